"""`esg evaluate METRIC`: scores saved predictions."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from esg_jax.cli import OK
from esg_jax.evaluation import report
from esg_jax.evaluation.formats import coco, label_maps, phrases, video
from esg_jax.evaluation.metrics import averages

DESCRIPTION = "`esg evaluate METRIC --gt ... --pred ...`: scores saved predictions in the official file formats."
EXAMPLES = "`esg evaluate METRIC --help` lists the options of a metric."


@dataclasses.dataclass(frozen=True)
class Metric:
    """One choice of METRIC."""

    help: str
    run: Callable[[argparse.Namespace], Any]  # -> accumulator
    columns: tuple[str, ...]  # of the markdown row
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    many: bool = False  # several prediction files, one per host
    pred: bool = True  # False: looks at the ground truth alone


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
        lambda a: coco.entity_ap(a.gt, a.pred, workers=a.workers),
        (*_AP, "AR100", "AR@100@IoU0.5"),
        many=True,
    ),
    "coco-ap": Metric(
        "COCO AP of masks, boxes or boundaries, class-aware (COCO JSON)",
        lambda a: coco.coco_ap(
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
        lambda a: coco.best_overlap(a.gt, a.pred, workers=a.workers),
        ("mean_best_iou", "recall@IoU0.5"),
        many=True,
    ),
    "pq": Metric(
        "panoptic quality: PQ, SQ, RQ for all, things, stuff (COCO panoptic JSON + PNG)",
        lambda a: label_maps.panoptic_quality(a.gt, a.pred, gt_dir=a.gt_dir, pred_dir=a.pred_dir, workers=a.workers),
        ("PQ", "SQ", "RQ", "PQ_Th", "PQ_St"),
        _FOLDERS,
    ),
    "miou": Metric(
        "mean IoU, both definitions (folders of label-map PNGs of equal names)",
        lambda a: label_maps.semantic_iou(
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
    "lvis-ap": Metric(
        "LVIS AP with rare / common / frequent classes (LVIS JSON)",
        lambda a: coco.lvis_ap(
            a.gt, a.pred, kind=a.kind, max_dets=a.max_dets, top_per_class=a.fixed, workers=a.workers
        ),
        ("AP", "APr", "APc", "APf"),
        (
            _option("--kind", choices=("segm", "bbox"), default="segm", help="overlap (default: segm)"),
            _option("--max-dets", type=int, default=300, help="predictions per image (default: 300)"),
            _option("--fixed", type=int, nargs="?", const=10000, help="AP fixed: best N per class instead (10000)"),
        ),
        many=True,
    ),
    "dis": Metric(
        "dichotomous segmentation: F, weighted F, MAE, S, E, HCE (folders of grey PNGs)",
        lambda a: label_maps.dichotomous(a.gt, a.pred, correction_effort=not a.no_hce, workers=a.workers),
        ("maxF", "wF", "MAE", "S", "E_mean", "HCE"),
        (_option("--no-hce", action="store_true", help="leave out HCE, the slow one"),),
    ),
    "png-ar": Metric(
        "panoptic narrative grounding: AR for all, things, stuff, singular, plural (JSON, see docs/evaluation.md)",
        lambda a: phrases.phrase_grounding(a.gt, a.pred, soft=a.soft, workers=a.workers),
        ("AR", "AR_Th", "AR_St", "AR_Sing", "AR_Pl"),
        (_option("--soft", action="store_true", help="the 2021 protocol: soft masks through 256x256"),),
    ),
    "res": Metric(
        "referring / reasoning segmentation: cIoU, gIoU, N-acc, T-acc (JSON, see docs/evaluation.md)",
        lambda a: phrases.referring_segmentation(a.gt, a.pred, workers=a.workers),
        ("cIoU", "gIoU", "N-acc", "T-acc"),
    ),
    "rec": Metric(
        "referring comprehension: P@0.5 and others of boxes or masks (COCO JSON, one annotation per image)",
        lambda a: coco.referring_comprehension(a.gt, a.pred, kind=a.kind, workers=a.workers),
        ("P@0.5", "mIoU", "oIoU"),
        (_option("--kind", choices=("bbox", "segm"), default="bbox", help="overlap (default: bbox)"),),
        many=True,
    ),
    "click": Metric(
        "1-click interactive segmentation: mean IoU over instances (JSON, see docs/evaluation.md)",
        lambda a: phrases.click_iou(a.gt, a.pred),
        ("mIoU_1click",),
    ),
    "ar-text": Metric(
        "recall of grounded nouns in text, strict and loose (JSON, see docs/evaluation.md)",
        lambda a: phrases.text_recall(a.gt, a.pred),
        ("AR_text_strict", "AR_text_loose"),
    ),
    "consistency": Metric(
        "annotation consistency: mAP of one annotator (--pred) against another (--gt), and class accuracy (COCO JSON)",
        lambda a: coco.consistency(a.gt, a.pred, workers=a.workers),
        ("mAP", "ACC"),
    ),
    "statistics": Metric(
        "statistics of annotations: resolution, entities per image, covered area, shape (COCO JSON)",
        lambda a: coco.statistics(a.gt, workers=a.workers),
        ("ImageRes", "EntityNum", "EntityNumMax", "Convexity", "Simplicity", "ValidArea"),
        pred=False,
    ),
    "jf": Metric(
        "video object segmentation: J, F, J&F; YouTube-VOS G (folders SEQUENCE/FRAME.png)",
        lambda a: video.video_object_segmentation(
            a.gt, a.pred, protocol=a.protocol, meta=a.meta, sequences=a.sequences, workers=a.workers
        ),
        ("JF", "J", "F"),
        (
            _option("--protocol", choices=("davis", "youtube_vos", "all_frames"), default="davis", help="see the docs"),
            _option("--meta", help="YouTube-VOS meta.json with first frames and seen classes"),
            _option("--sequences", help="text file or JSON list of the sequences to score"),
        ),
    ),
    "video-ap": Metric(
        "video instance segmentation AP (YouTube-VIS / OVIS JSON)",
        lambda a: video.video_instance_ap(a.gt, a.pred, workers=a.workers),
        ("AP", "AP50", "AP75", "AR1", "AR10"),
        many=True,
    ),
    "hota": Metric(
        "HOTA of mask tracks (BURST JSON)",
        lambda a: video.burst_hota(a.gt, a.pred, overlap=a.overlap, workers=a.workers),
        ("HOTA", "DetA", "AssA", "LocA"),
        (_option("--overlap", choices=("box", "mask"), default="box", help="box: as TrackEval really does (default)"),),
    ),
    "teta": Metric(
        "TETA of box tracks (TAO JSON)",
        lambda a: video.tao_teta(a.gt, a.pred, workers=a.workers),
        ("TETA", "LocA", "AssocA", "ClsA"),
        many=True,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The metrics, each with its files and options."""
    names = parser.add_subparsers(dest="metric", metavar="METRIC", required=True)
    _add_average(names)
    for name, metric in METRICS.items():
        sub = names.add_parser(name, help=metric.help, description=metric.help)
        sub.add_argument("--gt", required=True, help="ground truth, file or folder in the official format")
        if metric.pred:
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


def _add_average(names: Any) -> None:
    text = "mean of results over data sets, or mean +- deviation over seeds (JSON files written by --json)"
    sub = names.add_parser("average", help=text, description=text)
    sub.add_argument("results", nargs="+", help="DATASET.json; files in several folders are seeds, one folder each")
    sub.add_argument("--key", default="AP", help="which number to average (default: AP)")
    sub.add_argument("--set", choices=sorted(averages.SETS), help="insist on exactly these data sets")
    sub.add_argument("--json", help="write all numbers to this file")


def run(args: argparse.Namespace) -> int:
    """Scores, prints the table and writes what was asked for."""
    if args.metric == "average":
        expected = averages.SETS[args.set] if args.set else None
        result = phrases.average_of_results(args.results, args.key, expected)
        report.print_table(f"average of {args.key}", result)
        if args.json:
            report.write_json(result, args.json)
        return OK
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
    return OK
