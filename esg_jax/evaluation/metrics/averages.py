"""Averages over data sets and seeds: SGinW, ODinW, in-the-wild recall, few-shot tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from esg_jax.evaluation.metrics.errors import EvaluationError

# Members of the published averages; names as in the releases.
ODINW13 = tuple(
    (
        "AerialMaritimeDrone Aquarium CottontailRabbits EgoHands NorthAmericaMushrooms Packages PascalVOC pistols "
        "pothole Raccoon ShellfishOpenImages thermalDogsAndPeople VehiclesOpenImages"
    ).split()
)
SGINW = tuple(
    (
        "Airplane-Parts Bottles Brain-Tumor Chicken Cows Electric-Shaver Elephants Fruits Garbage Ginger-Garlic "
        "Hand-Metal Hand House-Parts HouseHold-Items Nutterfly-Squireel Phones Poles Puppies Rail Salmon-Fillet "
        "Strawberry Tablets Toolkits Trash Watermelon"
    ).split()
)
IN_THE_WILD = ("LVIS", "OCID", "CAMO", "FSS")  # ESG Table 8
SETS = {"odinw13": ODINW13, "sginw": SGINW, "in-the-wild": IN_THE_WILD}


def average(scores: Mapping[str, float], expected: Sequence[str] | None = None) -> float:
    """Unweighted mean over data sets.

    Args:
        scores: value per data set.
        expected: the names that must be there, no more and no less.

    Raises:
        EvaluationError: a data set is missing, unknown or NaN; no data set at all.
    """
    if not scores:
        raise EvaluationError("no data sets to average")
    if expected is not None and set(scores) != set(expected):
        missing, strange = sorted(set(expected) - set(scores)), sorted(set(scores) - set(expected))
        raise EvaluationError(f"the average is over {len(expected)} data sets; missing {missing}, unknown {strange}")
    bad = [name for name, value in scores.items() if not np.isfinite(value) or value == -1]
    if bad:
        raise EvaluationError(f"{bad[0]} has no score ({scores[bad[0]]}); an average over the others would not compare")
    return float(np.mean(list(scores.values())))


def few_shot(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds per data set, and of the per-seed averages (`Avg`).

    The papers do not say which deviation they print: `std` divides by n (numpy), `std_ddof1` by n - 1.

    Raises:
        EvaluationError: seeds with different data sets.
    """
    if not seeds:
        raise EvaluationError("no seeds given")
    names = list(seeds[0])
    rows = {name: [] for name in [*names, "Avg"]}
    for i, seed in enumerate(seeds):
        if set(seed) != set(names):
            raise EvaluationError(f"seed {i} covers {sorted(seed)}, seed 0 covers {sorted(names)}")
        for name in names:
            rows[name].append(seed[name])
        rows["Avg"].append(average(seed))
    return {
        name: {
            "mean": float(np.mean(values)),
            "std": float(np.std(values)),
            "std_ddof1": float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
        }
        for name, values in rows.items()
    }
