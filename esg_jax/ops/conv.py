"""3x3 convolution whose weight gradient is fast on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def conv3x3(x_bhwc: Float[Array, "b h w c"], kernel_33cd: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """Stride-1 convolution, zero padded to the same size.

    XLA:CPU computes the gradient of the kernel as a convolution with a window as large as the map, five times slower
    than the nine matrix products used here. On other platforms the gradients are XLA's own.

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
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [
        [
            jnp.einsum(
                "bhwc,bhwd->cd",
                padded[:, i : i + height, j : j + width],
                gradient,
                preferred_element_type=jnp.float32,
            )
            for j in range(3)
        ]
        for i in range(3)
    ]
    return jnp.stack([jnp.stack(row) for row in rows]).astype(kernel.dtype)


def _backward(residuals, gradient):
    x, kernel = residuals
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    kernel_gradient = jax.lax.platform_dependent(
        x, kernel, gradient, cpu=_kernel_gradient_cpu, default=_kernel_gradient
    )
    return _conv(gradient, flipped), kernel_gradient


conv3x3.defvjp(_forward, _backward)
