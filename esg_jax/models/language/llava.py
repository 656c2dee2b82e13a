"""LLaVA-1.5 (Liu et al. 2023): image tokens of CLIP, projected into the language model's embedding space."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from esg_jax.models.language.clip import ClipVision, ClipVisionConfig
from esg_jax.models.language.llama import Llama, LlamaConfig

_normal = nnx.initializers.normal(0.02)
PROJECTORS = ("mlp2x_gelu", "linear")


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Sizes of LLaVA; the defaults are those of LLaVA-1.5-7B.

    Attributes:
        vision: the image transformer.
        llm: the language model.
        projector: ``mlp2x_gelu`` (LLaVA-1.5) or ``linear`` (LLaVA, GELLA's text).
        select_layer: whose tokens of the image transformer are taken, see `ClipVision.hidden_states`.
        image_id: the token that stands for an image patch.
    """

    vision: ClipVisionConfig = ClipVisionConfig()
    llm: LlamaConfig = LlamaConfig()
    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    image_id: int = 32000

    @classmethod
    def llava_7b(cls) -> "LlavaConfig":
        """LLaVA-1.5-7B: 7.06 G parameters."""
        return cls()

    @classmethod
    def llava_13b(cls) -> "LlavaConfig":
        """LLaVA-1.5-13B: 13.35 G parameters."""
        return cls(llm=LlamaConfig.llama_13b())


class Projector(nnx.Module):
    """Image tokens -> tokens of the language model."""

    def __init__(
        self, kind: str, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
    ):
        """`kind` is ``mlp2x_gelu`` or ``linear``.

        Raises:
            ValueError: another kind.
        """
        if kind not in PROJECTORS:
            raise ValueError(f"projector is {kind!r}; choose one of {', '.join(PROJECTORS)}")
        kwargs = dict(kernel_init=_normal, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.kind = kind
        self.fc1 = nnx.Linear(fan_in, fan_out, **kwargs)
        if kind == "mlp2x_gelu":
            self.fc2 = nnx.Linear(fan_out, fan_out, **kwargs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
        x = self.fc1(x)
        return x if self.kind == "linear" else self.fc2(jax.nn.gelu(x, approximate=False))


def insert_image(
    text_btd: Float[Array, "b t d"], ids_bt: Int[Array, "b t"], image_id: int, tokens_bnd: Float[Array, "b n d"]
) -> Float[Array, "b t d"]:
    """The embedded text with the row's image tokens, in order, at the places where `ids_bt` is `image_id`.

    A row without such places stays as it is. Shapes are static, so nothing can be checked here: the places of a row
    must be as many as its image tokens. Surplus places repeat the last token.
    """
    is_image_bt = ids_bt == image_id
    index_bt = jnp.clip(jnp.cumsum(is_image_bt, axis=1) - 1, 0, tokens_bnd.shape[1] - 1)
    image_btd = jnp.take_along_axis(tokens_bnd, index_bt[..., None], axis=1)
    return jnp.where(is_image_bt[..., None], image_btd.astype(text_btd.dtype), text_btd)


class Llava(nnx.Module):
    """Image transformer, projector and language model."""

    def __init__(
        self, config: LlavaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        """`remat` recomputes every block in the backward pass."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.vision = ClipVision(config.vision, remat=remat, **kwargs)
        self.projector = Projector(config.projector, config.vision.width, config.llm.width, **kwargs)
        self.llm = Llama(config.llm, remat=remat, **kwargs)

    def embed(self, image_bhwc: Float[Array, "b h w 3"], ids_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The input of the language model.

        Args:
            image_bhwc: RGB, normalised as CLIP wants it, one per row.
            ids_bt: token ids; `image_id` comes as often as the image has patches.
        """
        grid_bghc = self.vision(image_bhwc, self.config.select_layer)
        tokens_bnd = self.projector(grid_bghc.reshape(grid_bghc.shape[0], -1, grid_bghc.shape[-1]))
        # Stand-in ids need not be rows of the table.
        text_btd = self.llm.embed(jnp.where(ids_bt == self.config.image_id, 0, ids_bt))
        return insert_image(text_btd, ids_bt, self.config.image_id, tokens_bnd)

    def __call__(self, image_bhwc: Float[Array, "b h w 3"], ids_bt: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Scores of the next token at every place, float32; arguments as for `embed`, rows padded on the right."""
        hidden_btd, _ = self.llm(self.embed(image_bhwc, ids_bt))
        return self.llm.logits(hidden_btd)
