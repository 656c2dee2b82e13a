"""AdamW with the reference's per-parameter rules, full-model clipping, and learning-rate schedules."""

import dataclasses
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]

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


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate as a function of the number of steps done."""

    def schedule(step):
        # The subtraction is exact in integers; 1 - step / total loses digits near the end.
        left = jnp.maximum(total_steps - step, 0) / total_steps
        if config.schedule == "poly":
            rate = config.learning_rate * left**config.power
        elif config.schedule == "step":
            passed = sum(
                (step >= round(milestone * total_steps)).astype(jnp.float32) for milestone in config.milestones
            )
            rate = config.learning_rate * config.gamma**passed
        else:
            rate = jnp.asarray(config.learning_rate, jnp.float32)
        if config.warmup_steps:
            rate *= jnp.minimum((step + 1) / config.warmup_steps, 1.0)
        return rate

    return schedule


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Adam direction plus weight decay; the step scales it by -learning rate x multiplier.

    Like PyTorch's AdamW, which shrinks a weight by lr * decay before the Adam update.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config)),
    )


def clip_by_norm(grads: dict[str, jax.Array], clip_norm: float) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scales the whole gradient to at most `clip_norm`, as torch.nn.utils.clip_grad_norm_; returns the norm before."""
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(clip_norm / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda grad: grad * factor, grads), norm
