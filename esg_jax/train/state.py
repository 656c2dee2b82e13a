"""What a training run carries from step to step, and how a module becomes plain arrays and back."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run; every leaf is an array, every weight is stored under its dotted name.

    Attributes:
        step: int32 scalar, steps done, skipped ones included. Randomness and learning rate follow from it.
        params: trained weights, float32.
        constants: weights that no gradient reaches, such as frozen batch-norm statistics.
        opt_state: of the optax transformation.
        ema: exponential moving average of `params`, or None.
        bad_steps: int32 scalar, non-finite steps in a row up to now.
    """

    step: jax.Array
    params: Arrays
    constants: Arrays
    opt_state: optax.OptState
    ema: Arrays | None
    bad_steps: jax.Array

    def weights(self, *, average: bool = False) -> Arrays:
        """Everything a model needs, flat; the averaged weights if `average`.

        Raises:
            ValueError: averages are asked for, but the run keeps none.
        """
        if average and self.ema is None:
            raise ValueError("the run keeps no average weights; set config.ema_decay")
        return {**(self.ema if average else self.params), **self.constants}


class ModelDef:
    """The structure of a module without its arrays.

    `nnx.split` happens once, here, on an abstract module; a step merges a fresh copy inside jit. That costs a third of
    `nnx.jit` in Python time, works in graph and in tree mode, and leaves nothing mutable between steps.
    """

    def __init__(self, build: Callable[[], nnx.Module], *, frozen: str = "", frozen_dtype: Any = None):
        """Traces `build`, a function that creates the module, without allocating anything.

        Args:
            build: creates the module.
            frozen: pattern of parameter names that are not trained; they become constants. Empty freezes none.
            frozen_dtype: type they are stored in; by default their own.
        """
        self._build, self._frozen, self._frozen_dtype = build, frozen, frozen_dtype
        self._graphdef, params, rest = nnx.split(nnx.eval_shape(build), self._is_trained, ...)
        self._params = nnx.to_flat_state(params)
        self._constants = [(path, self._store(variable)) for path, variable in nnx.to_flat_state(rest)]

    def _is_trained(self, path: tuple[Any, ...], variable: Any) -> bool:
        if not isinstance(variable, nnx.Param):
            return False
        return not self._frozen or re.search(self._frozen, dotted(path)) is None

    def _store(self, variable: nnx.Variable) -> nnx.Variable:
        """A constant as it is stored: frozen parameters in their own type."""
        if self._frozen_dtype is None or not isinstance(variable, nnx.Param):
            return variable
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            return variable.replace(jax.ShapeDtypeStruct(value.shape, self._frozen_dtype))
        return variable.replace(value.astype(self._frozen_dtype))

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every trained weight."""
        return _arrays(self._params)

    @property
    def constants(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every other array of the module."""
        return _arrays(self._constants)

    def init(self) -> tuple[Arrays, Arrays]:
        """Random (params, constants); meant to be traced by jit."""
        _, params, rest = nnx.split(self._build(), self._is_trained, ...)
        constants = [(path, self._store(variable)) for path, variable in nnx.to_flat_state(rest)]
        return _arrays(nnx.to_flat_state(params)), _arrays(constants)

    def merge(self, params: Mapping[str, jax.Array], constants: Mapping[str, jax.Array]) -> nnx.Module:
        """The module with these arrays; safe inside jit and grad.

        Raises:
            KeyError: an array is missing.
        """
        # Without the copy, tree mode would alias variables of an outer trace.
        return nnx.merge(self._graphdef, _fill(self._params, params), _fill(self._constants, constants), copy=True)


def dotted(path: tuple[Any, ...]) -> str:
    """Name of a path of attributes and list positions, e.g. "mask_decoder.layers.0.norm.scale"."""
    return ".".join(str(key) for key in path)


def _arrays(flat: Iterable[tuple[tuple[Any, ...], nnx.Variable]]) -> dict[str, Any]:
    return {dotted(path): variable.get_value() for path, variable in flat}


def _fill(flat: Iterable[tuple[tuple[Any, ...], nnx.Variable]], arrays: Mapping[str, jax.Array]) -> nnx.State:
    return nnx.from_flat_state([(path, variable.replace(arrays[dotted(path)])) for path, variable in flat])


def create_state(
    params: Arrays, constants: Arrays, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """State before the first step. Traceable, so that jit can create it already sharded."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=constants,
        opt_state=optimizer.init(params),
        # Distinct buffers: the step donates its input, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        bad_steps=jnp.zeros((), jnp.int32),
    )
