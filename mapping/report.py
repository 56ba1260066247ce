"""A scene as a page to look at: both dates as a swipe, the change on top, places to go to.

up to 2,048 pixels a side    pictures within the page
larger                       tiles in NAME_report_files/LAYER/LEVEL/X_Y.jpg or .png, cut while
bands come in: a level holds rows of one tile, and no more
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mapping.files import thinned
from mapping.grids import Grid
from pairs.images import IGNORE
from runtime.page import image_uri, write_page

TILE = 512
INLINE = 2048  # pixels a side of a scene whose pictures are within the page
MAX_PLACES = 500  # in the list, the largest ones
_CLEAR = 0.65  # alpha of the change

Bytes = NDArray[np.uint8]


class Pyramid:
    """Tiles of an image that comes from top to bottom, at full size, at half, at a quarter, ...

    Args:
        height, width: of the image.
        size: side of a tile.
        save: is told the level, the column and the row of a tile, and its pixels (h, w, ...);
            returns them at half the height and width, rounded up.
    """

    def __init__(
        self,
        height: int,
        width: int,
        size: int,
        save: Callable[[int, int, int, Bytes], Bytes],
    ) -> None:
        self.size, self.save = size, save
        self.sides = [(height, width)]
        while max(self.sides[-1]) > size:
            height, width = (-(-side // 2) for side in self.sides[-1])
            self.sides.append((height, width))
        self._held: list[Bytes | None] = [None] * self.levels  # up to `size` rows of each level
        self._filled = [0] * self.levels
        self._rows = [0] * self.levels  # of tiles that are done

    @property
    def levels(self) -> int:
        """How many there are; the last one is a single tile."""
        return len(self.sides)

    def write(self, rows: Bytes) -> None:
        """Take the next rows (n, W, ...)."""
        while len(rows):
            first = self._filled[0]
            part, rows = np.split(rows, [self.size - first])
            into = self._strip(0, part.shape[2:])[first : first + len(part)]
            if part.ndim == 3:  # channel by channel it is five times as fast
                for channel in range(part.shape[2]):
                    into[..., channel] = part[..., channel]
            else:
                into[:] = part
            self._take(0, len(part))

    def finish(self) -> None:
        """Cut what is left."""
        for level in range(self.levels):
            if self._filled[level]:
                self._cut(level)
        self._held = [None] * self.levels

    def _strip(self, level: int, channels: tuple[int, ...]) -> Bytes:
        """Return the rows of a level that are held: (size, W, ...)."""
        strip = self._held[level]
        if strip is None:
            height, width = self.sides[level]
            strip = np.empty((min(self.size, height), width, *channels), dtype=np.uint8)
            self._held[level] = strip
        return strip

    def _take(self, level: int, num_rows: int) -> None:
        self._filled[level] += num_rows
        if self._filled[level] == self.size:
            self._cut(level)

    def _cut(self, level: int) -> None:
        strip = self._held[level]
        assert strip is not None
        strip = strip[: self._filled[level]]
        below = level + 1
        num_rows = -(-len(strip) // 2) if below < self.levels else 0
        first = self._filled[below] if num_rows else 0
        for x, left in enumerate(range(0, strip.shape[1], self.size)):
            half = self.save(level, x, self._rows[level], strip[:, left : left + self.size])
            if num_rows:
                into = self._strip(below, strip.shape[2:])[first : first + num_rows]
                into[:, left // 2 : left // 2 + half.shape[1]] = half
        self._rows[level] += 1
        self._filled[level] = 0
        if num_rows:
            self._take(below, num_rows)


class Report:
    """The page of one scene; takes bands from top to bottom.

    Args:
        folder: where the page and its tiles are made.
        name: of the scene.
        grid: its size.
        palette: the colour of each class value.
    """

    def __init__(
        self, folder: Path, name: str, grid: Grid, palette: Sequence[Sequence[int]]
    ) -> None:
        self.folder, self.name, self.grid = folder, name, grid
        clear = np.full((256, 1), round(255 * _CLEAR))
        self.colors = np.zeros((256, 4), dtype=np.uint8)
        self.colors[: len(palette)] = np.concatenate([palette, clear[: len(palette)]], axis=1)
        self.colors[0] = 0
        self.is_inline = max(grid.height, grid.width) <= INLINE
        self.size = INLINE if self.is_inline else TILE
        self.uris: dict[str, str] = {}
        self.layers = {
            "before": self._pyramid("before", self._save_picture),
            "after": self._pyramid("after", self._save_picture),
            "overlay": self._pyramid("overlay", self._save_overlay),
        }

    def write(self, before: Bytes, after: Bytes, classes: Bytes) -> None:
        """Take rows of both dates (3, n, W), and their classes (n, W), 0 or 255 = none."""
        for layer, date in (("before", before), ("after", after)):
            self.layers[layer].write(date.transpose(1, 2, 0))
        self.layers["overlay"].write(classes * (classes != IGNORE))

    def finish(
        self,
        about: Sequence[str],
        legend: Sequence[tuple[str, Sequence[int]]],
        places: Sequence[tuple[str, tuple[int, int, int, int]]],
        note: str,
    ) -> None:
        """Write the page.

        Args:
            about: lines to say first.
            legend: what the colours mean.
            places: texts and boxes in pixels, to go to.
            note: what the places are.
        """
        for layer in self.layers.values():
            layer.finish()
        view: dict[str, Any] = {
            "name": self.name,
            "note": note,
            "width": self.grid.width,
            "height": self.grid.height,
            "legend": [[label, f"#{bytes(color).hex()}"] for label, color in legend],
            "items": [{"label": label, "box": list(box)} for label, box in places[:MAX_PLACES]],
            **{name: self._layer(name) for name in self.layers},
        }
        page = {
            "title": f"{self.name}: change",
            "about": list(about),
            "sections": [{"title": "Before and after", "views": [view]}],
        }
        write_page(self.folder / f"{self.name}_report.html", page)

    def _pyramid(self, layer: str, save: Callable[[str, Path | None, Bytes], Bytes]) -> Pyramid:
        def save_tile(level: int, x: int, y: int, tile: Bytes) -> Bytes:
            path = None if self.is_inline else self.folder / self._files(layer, level, x, y)
            return save(layer, path, np.ascontiguousarray(tile))

        return Pyramid(self.grid.height, self.grid.width, self.size, save_tile)

    def _save_picture(self, layer: str, path: Path | None, tile: Bytes) -> Bytes:
        """Save a tile of a date; return it at half the height and width."""
        if path is None:
            self.uris[layer] = image_uri(tile)
            return tile
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(tile)
        image.save(path, quality=80)
        return np.asarray(image.reduce(2))

    def _save_overlay(self, layer: str, path: Path | None, tile: Bytes) -> Bytes:
        """Save a tile of the change, if there is any; return it thinned out."""
        if path is None:
            self.uris[layer] = image_uri(self.colors[tile])
        elif tile.any():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(tile)
            image.putpalette(self.colors[:, :3].tobytes(), "RGB")
            image.save(path, compress_level=1, transparency=self.colors[:, 3].tobytes())
        return thinned(tile, 2)

    def _files(self, layer: str, level: object, x: object, y: object) -> str:
        end = "png" if layer == "overlay" else "jpg"
        return f"{self.name}_report_files/{layer}/{level}/{x}_{y}.{end}"

    def _layer(self, name: str) -> object:
        if self.is_inline:
            return self.uris[name]
        tiles = _quoted(self._files(name, "{z}", "{x}", "{y}"))
        return {"tiles": tiles, "size": self.size, "levels": self.layers[name].levels}


def _quoted(path: str) -> str:
    """Return a path as a part of an address, its places to fill in as they are."""
    from urllib.parse import quote

    return quote(path, safe="/{}")
