"""Masks through GELLA's vision branch and back: how much of the entities survives the colormap (ESG, Table 16)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8

from esg_jax.input.records import Entities
from esg_jax.input.square import content_size, content_slices, entity_map, square_image
from esg_jax.models.gella import Gella
from esg_jax.ops.resize import bilinear_matrix


class Reconstructor:
    """Reconstructs the masks of one image at a time.

    Args:
        model: a GELLA, with or without language branch.
        seed: of the colours.

    Raises:
        ValueError: a model that reconstructs nothing.
    """

    def __init__(self, model: Gella, *, seed: int = 0):
        if not model.config.reconstructs:
            raise ValueError(f"{type(model.config.entities).__name__} reconstructs no masks")
        self.config = model.config
        graph, state = nnx.split(model.visual)
        key = jax.random.key(seed)

        @jax.jit
        def run(state, image_bhwc, size_b2, label_map_bhw, map_size_b2):
            branch = nnx.merge(graph, state)
            vision = branch.vision_tokens(image_bhwc, size_b2)
            output = branch.entities(vision, label_map_bhw, key[None], size_b2=map_size_b2).masks
            return jax.nn.softmax(output.image.logits[-1, 0])[:, 0], output.image_mask_logits()[0, 0]

        self._run = lambda *arrays: run(state, *(jnp.asarray(array)[None] for array in arrays))

    def __call__(
        self, image_hw3: UInt8[np.ndarray, "h w 3"], entities: Entities
    ) -> tuple[Bool[np.ndarray, "q h w"], Float[np.ndarray, "q"]]:
        """Masks of all queries at the image's resolution, and their entityness.

        Args:
            image_hw3: RGB.
            entities: whose masks are painted; of more than there are queries, the largest.
        """
        side, pad = self.config.colormap.size, self.config.pad_position
        pixels, size = square_image(image_hw3, self.config.image_size, pad)
        label_map, map_size, _ = entity_map(entities, side, self.config.num_queries, pad)
        scores, logits_qhw = jax.device_get(self._run(pixels, size, label_map, map_size))
        height, width = image_hw3.shape[:2]
        content = content_slices(content_size(height, width, side), side, pad)
        # Both steps, to the colormap's resolution and on to the image's, are linear: one matrix per axis.
        rows, columns = (
            bilinear_matrix(inside.stop - inside.start, outside) @ bilinear_matrix(side // 4, side)[inside]
            for inside, outside in zip(content, (height, width), strict=True)
        )
        masks = np.stack([rows @ logits @ columns.T > 0 for logits in logits_qhw])
        return masks, scores
