"""One training step as a pure function of (state, batch), compiled for a mesh.

A task is what is being trained: a loss and its normalisers, see `Task`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from esg_jax import sharding
from esg_jax.train.flops import count_flops
from esg_jax.train.optim import (
    OptimConfig,
    Schedule,
    clip_by_norm,
    learning_rate_multipliers,
    make_optimizer,
    make_schedule,
)
from esg_jax.train.state import Arrays, ModelDef, TrainState, create_state

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# Entry of a loss's terms: statistics of this batch for constants of the model (batch normalisation), by name.
STATISTICS = "statistics"
# Of the running statistics; 0.1 in PyTorch's terms.
_MOMENTUM = 0.9


class Task(Protocol):
    """Connects a model to its loss.

    Attributes:
        whole_batch: the loss takes the whole, sharded batch and leaves partitioning to the compiler, as language models
            want it; otherwise it is called for each device's own images (see `map_images`).
    """

    whole_batch: bool

    def inputs(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The entries of a host batch that the loss uses; each set of entries is compiled once."""
        ...

    def normalizers(self, batch: Batch) -> Any:
        """Sums over the whole batch that divide the loss; they depend on targets only."""
        ...

    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array, normalizers: Any) -> tuple[jax.Array, Metrics]:
        """Scalar loss and its named terms for some of the images, one random key each.

        Must be a plain sum over images: summed over devices and micro-batches it is the loss of the whole batch. A
        task with `whole_batch` may add batch statistics under `STATISTICS`, for which the step keeps running averages
        (with micro-batches, of their mean); then the loss of an image depends on the others.
        It runs inside `jax.set_mesh`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is carried out.

    Attributes:
        seed: all randomness of a step is fold_in(seed, step).
        accumulate: micro-batches per step; the batch is split evenly, gradients are added.
        ema_decay: of the average weights, or None to keep none.
    """

    seed: int = 0
    accumulate: int = 1
    ema_decay: float | None = None

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; choose a number from 0 to below 1, or None for no averages"
            )


