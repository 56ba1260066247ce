"""Siamese change-detection U-Net: shared encoder -> fusion per scale -> decoder -> head.

    before, after    (B, 3, H, W)                two dates of one scene, uint8 or float in [0, 1]
    encoder          (2B, C_s, H/s, W/s)         both dates in one batch, s = 2, 4, 8, 16, 32
    fusion           (B, D_s, H/s, W/s)          two dates become one map, scale by scale
    decoder          (B, D_2, H/2, W/2)          deep to shallow, one fused map per step
    head             (B, K, H, W)                logits; K = 1 is binary change

With `upsample=2` the encoder sees the dates at twice their size: every map has half that stride in
pixels of the dates, and the decoder's last map has their size.

and for semantic (from-to) change, beside it and on the same features:

    projection       (2B, D_s, H/s, W/s)         of each date alone, scale by scale
    decoder, head    (2B, K, H, W)               logits of K classes of land cover, for each date

Every division rounds up, so any H and W will do, even 1 x 1.
U-Net, arXiv:1505.04597; FC-Siam-conc, doi:10.1109/ICIP.2018.8451652.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.encoders import ENCODERS, Encoder, build_encoder, check_backbone
from networks.fusion import FUSIONS, ConvNormReLU
from pairs.labels import MAX_CLASSES
from runtime.checkpoint import read_checkpoint, restore, short
from runtime.errors import UserError
from runtime.options import find_model

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "TASKS",
    "Encoder",
    "SemanticUNet",
    "SiameseUNet",
    "build_model",
    "load_model",
]

# Width of the fused map and of the decoder at each stride. Wider costs most where the maps are
# large: twice the width at strides 2 and 4 takes 15 % of the training speed and on the sample set
# scores no higher (EXPERIMENTS.md).
WIDTHS = {2: 16, 4: 32, 8: 128, 16: 256, 32: 256}
FINEST = 2  # stride of the decoder's last map
UPSAMPLE = (1, 2)  # how many times their size the encoder may see the dates


class DecoderBlock(nn.Module):
    """Upsample to the skip's size (or twice), concatenate, two 3x3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormReLU(in_channels + skip_channels, out_channels, kernel_size=3),
            ConvNormReLU(out_channels, out_channels, kernel_size=3),
        )

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Turn (B, C, h, w) and perhaps (B, D, 2h, 2w) into (B, D', 2h, 2w)."""
        if skip is None:
            return self.convs(F.interpolate(x, scale_factor=2, mode="nearest"))
        x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
        first, second = self.convs
        return second(first(x, skip))


class SiameseUNet(nn.Module):
    """A shared encoder, one fusion per scale, a U-Net decoder, a head.

    Args:
        encoder: gives `channels`, `strides` and one map per stride.
        fusion: builds a fusion from (in_channels, out_channels, stride).
        num_classes: channels of the logits; 1 is binary change.
        upsample: how many times their size the encoder sees the dates, 1 or 2.
    """

    task = "change"

    def __init__(
        self,
        encoder: Encoder,
        fusion: Callable[[int, int, int], nn.Module],
        num_classes: int,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        scales = list(zip(encoder.channels, encoder.strides, strict=True))
        self.fusions = nn.ModuleList(fusion(c, WIDTHS[s], s) for c, s in scales)
        self.decoder, self.head = _decoder_and_head(encoder, num_classes, upsample)
        self.num_classes = num_classes
        self.upsample = upsample

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Compare two dates of one scene.

        Args:
            before: (B, 3, H, W), uint8 or float in [0, 1], any H and W.
            after: the same shape and dtype.

        Returns:
            (B, K, H, W) logits: no sigmoid, no softmax.
        """
        height, width = before.shape[-2:]
        features = self.encode(torch.cat([before, after]))  # (2B, C_s, H/s, W/s) for each s
        return self._compare(features)[..., :height, :width]  # sizes were rounded up

    def encode(self, image: Tensor) -> list[Tensor]:
        """Turn dates (N, 3, H, W), uint8 or float in [0, 1], into one map per stride."""
        image = image.contiguous(memory_format=torch.channels_last)
        if image.dtype == torch.uint8:
            image = image.float().div_(255)
        if self.upsample > 1:
            image = F.interpolate(image, scale_factor=self.upsample, mode="bilinear")
        return self.encoder(image)

    def compare(self, before: list[Tensor], after: list[Tensor]) -> Tensor:
        """Turn the maps of both dates into logits, of sizes that are rounded up."""
        return self._compare([torch.cat(pair) for pair in zip(before, after, strict=True)])

    def _compare(self, features: list[Tensor]) -> Tensor:
        fused = [fuse(*_dates(f)) for fuse, f in zip(self.fusions, features, strict=True)]
        return _decode(self.decoder, self.head, fused, FINEST // self.upsample)


class SemanticUNet(SiameseUNet):
    """Where something changed, and what was there at each date.

    One semantic decoder is applied to each date's features, beside the change decoder. The logits
    lie in one tensor, (B, 1 + 2K, H, W): change, the K classes of before, the K classes of after;
    `split_semantic` takes them apart.

    Args:
        encoder: gives `channels`, `strides` and one map per stride.
        fusion: builds a fusion from (in_channels, out_channels, stride).
        num_classes: K, of land cover; "unchanged" is none of them.
        upsample: how many times their size the encoder sees the dates, 1 or 2.
    """

    task = "semantic"

    def __init__(
        self,
        encoder: Encoder,
        fusion: Callable[[int, int, int], nn.Module],
        num_classes: int,
        upsample: int = 1,
    ) -> None:
        super().__init__(encoder, fusion, 1, upsample)
        scales = list(zip(encoder.channels, encoder.strides, strict=True))
        self.projections = nn.ModuleList(ConvNormReLU(c, WIDTHS[s], 1) for c, s in scales)
        self.semantic_decoder, self.semantic_head = _decoder_and_head(
            encoder, num_classes, upsample
        )
        self.num_classes = num_classes

    def _compare(self, features: list[Tensor]) -> Tensor:
        maps = [project(f) for project, f in zip(self.projections, features, strict=True)]
        step = FINEST // self.upsample
        classes = _decode(self.semantic_decoder, self.semantic_head, maps, step)  # (2B, K, H, W)
        return torch.cat([super()._compare(features), *_dates(classes)], dim=1)


def split_semantic(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take (B, 1 + 2K, H, W) apart: change (B, 1, H, W), classes before and after (B, K, H, W)."""
    num_classes = (logits.shape[1] - 1) // 2
    change, before, after = logits.split([1, num_classes, num_classes], dim=1)
    return change, before, after


TASKS: dict[str, type[SiameseUNet]] = {"change": SiameseUNet, "semantic": SemanticUNet}


def _dates(both: Tensor) -> tuple[Tensor, Tensor]:
    """Take (2B, ...) apart; `chunk` of a batch of unknown size cannot be exported.

    The gradients of two slices would each be filled up with zeros, and added: where the encoder
    learns, a quarter of a step.
    """
    num_pairs = both.shape[0] // 2
    before, after = both.split([num_pairs, num_pairs])
    return before, after


def _decoder_and_head(
    encoder: Encoder, num_logits: int, upsample: int
) -> tuple[nn.ModuleList, nn.Conv2d]:
    """Build the steps from the deepest map to stride 2, and the head.

    An encoder without a map at stride 2 gets a step without skip. The last step to full resolution
    is the head's: 2 x 2 logits per position, rearranged, or one where the dates are seen at twice
    their size. A decoder block at full resolution costs a quarter of the training speed.
    """
    widths = [WIDTHS[stride] for stride in encoder.strides]
    steps = [(deep, skip, skip) for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)]
    if encoder.strides[0] > FINEST:
        steps.append((widths[0], 0, WIDTHS[FINEST]))
    blocks = nn.ModuleList(DecoderBlock(*step) for step in steps)
    per_position = (FINEST // upsample) ** 2
    return blocks, nn.Conv2d(WIDTHS[FINEST], num_logits * per_position, kernel_size=1)


def _decode(blocks: nn.ModuleList, head: nn.Module, maps: list[Tensor], step: int) -> Tensor:
    """Turn one map per stride, shallow to deep, into logits (B, K, H, W) or a little more.

    The head gives step x step of them per position.
    """
    x = maps.pop()
    for block in blocks:
        x = block(x, maps.pop() if maps else None)
    logits = head(x)
    return F.pixel_shuffle(logits, step) if step > 1 else logits


def build_model(
    *,
    task: str = "change",
    backbone: str = "resnet50",
    fusion: str = "concat",
    num_classes: int = 1,
    freeze_backbone: bool = True,
    upsample: int = 1,
) -> SiameseUNet:
    """Build a change detector with random weights; see `pretrained.py` for the encoder's.

    Args:
        task: "change", or "semantic" for from-to change.
        backbone: a key of `ENCODERS`, or "timm:" and a name of timm's.
        fusion: a key of `FUSIONS`.
        num_classes: 1 for binary change, else the number of classes, class 0 being "no change"; of
            semantic change the classes of land cover.
        freeze_backbone: keep the encoder's weights and statistics fixed.
        upsample: 2 shows the encoder the dates at twice their size: finer outlines of small
            objects, four times the work.

    Raises:
        UserError: an unknown name, no number of classes, or another `upsample`.
    """
    check_names(task, backbone, fusion)
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(f"num_classes is {num_classes}; give 1 to {MAX_CLASSES}")
    if upsample not in UPSAMPLE:
        raise UserError(f"upsample is {upsample}; give {' or '.join(map(str, UPSAMPLE))}")
    model = TASKS[task](build_encoder(backbone), FUSIONS[fusion], num_classes, upsample)
    _initialize(model)
    if freeze_backbone:
        model.encoder.freeze()
    return model.to(memory_format=torch.channels_last)


def restore_model(state: Mapping[str, Any], source: str | Path) -> SiameseUNet:
    """Build the model that a checkpoint describes and fill it.

    Raises:
        UserError: the description is none of a model, or its weights do not fit it.
    """
    known = get_type_hints(build_model)
    for name, value in state["model_kwargs"].items():
        if name not in known or name == "return":
            raise UserError(f"{source}: its model cannot be built ({name!r} is unknown here)")
        if type(value) is not known[name]:
            raise UserError(f"{source}: its model cannot be built ({name} is {short(value)})")
    try:
        model = build_model(**state["model_kwargs"])
    except (UserError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its model cannot be built ({reason})") from None
    restore({"model": model}, state, source)
    return model


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SiameseUNet:
    """Load a trained model for prediction: on `device`, in eval mode.

    Args:
        path: of a run's folder, its name under runs/, or best.pt or last.pt in it.
        device: where to put it.

    Raises:
        UserError: the file is not one of our checkpoints.
    """
    found = find_model(path)
    return restore_model(read_checkpoint(found), found).to(device).eval()


def check_names(task: str, backbone: str, fusion: str) -> None:
    """Raise UserError, with the known names, for a task, backbone or fusion that there is not."""
    for kind, name, known in (("task", task, TASKS), ("fusion", fusion, FUSIONS)):
        if name not in known:
            raise UserError(f"--{kind} {name}: choose one of {', '.join(known)}")
    check_backbone(backbone)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters learn, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def _initialize(model: SiameseUNet) -> None:
    """Kaiming for the decoders; the head starts at a change probability of 5 %, LEVIR-CD's."""
    decoders = [model.decoder]
    if isinstance(model, SemanticUNet):
        decoders.append(model.semantic_decoder)
    for module in (module for decoder in decoders for module in decoder.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if len(model.head.weight) == (FINEST // model.upsample) ** 2:  # one logit, of change
        bias = model.head.bias
        assert bias is not None
        nn.init.constant_(bias, math.log(0.05 / 0.95))
