"""A predicted mask and the one it should be, from records that hold both."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE


def pair_of(record: Mapping[str, Any], where: str) -> tuple[RLE, RLE]:
    """`pred` and `gt` of a record, as RLEs of one size.

    Raises:
        EvaluationError, MaskError: one is missing, no mask, or of another size.
    """
    pred, target = (mask_of(record, name, where) for name in ("pred", "gt"))
    check_same_size(pred, target, where)
    return pred, target


def mask_of(record: Mapping[str, Any], name: str, where: str) -> RLE:
    """The mask `record[name]`, an RLE or bool (H, W), as RLE."""
    if name not in record:
        raise EvaluationError(f"{where}: {name!r} is missing")
    value = record[name]
    if isinstance(value, Mapping):
        if "size" not in value:
            raise EvaluationError(f"{where}: {name!r} is no RLE, it has no 'size'")
        return rle.from_annotation(value, value["size"], f"{where}, {name}")
    value = np.asarray(value)
    if value.ndim != 2:
        raise EvaluationError(f"{where}: {name!r} must be an RLE or a mask (H, W), got shape {value.shape}")
    return rle.encode(value[None])[0]


def check_same_size(pred: RLE, target: RLE, where: str) -> None:
    """Raises EvaluationError when two masks differ in size."""
    if list(pred["size"]) != list(target["size"]):
        raise EvaluationError(f"{where}: prediction has size {pred['size']}, ground truth {target['size']}")
