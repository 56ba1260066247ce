"""The baseline: the same job as a notebook's author writes it, neither crippled nor tuned.

Files are decoded and resized in `__getitem__`, jittered with Pillow and loaded without workers; the
encoder, frozen, runs once per date, in float32 and PyTorch's default layout; the decoder
has a textbook U-Net's widths, on the concatenated features of both dates; the scores of each batch
leave the device at once. Every ratio of these benchmarks is against it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.models import resnet50

Files = tuple[Path, Path, Path]


class NaiveDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(before, after, mask): two normalised float images (3, H, W) and a float mask (1, H, W)."""

    def __init__(self, files: Sequence[Files], size: int = 256) -> None:
        self.files = files
        self.size = size
        self.jitter = transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        self.to_tensor = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        before, after, mask = (Image.open(path) for path in self.files[index])
        images = [
            self.to_tensor(self.jitter(image.convert("RGB").resize((self.size, self.size))))
            for image in (before, after)
        ]
        label = mask.convert("L").resize((self.size, self.size), Image.Resampling.NEAREST)
        return images[0], images[1], (transforms.functional.to_tensor(label) > 0.5).float()


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, as everywhere in U-Nets."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class NaiveUNet(nn.Module):
    """ResNet50 on each date, features concatenated, a decoder of 512 down to 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        resnet = resnet50(weights=None)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
        self.pool = resnet.maxpool
        self.layers = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        for module in (self.stem, self.layers):
            for parameter in module.parameters():
                parameter.requires_grad = False
        self.up4 = conv_block(4096 + 2048, 512)
        self.up3 = conv_block(512 + 1024, 256)
        self.up2 = conv_block(256 + 512, 128)
        self.up1 = conv_block(128 + 128, 64)
        self.up0 = conv_block(64, 32)
        self.out = nn.Conv2d(32, 1, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the maps of strides 2, 4, 8, 16, 32."""
        features = [self.stem(image)]
        x = self.pool(features[0])
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return logits (B, 1, H, W)."""
        first, second = self.encode(before), self.encode(after)
        fused = [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]
        x = fused[4]
        blocks = (self.up4, self.up3, self.up2, self.up1)
        for block, skip in zip(blocks, fused[3::-1], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.up0(x))


class NaiveTrainer:
    """A model, its loss and its optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = NaiveUNet().to(device).train()
        self.bce = nn.BCEWithLogitsLoss()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr=1e-3)
        self.history: list[Any] = []

    def step(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Train on one batch and note its loss, Dice and IoU."""
        before, after, mask = (x.to(self.device) for x in (before, after, mask))
        self.optimizer.zero_grad()
        logits = self.model(before, after)
        probability = torch.sigmoid(logits)
        overlap = (probability * mask).sum()
        total = probability.sum() + mask.sum()
        loss = self.bce(logits, mask) + 1 - (overlap + 1) / (total - overlap + 1)
        loss.backward()
        self.optimizer.step()
        predicted = (probability > 0.5).float()
        hits = (predicted * mask).sum().item()
        union = (predicted + mask).clamp(max=1).sum().item()
        sizes = predicted.sum().item() + mask.sum().item()
        self.history.append((loss.item(), 2 * hits / (sizes + 1e-7), hits / (union + 1e-7)))
