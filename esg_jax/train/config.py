"""The configuration of a run: one frozen dataclass that `configs/` fills in and the command line overrides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from esg_jax.config import from_dict, to_dict
from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.input.pipeline import DataConfig
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.sharding import DEFAULT_RULES, Rules, make_mesh
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import StepConfig, TrainStep
from esg_jax.train.tasks import GroundingTask, SegmentationTask

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

    model: sizes; decides the parameters, and whether CropFormer or GELLA is trained.
    data: sources, augmentation, batch size, seed of the data order.
    loss, optim, loop, mesh: see the dataclasses.
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

    model: CropFormerConfig | GellaConfig
    data: DataConfig | GroundingDataConfig
    loss: LossConfig | GellaLossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig(total_steps=34_375)
    mesh: MeshConfig = MeshConfig()
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
        if isinstance(self.model, GellaConfig):
            self._check_grounding()
        else:
            self._check_segmentation()

    def _check_segmentation(self) -> None:
        if not isinstance(self.data, DataConfig) or not isinstance(self.loss, LossConfig):
            raise ValueError("a CropFormer needs data of type DataConfig and a loss of type LossConfig")
        if self.data.mapper == "colormap":
            raise ValueError("data.mapper 'colormap' is for GELLA; choose entity_crop, entity_full or lsj")
        if self.data.mapper == "entity_crop" and self.model.association is None:
            raise ValueError(
                "data.mapper 'entity_crop' gives two views, but the model has no association module; "
                "use 'entity_full' or 'lsj', or a model with association"
            )
        if self.data.mapper != "entity_crop" and self.model.association is not None:
            raise ValueError(
                f"data.mapper {self.data.mapper!r} gives one view, but the model has an association module; use "
                "'entity_crop', or model.association=None"
            )
        if getattr(self.model.backbone, "batch_statistics", False):
            raise ValueError("model.backbone.batch_statistics is for GELLA; CropFormer's step keeps statistics fixed")
        if self.data.class_agnostic and self.model.mask_decoder.num_classes != 1:
            raise ValueError(
                f"model.mask_decoder.num_classes is {self.model.mask_decoder.num_classes}, but data.class_agnostic "
                "maps every label to 0"
            )

    def _check_grounding(self) -> None:
        if not isinstance(self.loss, GellaLossConfig):
            raise ValueError("GELLA needs a loss of type GellaLossConfig")
        model, data = self.model, self.data
        if isinstance(data, DataConfig) != (model.llm is None):
            raise ValueError(
                "GELLA with a language model needs data of type GroundingDataConfig; without one (model.llm=None) it "
                "needs DataConfig with mapper 'colormap'"
            )
        if isinstance(data, DataConfig) and data.mapper != "colormap":
            raise ValueError(f"data.mapper is {data.mapper!r}; GELLA without language model needs 'colormap'")
        wanted = {
            "image_size": model.image_size,
            "map_size": model.colormap.size,
            "max_entities": model.num_queries,
            "num_image_tokens": model.num_image_tokens,
            "pad_position": model.pad_position,
        }
        for name, value in wanted.items():
            if getattr(data, name, value) != value:
                raise ValueError(f"data.{name} is {getattr(data, name)}, but the model needs {value}")
        if model.llm is not None and not self.tokenizer:
            raise ValueError("config.tokenizer is empty; name a tokenizer file, or 'smollm2'")

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

    def train_step(self, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES) -> TrainStep:
        """The step of this run, not yet compiled.

        Args:
            mesh: devices; by default all of this process's cluster, arranged by `self.mesh`.
            rules: how parameters are split.
        """
        task = (
            GroundingTask(self.loss, self.model.num_queries)
            if isinstance(self.model, GellaConfig)
            else SegmentationTask(self.loss, self.model.mask_decoder.num_queries)
        )
        return TrainStep(
            self.model_def(),
            task,
            optim=self.optim,
            total_steps=self.loop.total_steps,
            mesh=mesh or make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.model, devices=jax.devices()),
            config=StepConfig(seed=self.seed, accumulate=self.accumulate, ema_decay=self.ema_decay),
            rules=rules,
        )


def model_def(
    config: CropFormerConfig | GellaConfig,
    dtype=jnp.float32,
    *,
    seed: int = 0,
    remat: bool = False,
    frozen: str = "",
    frozen_dtype=None,
) -> ModelDef:
    """A CropFormer, Mask2Former or GELLA without its arrays."""
    module = Gella if isinstance(config, GellaConfig) else CropFormer
    return ModelDef(
        lambda: module(config, rngs=nnx.Rngs(seed), dtype=dtype, remat=remat), frozen=frozen, frozen_dtype=frozen_dtype
    )
