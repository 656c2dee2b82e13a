"""GELLA on captions linked to masks, with true masks as input, beside two baselines that know nothing of the image.

    python benchmarks/grounding_mini.py runs/gella/model.safetensors ../shared/realdata --split val

Phrases are given (forced mode). Reported over phrases: AR (the mean IoU of chosen and true masks) and accuracy (share
with IoU >= 0.5). Baselines: the largest mask of the image; and the masks whose category name shares a word with the
phrase (the largest of them for a singular phrase, all for a plural one). The links of this data were themselves made
by a list of words for every category, so the second baseline is close to the rule that made the answers: a ceiling for
word matching, not a rival.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import esg_jax  # noqa: E402
from esg_jax.inference.grounding import Grounder  # noqa: E402
from esg_jax.inference.masks_in import disjoint_masks  # noqa: E402
from esg_jax.input.grounding_readers import GroundingSourceConfig, open_narratives  # noqa: E402
from esg_jax.input.mask_files import MaskSet  # noqa: E402
from esg_jax.interop.gguf import packaged_smollm2  # noqa: E402
from esg_jax.text.prompts import Prompts  # noqa: E402
from esg_jax.text.tokenizers import open_tokenizer  # noqa: E402
from esg_jax.weights import read_info  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="GELLA from configs/gella_quickstart.py")
    parser.add_argument("data", type=Path, help="folder with grounding_mini/")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--limit", type=int, default=0, help="only the first captions, for a quick look")
    arguments = parser.parse_args()

    captions = arguments.data / "grounding_mini" / f"captions_{arguments.split}.json"
    narratives = open_narratives(GroundingSourceConfig(captions=str(captions), images=str(arguments.data)))
    categories = {a["id"]: a["category"] for a in json.loads(captions.read_text())["annotations"]}
    grounder = open_grounder(arguments.weights)
    results: dict[str, list[tuple[float, bool]]] = {}
    rows = np.flatnonzero(narratives.num_linked > 0)
    for row in rows[: arguments.limit or None]:
        for method, found in ground(grounder, narratives[int(row)], categories).items():
            results.setdefault(method, []).extend(found)
    print(f"{arguments.split}: {len(results['GELLA'])} phrases, {len(rows[: arguments.limit or None])} captions")
    print("| | AR | accuracy | AR singular | AR plural |\n|---|---|---|---|---|")
    for method, found in results.items():
        overlap, plural = (np.array(column) for column in zip(*found, strict=True))
        parts = [overlap.mean(), (overlap >= 0.5).mean(), overlap[~plural].mean(), overlap[plural].mean()]
        print(f"| {method} | " + " | ".join(f"{100 * value:.1f}" for value in parts) + " |")


def open_grounder(path: Path) -> Grounder:
    known = read_info(path)[1].get("grounding", {})
    model = esg_jax.load(path)
    return Grounder(
        model, open_tokenizer(packaged_smollm2()), Prompts.load(None, known.get("conversation", "vicuna")), batch_size=1
    )


def ground(grounder: Grounder, narrative, categories) -> dict[str, list[tuple[float, bool]]]:
    """Per method, IoU and plurality of every linked phrase of a caption."""
    entities = narrative.record.load_entities()
    linked = [phrase for phrase in narrative.phrases if phrase.entities]
    masks = disjoint_masks(
        MaskSet(entities.layers, tuple(range(len(entities.ids))), None), max_entities=grounder.max_entities
    )
    (scene,) = grounder.look([narrative.record.load_image()], [masks])
    (result,) = grounder.ground(
        [scene],
        [narrative.caption],
        [[phrase.text for phrase in linked]],
        [[phrase.plural for phrase in linked]],
    )
    areas = entities.areas()
    out: dict[str, list[tuple[float, bool]]] = {"GELLA": [], "largest mask": [], "word in category name": []}
    for phrase, answer in zip(linked, result.phrases, strict=True):
        truth = np.any([entities.mask(entity) for entity in phrase.entities], axis=0)
        words = {word.rstrip("s") for word in phrase.text.lower().split()}
        named = [k for k, i in enumerate(entities.ids) if words & {w.rstrip("s") for w in categories[i].split()}]
        if named and not phrase.plural:
            named = [max(named, key=lambda k: areas[k])]
        chosen = {
            "GELLA": [masks.ids[row] for row in answer.entities],
            "largest mask": [int(np.argmax(areas))],
            "word in category name": named,
        }
        for method, rows in chosen.items():
            found = np.any([entities.mask(row) for row in rows], axis=0) if rows else np.zeros_like(truth)
            overlap = np.sum(found & truth) / max(np.sum(found | truth), 1)
            out[method].append((float(overlap), bool(phrase.plural)))
    return out


if __name__ == "__main__":
    main()
