"""Speed of the evaluators on synthetic data, beside the procedures they replace.

    python benchmarks/evaluation_speed.py [boundary] [mask] [panoptic] [phrases]

boundary: 20 images of 1000x1500, 20 annotated and 100 predicted masks each, against the official procedure (OpenCV
    erosion of full-size masks, re-encoding, IoU of all pairs). mask: the same images against pycocotools.
panoptic: 5000 images of COCO size with 20 segments, PNG files included. phrases: 5000 narratives of 5 phrases.
Times are CPU seconds of one process, so that they mean the same on a busy machine. Needs `esg_jax[eval]`.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from esg_jax.evaluation.formats.label_maps import panoptic_quality
from esg_jax.evaluation.formats.phrases import phrase_grounding
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision
from esg_jax.masks import rle

SIZE = (1000, 1500)


def partition(rng, size, count):
    """Label map of `count` wavy regions: nearest of random sites, distorted by smooth noise."""
    coarse = tuple(s // 4 for s in size)
    sites = rng.random((count, 2)) * coarse
    warp = [ndimage.gaussian_filter(rng.normal(0, 1, coarse), 6) * 60 for _ in range(2)]
    y, x = np.mgrid[: coarse[0], : coarse[1]]
    points = np.stack([y + warp[0], x + warp[1]], -1)
    labels = np.argmin(((points[:, :, None] - sites) ** 2).sum(-1), -1)
    labels = np.kron(labels, np.ones((4, 4), int))
    return np.pad(labels, [(0, s - c) for s, c in zip(size, labels.shape, strict=True)], mode="edge")


def instances(num_images, seed=0):
    """COCO ground truth and results: predictions are shifted and shaved annotations, and other partitions."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []

    def code(mask):
        out = rle.encode(mask[None])[0]
        return rle.to_json(out)

    for i in range(num_images):
        images.append({"id": i + 1, "height": SIZE[0], "width": SIZE[1]})
        labels = partition(rng, SIZE, 20)
        for k in range(20):
            mask = labels == k
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0}
            annotations.append({**annotation, "area": int(mask.sum()), "segmentation": code(mask)})
        for j in range(5):
            shift = rng.integers(0, 12 * (j + 1), 2)
            moved = np.roll(labels, shift, (0, 1)) if j < 3 else partition(rng, SIZE, 20)
            for k in range(20):
                record = {"image_id": i + 1, "category_id": 1, "score": float(rng.random())}
                results.append({**record, "segmentation": code(moved == k)})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "entity"}]}, results


@contextlib.contextmanager
def clock(times, name):
    start = time.process_time()
    yield
    times[name] = time.process_time() - start


class OfficialBoundary(COCOeval):
    """The official procedure: boundaries by d erosions of padded full-size masks, then IoU of all pairs."""

    def computeIoU(self, imgId, catId):  # noqa: N802, N803 (the name is pycocotools')
        import cv2

        overlap = super().computeIoU(imgId, catId)
        if len(overlap) == 0:
            return overlap
        targets = [a["segmentation"] for a in self._gts[imgId, catId]]
        preds = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])
        steps = max(1, int(round(0.02 * np.hypot(*SIZE))))

        def boundary(segmentation):
            mask = coco_mask.decode(segmentation)
            padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1]
            return coco_mask.encode(np.asfortranarray(mask - eroded))

        edges = [[boundary(s) for s in group] for group in ([p["segmentation"] for p in preds[:100]], targets)]
        return np.minimum(overlap, coco_mask.iou(edges[0], edges[1], [0] * len(targets)))


def official(kind, gt, results):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = gt
        coco.createIndex()
        evaluator = (OfficialBoundary if kind == "boundary" else COCOeval)(coco, coco.loadRes(results), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[0]


def ours(kind, gt, results):
    metric = AveragePrecision(kind)
    grouped = {image["id"]: ([], []) for image in gt["images"]}
    for k, records in enumerate((results, gt["annotations"])):
        for record in records:
            grouped[record["image_id"]][k].append(record)
    for uid, (preds, targets) in grouped.items():
        metric.add(uid, preds, targets, SIZE)
    return metric.result()["AP"]


def compare(kind, num_images=20):
    gt, results = instances(num_images)
    times = {}
    with clock(times, "ours"):
        got = ours(kind, gt, results)
    with clock(times, "official"):
        expected = official(kind, gt, results)
    print(
        f"| {kind} AP, {num_images} images of 1000x1500 | {times['official']:.1f} | {times['ours']:.1f} | "
        f"{times['official'] / times['ours']:.1f} | {abs(got - expected):.1e} |",
        flush=True,
    )


def panoptic(num_images=5000, distinct=50):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sides = {"gt": [], "pred": []}
        for side in sides:
            (root / side).mkdir()
        segments = []
        for i in range(distinct):
            labels = partition(rng, (480, 640), 20) + 1
            segments.append([{"id": int(k), "category_id": 1 + int(k) % 5, "iscrowd": 0} for k in np.unique(labels)])
            for side, shift in (("gt", 0), ("pred", int(rng.integers(0, 20)))):
                ids = np.roll(labels, shift, 1)
                png = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], -1).astype(np.uint8)
                Image.fromarray(png).save(root / side / f"{i}.png")
        for side in sides:
            records = [
                {"image_id": i, "file_name": f"{i % distinct}.png", "segments_info": segments[i % distinct]}
                for i in range(num_images)
            ]
            content = {"annotations": records, "categories": [{"id": c, "isthing": c % 2} for c in range(1, 6)]}
            content["images"] = [{"id": i, "height": 480, "width": 640} for i in range(num_images)]
            (root / f"{side}.json").write_text(json.dumps(content))
        times = {}
        with clock(times, "ours"):
            panoptic_quality(root / "gt.json", root / "pred.json").result()
    print(f"| PQ, {num_images} images of 480x640 | | {times['ours']:.1f} | | |", flush=True)


def phrases(num_images=5000, distinct=50):
    rng = np.random.default_rng(0)
    scenes = []
    for _ in range(distinct):
        labels = partition(rng, (480, 640), 5)
        items = []
        for k in range(5):
            codes = rle.encode(np.stack([labels == k, np.roll(labels, 9, 1) == k]))
            gt, pred = map(rle.to_json, codes)
            items.append({"gt": gt, "pred": pred, "plural": k == 0, "isthing": k < 3})
        scenes.append(items)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "samples.json"
        path.write_text(json.dumps([{"image_id": i, "phrases": scenes[i % distinct]} for i in range(num_images)]))
        times = {}
        with clock(times, "ours"):
            phrase_grounding(path, path).result()
    print(f"| PNG AR, {num_images} narratives of 5 phrases | | {times['ours']:.1f} | | |", flush=True)


PARTS = {
    "boundary": lambda: compare("boundary"),
    "mask": lambda: compare("segm"),
    "panoptic": panoptic,
    "phrases": phrases,
}

if __name__ == "__main__":
    print("| job | official, s | ours, s | ratio | difference of AP |\n|---|---|---|---|---|", flush=True)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
