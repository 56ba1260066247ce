"""Siamese change-detection U-Net: shared encoder -> fusion per scale -> decoder -> head.

    before, after    (B, 3, H, W)                two dates of one scene, uint8 or float in [0, 1]
    encoder          (2B, C_s, H/s, W/s)         both dates in one batch, s = 2, 4, 8, 16, 32
    fusion           (B, D_s, H/s, W/s)          two dates become one map, scale by scale
    decoder          (B, D_2, H/2, W/2)          deep to shallow, one fused map per step
    head             (B, K, H, W)                logits; K = 1 is binary change

Every division rounds up, so any H and W will do, even 1 x 1.
U-Net, arXiv:1505.04597; FC-Siam-conc, doi:10.1109/ICIP.2018.8451652.
"""

import copy
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

from errors import UserError

# Width of the fused map and of the decoder at each stride. Wider costs most where the maps are
# large: twice the width at strides 2 and 4 takes 15 % of the training speed and on the sample set
# scores no higher (EXPERIMENTS.md).
WIDTHS = {2: 16, 4: 32, 8: 128, 16: 256, 32: 256}


class Encoder(nn.Module):
    """A backbone that yields one map per stride, shallow to deep.

    Frozen, it computes with a copy whose BatchNorms are folded into the convolutions and whose
    weights are in autocast's dtype. The copy follows every change of the weights and is in no state
    dict: what is saved and loaded is the backbone, in float32 and under torchvision's names.

    Attributes:
        channels: C_s of each map.
        strides: s of each map.
        frozen: the weights and the BatchNorm statistics stay as they are, whatever `train()` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.strides = strides
        self.frozen = False
        # ImageNet's, as every torchvision backbone was trained with
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), False)
        self._folded: tuple[Any, nn.Module] | None = None  # in a tuple: not one of the submodules

    def freeze(self) -> None:
        """Stop the weights from learning and BatchNorm's statistics from moving."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, unless frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W) float in [0, 1] into one (N, C_s, H/s, W/s) map per stride."""
        image = (image - self.mean) / self.std
        if not self.frozen:
            return list(self.backbone(image).values())
        with torch.no_grad():
            if torch.compiler.is_compiling():  # compilers fold by themselves, and export names
                return list(self.backbone(image).values())
            device = image.device.type
            is_autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if is_autocast else image.dtype
            return list(self._fold(dtype)(image.to(dtype)).values())

    def _fold(self, dtype: torch.dtype) -> nn.Module:
        """Return the folded backbone, made anew when a weight is another one or was written to."""
        tensors = chain(self.backbone.parameters(), self.backbone.buffers())
        key = (dtype, [(id(t), 0 if t.is_inference() else t._version) for t in tensors])
        if self._folded is None or self._folded[0] != key:
            self._folded = None  # before the new one: memory for one copy, not two
            twin = copy.deepcopy(self.backbone).eval()
            self._folded = (key, fuse(twin, inplace=True, no_trace=True).to(dtype))
        return self._folded[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Encoder":
        self._folded = None  # `to` swaps the data of a parameter without counting it as written
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}


def _resnet(name: str) -> Encoder:
    # blocks that start as identities: from scratch, a ResNet begins to learn at once (1706.02677)
    network = getattr(resnet, name)(weights=None, zero_init_residual=True)
    taps = {"relu": "s2", "layer1": "s4", "layer2": "s8", "layer3": "s16", "layer4": "s32"}
    deep = network.fc.in_features
    channels = (64, deep // 8, deep // 4, deep // 2, deep)
    return Encoder(create_feature_extractor(network, taps), channels, (2, 4, 8, 16, 32))


ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "resnet18": _resnet,
    "resnet34": _resnet,
    "resnet50": _resnet,
    "resnet101": _resnet,
}


class ConcatFusion(nn.Module):
    """Concatenate both dates and mix them: 1x1 convolution, BatchNorm, ReLU (FC-Siam-conc).

    It starts as a difference, W (before - after), from where it learns to use both dates: from
    scratch, the first epochs then find changes instead of looking for a way to compare.

    A 3x3 here costs a third of the training speed, and one of full width at 1/32 alone would hold
    75 M weights; the decoder's 3x3s look at the neighbourhood anyway.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = _conv_norm_relu(2 * in_channels, out_channels, kernel_size=1)
        with torch.no_grad():
            weight = next(self.mix.parameters())
            first, second = weight.chunk(2, dim=1)
            nn.init.kaiming_normal_(first, mode="fan_out", nonlinearity="relu")
            second.copy_(-first)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Fuse two (B, C, h, w) maps into (B, D, h, w)."""
        return self.mix(torch.cat([before, after], dim=1))


