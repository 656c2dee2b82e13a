"""What grounding returns: plain numpy at the resolution of the original image."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from esg_jax.inference.grounding.decisions import ClassSegment
from esg_jax.masks import MaskSet, rle


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image and its entities as the model sees them; text is grounded in it.

    Attributes:
        masks: the entities, disjoint.
        vision: Zv, the image encoder's grid.
        embed: E_vc of every query, for every colouring.
        query: the query of every entity, -1 where the model did not find it again, for every colouring.
        entityness: probability of being an entity, averaged over the colourings; 0 without a query.
        probabilities: the model's own masks at a quarter of the label map's side, for "reconstructed" output.
        content: (height, width) of the picture within those, in fractions.
        start: (top, left) of the picture within those, in fractions.
    """

    masks: MaskSet
    vision: Float[np.ndarray, "g g c"]
    embed: Float[np.ndarray, "k q c"]
    query: Int[np.ndarray, "k n"]
    entityness: Float[np.ndarray, "n"]
    probabilities: Float[np.ndarray, "n h w"] | None = None
    content: tuple[float, float] = (1.0, 1.0)
    start: tuple[float, float] = (0.0, 0.0)

    @property
    def groundable(self) -> Bool[np.ndarray, "n"]:
        """Entities that text can be grounded in."""
        return (self.query >= 0).any(axis=0)

    def mask(self, entities: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
        """One mask of several entities, at the original resolution."""
        if self.probabilities is None:
            return self.masks.union(entities)
        height, width = self.masks.size
        out = np.zeros((height, width), bool)
        for entity in entities:
            values = Image.fromarray(self.probabilities[entity])
            (top, left), (tall, wide) = self.start, self.content
            box = (values.width * left, values.height * top, values.width * (left + wide), values.height * (top + tall))
            out |= np.asarray(values.resize((width, height), Image.Resampling.BILINEAR, box=box)) > 0.5
        return out

    def rle(self, entities: tuple[int, ...]) -> dict[str, Any]:
        """`mask` in COCO's compressed run-length encoding, with text counts."""
        return rle.to_json(rle.encode(self.mask(entities)[None])[0])


@dataclasses.dataclass(frozen=True)
class GroundedPhrase:
    """A phrase and the entities it means.

    Attributes:
        text: the phrase.
        span: its characters in the text it belongs to; None when it does not occur there literally.
        entities: rows of the scene's masks, best first; empty when it was not found.
        scores: of these entities.
        best_score: the largest score of any entity, also when it was too small.
    """

    text: str
    span: tuple[int, int] | None
    entities: tuple[int, ...]
    scores: tuple[float, ...]
    best_score: float

    @property
    def found(self) -> bool:
        """Whether any entity is meant."""
        return bool(self.entities)


@dataclasses.dataclass(frozen=True)
class GroundingResult:
    """Phrases of one text in one image.

    Attributes:
        task: "caption", "text", "refer" or "question".
        text: what the spans count in: the caption, the text, the expression, or the answer to the question.
        phrases: in the order of the text.
        scene: where the masks are.
        prompt: the question, for "question".
        complete: False when generated text was cut off at the length limit.
    """

    task: str
    text: str
    phrases: tuple[GroundedPhrase, ...]
    scene: Scene
    prompt: str = ""
    complete: bool = True

    def mask(self, phrase: GroundedPhrase) -> Bool[np.ndarray, "h w"]:
        """The mask of a phrase at the original resolution; empty when it was not found."""
        return self.scene.mask(phrase.entities)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: text, phrases with span, mask ids, scores and RLE, and the entities."""
        ids = self.scene.masks.ids
        phrases = [
            {
                "text": phrase.text,
                "span": list(phrase.span) if phrase.span else None,
                "found": phrase.found,
                "mask_ids": [ids[entity] for entity in phrase.entities],
                "scores": [round(score, 6) for score in phrase.scores],
                "best_score": round(phrase.best_score, 6),
                "segmentation": self.scene.rle(phrase.entities),
            }
            for phrase in self.phrases
        ]
        head = {"task": self.task, "text": self.text, "complete": self.complete}
        if self.prompt:
            head["question"] = self.prompt
        return {**head, "phrases": phrases, "entities": entity_list(self.scene)}


@dataclasses.dataclass(frozen=True)
class CategoryResult:
    """Categories of the entities of one image.

    Attributes:
        names: the categories as they were given.
        is_thing: countable or not; all True for instance prediction.
        segments: best first. Of a panoptic result they are disjoint.
        scene: where the masks are.
        task: "panoptic" or "instances".
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    segments: tuple[ClassSegment, ...]
    scene: Scene
    task: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every segment with its category, mask ids, score and RLE, and the entities."""
        ids = self.scene.masks.ids
        segments = [
            {
                "category": self.names[segment.category],
                "isthing": self.is_thing[segment.category],
                "mask_ids": [ids[entity] for entity in segment.entities],
                "score": round(segment.score, 6),
                "segmentation": self.scene.rle(segment.entities),
            }
            for segment in self.segments
        ]
        return {"task": self.task, "segments": segments, "entities": entity_list(self.scene)}


def entity_list(scene: Scene) -> list[dict[str, Any]]:
    """Id, area, RLE and what became of every mask that was given."""
    masks, groundable = scene.masks, scene.groundable
    out: list[dict[str, Any]] = []
    for row, (mask_id, area, code) in enumerate(zip(masks.ids, masks.areas.tolist(), masks.rles(), strict=True)):
        encoded = rle.to_json(code)
        entry = {"id": mask_id, "area": area, "groundable": bool(groundable[row]), "segmentation": encoded}
        if masks.scores is not None:
            entry["score"] = round(float(masks.scores[row]), 6)
        out.append(entry)
    return out + [{"id": mask_id, "area": 0, "groundable": False, "dropped": True} for mask_id in masks.dropped]
