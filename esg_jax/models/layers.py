"""Building blocks shared by the pixel decoder, the mask decoder and the view association.

PyTorch's conventions are kept where they change numbers: LayerNorm and GroupNorm use eps 1e-5 and the two-pass
variance, attention initialises its packed query/key/value projection as one (3C, C) matrix.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from esg_jax.ops import normalization

xavier_uniform = nnx.initializers.xavier_uniform()
normal_1 = nnx.initializers.normal(1.0)
# PyTorch's default for linear layers, and its kaiming_uniform(a=1).
torch_linear = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
kaiming_uniform = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
# Xavier over the packed (C, 3C) projection: bound sqrt(6 / 4C), smaller than for three separate (C, C) matrices.
packed_xavier_uniform = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class LayerNorm(nnx.LayerNorm):
    """Over the last axis, by `ops.normalization`."""

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return normalization.layer_norm(x.astype(self.dtype), self.scale[...], self.bias[...], self.epsilon)


class GroupNorm(nnx.GroupNorm):
    """Over NHWC maps, by `ops.normalization`."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(self.dtype)
        return normalization.group_norm(x, self.scale[...], self.bias[...], self.num_groups, self.epsilon)


def layer_norm(features: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32) -> LayerNorm:
    """LayerNorm over the last axis with PyTorch's epsilon."""
    return LayerNorm(features, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def group_norm(features: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32) -> GroupNorm:
    """GroupNorm with 32 groups over NHWC maps."""
    return GroupNorm(features, num_groups=32, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def remat(function: Callable, enabled: bool) -> Callable:
    """`jax.checkpoint` when `enabled`: recompute `function` in the backward pass instead of storing its inside."""
    return jax.checkpoint(function) if enabled else function


def run_layers(run: Callable, layers: Sequence[nnx.Module], carry, xs: Sequence | None = None, *, remat: bool = False):
    """Equal layers one after the other, as `jax.lax.scan` would: ``carry, y = run(layer, carry, x)``.

    With `remat` it is a scan whose program holds one layer, so that compilation takes the time of one. Without, it is a
    loop: a scan would copy what the backward pass needs of every layer into a stack (7% of a training step on CPU).

    Args:
        run: (layer, carry, x) -> (carry, y).
        layers: of equal structure and shapes; a scan stacks their weights.
        carry: arrays, a pytree.
        xs: what differs between the layers besides their weights; None gives None.
        remat: recompute every layer in the backward pass.

    Returns:
        The last carry, and the ys, stacked (None if they are None).
    """
    xs = [None] * len(layers) if xs is None else xs
    if not remat:
        ys = []
        for layer, x in zip(layers, xs, strict=True):
            carry, y = run(layer, carry, x)
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    graph = nnx.graphdef(layers[0])

    def body(carry, step):
        state, x = step
        return run(nnx.merge(graph, state), carry, x)

    steps = [(nnx.state(layer), x) for layer, x in zip(layers, xs, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, stacked)


class MLP(nnx.Module):
    """Linear layers with ReLU between them; `sizes` = (in, hidden..., out)."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        rngs: nnx.Rngs,
        kernel_init: Callable = xavier_uniform,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ):
        self.layers = nnx.List(
            [
                nnx.Linear(fan_in, fan_out, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MultiHeadAttention(nnx.Module):
    """Scaled dot-product attention with separate projections; softmax in float32."""

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        if features % num_heads:
            raise ValueError(f"features ({features}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads

        def linear(kernel_init):
            return nnx.Linear(
                features, features, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.query, self.key, self.value = (linear(packed_xavier_uniform) for _ in range(3))
        self.out = linear(xavier_uniform)

    def __call__(
        self,
        query_nqc: Float[Array, "n q c"],
        key_nsc: Float[Array, "n s c"],
        value_nsc: Float[Array, "n s c"],
        blocked_nqs: Bool[Array, "n q s"] | None = None,
        *,
        rescore: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "n q c"]:
        """Attends; `blocked` marks the keys a query may not see, the same for all heads.

        `rescore` changes the float32 logits (n, heads, q, s) before that.
        """
        heads = self.num_heads
        query, key, value = (
            proj(x).reshape(*x.shape[:2], heads, -1)  # n s heads d
            for proj, x in ((self.query, query_nqc), (self.key, key_nsc), (self.value, value_nsc))
        )
        query = query * query.shape[-1] ** -0.5
        logits = jnp.einsum("nqhd,nshd->nhqs", query, key, preferred_element_type=jnp.float32)
        if rescore is not None:
            logits = rescore(logits)
        if blocked_nqs is not None:
            logits = jnp.where(blocked_nqs[:, None], -jnp.inf, logits)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        attended = jnp.einsum("nhqs,nshd->nqhd", weights, value)
        return self.out(attended.reshape(query_nqc.shape))


class SelfAttentionLayer(nnx.Module):
    """Post-norm residual self attention; `position` is added to queries and keys only."""

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        self.attention = MultiHeadAttention(features, num_heads, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layer_norm(features, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self, x_nqc: Float[Array, "n q c"], position_qc: Float[Array, "q c"] | None = None
    ) -> Float[Array, "n q c"]:
        query = x_nqc if position_qc is None else x_nqc + position_qc
        return self.norm(x_nqc + self.attention(query, query, x_nqc))


class CrossAttentionLayer(nnx.Module):
    """Post-norm residual cross attention over keys and values prepared by the caller."""

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        self.attention = MultiHeadAttention(features, num_heads, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layer_norm(features, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self,
        x_nqc: Float[Array, "n q c"],
        position_qc: Float[Array, "q c"],
        key_nsc: Float[Array, "n s c"],
        value_nsc: Float[Array, "n s c"],
        blocked_nqs: Bool[Array, "n q s"] | None = None,
    ) -> Float[Array, "n q c"]:
        return self.norm(x_nqc + self.attention(x_nqc + position_qc, key_nsc, value_nsc, blocked_nqs))


class FeedForwardLayer(nnx.Module):
    """Post-norm residual two-layer perceptron with ReLU."""

    def __init__(self, features: int, ffn_dim: int, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        self.mlp = MLP((features, ffn_dim, features), rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layer_norm(features, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return self.norm(x + self.mlp(x))
