"""What is trained: a model connected to its loss."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from esg_jax.losses.cropformer import LossConfig, cropformer_loss, loss_normalizers
from esg_jax.models.cropformer import CropFormer, CropFormerOutput
from esg_jax.models.mask_decoder import DecoderOutput
from esg_jax.train.sharding import BATCH_AXES, BATCH_SPEC
from esg_jax.train.step import Batch, Metrics, batch_shard_map


@dataclasses.dataclass(frozen=True)
class SegmentationTask:
    """CropFormer and Mask2Former: entity, instance, panoptic or semantic masks.

    Attributes:
        loss_config: weights and number of points.
        num_queries: of the model.
        drop_path: whether the backbone drops residual branches.
    """

    loss_config: LossConfig
    num_queries: int
    drop_path: bool = True

    def normalizers(self, batch: Batch) -> Any:
        return loss_normalizers(batch, self.num_queries, self.loss_config)

    def loss(
        self, model: CropFormer, batch: Batch, key: jax.Array, normalizers: Any, mesh: Mesh | None
    ) -> tuple[jax.Array, Metrics]:
        keys = jax.vmap(jax.random.split)(key)  # (batch, 2)
        output = model(batch["image"], batch["size"], drop_path_key=keys[0, 0] if self.drop_path else None)
        targets = {name: value for name, value in batch.items() if name != "image"}

        def local(output, targets, keys, normalizers):
            return cropformer_loss(output, targets, keys, self.loss_config, normalizers=normalizers)

        if mesh is None:
            return local(output, targets, keys[:, 1], normalizers)
        decoder = P(None, BATCH_AXES)  # (predictions, items, ...)
        output_specs = CropFormerOutput(
            image=DecoderOutput(decoder, decoder),
            batch=None if output.batch is None else DecoderOutput(decoder, decoder),
            mask_features=BATCH_SPEC,
        )
        return batch_shard_map(local, mesh, (output_specs, BATCH_SPEC, BATCH_SPEC, P()))(
            output, targets, keys[:, 1], normalizers
        )
