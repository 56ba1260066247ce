"""Networks that turn a normalised image into one map per stride; `encoders.py` wraps them.

    image    (N, 3, H, W)               normalised
    maps     (N, C_s, H/s, W/s)         a list, shallow to deep

Swin, arXiv:2103.14030, arXiv:2111.09883; ConvNeXt, arXiv:2201.03545; EfficientNet,
arXiv:1905.11946, its Lite variant as Google published it; timm's networks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth


class Stages(nn.Module):
    """The maps of a Swin or ConvNeXt of torchvision, each with its channels normalised.

    Between their stages nothing is normalised, so magnitudes differ by channel and depth. The
    LayerNorm has no weights of its own: the fusion's convolution follows, which has.
    """

    def __init__(self, features: nn.Sequential, *, channels_last: bool) -> None:
        super().__init__()
        self.features = features
        self.channels_last = channels_last  # Swin's tensors are (N, h, w, C)
        for module in features.modules():
            if isinstance(module, StochasticDepth):
                # It draws from the global generator, and a run could not be resumed bit for bit
                module.p = 0.0

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W) into the maps behind stages 1 to 4."""
        maps = []
        for number, stage in enumerate(self.features):
            x = stage(x)
            if number % 2:  # even ones embed and merge patches
                tap = x if self.channels_last else x.permute(0, 2, 3, 1)
                maps.append(F.layer_norm(tap, tap.shape[-1:]).permute(0, 3, 1, 2))
        return maps