FUSIONS: dict[str, Callable[[int, int], nn.Module]] = {"concat": ConcatFusion}


class DecoderBlock(nn.Module):
    """Upsample to the skip's size, concatenate, two 3x3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv_norm_relu(in_channels + skip_channels, out_channels, kernel_size=3),
            _conv_norm_relu(out_channels, out_channels, kernel_size=3),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Turn (B, C, h, w) and (B, D, 2h, 2w) into (B, D', 2h, 2w)."""
        x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
        return self.convs(torch.cat([x, skip], dim=1))


class SiameseUNet(nn.Module):
    """A shared encoder, one fusion per scale, a U-Net decoder, a head.

    Args:
        encoder: gives `channels`, `strides` and one map per stride.
        fusion: builds a fusion from (in_channels, out_channels).
        num_classes: channels of the logits; 1 is binary change.
    """

    def __init__(
        self, encoder: Encoder, fusion: Callable[[int, int], nn.Module], num_classes: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        widths = [WIDTHS[stride] for stride in encoder.strides]
        self.fusions = nn.ModuleList(
            fusion(c, d) for c, d in zip(encoder.channels, widths, strict=True)
        )
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # deep to shallow
        self.decoder = nn.ModuleList(DecoderBlock(deep, skip, skip) for deep, skip in steps)
        # The last step to full resolution is the head's: s x s logits per position, rearranged.
        # A decoder block at full resolution costs a quarter of the training speed.
        self.upscale = encoder.strides[0]
        self.head = nn.Conv2d(widths[0], num_classes * self.upscale**2, kernel_size=1)
        self.num_classes = num_classes

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Compare two dates of one scene.

        Args:
            before: (B, 3, H, W), uint8 or float in [0, 1], any H and W.
            after: the same shape and dtype.

        Returns:
            (B, K, H, W) logits: no sigmoid, no softmax.
        """
        height, width = before.shape[-2:]
        image = torch.cat([before, after]).contiguous(memory_format=torch.channels_last)
        if image.dtype == torch.uint8:
            image = image.float() / 255
        features = self.encoder(image)  # (2B, C_s, H/s, W/s) for each s
        fused = [fuse(*f.chunk(2)) for fuse, f in zip(self.fusions, features, strict=True)]
        x = fused.pop()
        for block in self.decoder:
            x = block(x, fused.pop())
        logits = F.pixel_shuffle(self.head(x), self.upscale)  # (B, K, H or a little more, W or ...)
        return logits[..., :height, :width]


def build_model(
    *,
    backbone: str = "resnet50",
    fusion: str = "concat",
    num_classes: int = 1,
    freeze_backbone: bool = True,
) -> SiameseUNet:
    """Build a change detector with random weights; see `pretrained.py` for the encoder's.

    Args:
        backbone: a key of `ENCODERS`.
        fusion: a key of `FUSIONS`.
        num_classes: 1 for binary change, else the number of classes, class 0 being "no change".
        freeze_backbone: keep the encoder's weights and statistics fixed.

    Raises:
        UserError: an unknown name.
    """
    check_names(backbone, fusion)
    model = SiameseUNet(ENCODERS[backbone](backbone), FUSIONS[fusion], num_classes)
    _initialize(model)
    if freeze_backbone:
        model.encoder.freeze()
    return model.to(memory_format=torch.channels_last)


def check_names(backbone: str, fusion: str) -> None:
    """Raise UserError, with the known names, for a backbone or fusion that there is not."""
    for kind, name, known in (("backbone", backbone, ENCODERS), ("fusion", fusion, FUSIONS)):
        if name not in known:
            raise UserError(f"--{kind} {name}: choose one of {', '.join(known)}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters learn, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _initialize(model: SiameseUNet) -> None:
    """Kaiming for the decoder; the head starts at a change probability of 5 %, LEVIR-CD's."""
    for module in model.decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if model.num_classes == 1:
        bias = model.head.bias
        assert bias is not None
        nn.init.constant_(bias, math.log(0.05 / 0.95))
