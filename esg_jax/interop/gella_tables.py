"""Names of GELLA in PyTorch. There is no original, so these are the reference; `torch_gella.py` has the modules.

An exported GELLA is a folder: its own modules in `gella.safetensors`, the language model in `llm/` and CLIP in `clip/`
as transformers writes them. In this table the names of the latter two carry the folder as prefix.
"""

import functools
import operator

from esg_jax.interop import backbone_tables as backbones
from esg_jax.interop.cropformer_tables import HEADS
from esg_jax.interop.language_tables import CLIP_VISION, LLAMA
from esg_jax.interop.rules import Table, conv, linear, norm, packed_attention, pointwise, same

_LEVEL = "resoblend.levels.{i}"

_OWN = Table(
    rules=(
        *linear("projector.fc1", "projector.fc1"),
        *linear("projector.fc2", "projector.fc2"),
        *linear("association.text_proj.{i*2}", "association.text_proj.layers.{i}"),  # ReLU between
        *linear("association.entity_proj.{i*2}", "association.entity_proj.layers.{i}"),
        *same("association.log_scale", "association.log_scale"),
        *same("association.bias", "association.bias"),
    )
)
_RESOBLEND = Table(
    rules=(
        *linear("resoblend.image_proj", "resoblend.image_proj"),
        *packed_attention("resoblend.self_attention.self_attn", "resoblend.self_attention.attention"),
        *norm("resoblend.self_attention.norm", "resoblend.self_attention.norm"),
        *pointwise(f"{_LEVEL}.lateral.0", f"{_LEVEL}.lateral.conv", bias=True),
        *norm(f"{_LEVEL}.lateral.1", f"{_LEVEL}.lateral.norm"),
        *same(f"{_LEVEL}.level_embed", f"{_LEVEL}.level_embed"),
        *packed_attention(f"{_LEVEL}.cross", f"{_LEVEL}.cross"),
        *norm(f"{_LEVEL}.cross_norm", f"{_LEVEL}.cross_norm"),
        *linear(f"{_LEVEL}.ffn.{{j*2}}", f"{_LEVEL}.ffn.layers.{{j}}"),
        *conv(f"{_LEVEL}.conv", f"{_LEVEL}.conv", bias=True),
        *norm(f"{_LEVEL}.conv_norm", f"{_LEVEL}.conv_norm"),
    )
)
_VISUAL, _ENTITIES = "visual.", "visual.entity_encoder."
# The first rule that fits a name is taken, so alternatives for the same place may stand side by side.
GELLA = functools.reduce(
    operator.add,
    (
        _OWN,
        _RESOBLEND.prefixed("", _ENTITIES),
        backbones.MOBILENET_TORCHVISION.prefixed("colormap_encoder.", f"{_ENTITIES}colormap_encoder."),
        backbones.SWIN_DETECTION.prefixed("colormap_encoder.", f"{_ENTITIES}colormap_encoder."),
        HEADS.prefixed("", _ENTITIES),
        backbones.MOBILENET_TORCHVISION.prefixed("image_encoder.", f"{_VISUAL}image_encoder."),
        CLIP_VISION.prefixed("clip.", f"{_VISUAL}image_encoder."),
        LLAMA.prefixed("llm.", "llm."),
    ),
)
