"""How much a step computes, and what that is of what the hardware could do (MFU)."""

import math
import re
from typing import Any

from jax.extend import core

# Device kind (a regular expression) -> peak of one chip in bfloat16 FLOP/s, without sparsity, by its data sheet. The
# first match counts.
PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H[12]00 NVL", 835e12),
    (r"NVIDIA (H100|H200|GH200).*", 989e12),
)


def peak_flops(device: Any) -> float | None:
    """bfloat16 FLOP/s that `device` can do at most; None if it is not in the table."""
    kind = device.device_kind
    if "MIG" in kind:  # a slice of a GPU that goes by the name of the whole
        return None
    return next((peak for pattern, peak in PEAK_FLOPS if re.fullmatch(pattern, kind)), None)


def count_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """Operations of the matrix products and convolutions of a program, over all its devices.

    A multiply-add is two operations. What `jax.checkpoint` computes again counts again. Elementwise work and custom
    kernels do not count, and a while loop counts as one turn.

    The compiler's own cost analysis counts the body of every loop once: it would miss most of a language model whose
    layers are scanned, and all micro-batches but one.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            lhs = equation.invars[0].aval.shape
            total += 2.0 * _size(equation) * math.prod(lhs[dim] for dim in contracted)
        elif name == "conv_general_dilated":
            kernel, out_dim = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            # Of a dilated input, as in the gradient of a strided convolution, most is zeros.
            total += 2.0 * _size(equation) * math.prod(kernel) / kernel[out_dim] / math.prod(params["lhs_dilation"])
        elif name == "cond":
            total += max(count_flops(branch) for branch in params["branches"])
        elif name != "pallas_call":
            total += _repetitions(name, params) * sum(map(count_flops, core.jaxprs_in_params(params)))
    return total


def _size(equation: core.JaxprEqn) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _repetitions(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # inside, arrays have the shapes of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1
