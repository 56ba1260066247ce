"""What may be wrong with the later date: shift, light, contrast, blur, JPEG, rotation.

    channels    (P, H, W) uint8      as `sources.py` has them: before, after, one or two label maps
    after     (3, H, W) uint8      is what is corrupted
    valid     (H, W) bool          False where the corrupted image shows nothing of the real one

The label stays with the earlier date. Pixels that come from outside the frame repeat its edge and
become "ignore": they are never counted, whatever the model says of them. A direction (of a shift, a
turn) goes with the pair's number, so that all occur in a split, and the same ones each time.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pairs.images import IGNORE
from pairs.sources import Source

# (after, level, number of the pair) -> (after, valid)
Corrupt = Callable[[Tensor, float, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt an image, and how far to go.

    Attributes:
        label: of the level, with its unit.
        levels: in the order of a plot's axis.
        neutral: the level that leaves the image as it is.
        corrupt: the function.
    """

    label: str
    levels: tuple[float, ...]
    neutral: float
    corrupt: Corrupt


def shift(after: Tensor, pixels: float, number: int) -> tuple[Tensor, Tensor | None]:
    """Shift by whole pixels to the right, down, left or up."""
    distance, (height, width) = int(pixels), after.shape[-2:]
    down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[number % 4]
    rows = torch.arange(height) - down * distance
    columns = torch.arange(width) - right * distance
    shifted = after[:, rows.clamp(0, height - 1)][:, :, columns.clamp(0, width - 1)]
    is_row, is_column = ((i >= 0) & (i < n) for i, n in ((rows, height), (columns, width)))
    return shifted, is_row[:, None] & is_column


def rotate(after: Tensor, degrees: float, number: int) -> tuple[Tensor, Tensor | None]:
    """Turn about the centre, of every second pair the other way round; bilinear."""
    angle = math.radians(degrees) * (-1) ** number
    height, width = after.shape[-2:]
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    source_x = math.cos(angle) * x - math.sin(angle) * y
    source_y = math.sin(angle) * x + math.cos(angle) * y
    grid = torch.stack(
        [source_x / max((width - 1) / 2, 0.5), source_y / max((height - 1) / 2, 0.5)], dim=-1
    )
    turned = F.grid_sample(
        after[None].float(), grid[None].float(), padding_mode="border", align_corners=True
    )
    return turned[0].round().to(torch.uint8), grid.abs().amax(-1) <= 1 + 1e-9


def brighten(after: Tensor, factor: float, _number: int) -> tuple[Tensor, Tensor | None]:
    """Multiply, and cut at white."""
    return V.adjust_brightness(after, factor), None


def change_contrast(after: Tensor, factor: float, _number: int) -> tuple[Tensor, Tensor | None]:
    """Multiply the distance to the image's mean grey."""
    return V.adjust_contrast(after, factor), None


def blur(after: Tensor, sigma: float, _number: int) -> tuple[Tensor, Tensor | None]:
    """Blur by a Gaussian that is cut at three sigma."""
    if sigma == 0:
        return after, None
    reach = min(math.ceil(3 * sigma), min(after.shape[-2:]) - 1)  # what reflecting edges allow
    return V.gaussian_blur(after, 2 * reach + 1, sigma), None


def compress(after: Tensor, quality: float, _number: int) -> tuple[Tensor, Tensor | None]:
    """Write as JPEG of this quality, and read; above 100 nothing is lost."""
    if quality > 100:
        return after, None
    file = io.BytesIO()
    Image.fromarray(after.permute(1, 2, 0).contiguous().numpy()).save(
        file, "JPEG", quality=int(quality)
    )
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous(), None


LOSSLESS = 101.0  # a quality that JPEG does not have

CORRUPTIONS = {
    "shift": Corruption("shift (pixels)", (0, 1, 2, 4, 8), 0, shift),
    "rotation": Corruption("rotation (degrees)", (0, 0.5, 1, 2, 4), 0, rotate),
    "brightness": Corruption("brightness (factor)", (0.6, 0.8, 1, 1.25, 1.6), 1, brighten),
    "contrast": Corruption("contrast (factor)", (0.6, 0.8, 1, 1.25, 1.6), 1, change_contrast),
    "blur": Corruption("blur (sigma in pixels)", (0, 0.5, 1, 2, 4), 0, blur),
    "jpeg": Corruption("JPEG quality", (LOSSLESS, 90, 70, 50, 30, 10), LOSSLESS, compress),
}


class CorruptedSource(Source):
    """The pairs of a source, the later date of each corrupted.

    Args:
        source: the pairs as they are.
        corruption: what to do.
        level: how much of it.
    """

    def __init__(self, source: Source, corruption: Corruption, level: float) -> None:
        self.pairs, self.sizes = source.pairs, source.sizes
        self.encoding, self.num_channels = source.encoding, source.num_channels
        self.source, self.corrupt, self.level = source, corruption.corrupt, level
        self._last: tuple[int, Tensor] | None = None  # sixteen patches of a pair come in a row

    def channels(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W)."""
        if self._last is None or self._last[0] != number:
            channels = self.source.channels(number).clone()
            after, valid = self.corrupt(channels[3:6], self.level, number)
            channels[3:6] = after
            if valid is not None:
                channels[6:, ~valid] = IGNORE
            self._last = number, channels
        return self._last[1]
