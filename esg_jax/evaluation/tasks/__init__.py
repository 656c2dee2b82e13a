"""What a model is evaluated on: one file per task, and one entry here.

A recipe of `configs/recipes` is a task with its fields filled in. A task from elsewhere is appended to `TASKS` before
its recipe is read, e.g. by the recipe's own file; see docs/extending.md.
"""

from collections.abc import Mapping
from typing import Any

from esg_jax.config import TYPE_KEY, from_dict
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.tasks.entity import EntityTask
from esg_jax.evaluation.tasks.instance import InstanceTask
from esg_jax.evaluation.tasks.narrative import NarrativeTask
from esg_jax.evaluation.tasks.panoptic import PanopticTask
from esg_jax.evaluation.tasks.reconstruction import ReconstructionTask
from esg_jax.evaluation.tasks.referring import ReferringTask
from esg_jax.evaluation.tasks.semantic import SemanticTask
from esg_jax.evaluation.tasks.task import EvalTask

TASKS: list[type[EvalTask]] = [
    EntityTask,
    InstanceTask,
    PanopticTask,
    SemanticTask,
    ReconstructionTask,
    NarrativeTask,
    ReferringTask,
]


def task_from_dict(values: Mapping[str, Any], path: str = "config") -> EvalTask:
    """The task of a recipe, from its `to_dict`.

    Raises:
        EvaluationError: no task of that type.
        ValueError: as `from_dict`.
    """
    types = {task.__name__: task for task in TASKS}
    name = values.get(TYPE_KEY)
    if name not in types:
        raise EvaluationError(f"{path}.{TYPE_KEY} is {name!r}; choose one of {', '.join(types)}")
    return from_dict(types[name], values, path)
