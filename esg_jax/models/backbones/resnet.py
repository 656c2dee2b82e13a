"""ResNet with frozen batch normalisation and the stride in the 3x3 convolution (He et al. 2016; detectron2's R-50)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models.backbones.frozen_norm import BatchNorm, FrozenBatchNorm
from esg_jax.models.layers import remat as remat_if

kaiming_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a bottleneck ResNet.

    Attributes:
        depths: blocks in res2..res5.
        stem_channels: channels after the 7x7 stem.
        bottleneck_channels: of the 3x3 convolutions in res2, doubled from stage to stage; outputs are 4x wider.
        train_affine: train the scales and offsets of the batch normalisation, whose statistics stay fixed.
    """

    depths: tuple[int, int, int, int]
    stem_channels: int = 64
    bottleneck_channels: int = 64
    train_affine: bool = False

    @classmethod
    def resnet50(cls) -> "ResNetConfig":
        """ResNet-50."""
        return cls(depths=(3, 4, 6, 3))


class ConvNorm(nnx.Module):
    """Convolution without bias, then batch normalisation; by default k // 2 zeros on every side, as in PyTorch.

    The normalisation is frozen but for `batch_statistics`, see `frozen_norm`.

    1x1 convolutions run as one flat matrix product, whose gradient is several times faster on CPU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        train_affine: bool,
        epsilon: float = 1e-5,
        padding: str | None = None,
        batch_statistics: bool = False,
        rngs,
        dtype,
        param_dtype,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=padding or ((kernel // 2,) * 2,) * 2,
            use_bias=False,
            kernel_init=kaiming_fan_out,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        norm = BatchNorm if batch_statistics else FrozenBatchNorm
        self.norm = norm(outputs, train_affine=train_affine, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)
        self.kernel_size, self.stride, self.dtype = kernel, stride, dtype

    def __call__(self, x_bhwc):
        if self.kernel_size != 1:
            return self.norm(self.conv(x_bhwc))
        x_bhwc = x_bhwc[:, :: self.stride, :: self.stride]
        kernel = self.conv.kernel[0, 0].astype(self.dtype)
        y = x_bhwc.reshape(-1, x_bhwc.shape[-1]).astype(self.dtype) @ kernel
        return self.norm(y.reshape(*x_bhwc.shape[:-1], -1))


class Bottleneck(nnx.Module):
    """1x1 reduce, 3x3 (with the stride), 1x1 expand, plus the projected input."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, **kwargs):
        self.conv1 = ConvNorm(inputs, middle, 1, **kwargs)
        self.conv2 = ConvNorm(middle, middle, 3, stride, **kwargs)
        self.conv3 = ConvNorm(middle, outputs, 1, **kwargs)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, **kwargs) if inputs != outputs else None

    def __call__(self, x_bhwc):
        shortcut = x_bhwc if self.shortcut is None else self.shortcut(x_bhwc)
        x_bhwc = jax.nn.relu(self.conv1(x_bhwc))
        x_bhwc = jax.nn.relu(self.conv2(x_bhwc))
        return jax.nn.relu(self.conv3(x_bhwc) + shortcut)


class ResNet(nnx.Module):
    """Stem and four stages; returns the outputs of all stages."""

    def __init__(
        self, config: ResNetConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        """Creates the parameters; `remat` recomputes every block in the backward pass."""
        kwargs = dict(train_affine=config.train_affine, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.remat = remat
        self.stem = ConvNorm(3, config.stem_channels, 7, 2, **kwargs)
        self.stages = nnx.List()
        inputs, out_channels = config.stem_channels, []
        for stage, depth in enumerate(config.depths):
            middle = config.bottleneck_channels * 2**stage
            blocks = nnx.List()
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inputs, middle, 4 * middle, stride, **kwargs))
                inputs = 4 * middle
            self.stages.append(blocks)
            out_channels.append(inputs)
        self.out_channels = tuple(out_channels)

    def __call__(
        self, image_bhwc: Float[Array, "b h w 3"], *, drop_path_key: Array | None = None
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Normalised images to (res2, res3, res4, res5) at strides 4, 8, 16, 32. There is no stochastic depth."""
        del drop_path_key
        x = jax.nn.relu(self.stem(image_bhwc))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        outputs = []
        for blocks in self.stages:
            for block in blocks:
                x = remat_if(lambda block, x: block(x), self.remat)(block, x)
            outputs.append(x)
        return tuple(outputs)
