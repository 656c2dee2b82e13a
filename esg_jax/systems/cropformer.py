"""CropFormer, and Mask2Former as the same without view association: images to entity masks."""

import jax
import jax.numpy as jnp

from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.systems.system import System


class CropFormerSystem(System):
    """Checkpoints: `interop/families/cropformer.py`, `interop/families/mask2former.py`."""

    name = "CropFormer"
    config = CropFormerConfig
    module = CropFormer

    def data_configs(self):
        from esg_jax.input.pipeline import DataConfig

        return (DataConfig,)

    def loss_config(self):
        from esg_jax.losses.cropformer import LossConfig

        return LossConfig

    def check(self, run):
        model, data = run.model, run.data
        if data.mapper == "colormap":
            raise ValueError("data.mapper 'colormap' is for GELLA; choose entity_crop, entity_full or lsj")
        if data.mapper == "entity_crop" and model.association is None:
            raise ValueError(
                "data.mapper 'entity_crop' gives two views, but the model has no association module; "
                "use 'entity_full' or 'lsj', or a model with association"
            )
        if data.mapper != "entity_crop" and model.association is not None:
            raise ValueError(
                f"data.mapper {data.mapper!r} gives one view, but the model has an association module; use "
                "'entity_crop', or model.association=None"
            )
        if getattr(model.backbone, "batch_statistics", False):
            raise ValueError("model.backbone.batch_statistics is for GELLA; CropFormer's step keeps statistics fixed")
        if data.class_agnostic and model.mask_decoder.num_classes != 1:
            raise ValueError(
                f"model.mask_decoder.num_classes is {model.mask_decoder.num_classes}, but data.class_agnostic "
                "maps every label to 0"
            )

    def batches(self, run, process_index, process_count):
        from esg_jax.input.pipeline import train_iterator

        return train_iterator(run.data, process_index, process_count)

    def batch_shapes(self, run, height, width):
        batch, slots = run.data.batch_size, run.data.max_entities
        views = 2 if run.data.mapper == "entity_crop" else 1
        return {
            "image": jax.ShapeDtypeStruct((batch, views, height, width, 3), jnp.uint8),
            "size": jax.ShapeDtypeStruct((batch, views, 2), jnp.int32),
            "masks": jax.ShapeDtypeStruct((batch, slots, views, height, width // 8), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((batch, slots), jnp.int32),
            "present": jax.ShapeDtypeStruct((batch, slots), jnp.bool_),
            "valid": jax.ShapeDtypeStruct((batch, slots, views), jnp.bool_),
        }

    def task(self, run):
        from esg_jax.train.tasks import SegmentationTask

        return SegmentationTask(run.loss, run.model.mask_decoder.num_queries)

    def pretrained(self, run, shapes):
        from esg_jax.train.initial import backbone_weights

        return backbone_weights(run.backbone_weights, shapes, "backbone.") if run.backbone_weights else {}

    def facts(self, run, trained):
        if run.data.mapper == "lsj":
            return {"inference": {}}  # the reference tests lsj models at the defaults of 800 and 1333
        # The largest view size of training, as the reference has it.
        return {"inference": {"min_size": max(run.data.short_edges), "max_size": run.data.max_size}}

    def predictor(self, bundle, **options):
        from esg_jax.inference.entities.predictor import Predictor

        return Predictor.from_bundle(bundle, **options)

    def views(self, model, views):
        joint = model.association is not None
        views = views or (5 if joint else 1)
        if views > 1 and not joint:
            raise ValueError("this model has no view association (it is a plain Mask2Former); use views=1")
        return views

    def outputs(self, model, image, size):
        output = model(image, size, all_predictions=False)
        if output.batch is None:
            return {"class_logits": output.image.logits[-1], "mask_logits": output.image_mask_logits().swapaxes(1, 2)}
        return {"class_logits": output.batch.logits[-1], "mask_logits": output.batch_mask_logits()}
