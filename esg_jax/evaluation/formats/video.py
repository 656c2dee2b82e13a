"""Files of tracks (DAVIS, YouTube-VOS, YouTube-VIS, BURST, TAO), and the metrics that score them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.evaluation.formats.coco import CocoAnnotations, load_results
from esg_jax.evaluation.formats.files import field, load_json, read_image
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.video.hota import BurstHOTA, Frame
from esg_jax.evaluation.metrics.video.teta import BoxFrame, TaoTETA
from esg_jax.evaluation.metrics.video.video_instance import VideoInstanceAP
from esg_jax.evaluation.metrics.video.video_object import VideoObjectSegmentation
from esg_jax.evaluation.workers import accumulate
from esg_jax.masks import rle


def video_object_segmentation(
    gt: str | Path,
    pred: str | Path,
    *,
    protocol: str = "davis",
    meta: str | Path | None = None,
    sequences: str | Path | None = None,
    workers: int = 1,
) -> VideoObjectSegmentation:
    """J&F of folders ``<sequence>/<frame>.png`` (palette or greyscale, pixel = object id).

    Args:
        gt, pred: the two roots (DAVIS `Annotations/480p`).
        protocol: see `VideoObjectSegmentation`.
        meta: YouTube-VOS `meta.json`: objects of every video with `first_frame` (index) and `seen`.
        sequences: JSON list or text file of the names to score; default: all folders of `gt`.
    """
    gt, pred = Path(gt), Path(pred)
    if not gt.is_dir():
        raise EvaluationError(f"no such folder: {gt}")
    names = _names(sequences) if sequences else sorted(p.name for p in gt.iterdir() if p.is_dir())
    if not names:
        raise EvaluationError(f"{gt} holds no sequence folders")
    videos = field(load_json(meta), "videos", str(meta)) if meta else None
    if protocol == "youtube_vos" and videos is None:
        raise EvaluationError(
            "the youtube_vos protocol needs --meta, which says when objects appear and which are seen"
        )
    items = []
    for name in names:
        objects = None
        if videos is not None:
            objects = {int(k): v for k, v in field(videos, name, str(meta))["objects"].items()}
        items.append((name, _frame_files(gt / name, pred / name), objects))
    metric = VideoObjectSegmentation(protocol)
    return accumulate(metric, items, _add_masks, workers=workers, description="J&F")


def _names(path: str | Path) -> list[str]:
    if Path(path).suffix == ".json":
        return list(load_json(path))
    if not Path(path).is_file():
        raise EvaluationError(f"no such file: {path}")
    return Path(path).read_text().split()


def _frame_files(gt: Path, pred: Path) -> list[tuple[Path, Path]]:
    targets = sorted(gt.glob("*.png"))
    if not targets:
        raise EvaluationError(f"{gt} holds no PNG frames")
    if not pred.is_dir():
        raise EvaluationError(f"sequence {gt.name} has no predictions: no folder {pred}")
    missing = [t.name for t in targets[1:-1] if not (pred / t.name).is_file()]
    if missing:
        raise EvaluationError(f"sequence {gt.name}: {len(missing)} frames without prediction, first {missing[0]}")
    return [(pred / t.name, t) for t in targets]


def _add_masks(metric: VideoObjectSegmentation, item: tuple) -> None:
    name, files, objects = item

    def frames() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i, (pred, target) in enumerate(files):
            labels = read_image(target)
            # Benchmarks do not ask for the frames that carry the given masks.
            ends = metric.protocol != "all_frames" and i in (0, len(files) - 1) and not pred.is_file()
            yield (np.zeros_like(labels) if ends else read_image(pred)), labels

    metric.add(name, frames(), objects)


def video_instance_ap(gt: str | Path, pred: str | Path | Sequence[str | Path], *, workers: int = 1) -> VideoInstanceAP:
    """AP of YouTube-VIS / OVIS files."""
    annotations = CocoAnnotations.load(gt, units="videos", key="video_id")
    results = load_results(pred, annotations.units, key="video_id")
    items = [
        (
            uid,
            results[uid],
            annotations.annotations[uid],
            annotations.size(uid),
            int(field(video, "length", f"{gt}, video {uid}")) if "length" in video else len(video["file_names"]),
        )
        for uid, video in annotations.units.items()
    ]
    metric = VideoInstanceAP(annotations.category_ids())
    return accumulate(metric, items, _add_tracks, workers=workers, description="video AP")


def _add_tracks(metric: VideoInstanceAP, item: tuple) -> None:
    metric.add(*item)


def burst_hota(gt: str | Path, pred: str | Path, *, overlap: str = "box", workers: int = 1) -> BurstHOTA:
    """HOTA of BURST files (`all_classes.json` against a results file of the same layout)."""
    targets = _burst_sequences(gt)
    preds = _burst_sequences(pred)
    unknown = sorted(set(preds) - set(targets))
    if unknown:
        raise EvaluationError(f"{pred}: sequence {unknown[0]} ({len(unknown)} in all) is not in {gt}; another split?")
    items = [(name, sequence, preds.get(name)) for name, sequence in targets.items()]
    return accumulate(BurstHOTA(overlap), items, _add_burst, workers=workers, description="HOTA")


def _burst_sequences(path: str | Path) -> dict[str, dict[str, Any]]:
    data = load_json(path)
    out = {}
    for sequence in field(data, "sequences", str(path)):
        name = f"{sequence.get('dataset')}/{field(sequence, 'seq_name', str(path))}"
        if name in out:
            raise EvaluationError(f"{path}: sequence {name} is listed twice")
        if len(sequence["segmentations"]) != len(sequence["annotated_image_paths"]):
            raise EvaluationError(f"{path}, {name}: segmentations and annotated_image_paths differ in length")
        out[name] = sequence
    return out


def _add_burst(metric: BurstHOTA, item: tuple) -> None:
    name, target, pred = item
    size = (int(target["height"]), int(target["width"]))
    # Predictions may have a higher frame rate; only annotated frames count.
    predicted = dict(zip(pred["annotated_image_paths"], pred["segmentations"], strict=True)) if pred else {}
    frames = [
        _burst_frame(predicted.get(path, {}), pred, size, f"{name}, {path}, prediction")
        for path in target["annotated_image_paths"]
    ]
    annotated = [
        _burst_frame(segments, target, size, f"{name}, {path}")
        for path, segments in zip(target["annotated_image_paths"], target["segmentations"], strict=True)
    ]
    metric.add(
        name,
        frames,
        annotated,
        negative=target["neg_category_ids"],
        not_exhaustive=target["not_exhaustive_category_ids"],
    )


def _burst_frame(segments: Mapping[str, Any], sequence: Mapping[str, Any] | None, size: tuple, where: str) -> Frame:
    tracks = list(segments)
    labels = [segments[k].get("category_id", (sequence or {}).get("track_category_ids", {}).get(k)) for k in tracks]
    if None in labels:
        raise EvaluationError(f"{where}: track {tracks[labels.index(None)]} has no category")
    scores = np.array([segments[k].get("score", 1.0) for k in tracks], np.float64)
    if not np.isfinite(scores).all():
        raise EvaluationError(
            f"{where}: the score of track {tracks[int(np.argmin(np.isfinite(scores)))]} is not finite"
        )
    return Frame(
        tracks=np.array([int(k) for k in tracks], np.int64),
        labels=np.array(labels, np.int64),
        rles=[
            rle.from_annotation({"size": list(size), "counts": segments[k]["rle"]}, size, f"{where}, track {k}")
            for k in tracks
        ],
        scores=scores,
    )


def tao_teta(gt: str | Path, pred: str | Path | Sequence[str | Path], *, workers: int = 1) -> TaoTETA:
    """TETA of TAO files; at most 300 predictions per image, frames without ground truth do not count."""
    annotations = CocoAnnotations.load(gt)
    results = load_results(pred, annotations.units)
    merged = {m["id"]: c["id"] for c in annotations.categories for m in c.get("merged", ())}
    videos: dict[Any, list[Any]] = {}
    for uid, image in annotations.units.items():
        video = videos.setdefault(field(image, "video_id", f"{gt}, image {uid}"), [])
        if annotations.annotations[uid]:
            video.append((field(image, "frame_index", f"{gt}, image {uid}"), uid))
    items = []
    for video, frames in videos.items():
        uids = [uid for _, uid in sorted(frames)]
        pairs = []
        for uid in uids:
            best = sorted(results[uid], key=lambda r: -r["score"])[:300] if len(results[uid]) > 300 else results[uid]
            where = f"image {uid}"
            pairs.append((_box_frame(best, merged, where), _box_frame(annotations.annotations[uid], merged, where)))
        items.append((video, [p for p, _ in pairs], [t for _, t in pairs]))
    return accumulate(TaoTETA(), items, _add_tracks, workers=workers, description="TETA")


def _box_frame(records: Sequence[Mapping[str, Any]], merged: Mapping[int, int], where: str) -> BoxFrame:
    return BoxFrame(
        tracks=np.array([field(r, "track_id", where) for r in records], np.int64),
        labels=np.array([merged.get(r["category_id"], r["category_id"]) for r in records], np.int64),
        boxes=np.array([field(r, "bbox", where) for r in records], np.float64).reshape(-1, 4),
    )
