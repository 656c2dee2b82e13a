"""The configuration of a run: one frozen dataclass that `configs/` fills in and the command line overrides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from esg_jax.config import from_dict, to_dict
from esg_jax.sharding import format_rules, make_mesh, parse_rules
from esg_jax.systems import DataConfig, LossConfig, ModelConfig, System, system_of
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import StepConfig, TrainStep

PRECISIONS = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along every mesh axis; one may be -1 and takes the rest.

    data: copies of the weights; across the slices of a pod.
    fsdp: weights and optimiser state are split, images too.
    model: matrices are split, images are not.
    """

    data: int = 1
    fsdp: int = -1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run.

    model: sizes; decides the parameters, and which of `esg_jax.systems` is trained.
    data: sources, augmentation, batch size, seed of the data order.
    loss: by default the system's.
    optim, loop, mesh: see the dataclasses.
    sharding: how weights are split over the mesh: (pattern of names, placement) in order, the first that fits a name
        decides; see `esg_jax.sharding.parse_rules`. By default the system's.
    seed: initial weights, point sampling and drop path.
    precision: "bfloat16" computes in bfloat16 with float32 weights and float32 islands; "float32" for parity.
    remat: recompute blocks in the backward pass: about a third more time, a fraction of the memory.
    accumulate: micro-batches per step.
    ema_decay: of average weights, which are then evaluated and exported; None keeps none.
    keep: checkpoints kept.
    init_from: what the run starts from: the workdir of another run, a model.safetensors, or a PyTorch checkpoint.
    init_optional: pattern of weights that `init_from` may lack; they start at random. By default the association
        module, which a Mask2Former checkpoint does not have.
    backbone_weights: a PyTorch checkpoint of a classifier, or "imagenet" for the packaged MobileNetV2. In GELLA it goes
        to every MobileNetV2: the encoder of colormaps or masks, and the image encoder if it is one.
    llm_weights: GELLA's language model: a GGUF file, or "smollm2" for the packaged one.
    tokenizer: GELLA's: a file or folder for `esg_jax.text.tokenizers.open_tokenizer`, or "smollm2".
    frozen: pattern of weights that are not trained.
    frozen_precision: "float32" or "bfloat16", in which frozen weights are stored.
    tensorboard: write TensorBoard files too; needs the extra `log`.
    wandb: Weights & Biases project to log to, too; needs the extra `log`.
    """

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = None
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig(total_steps=34_375)
    mesh: MeshConfig = MeshConfig()
    sharding: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    precision: str = "bfloat16"
    remat: bool = False
    accumulate: int = 1
    ema_decay: float | None = None
    keep: int = 2
    init_from: str = ""
    init_optional: str = r"^association\."
    backbone_weights: str = ""
    llm_weights: str = ""
    tokenizer: str = ""
    frozen: str = ""
    frozen_precision: str = "float32"
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self):
        for name in ("precision", "frozen_precision"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(f"config.{name} is {getattr(self, name)!r}; choose {' or '.join(PRECISIONS)}")
        system = self.system
        if self.loss is None:
            object.__setattr__(self, "loss", system.loss_config()())
        _check_type(system, "data of type", self.data, system.data_configs())
        _check_type(system, "a loss of type", self.loss, (system.loss_config(),))
        system.check(self)
        rules = self.sharding or format_rules(system.rules)
        object.__setattr__(self, "sharding", tuple((pattern, placement) for pattern, placement in rules))
        parse_rules(self.sharding, "config.sharding")

    @property
    def system(self) -> System:
        """To which the model belongs."""
        return system_of(self.model)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, for `ml_collections.ConfigDict` and for checkpoints."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Reads what `as_dict` wrote.

        Raises:
            ValueError: an unknown key or a value that does not fit, named.
        """
        return from_dict(cls, values)

    @classmethod
    def complete(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` with the defaults of fields it lacks; unchanged if it has keys that no longer exist."""
        try:
            return cls.from_dict(values).as_dict()
        except (ValueError, TypeError):
            return dict(values)

    def model_def(self) -> ModelDef:
        """Structure and shapes of the model; allocates nothing."""
        return model_def(
            self.model,
            PRECISIONS[self.precision],
            seed=self.seed,
            remat=self.remat,
            frozen=self.frozen,
            frozen_dtype=PRECISIONS[self.frozen_precision],
        )

    def train_step(self, *, mesh: Mesh | None = None) -> TrainStep:
        """The step of this run, not yet compiled.

        Args:
            mesh: devices; by default all of this process's cluster, arranged by `self.mesh`.
        """
        return TrainStep(
            self.model_def(),
            self.system.task(self),
            optim=self.optim,
            total_steps=self.loop.total_steps,
            mesh=mesh or make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.model, devices=jax.devices()),
            config=StepConfig(seed=self.seed, accumulate=self.accumulate, ema_decay=self.ema_decay),
            rules=parse_rules(self.sharding, "config.sharding"),
        )


def model_def(
    config: ModelConfig,
    dtype=jnp.float32,
    *,
    seed: int = 0,
    remat: bool = False,
    frozen: str = "",
    frozen_dtype=None,
) -> ModelDef:
    """The model of a system without its arrays."""
    module = system_of(config).module
    return ModelDef(
        lambda: module(config, rngs=nnx.Rngs(seed), dtype=dtype, remat=remat), frozen=frozen, frozen_dtype=frozen_dtype
    )


def _check_type(system: System, what: str, value: Any, types: tuple[type, ...]) -> None:
    if type(value) not in types:
        names = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{system.name} needs {what} {names}, not {type(value).__name__}")
