"""GELLA in PyTorch, to run what `esg convert` writes (needs the `torch` extra).

There is no original code; modules and names follow our own. Language model and CLIP are transformers'. This is
inference only and imports nothing of ours but the PyTorch CropFormer: `gella.py`, `cropformer.py` and `backbones.py`
may be copied into a PyTorch project.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from esg_jax.interop.pytorch.backbones import make_backbone
from esg_jax.interop.pytorch.cropformer import Attention, PixelDecoder, Predictor, sine_position

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def load(folder, dtype=torch.float32):
    """The model stored in a folder that `esg convert gella.safetensors folder/` wrote, in evaluation mode."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    folder = Path(folder)
    with safe_open(folder / "gella.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["esg_jax_config"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    options = dict(local_files_only=True, dtype=dtype)
    clip = CLIPVisionModel.from_pretrained(str(folder / "clip"), **options) if (folder / "clip").is_dir() else None
    llm = LlamaForCausalLM.from_pretrained(str(folder / "llm"), **options) if (folder / "llm").is_dir() else None
    model = Gella(config, clip, llm)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(("clip.", "llm."))]
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its configuration: {missing or unexpected}")
    return model.to(dtype).eval()


class Projector(nn.Module):
    def __init__(self, kind, inputs, outputs):
        super().__init__()
        self.fc1 = nn.Linear(inputs, outputs)
        self.fc2 = nn.Linear(outputs, outputs) if kind == "mlp2x_gelu" else None

    def forward(self, x):
        x = self.fc1(x)
        return x if self.fc2 is None else self.fc2(F.gelu(x))


class ResoBlendLevel(nn.Module):
    def __init__(self, config, inputs):
        super().__init__()
        dim, self.config = config["dim"], config
        self.lateral = nn.Sequential(nn.Conv2d(inputs, dim, 1), nn.GroupNorm(32, dim))
        self.level_embed = nn.Parameter(torch.zeros(dim))
        if config["use_ca"]:
            self.cross = nn.MultiheadAttention(dim, config["num_heads"], batch_first=True)
            if config["ca_residual"]:
                self.cross_norm = nn.LayerNorm(dim)
        if config["use_ff"]:
            hidden = config["ffn_dim"]
            self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        if config["use_conv"]:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1)
            if config["conv_norm"]:
                self.conv_norm = nn.GroupNorm(32, dim)

    def mix(self, query, query_position, value, value_position):
        x = query
        if hasattr(self, "cross"):
            x = self.cross(query + query_position, value + value_position, value, need_weights=False)[0]
            if hasattr(self, "cross_norm"):
                x = self.cross_norm(query + x)
        return self.ffn(x) if hasattr(self, "ffn") else x

    def convolve(self, tokens, grid):
        x = tokens.transpose(1, 2).unflatten(2, grid)
        if hasattr(self, "conv"):
            x = self.conv(x)
            if hasattr(self, "conv_norm"):
                x = F.relu(self.conv_norm(x))
        return x

    def forward(self, features, image, blended, grid, pool):
        lateral = self.lateral(features)
        dim, mode = lateral.shape[1], self.config["mode"]
        grid_position = sine_position(*grid, dim).to(lateral)
        if mode == "pixel_query":
            size = tuple(lateral.shape[2:])
            tokens = lateral.flatten(2).transpose(1, 2)
            x = self.mix(tokens, sine_position(*size, dim).to(lateral), blended, grid_position)
            return self.convolve(x + tokens if self.config["use_res"] else x, size)
        memory = F.avg_pool2d(lateral, pool) if pool > 1 else lateral
        position = sine_position(*memory.shape[2:], dim).to(lateral) + self.level_embed
        x = self.mix(blended, grid_position, memory.flatten(2).transpose(1, 2), position)
        x = self.convolve(x + image if self.config["use_res"] else x, grid)
        x = F.interpolate(x, lateral.shape[2:], mode="bilinear", align_corners=False)
        if mode == "paper":
            return x
        return lateral + x if self.config["use_ca"] else lateral


class ResoBlend(nn.Module):
    def __init__(self, config, image_channels, channels):
        super().__init__()
        self.config = config
        self.image_proj = nn.Linear(image_channels, config["dim"])
        if config["use_sa"]:
            self.self_attention = Attention(config["dim"], config["num_heads"], "self_attn")
        self.levels = nn.ModuleList(ResoBlendLevel(config, inputs) for inputs in channels)

    def forward(self, image, features):
        """Image features (B, C, g, g) and the colormap's maps at strides 4..32 to maps of the same sizes."""
        grid = tuple(image.shape[2:])
        tokens = blended = self.image_proj(image.flatten(2).transpose(1, 2))
        if hasattr(self, "self_attention"):
            query = tokens + sine_position(*grid, tokens.shape[-1]).to(tokens)
            blended = self.self_attention(tokens, query, query, tokens)
        pool = self.config["ca_kv_pool"] or (4 if features[0].shape[2] >= 256 else 1)
        return [
            level(x, tokens, blended, grid, 1 if index else pool)
            for index, (level, x) in enumerate(zip(self.levels, features, strict=True))
        ]


