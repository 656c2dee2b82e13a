"""Systems: one file each that says what it consists of, and an entry in `SYSTEMS`.

Nothing outside this folder and a system's own files asks which system it has; it asks the system.
"""

from typing import Annotated, Any

from esg_jax.systems.cropformer import CropFormerSystem
from esg_jax.systems.gella import GellaSystem
from esg_jax.systems.system import System

# A package that brings a system of its own adds an entry; see docs/extending.md.
SYSTEMS: list[System] = [CropFormerSystem(), GellaSystem()]


def system_of(config: Any) -> System:
    """The system to which a model belongs.

    Args:
        config: the model's configuration, or its class.

    Raises:
        ValueError: none has such a configuration.
    """
    kind = config if isinstance(config, type) else type(config)
    for system in SYSTEMS:
        if system.config is kind:
            return system
    known = ", ".join(system.config.__name__ for system in SYSTEMS)
    raise ValueError(f"no system has a model of type {kind.__name__}; choose one of {known}")


def _model_configs() -> tuple[type, ...]:
    return tuple(system.config for system in SYSTEMS)


def _data_configs() -> tuple[type, ...]:
    return tuple(dict.fromkeys(config for system in SYSTEMS for config in system.data_configs()))


def _loss_configs() -> tuple[type, ...]:
    return tuple(dict.fromkeys(system.loss_config() for system in SYSTEMS))


# Types of fields that hold the configuration of any system's model, data or loss (see `esg_jax.config.from_dict`).
ModelConfig = Annotated[Any, _model_configs]
DataConfig = Annotated[Any, _data_configs]
LossConfig = Annotated[Any, _loss_configs]
