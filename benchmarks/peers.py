"""Other people's change detectors with the interface of ours, for a comparison at equal terms.

They get bfloat16, channels_last, a fused optimizer and the engine's loop as ours does. Their
encoders learn, ours is frozen: that is part of the point, and "ours, the encoder learns" is timed
beside them. smp's U-Net, the stronger baseline, is there where it is installed:
pip install segmentation-models-pytorch.
"""

import itertools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FCSiamConc(nn.Module):
    """FC-Siam-conc, doi:10.1109/ICIP.2018.8451652, figure 1b: 1.5 M parameters.

    Of the published models that were timed for this repository the fastest one.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.encoder = nn.ModuleList(
            _convs([before, *[width] * (2 + (width > 32))])
            for before, width in zip((3, *widths), widths, strict=False)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 3, padding=1, stride=2, output_padding=1)
            for width in (128, 64, 32, 16)
        )
        self.decoder = nn.ModuleList(
            [
                _convs([384, 128, 128, 64]),
                _convs([192, 64, 64, 32]),
                _convs([96, 32, 16]),
                _convs([48, 16]),
            ]
        )
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Turn uint8 (B, 3, H, W) into logits (B, 1, H, W); sides are multiples of 16."""
        x = torch.cat([before, after]).contiguous(memory_format=torch.channels_last).float() / 255
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = x.chunk(2)[1]
        for up, block, skip in zip(self.ups, self.decoder, reversed(skips), strict=True):
            x = block(torch.cat([up(x), *skip.chunk(2)], dim=1))
        return self.head(x)


def _convs(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True)]
        layers.append(nn.Dropout2d(0.2))
    return nn.Sequential(*layers)


class EarlyFusion(nn.Module):
    """segmentation_models_pytorch's U-Net with a ResNet50 on both dates as six channels."""

    def __init__(self) -> None:
        super().__init__()
        smp = import_module("segmentation_models_pytorch")
        self.unet = smp.Unet("resnet50", encoder_weights=None, in_channels=6, classes=1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Turn uint8 (B, 3, H, W) into logits (B, 1, H, W); sides are multiples of 32."""
        x = torch.cat([before, after], dim=1).contiguous(memory_format=torch.channels_last)
        return self.unet(x.float() / 255)


PEERS: dict[str, Callable[[], nn.Module]] = {"FC-Siam-conc, bf16": FCSiamConc}
if find_spec("segmentation_models_pytorch"):
    PEERS["smp U-Net R50, early fusion, bf16"] = EarlyFusion
