"""AdamW with the reference's per-parameter rules, full-model clipping, and learning-rate schedules."""

import dataclasses
import re
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array | np.ndarray | np.generic

# norm, norm1, patch_norm, norms.3: every norm layer of the models is called so.
NORM_PATTERN = r"(^|[._])norms?\d*(\.\d+)?\.(scale|bias)$"
# nn.Embedding in the reference. The pixel decoder's level_embed is a plain parameter there and does decay.
EMBEDDING_PATTERN = r"(^|\.)mask_decoder\.(query_feat|query_embed|level_embed)$"
POSITION_TABLE_PATTERN = r"relative_position_bias_table$"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW as in the reference (spec 6.5); the defaults are its numbers.

    Attributes:
        learning_rate: at the start, before multipliers.
        backbone_multiplier: of parameters below `backbone.`.
        multipliers: further (pattern of names, factor) pairs; the first pattern found in a name decides.
        weight_decay: decoupled; multiplied by the learning rate of the parameter.
        no_decay: patterns of parameter names that do not decay. Biases of linear and convolution layers do.
        beta1, beta2, eps: of Adam.
        clip_norm: largest L2 norm of the whole gradient.
        schedule: "poly" (reference code), "step" (paper) or "constant".
        power: of the poly schedule, lr * (1 - step / total)^power.
        milestones: fractions of the run at which "step" multiplies by `gamma`; 91,575 and 99,414 of 103,125 in the
            paper.
        gamma: factor of the step schedule.
        warmup_steps: linear warm-up from zero; the reference has none.
    """

    learning_rate: float = 1e-4
    backbone_multiplier: float = 0.1
    multipliers: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = (NORM_PATTERN, EMBEDDING_PATTERN, POSITION_TABLE_PATTERN)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.01
    schedule: str = "poly"
    power: float = 0.9
    milestones: tuple[float, ...] = (0.888, 0.964)
    gamma: float = 0.1
    warmup_steps: int = 0

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple((pattern, factor) for pattern, factor in self.multipliers))
        if self.schedule not in ("poly", "step", "constant"):
            raise ValueError(f"optim.schedule is {self.schedule!r}; choose poly, step or constant")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"optim.milestones must increase, got {self.milestones}")


def learning_rate_multipliers(names: Iterable[str], config: OptimConfig) -> dict[str, float]:
    """Factor on the learning rate of every parameter."""
    rules = ((r"^backbone\.", config.backbone_multiplier), *config.multipliers)
    return {name: next((factor for pattern, factor in rules if re.search(pattern, name)), 1.0) for name in names}


def decay_mask(names: Iterable[str], config: OptimConfig) -> dict[str, bool]:
    """Whether weight decay applies to each parameter."""
    return {name: not any(re.search(pattern, name) for pattern in config.no_decay) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the number of steps done.

    A tree of numbers, so that a compiled step takes it as an argument: other rates or lengths compile nothing anew.
    All schedules are one formula, base * (1 - step / total)^power * gamma^(milestones passed) * warm-up.

    Attributes:
        base, power, gamma: float32 scalars.
        total, warmup: int32 scalars, numbers of steps.
        milestones: int32, steps at which `gamma` multiplies.
    """

    base: Array
    power: Array
    gamma: Array
    total: Array
    warmup: Array
    milestones: Array

    def __call__(self, step: Array) -> Array:
        # The subtraction is exact in integers; 1 - step / total loses digits near the end.
        left = jnp.maximum(self.total - step, 0) / self.total
        passed = jnp.sum(step >= self.milestones)
        warm = jnp.minimum((step + 1) / jnp.maximum(self.warmup, 1), 1.0)
        return self.base * left**self.power * self.gamma**passed * warm


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The configured schedule, as numpy scalars."""
    return Schedule(
        base=np.float32(config.learning_rate),
        power=np.float32(config.power if config.schedule == "poly" else 0.0),
        gamma=np.float32(config.gamma if config.schedule == "step" else 1.0),
        total=np.int32(total_steps),
        warmup=np.int32(config.warmup_steps),
        milestones=np.array([round(milestone * total_steps) for milestone in config.milestones], np.int32),
    )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Adam direction plus weight decay; the step scales it by -learning rate x multiplier.

    Like PyTorch's AdamW, which shrinks a weight by lr * decay before the Adam update.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config)),
    )


# Arrays up to this size are joined before their norm is taken.
_SMALL = 2**18


def clip_by_norm(
    grads: dict[str, jax.Array], clip_norm: float, *, split: Collection[str] = ()
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scales the whole gradient to at most `clip_norm`, as torch.nn.utils.clip_grad_norm_; returns the norm before.

    Args:
        grads: by name of the parameter.
        clip_norm: largest L2 norm.
        split: names of those that are split over devices.
    """

    def squares(x):
        return jnp.vdot(x, x, precision=jax.lax.Precision.HIGHEST)

    # A reduction per array costs more time to compile than the joint one of all small arrays; joining must not gather.
    joined = [name for name, grad in grads.items() if name not in split and grad.size <= _SMALL]
    parts = [squares(grad) for name, grad in grads.items() if name not in joined]
    if joined:
        parts.append(squares(jnp.concatenate([grads[name].ravel() for name in joined])))
    norm = jnp.sqrt(sum(parts))
    factor = jnp.minimum(clip_norm / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda grad: grad * factor, grads), norm
