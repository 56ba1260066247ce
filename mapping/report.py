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

from mapping.files import channels_last
from mapping.grids import Grid
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
        halve: turns rows (h, w, ...) into rows of half the height and width, rounded up.
        save: is told the level, the column and the row of a tile, and its pixels.
    """

    def __init__(
        self,
        height: int,
        width: int,
        size: int,
        halve: Callable[[Bytes], Bytes],
        save: Callable[[int, int, int, Bytes], None],
    ) -> None:
        self.size, self.halve, self.save = size, halve, save
        self.levels = 1
        while max(height, width) > size << (self.levels - 1):
            self.levels += 1
        self._held: list[list[Bytes]] = [[] for _ in range(self.levels)]
        self._rows = [0] * self.levels  # of tiles that are done

    def write(self, rows: Bytes, level: int = 0) -> None:
        """Take the next rows (n, W, ...)."""
        self._held[level].append(rows)
        while sum(map(len, self._held[level])) >= self.size:
            strip = np.concatenate(self._held[level])
            self._held[level] = [strip[self.size :]]
            self._cut(level, strip[: self.size])

    def finish(self) -> None:
        """Cut what is left."""
        for level in range(self.levels):
            held = [rows for rows in self._held[level] if len(rows)]
            if held:
                self._cut(level, np.concatenate(held))

    def _cut(self, level: int, strip: Bytes) -> None:
        for x, left in enumerate(range(0, strip.shape[1], self.size)):
            self.save(level, x, self._rows[level], strip[:, left : left + self.size])
        self._rows[level] += 1
        if level + 1 < self.levels:
            self.write(self.halve(strip), level + 1)


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
            "before": self._pyramid("before", _mean),
            "after": self._pyramid("after", _mean),
            "overlay": self._pyramid("overlay", _most),
        }

    def write(self, before: Bytes, after: Bytes, classes: Bytes) -> None:
        """Take rows of both dates (3, n, W), and their classes (n, W), 0 or 255 = none."""
        for layer, date in (("before", before), ("after", after)):
            self.layers[layer].write(channels_last(date))
        self.layers["overlay"].write(np.where(classes == 255, np.uint8(0), classes))

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

    def _pyramid(self, layer: str, halve: Callable[[Bytes], Bytes]) -> Pyramid:
        def save(level: int, x: int, y: int, tile: Bytes) -> None:
            tile = np.ascontiguousarray(tile)
            if self.is_inline:
                self.uris[layer] = image_uri(self.colors[tile] if layer == "overlay" else tile)
                return
            if layer == "overlay" and not tile.any():
                return
            path = self.folder / self._files(layer, level, x, y)
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(tile)
            if layer != "overlay":
                image.save(path, quality=80)
                return
            image.putpalette(self.colors[:, :3].tobytes(), "RGB")
            image.save(path, compress_level=1, transparency=self.colors[:, 3].tobytes())

        return Pyramid(self.grid.height, self.grid.width, self.size, halve, save)

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


def _mean(rows: Bytes) -> Bytes:
    return np.asarray(Image.fromarray(np.ascontiguousarray(rows)).reduce(2))


def _most(rows: Bytes) -> Bytes:
    """Halve a map so that a change of one pixel stays seen."""
    height, width = rows.shape
    padded = np.pad(rows, ((0, height % 2), (0, width % 2)))
    return padded.reshape(-(-height // 2), 2, -(-width // 2), 2).max((1, 3))
