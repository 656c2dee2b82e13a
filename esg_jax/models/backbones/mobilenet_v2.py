"""MobileNetV2 (Sandler et al. 2018), by default in torchvision's form: symmetric padding, batch-norm epsilon 1e-5.

The multi-scale outputs are the last blocks before each change of resolution:
res2 = block 3 (24 channels), res3 = block 6 (32), res4 = block 13 (96), res5 = block 17 (320), counted as in
torchvision's `features`. The classifier's 1x1 convolution to 1280 channels is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models.backbones.frozen_norm import BatchNorm, FrozenBatchNorm, RunningStat
from esg_jax.models.backbones.resnet import ConvNorm, kaiming_fan_out
from esg_jax.models.layers import remat as remat_if
from esg_jax.ops.depthwise_conv import depthwise_conv3x3

# Expansion, output channels, blocks, stride of the first block (Table 2 of the paper).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM = 32


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """Choices of the backbone.

    Attributes:
        train_affine: train the scales and offsets of the batch normalisation.
        batch_statistics: normalise with the statistics of the whole batch while training (SyncBN) and with their
            running averages otherwise; False keeps those of the pretrained network. Only GELLA's training supports it.
        epsilon: of the batch normalisation; 1e-3 in weights trained with TensorFlow.
        same_padding: pad as TensorFlow does, where the zeros of stride-2 convolutions are at the bottom and right.
    """

    train_affine: bool = False
    epsilon: float = 1e-5
    same_padding: bool = False
    batch_statistics: bool = False

    @classmethod
    def tensorflow(cls) -> "MobileNetV2Config":
        """The network of Google's checkpoints."""
        return cls(epsilon=1e-3, same_padding=True)


@jax.custom_jvp
def relu6(x: Array) -> Array:
    """Clips to [0, 6]; the gradient is 0 at both ends, as in PyTorch, and needs no stored factors."""
    return jnp.clip(x, 0, 6)


@relu6.defjvp
def _relu6_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu6(x), jnp.where((x > 0) & (x < 6), dx, 0)


class DepthwiseConvNorm(nnx.Module):
    """3x3 convolution per channel without bias, then batch normalisation, frozen but for `batch_statistics`."""

    def __init__(
        self,
        channels: int,
        stride: int,
        *,
        train_affine: bool,
        epsilon: float,
        same_padding: bool,
        batch_statistics: bool,
        rngs,
        dtype,
        param_dtype,
    ):
        self.stride = stride
        self.same_padding = same_padding
        self.dtype = dtype
        self.kernel = nnx.Param(kaiming_fan_out(rngs.params(), (3, 3, 1, channels), param_dtype))
        norm = BatchNorm if batch_statistics else FrozenBatchNorm
        self.norm = norm(channels, train_affine=train_affine, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x_bhwc):
        # TensorFlow pads an even side by one in all when the stride is 2.
        padding = tuple((0, 1) if self._shifts(side) else (1, 1) for side in x_bhwc.shape[1:3])
        return self.norm(depthwise_conv3x3(x_bhwc, self.kernel[...].astype(self.dtype), self.stride, padding))

    def _shifts(self, side: int) -> bool:
        return self.same_padding and self.stride == 2 and side % 2 == 0


class InvertedResidual(nnx.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; residual when the shape is kept."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, *, same_padding: bool, **kwargs):
        middle = inputs * expansion
        self.expand = ConvNorm(inputs, middle, 1, **kwargs) if expansion != 1 else None
        self.depthwise = DepthwiseConvNorm(middle, stride, same_padding=same_padding, **kwargs)
        self.project = ConvNorm(middle, outputs, 1, **kwargs)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x_bhwc):
        y = x_bhwc if self.expand is None else relu6(self.expand(x_bhwc))
        y = self.project(relu6(self.depthwise(y)))
        return x_bhwc + y if self.residual else y


class MobileNetV2(nnx.Module):
    """Stem and 17 inverted residual blocks."""

    def __init__(
        self,
        config: MobileNetV2Config,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """Creates the parameters; `remat` recomputes every block in the backward pass."""
        kwargs = dict(
            train_affine=config.train_affine,
            batch_statistics=config.batch_statistics,
            epsilon=config.epsilon,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.remat = remat
        self.stem = ConvNorm(3, _STEM, 3, 2, padding="SAME" if config.same_padding else None, **kwargs)
        kwargs["same_padding"] = config.same_padding
        self.blocks = nnx.List()
        strides = []
        inputs = _STEM
        for expansion, outputs, depth, first_stride in _STAGES:
            for block in range(depth):
                strides.append(1 if block else first_stride)
                self.blocks.append(InvertedResidual(inputs, outputs, expansion, strides[-1], **kwargs))
                inputs = outputs
        # Blocks after which the next one halves the resolution, except the first (stride 2), and the very last.
        reductions = [index for index, stride in enumerate(strides) if stride == 2]
        self.taps = (*(index - 1 for index in reductions[1:]), len(strides) - 1)
        widths = [outputs for _, outputs, depth, _ in _STAGES for _ in range(depth)]
        self.out_channels = tuple(widths[tap] for tap in self.taps)

    def __call__(
        self, image_bhwc: Float[Array, "b h w 3"], *, drop_path_key: Array | None = None
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Normalised images to (res2, res3, res4, res5) at strides 4, 8, 16, 32. There is no stochastic depth."""
        del drop_path_key
        x = relu6(self.stem(image_bhwc))
        outputs = []
        for index, block in enumerate(self.blocks):
            x, statistics = remat_if(_run_block, self.remat)(block, x)
            if statistics is not None:  # `jax.checkpoint` works on a copy of the block
                nnx.update(block, statistics)
            if index in self.taps:
                outputs.append(x)
        return tuple(outputs)


def _run_block(block: InvertedResidual, x: Array) -> tuple[Array, nnx.State | None]:
    """The block's output and, while it normalises with them, the statistics of the batch."""
    y, norm = block(x), block.project.norm
    observed = isinstance(norm, BatchNorm) and norm.axes is not None
    return y, nnx.state(block, RunningStat) if observed else None
