"""Files of masks that text names, and the metrics that score them; averages of result files.

Phrase grounding, referring / reasoning segmentation and clicks have no official file format. Here a file is a JSON list
of ``{"image_id", "phrases" | "items": [{"gt": RLE, "pred": RLE, ...}]}``; ground truth and predictions may be one file
with both fields or two files whose lists have equal lengths.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esg_jax.evaluation.formats.coco import add_instances
from esg_jax.evaluation.formats.files import field, load_json
from esg_jax.evaluation.metrics.averages import average, few_shot
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.grounding.click import ClickIoU
from esg_jax.evaluation.metrics.grounding.phrase_grounding import PhraseGrounding
from esg_jax.evaluation.metrics.grounding.referring_segmentation import ReferringSegmentation
from esg_jax.evaluation.metrics.grounding.text_recall import TextRecall
from esg_jax.evaluation.workers import accumulate


def phrase_grounding(gt: str | Path, pred: str | Path, *, soft: bool = False, workers: int = 1) -> PhraseGrounding:
    """PNG average recall."""
    items = _paired_lists(gt, pred, "phrases")
    return accumulate(PhraseGrounding(soft=soft), items, add_instances, workers=workers, description="PNG AR")


def referring_segmentation(gt: str | Path, pred: str | Path, *, workers: int = 1) -> ReferringSegmentation:
    """cIoU and gIoU (RefCOCO family, ReasonSeg)."""
    items = _paired_lists(gt, pred, "items")
    return accumulate(ReferringSegmentation(), items, add_instances, workers=workers, description="cIoU / gIoU")


def _paired_lists(gt: str | Path, pred: str | Path, name: str) -> list[tuple[Any, list[dict[str, Any]]]]:
    return pair(records_by_image(gt, name), records_by_image(pred, name), name, str(gt), str(pred))


def pair(
    targets: dict[Any, list[dict[str, Any]]],
    preds: dict[Any, list[dict[str, Any]]],
    name: str,
    gt: str,
    pred: str,
) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Annotated records of every image with the `pred` of those at the same place of its predictions.

    Args:
        targets, preds: from `records_by_image`.
        name: what the lists hold, "phrases" or "items".
        gt, pred: where they come from, for messages.
    """
    if set(targets) != set(preds):
        strange = sorted(set(targets) ^ set(preds), key=str)
        raise EvaluationError(f"image_id {strange[0]} is in only one of {gt} and {pred} ({len(strange)} such ids)")
    out = []
    for uid, wanted in targets.items():
        if len(wanted) != len(preds[uid]):
            raise EvaluationError(f"image_id {uid}: {len(wanted)} {name} in {gt}, {len(preds[uid])} in {pred}")
        where = f"{pred}, image_id {uid}, {name}"
        out.append((uid, [{**t, "pred": field(p, "pred", where)} for t, p in zip(wanted, preds[uid], strict=True)]))
    return out


def records_by_image(paths: str | Path | Sequence[str | Path], name: str) -> dict[Any, list[dict[str, Any]]]:
    """The field `name` of every record by its `image_id`, of one file or several (one per host)."""
    out: dict[Any, list[dict[str, Any]]] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        records = load_json(path)
        if not isinstance(records, list):
            raise EvaluationError(f"{path}: expected a JSON list with one record per image")
        for i, record in enumerate(records):
            uid = field(record, "image_id", f"{path}, record {i}")
            if uid in out:
                raise EvaluationError(f"{path}: image_id {uid} occurs twice")
            out[uid] = field(record, name, f"{path}, image_id {uid}")
    if not out:
        raise EvaluationError(f"{paths}: expected a JSON list with one record per image")
    return out


def click_iou(gt: str | Path, pred: str | Path) -> ClickIoU:
    """1-click mIoU: JSON lists of ``{"gt": RLE}`` and ``{"pred": RLE}`` in the same order (or one list with both)."""
    targets, preds = load_json(gt), load_json(pred)
    if not isinstance(targets, list) or not isinstance(preds, list) or len(targets) != len(preds) or not targets:
        raise EvaluationError(f"{gt} and {pred} must be JSON lists with one record per instance, of equal length")
    metric = ClickIoU()
    for i, (t, p) in enumerate(zip(targets, preds, strict=True)):
        metric.add(i, field(p, "pred", f"{pred}, record {i}"), field(t, "gt", f"{gt}, record {i}"))
    return metric


def text_recall(gt: str | Path, pred: str | Path) -> TextRecall:
    """AR_text: JSON dictionaries ``{caption id: [noun phrase, ...]}`` of annotated and of predicted phrases."""
    targets, preds = load_json(gt), load_json(pred)
    if not isinstance(targets, dict) or not isinstance(preds, dict):
        raise EvaluationError(f"{gt} and {pred} must be JSON dictionaries from caption id to noun phrases")
    if set(targets) != set(preds):
        strange = sorted(set(targets) ^ set(preds))
        raise EvaluationError(f"caption {strange[0]} is in only one of {gt} and {pred} ({len(strange)} such captions)")
    metric = TextRecall()
    for uid in targets:
        metric.add(uid, preds[uid], targets[uid])
    return metric


def average_of_results(paths: Sequence[str | Path], key: str, expected: Sequence[str] | None = None) -> dict[str, Any]:
    """Mean over data sets of result files written by `--json`; the file's stem names the data set.

    Files in several folders are taken as seeds, one folder each: mean +- standard deviation over seeds.
    """
    seeds: dict[Path, dict[str, float]] = {}
    for path in map(Path, paths):
        result = load_json(path)
        value = field(result, key, str(path))
        seed = seeds.setdefault(path.parent, {})
        if path.stem in seed:
            raise EvaluationError(f"{path} is given twice")
        seed[path.stem] = float("nan") if value is None else float(value)
    if len(seeds) == 1:
        (scores,) = seeds.values()
        return {"average": average(scores, expected), **scores}
    table = few_shot(list(seeds.values()))
    return {f"{name}_{part}": value for name, row in table.items() for part, value in row.items()}
