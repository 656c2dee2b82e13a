"""`esg evaluate METRIC --gt ... --pred ...`: scores saved predictions in the official file formats."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from esg_jax.evaluation import report, tasks


@dataclasses.dataclass(frozen=True)
class Metric:
    """One choice of METRIC."""

    help: str
    run: Callable[[argparse.Namespace], Any]  # -> accumulator
    columns: tuple[str, ...]  # of the markdown row
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    many: bool = False  # several prediction files, one per host


def _option(*names: str, **kwargs: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, kwargs


_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_FOLDERS = (
    _option("--gt-dir", help="folder of the ground-truth PNGs (default: named like the JSON, beside it)"),
    _option("--pred-dir", help="folder of the predicted PNGs (default: named like the JSON, beside it)"),
)

METRICS: dict[str, Metric] = {
    "entity-ap": Metric(
        "AP^e: class-agnostic mask AP, size buckets, AR@100, AR@100 at IoU 0.5 (COCO JSON)",
        lambda a: tasks.entity_ap(a.gt, a.pred, workers=a.workers),
        (*_AP, "AR100", "AR@100@IoU0.5"),
        many=True,
    ),
    "coco-ap": Metric(
        "COCO AP of masks, boxes or boundaries, class-aware (COCO JSON)",
        lambda a: tasks.coco_ap(
            a.gt, a.pred, kind=a.kind, class_agnostic=a.class_agnostic, box_areas=a.box_areas, workers=a.workers
        ),
        _AP,
        (
            _option("--kind", choices=("segm", "bbox", "boundary"), default="segm", help="overlap (default: segm)"),
            _option("--class-agnostic", action="store_true", help="treat all classes as one"),
            _option("--box-areas", action="store_true", help="size of a mask prediction = its box, as raw pycocotools"),
        ),
        many=True,
    ),
    "best-overlap": Metric(
        "mean best IoU and recall@0.5 of the annotated entities, whatever the scores (COCO JSON)",
        lambda a: tasks.best_overlap(a.gt, a.pred, workers=a.workers),
        ("mean_best_iou", "recall@IoU0.5"),
        many=True,
    ),
    "pq": Metric(
        "panoptic quality: PQ, SQ, RQ for all, things, stuff (COCO panoptic JSON + PNG)",
        lambda a: tasks.panoptic_quality(a.gt, a.pred, gt_dir=a.gt_dir, pred_dir=a.pred_dir, workers=a.workers),
        ("PQ", "SQ", "RQ", "PQ_Th", "PQ_St"),
        _FOLDERS,
    ),
    "miou": Metric(
        "mean IoU, both definitions (folders of label-map PNGs of equal names)",
        lambda a: tasks.semantic_iou(
            a.gt,
            a.pred,
            num_classes=a.num_classes,
            ignore_label=a.ignore_label,
            boundary=a.boundary,
            workers=a.workers,
        ),
        ("mIoU", "mIoU_with_predicted_only", "fwIoU", "mACC", "pACC"),
        (
            _option("--num-classes", type=int, required=True, help="labels are 0..N-1"),
            _option("--ignore-label", type=int, default=255, help="ground-truth value to leave out (default: 255)"),
            _option("--boundary", action="store_true", help="also boundary IoU per class"),
        ),
    ),
}


def add_parsers(subparsers: Any) -> None:
    """Adds `evaluate` and its metrics to the `esg` command; each sets `run(args) -> exit status`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score saved predictions with the papers' metrics",
        description=__doc__,
    )
    names = parser.add_subparsers(dest="metric", metavar="METRIC", required=True)
    for name, metric in METRICS.items():
        sub = names.add_parser(name, help=metric.help, description=metric.help)
        sub.add_argument("--gt", required=True, help="ground truth, file or folder in the official format")
        sub.add_argument(
            "--pred",
            required=True,
            nargs="+" if metric.many else None,
            help="predictions in the official format" + ("; one or more files" if metric.many else ""),
        )
        for flags, kwargs in metric.options:
            sub.add_argument(*flags, **kwargs)
        sub.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
        sub.add_argument("--json", help="write all numbers to this file")
        sub.add_argument("--curves", metavar="DIR", help="draw precision-recall, recall over IoU, per-class bars (PNG)")
        sub.add_argument("--markdown", metavar="LABEL", help="print a markdown row with this label, values x100")
        sub.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Scores, prints the table, writes what was asked for. Bad input raises `EvaluationError` (a ValueError)."""
    metric = METRICS[args.metric]
    accumulator = metric.run(args)
    result = accumulator.result()
    report.print_table(args.metric, result)
    if args.json:
        report.write_json(result, args.json)
    if args.markdown:
        print(report.markdown_row(args.markdown, result, metric.columns))
    if args.curves:
        for path in report.write_curves(accumulator, result, args.curves):
            print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Stand-alone entry, `python -m esg_jax.evaluation.commands evaluate ...`."""
    parser = argparse.ArgumentParser(prog="esg")
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return args.run(args)
