"""What is trained: a model connected to its loss."""

import dataclasses
from typing import Any

import jax

from esg_jax.losses.cropformer import LossConfig, cropformer_loss, loss_normalizers
from esg_jax.models.cropformer import CropFormer
from esg_jax.train.step import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class SegmentationTask:
    """CropFormer and Mask2Former: entity, instance, panoptic or semantic masks.

    Attributes:
        config: weights of the losses and number of points.
        num_queries: of the model.
    """

    config: LossConfig
    num_queries: int

    def normalizers(self, batch: Batch) -> Any:
        """Numbers of target masks and sums of class weights over the batch."""
        return loss_normalizers(batch, self.num_queries, self.config)

    def loss(self, model: CropFormer, batch: Batch, keys: jax.Array, normalizers: Any) -> tuple[jax.Array, Metrics]:
        """All losses of some images; every image draws points and drop path from its own key."""
        views = batch["image"].shape[1]
        keys = jax.vmap(lambda key: jax.random.split(key, views + 1))(keys)  # (images, views + 1)
        output = model(batch["image"], batch["size"], drop_path_key=keys[:, 1:].reshape(-1))
        return cropformer_loss(output, batch, keys[:, 0], self.config, normalizers=normalizers)
