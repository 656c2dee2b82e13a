"""Images with masks as a GELLA sees them: its vision branch, run once per image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esg_jax.inference.engine import Engine, batches, fill
from esg_jax.inference.grounding import decisions
from esg_jax.inference.grounding.decisions import GroundingConfig
from esg_jax.inference.grounding.results import Scene
from esg_jax.input.image_io import ImageLike, pixels_of, size_of
from esg_jax.input.square import square_image, square_labels
from esg_jax.masks import MaskSet
from esg_jax.models.gella.gella import GellaConfig, VisionBranch
from esg_jax.ops.padding import content_mask, content_start


class SceneEncoder:
    """Makes scenes.

    Args:
        engine: with a GELLA.
        model: its configuration.
        config: number of colourings, and whether the model's own masks are kept.
        batch_size: images per call.
        seed: of the colours.
    """

    def __init__(self, engine: Engine, model: GellaConfig, config: GroundingConfig, batch_size: int, seed: int):
        self._engine, self._model, self._batch_size = engine, model, batch_size
        self._seed, self._colorings = seed, config.colorings
        self._keep_masks = config.output_masks == "reconstructed"
        self._see = engine.per_image(self._run, part=lambda gella: gella.visual)

    def __call__(self, images: Sequence[ImageLike], masks: Sequence[MaskSet], config: GroundingConfig) -> list[Scene]:
        """See `Grounder.look`; `config` says which query speaks for an entity."""
        count = self._model.num_queries
        for number, (image, entities) in enumerate(zip(images, masks, strict=True), start=1):
            try:
                size = size_of(image)
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from error
            if entities.size != size:
                raise ValueError(f"image {number} is {size}, its masks are {entities.size} (height, width)")
            if not 0 < len(entities) <= count:
                raise ValueError(
                    f"image {number} has {len(entities)} masks; the model takes 1 to {count} "
                    "(`disjoint_masks(max_entities=...)` keeps the largest)"
                )
        pairs = list(zip(images, masks, strict=True))
        return [scene for batch in batches(pairs, self._batch_size) for scene in self._encode(batch, config)]

    def _encode(self, batch: Sequence[tuple[ImageLike, MaskSet]], config: GroundingConfig) -> list[Scene]:
        side, pad = self._model.colormap.size, self._model.pad_position
        images, masks = zip(*batch, strict=True)
        pixels = np.zeros((len(batch), self._model.image_size, self._model.image_size, 3), np.uint8)
        sizes = np.ones((len(batch), 2), np.int32)
        for row in set(self._engine.own_rows(self._batch_size)) & set(range(len(batch))):
            pixels[row], sizes[row] = square_image(pixels_of(images[row]), self._model.image_size, pad)
        maps, map_sizes = zip(*(square_labels(m.label_map.astype(np.int16), side, pad) for m in masks), strict=True)
        arrays = (fill(np.stack(part), self._batch_size) for part in (pixels, sizes, maps, map_sizes))
        seen = self._engine.fetch(self._see(*arrays))
        out = []
        for row, entities in enumerate(masks):
            count = len(entities)
            query = np.stack([decisions.match_queries(iou[:, :count], config.match_iou) for iou in seen["iou"][row]])
            entityness = np.where(query >= 0, np.take_along_axis(seen["entityness"][row], query.clip(0), 1), 0)
            probabilities = None
            if config.output_masks == "reconstructed":
                found = (query[0] >= 0)[:, None, None]
                probabilities = np.where(found, seen["probabilities"][row][query[0].clip(0)], 0)
            content = tuple(float(length) / side for length in map_sizes[row])
            start = tuple(float(content_start(length, side, pad)) / side for length in map_sizes[row])
            vision, embed = seen["vision"][row], seen["embed"][row]
            out.append(Scene(entities, vision, embed, query, entityness.mean(0), probabilities, content, start))
        return out

    def _run(self, branch: VisionBranch, image_bhwc, size_b2, label_map_bhw, map_size_b2) -> dict[str, jax.Array]:
        """Everything of a batch; arrays with a value per colouring have it behind the batch."""
        vision = branch.vision_tokens(image_bhwc, size_b2)
        inside = content_mask(*label_map_bhw.shape[1:], map_size_b2, self._model.pad_position)

        def with_colors(key):
            keys = jnp.broadcast_to(key, len(image_bhwc))
            output = branch.entities(vision, label_map_bhw, keys, size_b2=map_size_b2)
            if output.masks is None:  # entity k has embedding k
                present = output.present.astype(jnp.float32)
                iou = jnp.eye(self._model.num_queries) * present[:, None]
                return {"embed": output.embed, "entityness": present, "iou": iou}, None
            logits = output.masks.image_mask_logits()[:, 0]
            seen = {
                "embed": output.embed,
                "entityness": jax.nn.softmax(output.masks.image.logits[-1])[..., 0],
                "iou": mask_overlaps(logits, label_map_bhw, inside, self._model.num_queries),
            }
            return seen, logits

        seen, logits = jax.lax.map(with_colors, jax.random.split(jax.random.key(self._seed), self._colorings))
        seen = {name: jnp.moveaxis(value, 0, 1) for name, value in seen.items()}
        if self._keep_masks:
            seen["probabilities"] = jax.nn.sigmoid(logits[0])
        return {**seen, "vision": vision}


def mask_overlaps(logits_bqhw: jax.Array, label_map_bhw: jax.Array, inside_bhw: jax.Array, count: int) -> jax.Array:
    """IoU (b, q, n) of the model's masks with the entities of the label map, at the masks' resolution.

    `inside` tells the picture from its padding.
    """
    labels, inside = label_map_bhw[:, 2::4, 2::4], inside_bhw[:, 2::4, 2::4]
    wanted = (labels[..., None] == jnp.arange(1, count + 1)).astype(jnp.float32)
    masks = ((logits_bqhw > 0) & inside[:, None]).astype(jnp.float32)
    both = jnp.einsum("bqhw,bhwn->bqn", masks, wanted, precision=jax.lax.Precision.HIGHEST)
    union = masks.sum((2, 3))[:, :, None] + wanted.sum((1, 2))[:, None] - both
    return both / jnp.maximum(union, 1)
