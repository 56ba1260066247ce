"""Backbones that turn an image into one map per stride, shallow to deep: the table is `ENCODERS`.

    image    (N, 3, H, W)               float in [0, 1], any H and W
    maps     (N, C_s, H/s, W/s)         s = 2, 4, 8, 16, 32 (ResNets, EfficientNet-Lite0),
                                        4, 8, 16, 32 (Swin, ConvNeXt, ViT)

ResNet, arXiv:1512.03385; the others are in `backbones.py`. Everything that timm can cut into
stages is there as `timm:<name>`, where timm is installed.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

from networks.backbones import EfficientNetLite0, PlainStages, PlainViT, Stages, TimmStages
from networks.fused import Snapshot, fast_copy
from runtime.errors import UserError

# torchvision's, the same for all of its backbones
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM = "timm:"
VIT_LAYERS = (-10, -7, -4, -1)  # of a plain ViT's, for strides 4, 8, 16, 32
LITE = "efficientnet_lite0"


class Encoder(nn.Module):
    """A backbone, its normalisation, and a way to keep it fixed.

    Frozen, a backbone computes with a fast copy where there is one (`fused.py`): BatchNorms and, on
    a CPU, activations and sums are done within the convolutions, in autocast's dtype. The copy is
    made anew when a weight is another one or was written to, but for writes to `.data`, which
    PyTorch does not count. It is in no state dict: what is saved and loaded is the backbone, in
    float32 and under the names of the library that it comes from.

    Args:
        backbone: (N, 3, H, W) -> its maps, as a list or a dictionary.
        channels: C_s of each map.
        strides: s of each map.
        multiple: H and W are padded to a multiple of this, as patches want it; 1 needs none.
        mean, std: of the pixels that the backbone was trained on.

    Attributes:
        channels, strides: as above.
        frozen: the weights and the BatchNorm statistics stay as they are, whatever `train()` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        multiple: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.multiple = multiple
        self.frozen = False
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), False)
        # in a tuple, and so none of the submodules: (snapshot, what for, copy or None)
        self._fast: tuple[Snapshot, Any, nn.Module | None] | None = None

    def freeze(self) -> None:
        """Stop the weights from learning and BatchNorm's statistics from moving."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, unless frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Turn (N, 3, H, W) float in [0, 1] into one (N, C_s, H/s, W/s) map per stride.

        H/s and W/s are rounded up, and where there is a `multiple`, those of the padded image.
        """
        image = self._normalized(image)
        if self.multiple > 1:
            height, width = image.shape[-2:]
            # as exporters need it: from a remainder they don't see that the sum divides by
            # `multiple`, and ONNX divides negative numbers towards 0
            up = self.multiple - 1
            rows, columns = ((n + up) // self.multiple * self.multiple for n in (height, width))
            image = F.pad(image, (0, columns - width, 0, rows - height), mode="replicate")
        if not self.frozen:
            return _as_list(self.backbone(image))
        with torch.no_grad():
            if torch.compiler.is_compiling():  # compilers fuse by themselves; export: plain names
                return _as_list(self.backbone(image))
            device = image.device.type
            is_autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if is_autocast else image.dtype
            fast = self._fast_copy(image, dtype)
            return _as_list(self.backbone(image) if fast is None else fast(image))

    def _normalized(self, image: Tensor) -> Tensor:
        """Return (image - mean) / std; on a CPU by rows of pixels, in a tenth of the time.

        There PyTorch would take three numbers at a time, those of a pixel.
        """
        by_rows = image.is_cpu and image.is_contiguous(memory_format=torch.channels_last)
        if not by_rows or torch.compiler.is_compiling():
            return (image - self.mean) / self.std
        height, width = image.shape[-2:]
        mean, std = (x.flatten().repeat(width) for x in (self.mean, self.std))
        rows = image.movedim(1, -1).flatten(2)  # (N, H, 3 W)
        return (rows - mean).div_(std).view(-1, height, width, 3).movedim(-1, 1)

    def _fast_copy(self, image: Tensor, dtype: torch.dtype) -> nn.Module | None:
        """Return the fast copy for such images, made anew if need be, or None."""
        key = (dtype, image.device)
        if self._fast is None or self._fast[1] != key or not self._fast[0].is_current():
            self._fast = None  # before the new one: memory for one copy, not two
            snapshot = Snapshot(self.backbone)
            self._fast = (snapshot, key, fast_copy(self.backbone, dtype, image[:1]))
        return self._fast[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Encoder":
        self._fast = None  # `to` swaps the data of a parameter without counting it as written
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.train(self.training)  # a deep copy of one of fx's graphs is in training mode


def _as_list(maps: Any) -> list[Tensor]:
    return list(maps.values()) if isinstance(maps, dict) else list(maps)


def _resnet(name: str) -> Encoder:
    # blocks that start as identities: from scratch, a ResNet begins to learn at once (1706.02677)
    network = getattr(resnet, name)(weights=None, zero_init_residual=True)
    taps = {"relu": "s2", "layer1": "s4", "layer2": "s8", "layer3": "s16", "layer4": "s32"}
    deep = network.fc.in_features
    channels = (64, deep // 8, deep // 4, deep // 2, deep)
    return Encoder(create_feature_extractor(network, taps), channels, (2, 4, 8, 16, 32))


def _stages(name: str) -> Encoder:
    network = getattr(torchvision.models, name)(weights=None)
    wide = 128 if name in ("swin_b", "swin_v2_b", "convnext_base") else 96
    stages = Stages(network.features, channels_last=name.startswith("swin"))
    return Encoder(stages, [wide, 2 * wide, 4 * wide, 8 * wide], (4, 8, 16, 32), multiple=32)


def _lite(_: str) -> Encoder:
    channels, half = (16, 24, 40, 112, 320), (0.5, 0.5, 0.5)
    strides = (2, 4, 8, 16, 32)
    return Encoder(EfficientNetLite0(), channels, strides, multiple=32, mean=half, std=half)


def _plain(_: str) -> Encoder:
    base = {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
    network = PlainViT(VIT_LAYERS, image_size=224, **base)
    return Encoder(network, [768] * 4, (4, 8, 16, 32), multiple=32)


def timm_network(name: str, *, features_only: bool = True, **options: Any) -> Any:
    """Build a network of timm that returns its maps, or whole; options as of `timm.create_model`.

    Raises:
        UserError: timm is not installed.
    """
    try:
        import timm
    except ImportError:
        raise UserError(
            f"--backbone {name}: timm is not installed; pip install -r requirements-zoo.txt"
        ) from None
    model = name.removeprefix(TIMM)
    if "swin" in model:
        options["strict_img_size"] = False  # else images of its training's size alone
    arch = model.partition(".")[0]
    if arch in timm.list_models(module="vision_transformer") + timm.list_models(module="eva"):
        options["dynamic_img_size"] = True
        if features_only:
            options["out_indices"] = VIT_LAYERS
    return timm.create_model(model, features_only=features_only, **options)


def _timm(name: str) -> Encoder:
    """Cut a network of timm into stages; its stride-64 maps and the like are left out."""
    try:
        backbone = timm_network(name)
        channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
    except UserError:
        raise
    except Exception as error:  # timm raises whatever its networks do for a name or an option
        raise UserError(f"--backbone {name}: timm cannot build it ({error})") from None
    is_plain = list(strides) == [16] * len(VIT_LAYERS)
    strides = [4, 8, 16, 32] if is_plain else strides
    wanted = [i for i, stride in enumerate(strides) if stride in (2, 4, 8, 16, 32)]
    strides = [strides[i] for i in wanted]
    if strides not in ([2, 4, 8, 16, 32], [4, 8, 16, 32]):
        raise UserError(
            f"--backbone {name}: its maps have the strides {strides}; needs 4, 8, 16, 32"
        )
    about = backbone.pretrained_cfg
    return Encoder(
        PlainStages(backbone) if is_plain else TimmStages(backbone, wanted, channels),
        [channels[i] for i in wanted],
        strides,
        multiple=32,
        mean=about.get("mean") or IMAGENET_MEAN,
        std=about.get("std") or IMAGENET_STD,
    )


# training/catalogue.py reads the names here, without importing them: write each one out
ENCODERS: dict[str, Callable[[str], Encoder]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), _resnet),
    "efficientnet_lite0": _lite,
    **dict.fromkeys(("swin_t", "swin_s", "swin_b"), _stages),
    **dict.fromkeys(("swin_v2_t", "swin_v2_s", "swin_v2_b"), _stages),
    **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base"), _stages),
    "vit_b_16": _plain,
}


def build_encoder(name: str) -> Encoder:
    """Build a backbone with random weights; see `pretrained.py` for its own.

    Raises:
        UserError: an unknown name, or a timm network that cannot be used.
    """
    check_backbone(name)
    return _timm(name) if name.startswith(TIMM) else ENCODERS[name](name)


def check_backbone(name: str) -> None:
    """Raise UserError, with the known names, for a backbone that there is not."""
    # timm would also take the address of a file, or of a repository that it then downloads
    if name not in ENCODERS and not re.fullmatch(rf"{TIMM}[\w.-]+", name):
        known = ", ".join(ENCODERS)
        raise UserError(f"--backbone {name}: choose one of {known}, or {TIMM}NAME")