class TrainStep:
    """A compiled step with everything needed to create, restore and place its state."""

    def __init__(
        self,
        model: ModelDef,
        task: Task,
        *,
        optim: OptimConfig,
        total_steps: int,
        mesh: Mesh,
        config: StepConfig = StepConfig(),  # noqa: B008 (frozen)
        rules: sharding.Rules = sharding.DEFAULT_RULES,
    ):
        """Plans shardings; compiles nothing yet.

        Raises:
            ValueError: the sharding table does not fit the model (see `sharding.partition_specs`).
        """
        self.model, self.task, self.config, self.mesh = model, task, config, mesh
        self._optim = optim
        self._optimizer = make_optimizer(optim)
        # Arguments of the compiled step, not part of it: another length, rate or seed compiles nothing anew. The seed
        # is raw key data, because numpy arrays are the same on every process.
        self._schedule = make_schedule(optim, total_steps)
        self.settings = (self._schedule, np.asarray(jax.random.key_data(jax.random.key(config.seed))))
        self._multipliers = learning_rate_multipliers(model.params, optim)
        self._specs = sharding.partition_specs({**model.params, **model.constants}, rules, mesh)
        shapes = jax.eval_shape(self._create)
        self.shardings: TrainState = sharding.tree_shardings(shapes, self._specs, mesh)
        self._split = {name for name, place in self.shardings.params.items() if not place.is_fully_replicated}
        #: Shape, type and sharding of every leaf: one description for init, restore and ahead-of-time compilation.
        self.abstract_state: TrainState = jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, self.shardings
        )
        self._compiled = jax.jit(self._run, donate_argnums=0, out_shardings=(self.shardings, NamedSharding(mesh, P())))
        self._flops: dict[Any, float] = {}

    def _create(self) -> TrainState:
        params, constants = self.model.init()
        return create_state(params, constants, self._optimizer, ema=self.config.ema_decay is not None)

    def init(self, weights: Mapping[str, Any] | None = None) -> TrainState:
        """A new state, created directly in its sharding; `weights` replace the random ones of the same name."""
        state = jax.jit(self._create, out_shardings=self.shardings)()
        return self.replace_weights(state, weights) if weights else state

    def replace_weights(self, state: TrainState, weights: Mapping[str, Any]) -> TrainState:
        """State with some weights (and their averages) exchanged.

        Raises:
            ValueError: a name or a shape does not belong to the model.
        """
        known = {**state.params, **state.constants}
        for name, value in weights.items():
            if name not in known:
                raise ValueError(f"weight {name!r} does not belong to this model")
            if tuple(value.shape) != known[name].shape:
                raise ValueError(f"weight {name!r} has shape {tuple(value.shape)}, the model needs {known[name].shape}")

        def swap(group: Arrays) -> Arrays:
            # A copy per group: parameters and averages must not share a buffer that the step then donates.
            return {
                name: jax.device_put(jnp.array(weights[name], value.dtype), value.sharding)
                if name in weights
                else value
                for name, value in group.items()
            }

        ema = None if state.ema is None else swap(state.ema)
        return dataclasses.replace(state, params=swap(state.params), constants=swap(state.constants), ema=ema)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs one step; `state` is consumed. Metrics are device scalars."""
        with jax.set_mesh(self.mesh):
            return self._compiled(state, batch, self.settings)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """The step as a jaxpr, for arrays or for their abstract description."""
        with jax.set_mesh(self.mesh):
            return self._compiled.trace(state, batch, self.settings)

    def flops(self, state: TrainState, batch: Batch) -> float:
        """Operations of one step over all devices, see `count_flops`; free once a batch of these shapes has run."""
        shapes = tuple(sorted((name, value.shape) for name, value in batch.items()))
        if shapes not in self._flops:
            self._flops[shapes] = count_flops(self.trace(state, batch).jaxpr)
        return self._flops[shapes]

    def lower(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """Lowers for ahead-of-time compilation, e.g. for a TPU topology without a TPU."""
        place = NamedSharding(self.mesh, sharding.BATCH_SPEC)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in batch.items()}
        with jax.set_mesh(self.mesh):
            return self.trace(self.abstract_state, batch).lower()

    def _run(self, state: TrainState, batch: Batch, settings: tuple[Schedule, jax.Array]) -> tuple[TrainState, Metrics]:
        schedule, seed = settings
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), state.step)
        (loss, terms), grads = self._gradients(state, batch, key)
        terms, statistics = self._take_statistics(state, terms)
        if self.mesh.size > 1:
            # Gradients leave in the layout of their parameters, so the sum over devices can be a reduce-scatter.
            grads = {
                name: jax.lax.with_sharding_constraint(x, self.shardings.params[name]) for name, x in grads.items()
            }
        grads, norm = clip_by_norm(grads, self._optim.clip_norm, split=self._split)
        rate = schedule(state.step)
        direction, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        scale = {name: -rate * self._multipliers[name] for name in direction}
        params = optax.apply_updates(state.params, {name: scale[name] * x for name, x in direction.items()})
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.config.ema_decay)

        # A non-finite step changes nothing but the step counter, so the next batch and key are drawn.
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state, ema, statistics = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, ema, statistics),
            (state.params, state.opt_state, state.ema, {name: state.constants[name] for name in statistics}),
        )
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics = {**terms, "loss": loss, "grad_norm": norm, "learning_rate": rate, "bad_steps": bad_steps}
        constants = {**state.constants, **statistics}
        new = TrainState(state.step + 1, params, constants, opt_state, ema, bad_steps)
        return new, metrics

    def _take_statistics(self, state: TrainState, terms: Metrics) -> tuple[Metrics, Arrays]:
        """The terms without the statistics, and the running statistics after this batch."""
        batch = terms.get(STATISTICS, {})
        share = (1 - _MOMENTUM) / self.config.accumulate  # micro-batches were added up
        running = {name: _MOMENTUM * state.constants[name] + share * value for name, value in batch.items()}
        return {name: value for name, value in terms.items() if name != STATISTICS}, running

    def _gradients(self, state: TrainState, batch: Batch, key: jax.Array):
        """Loss, terms and gradients of the whole batch, one micro-batch at a time."""
        normalizers = self.task.normalizers(batch)

        def local_loss(params, constants, micro, keys, normalizers):
            return self.task.loss(self.model.merge(params, constants), micro, keys, normalizers)

        images = sharding.BATCH_SPEC
        in_specs = (P(), P(), images, images, P())
        mapped = local_loss if self.task.whole_batch else map_images(local_loss, self.mesh, in_specs)

        def loss_fn(params, micro, keys):
            return mapped(params, state.constants, micro, keys, normalizers)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        parts = self.config.accumulate
        rows = len(next(iter(batch.values())))
        # One key per image, drawn before any split: neither devices nor micro-batches change what an image sees.
        keys = jax.random.split(key, rows)
        if parts == 1:
            return grad_fn(state.params, batch, keys)
        if rows % parts:
            raise ValueError(f"batch size {rows} is not a multiple of accumulate = {parts}")
        # Micro-batch m takes every parts-th row, so that each device works on its own rows all the time.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0), (batch, keys))

        def body(total, micro):
            return jax.tree.map(jnp.add, total, grad_fn(state.params, *micro)), None

        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(grad_fn, state.params, *jax.tree.map(lambda x: x[0], split)),
        )
        return jax.lax.scan(body, zero, split)[0]


def map_images(function: Callable, mesh: Mesh, in_specs: Any) -> Callable:
    """Runs `function` on every device's own images; its outputs, sums over those images, come back added up.

    Weights arrive whole along (data, fsdp): that is the all-gather of FSDP, and its transpose the reduce-scatter.
    Inside, nothing communicates. The automatic partitioner would do worse: it synchronises the loop of the assignment
    in every iteration, gathers around kernels, and may split activations along channels. It still splits matrices
    along "model" when that axis is used. A single device runs `function` as it is.
    """
    if mesh.size == 1:
        return function
    axes = set(mesh.axis_names) if mesh.shape[sharding.MODEL] == 1 else set(sharding.BATCH_AXES)

    def local(*args):
        return jax.tree.map(lambda x: x[None], function(*args))

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=sharding.BATCH_SPEC, axis_names=axes, check_vma=False
    )
    return lambda *args: jax.tree.map(lambda x: jnp.sum(x, axis=0), mapped(*args))
