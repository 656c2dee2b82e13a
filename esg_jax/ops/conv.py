"""3x3 convolution whose weight gradient is fast on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def conv3x3(x_bhwc: Float[Array, "b h w c"], kernel_33cd: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """Stride-1 convolution, zero padded to the same size.

    XLA:CPU computes the gradient of the kernel as a convolution with a window as large as the map, six times
    slower than the matrix products used here. On other platforms the gradients are XLA's own.

    Args:
        x_bhwc: input map.
        kernel_33cd: weights (height, width, in, out).
    """
    return _conv(x_bhwc, kernel_33cd)


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x, kernel):
    return _conv(x, kernel), (x, kernel)


def _kernel_gradient(x, kernel, gradient):
    return jax.linear_transpose(lambda k: _conv(x, k), kernel)(gradient)[0]


def _kernel_gradient_cpu(x, kernel, gradient):
    """One matrix product per few rows, so that the shifted copies of the input stay in cache.

    In rows padded by two, every tap is a contiguous shift of the flat map; the gradient is zero in the padding.
    """
    batch, height, width, channels = x.shape
    rows = next(rows for rows in (4, 3, 2, 1) if height % rows == 0)
    pitch = width + 2
    length = rows * pitch - 2
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (0, 0), (0, 2), (0, 0)))
    features = gradient.shape[-1]

    def add(total, index):
        image, row = index // (height // rows), index % (height // rows) * rows
        window = jax.lax.dynamic_slice(padded, (image, row, 0, 0), (1, rows + 2, pitch, channels)).reshape(-1, channels)
        slope = jax.lax.dynamic_slice(gradient, (image, row, 0, 0), (1, rows, pitch, features)).reshape(-1, features)
        starts = (i * pitch + j for i in range(3) for j in range(3))
        taps = jnp.concatenate([window[start : start + length] for start in starts], axis=1)
        return total + jnp.einsum("sd,sk->dk", slope[:length], taps, preferred_element_type=jnp.float32), None

    total = jnp.zeros((features, 9 * channels), jnp.float32)
    total = jax.lax.scan(add, total, jnp.arange(batch * height // rows))[0]
    return total.reshape(features, 3, 3, channels).transpose(1, 2, 3, 0).astype(kernel.dtype)


def _backward(residuals, gradient):
    x, kernel = residuals
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    kernel_gradient = jax.lax.platform_dependent(
        x, kernel, gradient, cpu=_kernel_gradient_cpu, default=_kernel_gradient
    )
    return _conv(gradient, flipped), kernel_gradient


conv3x3.defvjp(_forward, _backward)