class TimmStages(nn.Module):
    """Some maps of a timm network, as (N, C, h, w); a few of its families give (N, h, w, C)."""

    def __init__(self, network: nn.Module, wanted: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.wanted = tuple(wanted)
        self.channels = tuple(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W) into the wanted maps."""
        maps = self.network(x)
        return [channels_first(maps[i], self.channels[i]) for i in self.wanted]


@fx.wrap  # a tracer of `fused.py` does not know shapes, and keeps the call
def channels_first(x: Tensor, channels: int) -> Tensor:
    """Return a map as (N, C, h, w) that may be (N, h, w, C)."""
    return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)


class PlainStages(nn.Module):
    """A plain ViT of timm with patches of 16: four of its layers, resized to strides 4 to 32.

    ViTDet's simple feature pyramid (arXiv:2203.16527) learns to resize; a frozen encoder learns
    nothing, so here resizing has no weights, and fine scales take shallow layers. The magnitudes of
    layers differ, so each map has its channels normalised, as in `Stages`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W), multiples of 32, into the maps at strides 4, 8, 16, 32."""
        return pyramid([tokens.permute(0, 2, 3, 1) for tokens in self.network(x)])


class PlainViT(VisionTransformer):
    """A plain ViT of torchvision as `PlainStages`, under torchvision's names.

    Its positions are those of one size of image; for others they are interpolated, as DeiT does
    (arXiv:2012.12877).

    Args:
        layers: whose outputs become the maps, shallow to deep.
        sizes: of the network, as of `VisionTransformer`.
    """

    def __init__(self, layers: Sequence[int], **sizes: int) -> None:
        super().__init__(**sizes)
        self.heads = nn.Sequential()
        self.taps = {layer % len(self.encoder.layers) for layer in layers}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W), multiples of 32, into the maps at strides 4, 8, 16, 32."""
        patches = self.conv_proj(x)
        rows, columns = patches.shape[-2:]
        tokens = torch.cat(
            [self.class_token.expand(x.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        tokens = tokens + self._positions(rows, columns)
        maps = []
        for number, layer in enumerate(self.encoder.layers):
            tokens = layer(tokens)
            if number in self.taps:
                maps.append(tokens)
        maps[-1] = self.encoder.ln(maps[-1])
        return pyramid([tap[:, 1:].unflatten(1, (rows, columns)) for tap in maps])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return (1, 1 + rows * columns, C) for the class token and the patches."""
        own = self.image_size // self.patch_size
        first, grid = self.encoder.pos_embedding.split([1, own**2], dim=1)
        grid = grid.unflatten(1, (own, own)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def pyramid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn four (N, h, w, C) at stride 16 into (N, C, ...) at strides 4, 8, 16, 32, normalised."""
    fine, middle, same, coarse = (F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2) for x in maps)
    return [
        F.interpolate(fine, scale_factor=4, mode="bilinear"),
        F.interpolate(middle, scale_factor=2, mode="bilinear"),
        same,
        F.max_pool2d(coarse, 2),
    ]


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, without squeezes, with ReLU6, under timm's names and with its taps.

    Timm and TensorFlow pad what they halve by `same`: of even sides one more to the right and below
    than to the left and above. Sides are multiples of 32 here, so all of them are even.
    """

    # of each stage: kernel, stride, factor of the width within a block, channels, blocks
    STAGES = (
        (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
    )  # fmt: skip
    TAPS = (0, 1, 2, 4, 6)  # the last stages at strides 2, 4, 8, 16, 32

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self.conv_stem, self.bn1 = _same_conv(3, channels, 3, stride=2), _norm(channels)
        stages = []
        for kernel, stride, widen, out_channels, num in self.STAGES:
            blocks: list[nn.Module] = []
            for number in range(num):
                kind = InvertedResidual if widen > 1 else DepthwiseSeparable
                step = 1 if number else stride
                blocks.append(kind(channels, out_channels, kernel, step, channels * widen))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as timm does, per group
                fan_out = module.weight.shape[0] * module.weight[0, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W) into the maps at strides 2, 4, 8, 16, 32."""
        x = F.relu6(self.bn1(self.conv_stem(x)))
        maps = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return [maps[i] for i in self.TAPS]


class DepthwiseSeparable(nn.Module):
    """A convolution per channel, and one across the channels."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, _: int) -> None:
        super().__init__()
        self.conv_dw = _same_conv(channels, channels, kernel, stride=stride, groups=channels)
        self.bn1 = _norm(channels)
        self.conv_pw = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, C, h, w) into (N, D, h, w)."""
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class InvertedResidual(nn.Module):
    """Widen, a convolution per channel, narrow; and a sum where the shape stays."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int, width: int
    ) -> None:
        super().__init__()
        self.conv_pw = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = _norm(width)
        self.conv_dw = _same_conv(width, width, kernel, stride=stride, groups=width)
        self.bn2 = _norm(width)
        self.conv_pwl = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = _norm(out_channels)
        self.has_sum = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, C, h, w) into (N, D, h/s, w/s)."""
        wide = F.relu6(self.bn1(self.conv_pw(x)))
        wide = F.relu6(self.bn2(self.conv_dw(wide)))
        narrow = self.bn3(self.conv_pwl(wide))
        return x + narrow if self.has_sum else narrow


class Conv2dDepthwise(nn.Conv2d):
    """A convolution of each channel alone; on a CPU it learns in float32, whatever autocast says.

    For its gradients there is no fast way in bfloat16: a step of EfficientNet-Lite0 that learns
    took 1.8 times as long (median of 5 alternated steps, 1.4 to 2.0; torch 2.14, Xeon with AMX).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Turn (N, C, h, w) into (N, C, h/s, w/s)."""
        if not (self.training and input.is_cpu):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


class Conv2dSame(Conv2dDepthwise):
    """A convolution of stride 2 that pads even sides as TensorFlow's `same` does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Turn (N, C, h, w) into (N, D, h/2, w/2)."""
        left, right = (self.kernel_size[0] - 2) // 2, (self.kernel_size[0] - 1) // 2
        return super().forward(F.pad(input, (left, right, left, right)))


def _same_conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int, groups: int = 1
) -> nn.Conv2d:
    if stride == 1:
        return Conv2dDepthwise(
            in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False
        )
    return Conv2dSame(in_channels, out_channels, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
