"""Masks through GELLA's vision branch and back: how much of the entities survives the colormap (ESG, Table 16)."""

from collections.abc import Iterable, Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, UInt8

from esg_jax.inference.engine import Engine, fill
from esg_jax.input.records import Entities
from esg_jax.input.square import content_size, content_slices, entity_map, square_image
from esg_jax.models.gella.gella import Gella, VisionBranch
from esg_jax.ops.resize import bilinear_matrix

Reconstruction = tuple[Bool[np.ndarray, "q h w"], Float[np.ndarray, "q"]]


class Reconstructor:
    """Reconstructs the masks of images.

    Args:
        model: a GELLA, with or without language branch.
        seed: of the colours.
        mesh: images and weights are split over it, see `Engine`.

    Raises:
        ValueError: a model that reconstructs nothing.
    """

    def __init__(self, model: Gella, *, seed: int = 0, mesh: Mesh | None = None):
        if not model.config.reconstructs:
            raise ValueError(f"{type(model.config.entities).__name__} reconstructs no masks")
        self.config = model.config
        self._engine = Engine(model, mesh)

        def run(branch: VisionBranch, image_bhwc, size_b2, label_map_bhw, map_size_b2):
            vision = branch.vision_tokens(image_bhwc, size_b2)
            keys = jnp.broadcast_to(jax.random.key(seed), len(vision))
            output = branch.entities(vision, label_map_bhw, keys, size_b2=map_size_b2).masks
            return jax.nn.softmax(output.image.logits[-1])[..., 0], output.image_mask_logits()[:, 0]

        self._run = self._engine.per_image(run, part=lambda gella: gella.visual)

    def __call__(self, image_hw3: UInt8[np.ndarray, "h w 3"], entities: Entities) -> Reconstruction:
        """Masks of all queries at the image's resolution, and their entityness.

        Args:
            image_hw3: RGB.
            entities: whose masks are painted; of more than there are queries, the largest.
        """
        return next(self.many([(image_hw3, entities)]))

    def many(self, pairs: Iterable[tuple[UInt8[np.ndarray, "h w 3"], Entities]]) -> Iterator[Reconstruction]:
        """The same for many images, as many at a time as there are devices."""
        side, pad, size = self.config.colormap.size, self.config.pad_position, self._engine.batch_size(1)
        pairs = iter(pairs)
        while batch := list(islice(pairs, size)):  # itertools.batched needs Python 3.12
            rows = [
                (*square_image(image, self.config.image_size, pad),
                 *entity_map(entities, side, self.config.num_queries, pad)[:2])
                for image, entities in batch
            ]  # fmt: skip
            arrays = (fill(np.stack(column), size) for column in zip(*rows, strict=True))
            outputs = self._engine.fetch(self._run(*arrays))
            for (image, _), scores, logits_qhw in zip(batch, *outputs, strict=False):
                yield self._masks(logits_qhw, image.shape[:2]), scores

    def _masks(self, logits_qhw: np.ndarray, original: tuple[int, int]) -> Bool[np.ndarray, "q h w"]:
        side = self.config.colormap.size
        content = content_slices(content_size(*original, side), side, self.config.pad_position)
        # Both steps, to the colormap's resolution and on to the image's, are linear: one matrix per axis.
        rows, columns = (
            bilinear_matrix(inside.stop - inside.start, outside) @ bilinear_matrix(side // 4, side)[inside]
            for inside, outside in zip(content, original, strict=True)
        )
        return np.stack([rows @ logits @ columns.T > 0 for logits in logits_qhw])
