"""Multi-scale deformable attention: one differentiable function, several implementations."""

import functools
from typing import Literal, get_args

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from esg_jax.ops.deform_attn import cuda, pallas_gpu, pallas_tpu, xla
from esg_jax.ops.deform_attn.xla import Shapes

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "cuda"]


def deform_attn(
    values_bshd: Float[Array, "B S H D"],
    shapes: Shapes,
    locations_bqhlp2: Float[Array, "B Q H L P 2"],
    weights_bqhlp: Float[Array, "B Q H L P"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B Q H*D"]:
    """Weighted sum of bilinear samples from several feature maps (Deformable DETR, arXiv 2010.04159, eq. 3).

    Equals PyTorch's `grid_sample(mode="bilinear", padding_mode="zeros", align_corners=False)` per level followed by
    the weighted sum over levels and points. Sums run in float32.

    Args:
      values_bshd: value maps of all levels, each row-major, concatenated along S; float32, bfloat16 or float16.
      shapes: static (height, width) of every level, in pixels; the areas add up to S.
      locations_bqhlp2: (x, y) of every sample in units of its level's width and height: 0 and 1 are the outer edges of
        the first and last pixel. Any finite value is allowed; samples outside the map read zeros. float32.
      weights_bqhlp: attention weights, softmaxed over (L, P) by the caller. float32.
      implementation: None chooses by platform (when the computation is lowered) and shape: the Pallas kernel on TPU
        where a level fits its memory, the CUDA kernel on NVIDIA GPUs once it is built, else XLA. "xla" runs everywhere,
        "pallas_tpu" in (slow) interpret mode off TPU, "cuda" only on NVIDIA GPUs. "pallas_gpu" is never chosen by
        itself: a forward kernel for NVIDIA GPUs of compute capability 9.0 or higher, with XLA's gradients.

    Returns:
      (B, Q, H*D) in the dtype of the values.

    Raises:
      ValueError: shapes of the arguments do not fit together, or the implementation is unknown or does not take them.
    """
    shapes = tuple((int(height), int(width)) for height, width in shapes)
    _check(values_bshd, shapes, locations_bqhlp2, weights_bqhlp)
    if implementation is not None:
        _check_implementation(implementation, values_bshd, shapes, weights_bqhlp)
    if 0 in (*values_bshd.shape, *locations_bqhlp2.shape):
        batch, _, heads, channels = values_bshd.shape
        return jnp.zeros((batch, locations_bqhlp2.shape[1], heads * channels), values_bshd.dtype)
    return _deform_attn(
        values_bshd, locations_bqhlp2.astype(jnp.float32), weights_bqhlp.astype(jnp.float32), shapes, implementation
    )


def _jit(function, **options):
    # Every layer lowers all branches' code: jit traces each only once per shape.
    return jax.jit(functools.partial(function, **options), static_argnums=1)


# implementation -> function by platform; "default" is any other platform.
_FORWARD = {
    "xla": {"tpu": _jit(xla.packed_forward), "default": _jit(xla.forward)},
    "pallas_tpu": {"tpu": _jit(pallas_tpu.forward), "default": _jit(pallas_tpu.forward, interpret=True)},
    "pallas_gpu": {"cuda": _jit(pallas_gpu.forward)},
    "cuda": {"cuda": _jit(cuda.forward)},
}
_BACKWARD = {
    "xla": {"tpu": _jit(xla.packed_backward), "default": _jit(xla.backward)},
    "pallas_tpu": {"tpu": _jit(pallas_tpu.backward), "default": _jit(pallas_tpu.backward, interpret=True)},
    "pallas_gpu": {"cuda": _jit(xla.backward)},
    "cuda": {"cuda": _jit(cuda.backward)},
}
_PREFERRED = {"tpu": "pallas_tpu", "cuda": "cuda"}


# The rule is outside the choice of backend: residuals are the arguments, whatever computes the output.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _deform_attn(values, locations, weights, shapes, implementation):
    return _dispatch(_FORWARD, implementation, values, shapes, locations, weights)


def _forward(values, locations, weights, shapes, implementation):
    return _deform_attn(values, locations, weights, shapes, implementation), (values, locations, weights)


def _backward(shapes, implementation, residuals, grad_out):
    values, locations, weights = residuals
    grad_values, *grads = _dispatch(_BACKWARD, implementation, values, shapes, locations, weights, grad_out)
    return grad_values.astype(values.dtype), *grads


_deform_attn.defvjp(_forward, _backward)


def _dispatch(table, implementation, values, shapes, *arrays):
    """Calls the function of the platform that the computation is lowered for."""
    functions = dict(table[implementation or "xla"])
    if implementation is None:
        for platform, preferred in _PREFERRED.items():
            if not _refusal(preferred, values, shapes, arrays[1]):
                functions[platform] = table[preferred][platform]
    branches = {
        platform: functools.partial(lambda function, values, *arrays: function(values, shapes, *arrays), function)
        for platform, function in functions.items()
    }
    if list(branches) == ["cuda"]:
        return branches["cuda"](values, *arrays)  # lowering for another platform then names the missing target
    return lax.platform_dependent(values, *arrays, **branches)


def _refusal(implementation, values, shapes, weights) -> str | None:
    if implementation == "pallas_tpu":
        return pallas_tpu.unsupported(values.shape, values.dtype, shapes, weights.shape[4])
    if implementation == "pallas_gpu":
        return pallas_gpu.unsupported(values.shape, values.dtype, shapes, weights.shape) or pallas_gpu.missing()
    if implementation == "cuda":
        return cuda.unsupported(values.shape, values.dtype, shapes) or cuda.missing()
    return None


def available_implementations() -> tuple[Implementation, ...]:
    """Implementations that run natively on the default platform of this process."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform == "cuda":
        optional = {"pallas_gpu": pallas_gpu.missing(), "cuda": cuda.missing()}
        return ("xla", *(name for name, reason in optional.items() if reason is None))
    return ("xla", "pallas_tpu") if platform == "tpu" else ("xla",)


def _check_implementation(implementation, values, shapes, weights):
    if implementation not in get_args(Implementation):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"deform_attn: unknown implementation {implementation!r}; use None or one of {known}")
    refusal = _refusal(implementation, values, shapes, weights)
    if refusal:
        raise ValueError(f"deform_attn: {implementation!r} does not take these arguments ({refusal}); use None")


def _check(values, shapes, locations, weights):
    if values.ndim != 4 or locations.ndim != 6 or weights.ndim != 5 or locations.shape[-1] != 2:
        raise ValueError(
            "deform_attn: expected values (B, S, H, D), locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), got "
            f"{values.shape}, {locations.shape} and {weights.shape}"
        )
    batch, rows, heads, _ = values.shape
    if locations.shape[:-1] != weights.shape or locations.shape[0] != batch or locations.shape[2] != heads:
        raise ValueError(
            f"deform_attn: values {values.shape}, locations {locations.shape} and weights {weights.shape} disagree "
            "about batch, queries, heads, levels or points"
        )
    area = sum(height * width for height, width in shapes)
    if len(shapes) != locations.shape[3] or area != rows:
        raise ValueError(
            f"deform_attn: {len(shapes)} levels {shapes} hold {area} pixels, but values have {rows} rows and locations "
            f"{locations.shape[3]} levels"
        )
