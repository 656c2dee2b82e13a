"""What a system consists of."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from esg_jax.sharding import DEFAULT_RULES, Rules

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from esg_jax.inference.bundle import Bundle
    from esg_jax.interop.families.family import Family
    from esg_jax.train.config import RunConfig
    from esg_jax.train.step import Task

Arrays = Mapping[str, Any]


class System(abc.ABC):
    """A model with everything that it needs around it: data, loss, weights to start from, inference.

    An object without state. Its methods import what only training or only inference needs when they are called, so that
    `esg predict` starts without the input pipeline.

    Attributes:
        name: for messages.
        config: class of the model's configuration. It decides which system a run or a weights file belongs to.
        module: class of the model; called with the configuration, `rngs`, `dtype`, `param_dtype` and `remat`.
        rules: how its weights are split over devices, unless a run says otherwise.
        grounds_text: whether `grounder` gives one, which an evaluation then prefers to `predictor`.
    """

    name: ClassVar[str]
    config: ClassVar[type]
    module: ClassVar[type[nnx.Module]]
    rules: ClassVar[Rules] = DEFAULT_RULES
    grounds_text: ClassVar[bool] = False

    # Training

    @abc.abstractmethod
    def data_configs(self) -> tuple[type, ...]:
        """Classes that `RunConfig.data` may have."""

    @abc.abstractmethod
    def loss_config(self) -> type:
        """Class of `RunConfig.loss`; without arguments it is the default."""

    def check(self, run: RunConfig) -> None:  # noqa: B027 (a system may have nothing to check)
        """Finds contradictions between model, data and loss, whose types are right.

        Raises:
            ValueError: one, naming the fields and the fix.
        """

    @abc.abstractmethod
    def batches(self, run: RunConfig, process_index: int, process_count: int) -> Iterator[Mapping[str, Any]]:
        """Endless batches of one process: a Grain iterator, whose position a checkpoint stores."""

    @abc.abstractmethod
    def batch_shapes(self, run: RunConfig, height: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What a step uses of a batch over all processes, to compile without data.

        Args:
            run: with the batch size.
            height, width: padded size of the views in pixels, for systems that leave it to the data.
        """

    @abc.abstractmethod
    def task(self, run: RunConfig) -> Task:
        """The model connected to its loss."""

    def starting_names(self, weights: Arrays) -> Arrays:
        """Weights of `RunConfig.init_from` under this model's names; those of a part may have others."""
        return weights

    def pretrained(self, run: RunConfig, shapes: Arrays) -> dict[str, Any]:
        """Weights of parts that a run without `init_from` starts from, by name.

        Args:
            run: whose fields name the files.
            shapes: dotted name -> anything with a `shape`: all that the model needs.

        Raises:
            FileNotFoundError, ValueError: a file is missing or does not fit.
        """
        return {}

    # What is stored for inference

    def facts(self, run: RunConfig, trained: Arrays) -> dict[str, Any]:
        """What inference must know beside the model: JSON, kept with the weights.

        Args:
            run: that made them.
            trained: its parameters by name.
        """
        return {}

    def left_out(self, run: RunConfig, trained: Arrays) -> str:
        """Pattern of weights that are not stored, because they are as the user has them in another file; "" for none.

        Args:
            run: names that file.
            trained: its parameters by name.
        """
        return ""

    def given(self, facts: Mapping[str, Any]) -> Arrays:
        """The weights that were left out, by name, if any were; `facts` are those stored with the others."""
        return {}

    # Inference

    def predictor(self, bundle: Bundle, **options: Any) -> Any:
        """An `inference.Predictor`, or one with its methods.

        Raises:
            ValueError: the system finds no entities, or a wrong option.
        """
        raise ValueError(f"{bundle.name} holds a {self.name}, which finds no entities")

    def grounder(self, bundle: Bundle, **options: Any) -> Any:
        """An `inference.grounding.grounder.Grounder`, or one with its methods.

        Raises:
            ValueError: the system grounds no text, or a wrong option.
        """
        raise ValueError(f"{bundle.name} holds a {self.name}, which grounds no text")

    def reconstructor(self, bundle: Bundle, **options: Any) -> Any:
        """An `inference.grounding.reconstruction.Reconstructor`, or one with its methods.

        Raises:
            ValueError: the system reconstructs no masks, or a wrong option.
        """
        raise ValueError(f"{bundle.name} holds a {self.name}, which reconstructs no masks")

    def views(self, model: Any, views: int | None) -> int:
        """Views per image of a compiled program, see `outputs`.

        Args:
            model: configuration.
            views: those asked for, None for the default.

        Raises:
            ValueError: the system has no such program, or the model not so many views.
        """
        raise ValueError(f"the inference of a {self.name} is not exported")

    def outputs(self, model: nnx.Module, image: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        """Inference as one compiled program.

        Args:
            model: the module.
            image: uint8 (B, T, H, W, 3).
            size: int32 (B, T, 2), height and width of every view in pixels.

        Returns:
            ``class_logits`` (B, Q, K+1) and ``mask_logits`` (B, Q, T, H/4, W/4), both float32.
        """
        raise NotImplementedError(f"{self.name} has no compiled program")

    # Checkpoints

    def families(self) -> list[Family]:
        """Checkpoints of PyTorch that become this model; one is a file in `esg_jax/interop/families`."""
        from esg_jax.interop.families import FAMILIES

        return [family for family in FAMILIES if family.config is self.config]
