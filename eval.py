"""Evaluates a model, or scores again the predictions that an earlier run saved.

    python eval.py --config=configs/recipes/entity_mini.py --workdir=runs/entity_mini --views=5
    python eval.py --config=configs/recipes/coco_panoptic.py --checkpoint=model.safetensors --out=runs/coco
    python eval.py --config=configs/recipes/grounding_mini.py --workdir=runs/gella
    python eval.py --config=configs/recipes/entity_mini.py --predictions=runs/x/eval/predictions.json --out=runs/again

First every image is predicted and written to files in the official formats, then the files are scored: the numbers of
several hosts are those of one. Writes results.json, a table, and grid.png with predictions beside the ground truth.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from esg_jax.config import from_dict, to_dict
from esg_jax.evaluation import formats, grounding_predictions, report, rle
from esg_jax.evaluation import run as evaluation
from esg_jax.evaluation.config import EvalConfig
from esg_jax.evaluation.driver import progress
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.inference.bundle import Bundle, open_bundle
from esg_jax.inference.entities.predictor import Predictor
from esg_jax.inference.grounding.reconstruction import Reconstructor
from esg_jax.input.image_io import load_image
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.models.gella import Gella
from esg_jax.sharding import make_mesh, parse_mesh
from esg_jax.viz import GridRow, prediction_grid

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Only when this is the program: train.py imports `predict` and `score`, and has flags of its own."""
    config_flags.DEFINE_config_file("config", None, "File with get_config(), see configs/recipes.")
    flags.DEFINE_string("checkpoint", None, "Weights (.safetensors).")
    flags.DEFINE_string("workdir", None, "Folder of a training run: its model.safetensors is evaluated.")
    flags.DEFINE_list("predictions", None, "Saved predictions to score again, without a model.")
    flags.DEFINE_string("out", None, "Folder for predictions and results (default: WORKDIR/eval).")
    flags.DEFINE_enum("views", None, ["1", "5"], "Whole image (1), or also its four corner crops (5).")
    flags.DEFINE_integer("workers", 1, "Processes that score.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of the network.")
    flags.DEFINE_string("mesh", None, "DATA,FSDP,MODEL devices: images over the first two, weights over the last.")
    flags.DEFINE_bool("multihost", False, "Connect to the other hosts first; --out must be a shared folder.")
    flags.mark_flag_as_required("config")


def main(_):
    try:
        run(from_dict(EvalConfig, FLAGS.config.to_dict()))
    except (ValueError, FileNotFoundError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


def run(config: EvalConfig) -> None:
    """What the flags say: predicts unless predictions are given, scores, prints."""
    if FLAGS.out is None and FLAGS.workdir is None:
        raise EvaluationError("say where to write: --out FOLDER")
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "eval")
    if FLAGS.predictions:
        files = [Path(name) for name in FLAGS.predictions]
    else:
        if FLAGS.multihost:
            jax.distributed.initialize()
        if FLAGS.views:
            config = dataclasses.replace(config, views=int(FLAGS.views))
        mesh = parse_mesh(FLAGS.mesh) if FLAGS.mesh else make_mesh(-1, 1, 1) if FLAGS.multihost else None
        files = predict(config, open_bundle(checkpoint(), dtype=FLAGS.dtype, mesh=mesh), out)
        if jax.process_index():
            return
    scores = score(config, files, out, workers=FLAGS.workers)
    print_scores(config, scores)
    if config.grid_images:
        print(f"predictions beside the ground truth: {out / 'grid.png'}")
    print(f"all numbers: {out / 'results.json'}")


def checkpoint() -> Path:
    """The weights to evaluate."""
    if FLAGS.checkpoint:
        return Path(FLAGS.checkpoint)
    if FLAGS.workdir is None:
        raise EvaluationError("give --checkpoint FILE, --workdir FOLDER, or --predictions FILES to score again")
    path = Path(FLAGS.workdir) / "model.safetensors"
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist yet; train.py writes it when it stops")
    return path


