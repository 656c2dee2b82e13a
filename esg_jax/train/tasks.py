"""What is trained: a model connected to its loss."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from esg_jax import sharding
from esg_jax.losses.cropformer import Assignment, LossConfig, cropformer_loss, loss_and_assignment, loss_normalizers
from esg_jax.losses.gella import GellaLossConfig, answer_loss, association_loss
from esg_jax.models.backbones.frozen_norm import running_statistics, use_batch_statistics
from esg_jax.models.cropformer import CropFormer
from esg_jax.models.gella import Gella
from esg_jax.models.gella.colormap import pack_labels
from esg_jax.train.step import STATISTICS, Batch, Metrics

# Number of the task in a batch, see `input.narratives.TASKS`.
DESCRIPTION = 0


@dataclasses.dataclass(frozen=True)
class SegmentationTask:
    """CropFormer and Mask2Former: entity, instance, panoptic or semantic masks.

    Attributes:
        config: weights of the losses and number of points.
        num_queries: of the model.
    """

    config: LossConfig
    num_queries: int
    whole_batch = False

    def inputs(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """All of it."""
        return batch

    def normalizers(self, batch: Batch) -> Any:
        """Numbers of target masks and sums of class weights over the batch."""
        return loss_normalizers(batch, self.num_queries, self.config)

    def loss(self, model: CropFormer, batch: Batch, keys: jax.Array, normalizers: Any) -> tuple[jax.Array, Metrics]:
        """All losses of some images; every image draws points and drop path from its own key."""
        views = batch["image"].shape[1]
        keys = jax.vmap(lambda key: jax.random.split(key, views + 1))(keys)  # (images, views + 1)
        output = model(batch["image"], batch["size"], drop_path_key=keys[:, 1:].reshape(-1))
        return cropformer_loss(output, batch, keys[:, 0], self.config, normalizers=normalizers)


@dataclasses.dataclass(frozen=True)
class GroundingTask:
    """GELLA: reconstruction of entities, their association with nouns, and answers.

    Batches of text only (without `label_map`) train the answers alone; a model without language model trains the
    reconstruction alone, one whose entities are embedded directly (`models.entity_variants`) has none. Each kind of
    batch is a program of its own.

    Attributes:
        config: weights of the losses.
        num_queries: of the mask decoder.
    """

    config: GellaLossConfig
    num_queries: int
    whole_batch = True

    def inputs(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Everything for the tasks with phrases; a description trains the language model alone (section 5.3)."""
        unused = {"task"}
        mixed = "reconstruct" in batch  # every sample has a task of its own, so the program is the same for all
        if "task" in batch and not mixed and int(batch["task"][0]) == DESCRIPTION:
            unused |= {"label_map", "map_size", "links", "linked", "seg_pos", "seg_valid"}
        return {name: value for name, value in batch.items() if name not in unused}

    def normalizers(self, batch: Batch) -> Any:
        """Numbers of entities, of nouns with a link and of answer tokens over the batch."""
        out = {}
        if "label_map" in batch:
            out |= loss_normalizers(self._targets(batch), self.num_queries, self.config.reconstruction)
        if "ids" in batch:
            out["tokens"] = jnp.sum(batch["answer"][:, 1:]).astype(jnp.float32)
            if "links" in batch:
                out["nouns"] = jnp.sum(batch["linked"] & batch["seg_valid"]).astype(jnp.float32)
        return out

    def loss(self, model: Gella, batch: Batch, keys: jax.Array, normalizers: Any) -> tuple[jax.Array, Metrics]:
        """All losses that the batch has targets for."""
        config = self.config
        total, terms = jnp.zeros(()), {}
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)  # colours, points, drop path, adapters
        vision, statistics = self._vision(model, batch, keys[:, :3], normalizers)
        if "label_map" in batch:
            segmentation, terms, embed, assignment = vision[1:]
            total += config.segmentation * segmentation
        if "ids" in batch:
            text = functools.partial(model.text, vision[0], batch["ids"], lora_key=keys[0, 3], pin=sharding.pin_batch)
            blocks = model.config.noun_blocks
            hidden = text() if config.answer or blocks is None else None
            # Weight 0 leaves the vocabulary out: with a frozen language model no weight depends on its answers.
            if config.answer:
                answer = answer_loss(
                    lambda states: model.llm.logits(sharding.pin_batch(states)),
                    hidden,
                    batch["ids"],
                    batch["answer"],
                    normalizer=normalizers["tokens"],
                )
                terms["loss_answer"] = config.answer * answer
                total += terms["loss_answer"]
            if "links" in batch:
                states = hidden if blocks is None else text(num_blocks=blocks)
                logits = model.associate(model.noun_states(states, batch["seg_pos"]), embed)
                # A row without entity is no negative: a query could have become an entity, such a row cannot.
                pairs = config if model.config.reconstructs else dataclasses.replace(config, unmatched="ignore")
                association = association_loss(
                    logits,
                    batch["links"],
                    batch["linked"] & batch["seg_valid"],
                    assignment,
                    pairs,
                    normalizer=normalizers["nouns"],
                )
                terms["loss_association"] = config.association * association
                total += terms["loss_association"]
        return total, terms | statistics

    def _targets(self, batch: Batch) -> dict[str, jax.Array]:
        """Reconstruction targets: the entities painted into the label maps."""
        masks, present = pack_labels(batch["label_map"], self.num_queries)
        mixed = {}
        if "reconstruct" in batch:
            mixed = {"counted": batch["reconstruct"]}
            present &= batch["reconstruct"][:, None]
        return {
            "masks": masks[:, :, None],
            "labels": jnp.zeros(present.shape, jnp.int32),
            "present": present,
            "valid": present[..., None],
            **mixed,
        }

    def _vision(self, model: Gella, batch: Batch, keys: jax.Array, normalizers: Any) -> tuple[tuple, dict]:
        """Image grid and, with label maps, the loss, its terms, E_vc and the assignment; then statistics of the batch.

        Every device works on its own images, with the weights of this small branch whole: matching and kernels must
        not be partitioned, see `map_images`.
        """
        mesh = jax.sharding.get_abstract_mesh()
        graph, state = nnx.split(model.visual)
        sizes = {name: batch[name] for name in ("image_size", "map_size") if name in batch}
        images = sizes | {name: batch[name] for name in ("image", "label_map", "reconstruct") if name in batch}

        def local(state, images, keys, normalizers):
            branch = nnx.merge(graph, state)
            # The only thing that crosses devices here: batch normalisation sees the whole batch.
            use_batch_statistics(branch, () if mesh.empty else sharding.BATCH_AXES)
            vision = branch.vision_tokens(images["image"], images["image_size"])
            if "label_map" not in images:
                return (vision,), running_statistics(branch)
            output = branch.entities(
                vision,
                images["label_map"],
                keys[:, 0],
                size_b2=images.get("map_size"),
                drop_path_key=keys[:, 2],
                all_predictions=True,
            )
            if output.masks is None:
                rows = jnp.broadcast_to(jnp.arange(self.num_queries), output.present.shape)
                loss, terms, assignment = jnp.zeros(()), {}, Assignment(rows, output.present)
            else:
                loss, terms, assignment = loss_and_assignment(
                    output.masks, self._targets(images), keys[:, 1], self.config.reconstruction, normalizers=normalizers
                )
            sums = jax.tree.map(lambda x: x[None], (loss, terms))
            return (vision, *sums, output.embed, assignment), running_statistics(branch)

        if mesh.empty:
            out, statistics = local(state, images, keys, normalizers)
        else:
            axes = set(mesh.axis_names) if mesh.shape[sharding.MODEL] == 1 else set(sharding.BATCH_AXES)
            spec = sharding.BATCH_SPEC
            specs = dict(in_specs=(P(), spec, spec, P()), out_specs=(spec, P()))
            run = jax.shard_map(local, mesh=mesh, **specs, axis_names=axes, check_vma=False)
            out, statistics = run(state, images, keys, normalizers)
        if statistics:
            statistics = {STATISTICS: {f"visual.{name}": value for name, value in statistics.items()}}
        if len(out) == 1:
            return out, statistics
        vision, loss, terms, *rest = out
        loss, terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), (loss, terms))
        return (vision, loss, terms, *rest), statistics
