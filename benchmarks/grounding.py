"""Phrase grounding with given masks: GELLA beside two rules that never look at the image.

    python -m benchmarks.grounding --captions ../shared/realdata/grounding_mini/captions_val.json \
        --images ../shared/realdata [--model gella.safetensors] [--json out.json]

Every phrase of every caption is grounded in the annotated masks of its image (forced mode). Reported are the average
recall of panoptic narrative grounding (the mean IoU of phrases), the share of phrases with an IoU of at least 0.5, and
the share whose set of masks is exactly right. The rules:

* largest: the image's largest mask, for every phrase;
* category: all masks of the category that the phrase names word for word (one for a singular phrase: the largest), else
  the largest mask. It is given the masks' category names, which GELLA never sees, and links that were made from words
  and categories, as those of grounding_mini, favour it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from esg_jax.evaluation.grounding import PhraseGrounding
from esg_jax.evaluation.text import words
from esg_jax.inference.commands import progress
from esg_jax.inference.ground_commands import open_grounder
from esg_jax.inference.masks_in import EntityMasks, disjoint_masks
from esg_jax.input.grounding_readers import GroundingSourceConfig, Narrative, open_narratives
from esg_jax.input.mask_files import MaskSet


class Score:
    """Average recall, and how often exactly the right masks were chosen."""

    def __init__(self):
        self.metric, self.exact, self.total = PhraseGrounding(), 0, 0

    def add(self, uid: int, narrative: Narrative, masks: EntityMasks, chosen: Sequence[Sequence[int]]) -> None:
        """`chosen`: rows of `masks` for every linked phrase."""
        rows = {mask_id: row for row, mask_id in enumerate(masks.ids)}
        phrases = []
        for phrase, entities in zip(linked(narrative), chosen, strict=True):
            wanted = {rows[entity] for entity in phrase.entities if entity in rows}
            right = wanted == set(entities) and len(wanted) == len(phrase.entities)
            self.exact, self.total = self.exact + right, self.total + 1
            target = np.isin(masks.label_map, [row + 1 for row in wanted]) if wanted else masks.union(())
            phrases.append({"pred": masks.union(entities), "gt": target, "plural": phrase.plural, "isthing": True})
        self.metric.add(uid, phrases)

    def result(self) -> dict[str, float]:
        found = self.metric.result()
        names = {"AR": "AR", "singular": "AR_Sing", "plural": "AR_Pl", "acc@0.5": "acc@0.5"}
        out = {name: float(found[key]) for name, key in names.items()}
        return {**out, "exact": self.exact / self.total, "phrases": self.total}


def linked(narrative: Narrative):
    return [phrase for phrase in narrative.phrases if phrase.entities]


def largest(masks: EntityMasks, among: Sequence[int] | None = None) -> list[int]:
    """The row of the largest mask."""
    among = range(len(masks)) if among is None else among
    return [max(among, key=lambda row: masks.areas[row])]


def by_category(phrase, masks: EntityMasks, names: Sequence[str]) -> list[int]:
    """Masks whose category the phrase names; `names`: of every row."""
    said = words(phrase.text)
    rows = [
        row for row, name in enumerate(names) if said and (set(words(name)) <= set(said) or said[-1] in words(name))
    ]
    if not rows:
        return largest(masks)
    return rows if phrase.plural else largest(masks, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--captions", required=True, help="linked captions (reader linked_captions)")
    add("--annotations", default="", help="COCO file of the masks (default: the caption file)")
    add("--images", default="")
    add("--model", type=Path, help="GELLA weights; without, only the rules are scored")
    add("--tokenizer")
    add("--conversation")
    add("--prompts", type=Path)
    add("--rule", action="append", default=[], metavar="NAME=VALUE", help="a field of GroundingConfig")
    add("--batch-size", type=int, default=8)
    add("--precision", default="float32")
    add("--limit", type=int, help="only the first captions")
    add("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    source = open_narratives(
        GroundingSourceConfig(captions=args.captions, annotations=args.annotations, images=args.images)
    )
    rows = np.flatnonzero(source.num_linked > 0)[: args.limit].tolist()
    args.max_new_tokens = 16  # nothing is generated
    grounder = open_grounder(args) if args.model else None
    most = grounder.max_entities if grounder else 1000
    scores = {name: Score() for name in ("largest", "category", *(["GELLA"] if grounder else []))}
    with progress(len(rows), "grounding") as advance:
        for start in range(0, len(rows), args.batch_size):
            batch = []
            for row in rows[start : start + args.batch_size]:
                narrative = source[row]
                entities = narrative.record.load_entities()
                # Rows of the annotations are the ids; of overlapping masks the smaller is on top, as in training.
                ids = tuple(range(len(entities.labels)))
                masks = disjoint_masks(MaskSet(entities.layers, ids), overlap="area", max_entities=most)
                names = [source.categories[entities.labels[entity]] for entity in masks.ids]
                phrases = linked(narrative)
                scores["largest"].add(row, narrative, masks, [largest(masks)] * len(phrases))
                chosen = [by_category(phrase, masks, names) for phrase in phrases]
                scores["category"].add(row, narrative, masks, chosen)
                batch.append((row, narrative, masks))
            if grounder:
                images = [narrative.record.load_image() for _, narrative, _ in batch]
                scenes = grounder.look(images, [masks for _, _, masks in batch])
                results = grounder.ground(
                    scenes,
                    [narrative.caption for _, narrative, _ in batch],
                    [[phrase.text for phrase in linked(narrative)] for _, narrative, _ in batch],
                    [[phrase.plural for phrase in linked(narrative)] for _, narrative, _ in batch],
                )
                for (row, narrative, masks), result in zip(batch, results, strict=True):
                    chosen = [phrase.entities for phrase in result.phrases]
                    scores["GELLA"].add(row, narrative, masks, chosen)
            for _ in batch:
                advance()
    table = {name: score.result() for name, score in scores.items()}
    print("| | AR | singular | plural | IoU >= 0.5 | exactly the right masks |\n|---|---|---|---|---|---|")
    for name, result in table.items():
        numbers = (result[key] for key in ("AR", "singular", "plural", "acc@0.5", "exact"))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in numbers) + " |")
    print(f"{table['largest']['phrases']} phrases of {len(rows)} captions", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
