"""Backbones in PyTorch under the reference's names (see `cropformer.py` beside)."""

import torch
import torch.nn.functional as F
from torch import nn


class WindowAttention(nn.Module):
    def __init__(self, features, heads, window):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", index)

    def forward(self, windows, penalty):
        """(B, W, N, C), and (W, N, N) added to the logits or None."""
        batch, count, tokens, features = windows.shape
        qkv = self.qkv(windows).view(batch, count, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv[0], qkv[1], qkv[2]
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if penalty is not None:
            logits = logits + penalty[:, None]
        return self.proj((logits.softmax(-1) @ value).transpose(2, 3).reshape(batch, count, tokens, features))


class SwinBlock(nn.Module):
    def __init__(self, features, heads, window, shift, mlp_ratio):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(features)
        self.attn = WindowAttention(features, heads, window)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(features, int(features * mlp_ratio))
        self.mlp.fc2 = nn.Linear(int(features * mlp_ratio), features)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

    def attend(self, x):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        padded, penalty = x.shape[1:3], None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            penalty = self.penalty(*padded).to(x)
        x = self.windows_to_map(self.attn(self.map_to_windows(x), penalty), *padded)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def map_to_windows(self, x):
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        return x.transpose(2, 3).reshape(batch, -1, self.window**2, channels)

    def windows_to_map(self, x, height, width):
        batch, channels = x.shape[0], x.shape[-1]
        x = x.view(batch, height // self.window, width // self.window, self.window, self.window, channels)
        return x.transpose(2, 3).reshape(batch, height, width, channels)

    def penalty(self, height, width):
        """-100 between tokens that only the cyclic shift brought into one window."""

        def region(size):
            index = torch.arange(size)
            return (index >= size - self.window).int() + (index >= size - self.shift).int()

        regions = (3 * region(height)[:, None] + region(width))[None, ..., None]
        regions = self.map_to_windows(regions)[0, ..., 0]
        return (regions[:, :, None] != regions[:, None]).float() * -100


class PatchMerging(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.reduction = nn.Linear(4 * features, 2 * features, bias=False)
        self.norm = nn.LayerNorm(4 * features)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self, config):
        super().__init__()
        features, window = config["embed_dim"], config["window_size"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, features, 4, 4)
        self.patch_embed.norm = nn.LayerNorm(features)
        self.layers = nn.ModuleList()
        self.out_channels = []
        for stage, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
            layer = nn.Module()
            layer.blocks = nn.ModuleList(
                SwinBlock(features, heads, window, window // 2 if block % 2 else 0, config["mlp_ratio"])
                for block in range(depth)
            )
            layer.downsample = PatchMerging(features) if stage < 3 else None
            self.layers.append(layer)
            self.add_module(f"norm{stage}", nn.LayerNorm(features))
            self.out_channels.append(features)
            features *= 2

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        outputs = []
        for stage, layer in enumerate(self.layers):
            for block in layer.blocks:
                x = block(x)
            outputs.append(getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2))
            if layer.downsample is not None:
                x = layer.downsample(x)
        return outputs


class FrozenBatchNorm(nn.Module):
    def __init__(self, features):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class ConvNorm(nn.Conv2d):
    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = FrozenBatchNorm(outputs)

    def forward(self, x):
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    def __init__(self, inputs, middle, stride):
        super().__init__()
        self.shortcut = ConvNorm(inputs, 4 * middle, 1, stride) if inputs != 4 * middle else None
        self.conv1 = ConvNorm(inputs, middle, 1)
        self.conv2 = ConvNorm(middle, middle, 3, stride)
        self.conv3 = ConvNorm(middle, 4 * middle, 1)

    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + shortcut)


class ResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        inputs = config["stem_channels"]
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, inputs, 7, 2)
        self.out_channels = []
        for stage, depth in enumerate(config["depths"]):
            middle = config["bottleneck_channels"] * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(inputs, middle, 2 if stage and not block else 1))
                inputs = 4 * middle
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))
            self.out_channels.append(inputs)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        outputs = []
        for stage in range(2, 6):
            x = getattr(self, f"res{stage}")(x)
            outputs.append(x)
        return outputs


def _conv_bn(inputs, outputs, kernel, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        middle = inputs * expansion
        expand = [nn.Sequential(*_conv_bn(inputs, middle, 1), nn.ReLU6())] if expansion != 1 else []
        depthwise = nn.Sequential(*_conv_bn(middle, middle, 3, stride, middle), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, *_conv_bn(middle, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's names; the last 1x1 convolution of the classifier is left out."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    TAPS = (3, 6, 13, 17)

    def __init__(self, config):
        super().__init__()
        if config.get("same_padding", False) or config.get("epsilon", 1e-5) != 1e-5:
            raise ValueError("only torchvision's MobileNetV2 is implemented (symmetric padding, epsilon 1e-5)")
        features, inputs = [nn.Sequential(*_conv_bn(3, 32, 3, 2), nn.ReLU6())], 32
        for expansion, outputs, depth, stride in self.STAGES:
            for block in range(depth):
                features.append(InvertedResidual(inputs, outputs, expansion, 1 if block else stride))
                inputs = outputs
        self.features = nn.Sequential(*features)
        self.out_channels = [24, 32, 96, 320]

    def forward(self, x):
        outputs = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.TAPS:
                outputs.append(x)
        return outputs


BACKBONES = {"SwinConfig": Swin, "ResNetConfig": ResNet, "MobileNetV2Config": MobileNetV2}


def make_backbone(config):
    """The backbone that a nested dictionary describes."""
    if config["type"] not in BACKBONES:
        raise ValueError(f"there is no PyTorch module for a {config['type']}, only for {', '.join(BACKBONES)}")
    return BACKBONES[config["type"]](config)