def predict(config: EvalConfig, bundle: Bundle, out: Path) -> list[Path]:
    """Predictions as files, one per process; all processes must call it, and share the work.

    Args:
        config: the evaluation.
        bundle: weights of a file, or of a training state where they are.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = evaluation.images_of(config)
    files = [out / f"predictions{f'.{i}' if i else ''}.json" for i in range(jax.process_count())]
    if config.task == "reconstruction":
        label, records = "reconstruction", partial(write_reconstructions, config, bundle)
    elif grounding_predictions.needs_grounder(config, bundle):
        label = f"grounding, {config.task}"
        records = partial(grounding_predictions.predict, config, bundle, images, out)
    else:
        label, records = segmentation(config, bundle, images, out)
    with progress(label, len(images)) as advance:
        files[jax.process_index()].write_text(json.dumps(records(advance)))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("predictions written")
    return files


def is_own(index: int) -> bool:
    """Whether this process writes what is predicted of image `index`."""
    return index % jax.process_count() == jax.process_index()


def score(config: EvalConfig, files: Sequence[Path], out: Path, *, workers: int = 1) -> dict[str, Any]:
    """Scores of saved predictions, written to results.json; grid.png shows some beside the ground truth."""
    out.mkdir(parents=True, exist_ok=True)
    scores = evaluation.score(config, files, workers=workers)
    about = {"config": to_dict(config), "predictions": [str(file) for file in files]}
    report.write_json({**about, **scores}, out / "results.json")
    if config.grid_images:
        drawings = evaluation.drawings(config, files)
        rows = (GridRow(load_image(path), predicted, target, title) for title, path, predicted, target in drawings)
        Image.fromarray(prediction_grid(rows)).save(out / "grid.png")
    return scores


def segmentation(config: EvalConfig, bundle: Bundle, images, out: Path):
    """What the progress bar says, and the function that predicts all images."""
    predictor = Predictor.from_bundle(
        bundle,
        views=(config.views or None) if config.task == "entity" else 1,
        min_size=config.min_size or None,
        max_size=config.max_size or None,
        score_mode=config.score_mode,
    )
    write = {"entity": write_entities, "instance": write_instances, "panoptic": write_panoptic, "semantic": write_maps}
    label = f"{config.task}, {predictor.views} view{'s' if predictor.views > 1 else ''}"
    return label, partial(write[config.task], config, predictor, images, out)


def write_reconstructions(config: EvalConfig, bundle: Bundle, advance) -> list[dict]:
    """COCO results: every query's mask."""
    try:
        reconstruct = Reconstructor(bundle.load_as(Gella))
    except ValueError as error:
        raise EvaluationError(f"{error}; task 'reconstruction' is GELLA's") from error
    source = open_source(SourceConfig(annotations=config.annotations, images=config.images))
    rows = [source[row] for row in range(len(source))[: config.max_images or None]]
    records = []
    found = reconstruct.many((record.load_image(), record.load_entities()) for record in rows)
    for index, (record, (masks, scores)) in enumerate(zip(rows, found, strict=True)):
        if is_own(index):
            shown = np.flatnonzero(masks.any((1, 2)))
            records += _results(record.image_id, rle.encode(masks[shown]), scores[shown], [1] * len(shown))
        advance(1)
    return records


def predictions(config, predictor, images, advance, **options):
    """(position, prediction) of the images that this process writes."""
    paths = [path for _, path in images]
    for index, prediction in predictor.predict_many(paths, batch_size=config.batch_size, **options):
        if isinstance(prediction, Exception):
            raise prediction  # a score over fewer images would not compare
        if is_own(index):
            yield index, prediction
        advance(1)


def write_entities(config, predictor, images, out, advance) -> list[dict]:
    """COCO results, every query of every image: the metric wants the empty and unlikely ones too."""
    by_image = {
        index: _results(images[index][0], found.rles(), found.scores, [1] * len(found))
        for index, found in predictions(config, predictor, images, advance)
    }
    return [record for index in sorted(by_image) for record in by_image[index]]


def write_instances(config, predictor, images, out, advance) -> list[dict]:
    """COCO results with categories."""
    ids = sorted(formats.CocoAnnotations.load(config.annotations).category_ids())
    by_image = {
        index: _results(images[index][0], found.rles, found.scores, [ids[label] for label in found.labels])
        for index, found in predictions(config, predictor, images, advance, output="instances")
    }
    return [record for index in sorted(by_image) for record in by_image[index]]


def _results(uid, rles, scores, categories) -> list[dict]:
    return [
        {
            "image_id": uid,
            "category_id": int(category),
            "score": float(score),
            "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode()},
        }
        for code, score, category in zip(rles, scores, categories, strict=True)
    ]


def write_panoptic(config, predictor, images, out, advance) -> dict:
    """COCO panoptic JSON; PNGs in the folder `predictions` beside it."""
    categories = sorted(formats.CocoAnnotations.load(config.annotations).categories, key=lambda c: c["id"])
    is_thing = [bool(c.get("isthing", 1)) for c in categories]
    (out / "predictions").mkdir(exist_ok=True)
    annotations = {}
    options = dict(output="panoptic", is_thing=tuple(is_thing))
    for index, found in predictions(config, predictor, images, advance, **options):
        uid, path = images[index]
        ids = np.asarray(found.segment_map)
        file = f"{path.stem}.png"
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(
            out / "predictions" / file
        )
        segments = [{"id": s.id, "category_id": categories[s.category]["id"]} for s in found.segments]
        annotations[index] = {"image_id": uid, "file_name": file, "segments_info": segments}
    return {"annotations": [annotations[index] for index in sorted(annotations)]}


def write_maps(config, predictor, images, out, advance) -> list[str]:
    """Label-map PNGs in the folder `predictions`, named like the ground truth."""
    names = []
    for index, labels in predictions(config, predictor, images, advance, output="semantic"):
        file = out / "predictions" / images[index][0]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(file)
        names.append(images[index][0])
    return sorted(names)


def print_scores(config: EvalConfig, scores: dict) -> None:
    """One row for the set and one for every group; fractions as percentages."""
    columns = evaluation.columns(config)
    truth = Path(config.captions or config.annotations)
    table = Table(title=f"{config.task}, {truth.name}")
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    rows = {"all": scores["metrics"], **scores.get("groups", {})}
    for name, result in rows.items():
        table.add_row(name, *(report.format_value(result[column]) for column in columns))
    Console(width=max(100, 12 * len(columns))).print(table)
    print(report.markdown_row(truth.stem, scores["metrics"], columns))


if __name__ == "__main__":
    define_flags()
    app.run(main)
