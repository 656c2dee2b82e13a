"""A model together with what is stored beside its weights: what every predictor starts from."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import esg_jax
from esg_jax import weights
from esg_jax.sharding import Layout, Rules
from esg_jax.systems import System, system_of


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model that is stored in a file, or one that is being trained.

    Attributes:
        name: of the source, for messages; of a checkpoint, its path.
        load: gives the model, its arrays placed.
        config: of the model; None where it shows only in the weights themselves, as in PyTorch's checkpoints.
        info: what inference must know beside the model, see `weights.save_weights`.
    """

    name: str
    load: Callable[[], nnx.Module]
    config: Any = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def system(self) -> System:
        """The system of the model; of PyTorch's checkpoints their names show it.

        Raises:
            ValueError: a part of a system, or not a usable checkpoint.
        """
        if self.config is not None:
            return system_of(self.config)
        from esg_jax.interop.checkpoints import family_of

        return system_of(family_of(self.name).config)

    def load_as(self, cls: type[nnx.Module]) -> Any:
        """The model, which must be of this class.

        Raises:
            ValueError: it is another one, or not a usable checkpoint.
        """
        model = self.load()
        if not isinstance(model, cls):
            raise ValueError(f"{self.name} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def open_bundle(
    path: str | Path, *, dtype: Any = "float32", mesh: Mesh | None = None, rules: Rules | None = None
) -> Bundle:
    """What a file holds; its weights are read by `load`.

    Args:
        path: anything `esg_jax.load` reads: weights of ours, or a PyTorch checkpoint in one of the formats of
            `esg convert`.
        dtype: of the computation; bfloat16 is faster on accelerators.
        mesh: of `sharding.make_mesh`; every device reads its own part of every array. By default one device.
        rules: how arrays are split over it; by default as the system says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of ours that are damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    config, info = weights.read_info(path) if weights.is_weights_file(path) else (None, {})
    bundle = Bundle(str(path), lambda: esg_jax.load(path, **options), config, info)
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype)}
    if mesh is not None:
        options["shardings"] = Layout(mesh, rules or bundle.system.rules)
    return bundle