class Association(nn.Module):
    def __init__(self, config, text_dim, entity_dim):
        super().__init__()
        self.config = config
        self.text_proj, self.entity_proj = self.projection(text_dim), self.projection(entity_dim)
        if config["scale"] == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.bias = nn.Parameter(torch.zeros(()))

    def projection(self, inputs):
        dim, layers = self.config["dim"], [nn.Linear(inputs, self.config["dim"])]
        if self.config["depth"] == 2:
            layers += [nn.ReLU(), nn.Linear(dim, dim)]
        return nn.Sequential(*layers)

    def forward(self, text, entity):
        logits = self.text_proj(text) @ self.entity_proj(entity).transpose(1, 2)
        if self.config["scale"] == "sqrt_dim":
            return logits * self.config["dim"] ** -0.5
        if self.config["scale"] == "learned":
            return logits * self.log_scale.exp() + self.bias
        return logits


class Gella(nn.Module):
    """The whole network; `config` is the nested dictionary of `esg_jax.config.to_dict`.

    `clip` and `llm` are transformers' CLIPVisionModel and LlamaForCausalLM, None where the configuration has none.
    """

    def __init__(self, config, clip=None, llm=None):
        super().__init__()
        self.config, self.clip, self.llm = config, clip, llm
        entities = config["entities"]
        if clip is None:
            self.image_encoder = make_backbone(config["vision"])
        channels = config["vision"]["width"] if clip is not None else self.image_encoder.out_channels[-1]
        encoder, dim = entities["colormap_encoder"], entities["resoblend"]["dim"]
        self.colormap_encoder = make_backbone(encoder)
        self.resoblend = ResoBlend(entities["resoblend"], channels, self.colormap_encoder.out_channels)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = PixelDecoder(entities["pixel_decoder"], (dim,) * 4)
        self.sem_seg_head.predictor = Predictor(entities["mask_decoder"], None)
        if config["llm"] is not None:
            width = config["llm"]["width"]
            self.projector = Projector(config["projector"], channels, width)
            self.association = Association(config["association"], width, entities["mask_decoder"]["hidden_dim"])

    def vision_tokens(self, image, size):
        """Features of images (B, 3, S, S) on the 0..255 scale, content at the top left: (B, C, g, g).

        `size` (B, 2): heights and widths before padding.
        """
        mean, std = (IMAGENET_MEAN, IMAGENET_STD)
        if self.clip is not None:
            mean, std = ([255 * value for value in values] for values in (CLIP_MEAN, CLIP_STD))
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (mean, std))
        x = (image.float() - mean) / std
        rows = torch.arange(x.shape[2], device=x.device)[:, None] < size[:, 0, None, None]
        columns = torch.arange(x.shape[3], device=x.device) < size[:, 1, None, None]
        x = (x * (rows & columns)[:, None]).to(self.resoblend.image_proj.weight)
        if self.clip is None:
            return self.image_encoder(x)[-1]
        tokens = self.clip(x, output_hidden_states=True).hidden_states[self.config["select_layer"]][:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def entities(self, vision, colormap):
        """Entities of colormaps (B, 3, H, W) on the 0..255 scale, black where there is none.

        Returns:
            Entityness logits (B, Q, 2), stride-4 mask logits (B, Q, H/4, W/4), embeddings (B, Q, C).
        """
        mean, std = (torch.tensor(v, device=colormap.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.colormap_encoder(((colormap.float() - mean) / std).to(vision))
        mask_features, memory = self.sem_seg_head.pixel_decoder(self.resoblend(vision, features))
        predictor, levels = self.sem_seg_head.predictor, []
        for maps in memory:
            size = maps.shape[2:]
            small = F.interpolate(mask_features, size, mode="bilinear", align_corners=False)
            position = sine_position(*size, maps.shape[1]).to(maps)
            levels.append((maps.flatten(2).transpose(1, 2), position, small.flatten(2).transpose(1, 2)))
        x = predictor.decode(predictor.query_feat.weight.expand(len(vision), -1, -1), levels)
        logits, embed = predictor.predict(x)
        return logits, torch.einsum("bqc,bchw->bqhw", embed, mask_features), predictor.decoder_norm(x)

    def text(self, vision, ids):
        """States (B, T, D) after the final norm; the image stands where `ids` is the configuration's `image_id`."""
        image = self.projector(vision.flatten(2).transpose(1, 2))
        places = ids == self.config["image_id"]
        embeds = self.llm.get_input_embeddings()(ids.masked_fill(places, 0))
        index = (places.cumsum(1) - 1).clamp(0, image.shape[1] - 1)
        inserted = image.gather(1, index[..., None].expand(-1, -1, image.shape[2]))
        embeds = torch.where(places[..., None], inserted.to(embeds), embeds)
        return self.llm.model(inputs_embeds=embeds).last_hidden_state

    def forward(self, image, size, colormap, ids, seg_pos):
        """Association logits (B, V, Q) of the nouns whose `<SEG>` tokens are at `seg_pos` (B, V), and `entities`."""
        vision = self.vision_tokens(image, size)
        logits, masks, embed = self.entities(vision, colormap)
        if self.config["seg_hidden"] == "predict":
            seg_pos = (seg_pos - 1).clamp(min=0)
        states = self.text(vision, ids)
        nouns = states.gather(1, seg_pos[..., None].expand(-1, -1, states.shape[2]))
        return self.association(nouns, embed), (logits, masks, embed)
