"""The language model with int8 kernels: 7B parameters in 7 GB, for generation on one small accelerator."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models.language.llama import KVCache, Llama, LlamaConfig
from esg_jax.ops.int8 import int8_matmul, quantize_int8

_PROJECTIONS = {"attention": ("query", "key", "value", "out"), "mlp": ("gate", "up", "down")}


class Int8Projection(nnx.Module):
    """Linear map without bias whose kernel is int8 with a scale per output channel; neither is trained."""

    def __init__(self, kernel, scale, *, dtype=jnp.float32):
        self.dtype = dtype
        self.kernel = nnx.Variable(kernel)
        self.scale = nnx.Variable(scale)

    def __call__(self, x: Float[Array, "... c"], preferred_element_type=None) -> Float[Array, "... d"]:
        y = int8_matmul(x, self.kernel[...], self.scale[...], dtype=self.dtype)
        return y.astype(preferred_element_type or self.dtype)


def quantize(model: Llama) -> Llama:
    """A model whose projections and head are int8; embedding and norms stay as they are.

    Under `jax.eval_shape` it gives the abstract model that `quantize_arrays` fills.
    """
    model = nnx.clone(model)
    parents = [(getattr(model.layers, part), name) for part, names in _PROJECTIONS.items() for name in names]
    for parent, name in parents if model.config.tied else [*parents, (model, "head")]:
        projection = getattr(parent, name)
        setattr(parent, name, Int8Projection(*quantize_int8(projection.kernel[...]), dtype=projection.dtype))
    return model


def quantize_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Named parameters of a `Llama` as those of its quantised form, one at a time.

    A checkpoint larger than the memory is converted so: no more than one float tensor exists at once.
    """
    for name, value in arrays:
        if not name.endswith(".kernel"):
            yield name, value
            continue
        kernel, scale = quantize_int8(value)
        yield name, kernel
        yield name.removesuffix("kernel") + "scale", scale


def memory_bytes(
    config: LlamaConfig, *, int8: bool, dtype=jnp.bfloat16, batch: int = 1, length: int = 0
) -> dict[str, int]:
    """Bytes of the weights and of the key/value cache.

    Args:
        config: the model.
        int8: whether its kernels are quantised.
        dtype: of everything else: of all weights without `int8`, of the cache.
        batch, length: rows and slots of the cache.
    """

    def build() -> Any:
        model = Llama(config, rngs=nnx.Rngs(0), param_dtype=dtype)
        return nnx.state(quantize(model) if int8 else model)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, length, dtype))
    return {"weights": size(jax.eval_shape(build)), "cache": size((cache.k, cache.v))}
