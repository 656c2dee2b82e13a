"""GELLA on captions linked to masks, with true masks as input, beside two baselines that know nothing of the image.

    python benchmarks/grounding_mini.py runs/gella/model.safetensors ../shared/realdata --split val

The numbers of GELLA are those of `eval.py --config=configs/recipes/grounding_mini.py`: phrases are given, AR is the
mean IoU of chosen and true masks over phrases, accuracy the share with IoU >= 0.5. Baselines: the largest mask of the
image; and the masks whose category name shares a word with the phrase (the largest of them for a singular phrase, all
for a plural one). The links of this data were themselves made by a list of words for every category, so the second
baseline is close to the rule that made the answers: a ceiling for word matching, not a rival.

AR gives every phrase an answer. The last two lines say what the model does by its thresholds: how many nouns of
captions of other images (none of whose words a caption of this image has) are answered with a mask, and how many of the
nouns that are there.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from configs.recipes import grounding_mini  # noqa: E402
from esg_jax.evaluation.report import format_value  # noqa: E402
from esg_jax.evaluation.tasks import NarrativeTask, task_from_dict  # noqa: E402
from esg_jax.evaluation.tasks.task import ModelRun  # noqa: E402
from esg_jax.evaluation.tasks.text_task import linked_phrases  # noqa: E402
from esg_jax.evaluation.workers import progress  # noqa: E402
from esg_jax.inference.bundle import open_bundle  # noqa: E402
from esg_jax.input.grounding import Strangers  # noqa: E402
from esg_jax.input.grounding_readers import open_narratives  # noqa: E402
from esg_jax.input.narratives import GroundingSourceConfig  # noqa: E402
from esg_jax.masks import rle  # noqa: E402

COLUMNS = {"AR": "AR", "acc@0.5": "accuracy", "AR_Sing": "AR singular", "AR_Pl": "AR plural"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="GELLA from configs/gella_quickstart.py")
    parser.add_argument("data", type=Path, help="folder with grounding_mini/")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--limit", type=int, default=0, help="only the first images, for a quick look")
    arguments = parser.parse_args()

    task = task_from_dict(grounding_mini.get_config(str(arguments.data)).to_dict())
    captions = task.captions.replace("_val", f"_{arguments.split}")
    task = dataclasses.replace(task, captions=captions, max_images=arguments.limit, plural_by="flag")
    truth = task.truth()
    images = truth.images
    with tempfile.TemporaryDirectory() as folder, progress("GELLA", len(images)) as advance:
        found = task.predict(truth, ModelRun(open_bundle(arguments.weights), Path(folder), advance))
        methods = {"GELLA": found, **baselines(task)}
        scores = {}
        for name, records in methods.items():
            file = Path(folder) / "predictions.json"
            file.write_text(json.dumps(records))
            scores[name] = task.score(truth, [file])["metrics"]
    print(f"{arguments.split}: {scores['GELLA']['num_phrases']} phrases, {len(found)} captions, {len(images)} images")
    print("| | " + " | ".join(COLUMNS.values()) + " |\n|---|" + "---|" * len(COLUMNS))
    for name, result in scores.items():
        print(f"| {name} | " + " | ".join(format_value(result[column]) for column in COLUMNS) + " |")
    for name, answers in answered(task, arguments.weights).items():
        print(f"{name} nouns answered with a mask: {sum(answers)} of {len(answers)}")


def answered(task: NarrativeTask, weights: Path, *, draws: int = 2) -> dict[str, list[bool]]:
    """Whether nouns that an image shows, and nouns that it does not, are answered with a mask.

    Of every image the linked nouns of its first caption, and `draws` captions of other images.
    """
    narratives = open_narratives(GroundingSourceConfig(captions=task.captions, images=task.images))
    strangers = Strangers(narratives, np.flatnonzero(narratives.num_linked > 0))
    grounder, entities = task.grounder(open_bundle(weights)), task.input_entities()
    rng = np.random.default_rng(0)
    out: dict[str, list[bool]] = {"absent": [], "present": []}
    for image in task.truth().content.images:
        narrative = image.texts[0][1]
        linked = [phrase.text for phrase in linked_phrases(narrative)]
        asked = [("present", narrative.caption, linked, [True] * len(linked))]
        for _ in range(draws):
            caption, phrases, absent = strangers(narrative, rng)
            asked.append(("absent", caption, [text for text, _ in phrases], absent))
        scene = entities.scenes(grounder, [image.record])[0]
        for name, caption, texts, counted in asked:
            if scene is None:  # nothing to ground in: "not found"
                out[name] += [False] * sum(counted)
            elif texts:
                (result,) = grounder.ground([scene], [caption], [texts])
                pairs = zip(result.phrases, counted, strict=True)
                out[name] += [phrase.found for phrase, counts in pairs if counts]
    return out


def baselines(task: NarrativeTask) -> dict[str, list[dict]]:
    """Records of the largest mask, and of the masks whose category the phrase names."""
    categories = {a["id"]: a["category"] for a in json.loads(Path(task.captions).read_text())["annotations"]}
    out: dict[str, list[dict]] = {"largest mask": [], "word in category name": []}
    for image in task.truth().content.images:
        entities = image.record.load_entities()
        areas = entities.areas
        masks = [entities.mask(row) for row in range(len(areas))]
        names = [{word.rstrip("s") for word in categories[i].split()} for i in entities.ids]
        for uid, narrative in image.texts:
            chosen: dict[str, list[dict]] = {name: [] for name in out}
            for phrase in linked_phrases(narrative):
                words = {word.rstrip("s") for word in phrase.text.lower().split()}
                named = [row for row, name in enumerate(names) if words & name]
                if named and not phrase.plural:
                    named = [max(named, key=lambda row: areas[row])]
                for name, rows in (("largest mask", [int(np.argmax(areas))]), ("word in category name", named)):
                    mask = np.any([masks[row] for row in rows], axis=0) if rows else np.zeros_like(masks[0])
                    code = rle.encode(mask[None])[0]
                    chosen[name].append({"pred": rle.to_json(code)})
            for name, phrases in chosen.items():
                out[name].append({"image_id": uid, "phrases": phrases})
    return out


if __name__ == "__main__":
    main()
