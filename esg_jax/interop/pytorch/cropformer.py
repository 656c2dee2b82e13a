"""CropFormer and Mask2Former in PyTorch, to run what `esg convert` writes for PyTorch (needs the `torch` extra).

Names and shapes are those of the reference code, so that its checkpoints load with ``strict=True`` as well. This is
inference only and imports nothing of ours but its backbones: both files may be copied into a PyTorch project.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from esg_jax.interop.pytorch.backbones import make_backbone


def load(path):
    """The model stored in a `.pth` or `.safetensors` file of `esg convert`, in evaluation mode."""
    if str(path).endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            checkpoint = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no mapping)
            checkpoint |= file.metadata() or {}
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "esg_jax_config" not in checkpoint:
        raise ValueError(f"{path} holds no configuration; create CropFormer(config) and load its state dict")
    model = CropFormer(json.loads(checkpoint["esg_jax_config"]))
    model.load_state_dict(checkpoint["model"], strict=True)
    return model.eval()


def sine_position(height, width, features):
    """(H*W, C): the first half of the channels encodes y, the second x."""
    y, x = encode(height, features // 2, features // 2), encode(width, features // 2, features // 2)
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)
    return grid.flatten(0, 1)


def encode(count, features, exponent_features):
    angle = torch.arange(1, count + 1, dtype=torch.float32) / (count + 1e-6) * 2 * math.pi
    index = torch.arange(features)
    phase = angle[:, None] / 10000 ** (2 * (index // 2) / exponent_features)
    return torch.where(index % 2 == 0, phase.sin(), phase.cos())


class DeformableAttention(nn.Module):
    def __init__(self, features, heads, levels, points):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(features, heads * levels * points * 2)
        self.attention_weights = nn.Linear(features, heads * levels * points)
        self.value_proj = nn.Linear(features, features)
        self.output_proj = nn.Linear(features, features)

    def forward(self, query, value, reference, shapes):
        batch, tokens, features = query.shape
        value = self.value_proj(value).view(batch, tokens, self.heads, -1)
        grid = (batch, tokens, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*grid, 2)
        weights = self.attention_weights(query).view(batch, tokens, self.heads, -1).softmax(-1).view(grid)
        sums = 0
        for level, ((height, width), part) in enumerate(
            zip(shapes, value.split([h * w for h, w in shapes], 1), strict=True)
        ):
            maps = part.permute(0, 2, 3, 1).reshape(batch * self.heads, -1, height, width)
            scale = torch.tensor([width, height], dtype=query.dtype, device=query.device)
            points = reference[None, :, None, None] + offsets[:, :, :, level] / scale
            points = (2 * points - 1).transpose(1, 2).flatten(0, 1)  # batch*heads, tokens, points, 2
            sampled = F.grid_sample(maps, points, align_corners=False)
            sums = sums + (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(sums.view(batch, features, tokens).transpose(1, 2))


class EncoderLayer(nn.Module):
    def __init__(self, features, heads, levels, points, hidden):
        super().__init__()
        self.self_attn = DeformableAttention(features, heads, levels, points)
        self.norm1 = nn.LayerNorm(features)
        self.linear1 = nn.Linear(features, hidden)
        self.linear2 = nn.Linear(hidden, features)
        self.norm2 = nn.LayerNorm(features)

    def forward(self, x, position, reference, shapes):
        x = self.norm1(x + self.self_attn(x + position, x, reference, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class NormedConv(nn.Conv2d):
    """Convolution without bias, with GroupNorm."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(32, outputs)

    def forward(self, x):
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    def __init__(self, config, channels):
        super().__init__()
        width, (res2, *deep) = config["conv_dim"], channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, width, 1), nn.GroupNorm(32, width)) for inputs in reversed(deep)
        )
        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.zeros(len(deep), width))
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            EncoderLayer(width, config["num_heads"], len(deep), config["num_points"], config["ffn_dim"])
            for _ in range(config["num_layers"])
        )
        self.mask_features = nn.Conv2d(width, config["mask_dim"], 1)
        self.adapter_1 = NormedConv(res2, width, 1)
        self.layer_1 = NormedConv(width, width, 3)

    def forward(self, features):
        """Maps res2..res5 to (mask features, [maps at strides 32, 16, 8])."""
        res2, *deep = features
        maps = [project(x) for project, x in zip(self.input_proj, reversed(deep), strict=True)]
        shapes = [x.shape[2:] for x in maps]
        level_embed = self.transformer.level_embed
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        position, reference = [], []
        for level, (height, width) in enumerate(shapes):
            position.append(sine_position(height, width, tokens.shape[-1]).to(tokens) + level_embed[level])
            y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
            reference.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1).to(tokens))
        position, reference = torch.cat(position), torch.cat(reference)
        for layer in self.transformer.encoder.layers:
            tokens = layer(tokens, position, reference, shapes)
        parts = tokens.transpose(1, 2).split([h * w for h, w in shapes], 2)
        memory = [part.unflatten(2, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
        lateral = self.adapter_1(res2)
        top_down = F.interpolate(memory[-1], lateral.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_features(F.relu(self.layer_1(lateral + top_down))), memory


class Attention(nn.Module):
    """Post-norm attention; `name` is what the reference calls the attention module."""

    def __init__(self, features, heads, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.MultiheadAttention(features, heads, batch_first=True))
        self.norm = nn.LayerNorm(features)

    def forward(self, x, query, key, value, blocked=None):
        return self.norm(x + getattr(self, self.name)(query, key, value, attn_mask=blocked, need_weights=False)[0])


class FeedForward(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.linear1 = nn.Linear(features, hidden)
        self.linear2 = nn.Linear(hidden, features)
        self.norm = nn.LayerNorm(features)

    def forward(self, x):
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class Association(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        layers, heads = range(config["num_layers"]), config["num_heads"]
        self.enc_crosattn_3d = nn.ModuleList(Attention(width, heads, "multihead_attn") for _ in layers)
        self.enc_selfattn_3d = nn.ModuleList(Attention(width, heads, "self_attn") for _ in layers)
        self.enc_ffn_3d = nn.ModuleList(FeedForward(width, config["ffn_dim"]) for _ in layers)

    def forward(self, states, query_embed):
        """Query states (B, T, Q, C) of all views to (B, Q, C)."""
        x = states[:, 0]
        key, value = (states + query_embed).flatten(1, 2), states.flatten(1, 2)
        for cross, self_attention, ffn in zip(self.enc_crosattn_3d, self.enc_selfattn_3d, self.enc_ffn_3d, strict=True):
            x = cross(x, x + query_embed, key, value)
            x = ffn(self_attention(x, x, x, x))
        return x


class Predictor(nn.Module):
    def __init__(self, config, association):
        super().__init__()
        width, heads, layers = config["hidden_dim"], config["num_heads"], range(config["num_layers"])
        self.heads = heads
        self.transformer_self_attention_layers = nn.ModuleList(Attention(width, heads, "self_attn") for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(
            Attention(width, heads, "multihead_attn") for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(width, config["ffn_dim"]) for _ in layers)
        if association:
            self.make_3d = Association(association, width)
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(config["num_queries"], width)
        self.query_embed = nn.Embedding(config["num_queries"], width)
        self.level_embed = nn.Embedding(3, width)
        self.class_embed = nn.Linear(width, config["num_classes"] + 1)
        self.mask_embed = nn.Module()
        sizes = (width, width, width, config["mask_dim"])
        self.mask_embed.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))

    def predict(self, x):
        x = self.decoder_norm(x)
        first, second, third = self.mask_embed.layers
        return self.class_embed(x), third(F.relu(second(F.relu(first(x)))))

    def decode(self, x, levels):
        """Queries (N, Q, C) against [(tokens, position, mask features)] per level; final queries."""
        embed = self.query_embed.weight
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for index, (cross, self_attention, ffn) in enumerate(layers):
            tokens, position, features = levels[index % len(levels)]
            blocked = self.predict(x)[1] @ features.transpose(1, 2) < 0
            blocked &= ~blocked.all(-1, keepdim=True)
            value = tokens + self.level_embed.weight[index % len(levels)]
            x = cross(x, x + embed, value + position, value, blocked.repeat_interleave(self.heads, 0))
            x = ffn(self_attention(x, x + embed, x + embed, x))
        return x

    def forward(self, mask_features, memory, batch):
        """Features of all views to (class logits (B, Q, K+1), mask logits (B, Q, T, h, w)) of the last level."""
        single, joint = [], []
        for maps in memory:
            views, features, height, width = maps.shape
            tokens = maps.flatten(2).transpose(1, 2)
            small = F.interpolate(mask_features, (height, width), mode="bilinear", align_corners=False)
            small = small.flatten(2).transpose(1, 2)
            position = sine_position(height, width, features).to(maps)
            single.append((tokens, position, small))
            count = views // batch
            view = encode(count, features, features).to(maps)
            position = (view[:, None] + position).flatten(0, 1)
            joint.append((tokens.reshape(batch, -1, features), position, small.reshape(batch, -1, small.shape[-1])))
        x = self.decode(self.query_feat.weight.expand(len(mask_features), -1, -1), single)
        features = mask_features.unflatten(0, (batch, -1))
        if hasattr(self, "make_3d"):
            x = self.decode(self.make_3d(x.unflatten(0, (batch, -1)), self.query_embed.weight), joint)
        logits, embed = self.predict(x)
        return logits, torch.einsum("bqc,btchw->bqthw", embed, features)


class CropFormer(nn.Module):
    """The whole network; `config` is the nested dictionary of `esg_jax.config.to_dict`."""

    def __init__(self, config):
        super().__init__()
        self.backbone = make_backbone(config["backbone"])
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = PixelDecoder(config["pixel_decoder"], self.backbone.out_channels)
        self.sem_seg_head.predictor = Predictor(config["mask_decoder"], config["association"])
        weight = torch.ones(config["mask_decoder"]["num_classes"] + 1)
        weight[-1] = 0.1
        for name in ("criterion_2d", "criterion_3d") if config["association"] else ("criterion",):
            self.add_module(name, nn.Module())
            getattr(self, name).register_buffer("empty_weight", weight.clone())
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1), persistent=False)

    def forward(self, image, size):
        """Predicts entities.

        Args:
            image: (B, T, 3, H, W) RGB on the 0..255 scale, views padded at the bottom and right to a multiple of 32;
                T = 1 without association.
            size: (B, T, 2) heights and widths before padding.

        Returns:
            Class logits (B, Q, K+1) and stride-4 mask logits (B, Q, T, H/4, W/4).
        """
        x = (image.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        rows = torch.arange(x.shape[3], device=x.device)[:, None] < size[..., 0, None, None]
        columns = torch.arange(x.shape[4], device=x.device) < size[..., 1, None, None]
        x = x * (rows & columns)[:, :, None]
        mask_features, memory = self.sem_seg_head.pixel_decoder(self.backbone(x.flatten(0, 1)))
        return self.sem_seg_head.predictor(mask_features, memory, len(image))
