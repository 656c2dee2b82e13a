"""CropFormer, and Mask2Former as the same class without view association."""

from esg_jax.models.cropformer.cropformer import CropFormer, CropFormerConfig, CropFormerOutput

__all__ = ["CropFormer", "CropFormerConfig", "CropFormerOutput"]
