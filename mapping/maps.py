"""What a prediction leaves behind for one scene, written band by band.

    probability    uint8, 254 p rounded, or float32         255 or NaN = no data
    mask           uint8 class values under a palette       255 = no data; of semantic change
                                                            classes_before and classes_after
    overlay        PNG, the later date with the change tinted, at most 2,048 pixels a side
    and            polygons (polygons.py), a page to look at (report.py), sidecars (sidecars.py)

A georeferenced or large scene gives cloud-optimised GeoTIFFs on the grid of its first date, others
PNGs (and TIFF for float32). All is written into a folder of its own and moved into place when it
is whole, so that no file that looks complete is not.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mapping.grids import Grid
from mapping.polygons import (
    Polygon,
    check_installed,
    find_polygons,
    write_geojson,
    write_geopackage,
)
from mapping.rasters import Bools, Bytes, Scene
from mapping.report import MAX_PLACES, Report
from mapping.sidecars import (
    tags_of,
    write_about,
    write_class_style,
    write_place,
    write_probability_style,
)
from metrics import change_probability, check_logits, predict_classes
from pairs.images import IGNORE
from runtime.errors import UserError
from visualize import PALETTE

LAYERS = ("probability", "mask", "classes_before", "classes_after", "overlay", "polygons",
          "report", "about")  # fmt: skip
# all that may be there of a layer, with what other programs leave beside it
ENDINGS = (".png", ".tif", ".geojson", ".gpkg", ".html", ".json", ".qml", ".pgw", "_files",
           ".png.aux.xml", ".tif.aux.xml", ".gpkg-wal", ".gpkg-shm")  # fmt: skip
PROBABILITY_STEPS = 254  # of uint8; 255 is no data
SINGLE = (255, 0, 170)  # of change in the overlay, where there is one kind: a colour of no land
PREVIEW_SIDE = 2048  # pixels of the overlay's longer side
_TINT = 0.45  # how much of a changed pixel's colour is its class's
_TILE = 512

Color = Sequence[int]


@dataclass(frozen=True)
class Kinds:
    """What the classes of a mask are.

    Attributes:
        task: of the model.
        names: of the classes of a mask, class 0 first.
        palette: their colours.
        has_threshold: change is a probability above a threshold by itself, not the likeliest class.
    """

    task: str
    names: tuple[str, ...]
    palette: list[Color]
    has_threshold: bool

    @classmethod
    def of(cls, task: str, num_classes: int, data: dict[str, Any]) -> "Kinds":
        """Take names and colours from a checkpoint's data, where it has them."""
        is_semantic = task == "semantic"
        number = num_classes + 1 if is_semantic else max(num_classes, 2)
        names = tuple(map(str, data.get("class_names") or ()))
        if len(names) != number:
            names = ("no change", *(["change"] if number == 2 else map(str, range(1, number))))
        colors: list[Color] = [tuple(color) for color in data.get("class_colors") or ()]
        if len(colors) != number:
            over_again = [0, *(1 + k % (len(PALETTE) - 1) for k in range(number - 1))]
            colors = PALETTE[over_again].tolist()
        return cls(task, names, colors, is_semantic or num_classes == 1)

    def describe(self, value: int) -> dict[str, object]:
        """Return the properties of a polygon: its class, or of semantic change both."""
        if self.task == "semantic":
            return {"from": self.names[value >> 8], "to": self.names[value & 255]}
        return {"class": value, "name": self.names[value]}


@dataclass(frozen=True)
class Output:
    """What is wanted of a scene.

    Attributes:
        probability: its dtype, "uint8" or "float32".
        polygons: "geojson", "gpkg", "both" or "none".
        min_area, fill_holes, simplify: of `find_polygons`.
        has_report: whether a page is made.
        about: the provenance.
    """

    probability: str = "uint8"
    polygons: str = "geojson"
    min_area: float | None = None
    fill_holes: float = 0.0
    simplify: float = 0.0
    has_report: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What came of the polygons of a scene.

    Attributes:
        number, num_left_out: of polygons.
        fault: why there are none, although they were wanted.
        places: text and box in pixels of each, largest first.
    """

    number: int = 0
    num_left_out: int = 0
    fault: str = ""
    places: Sequence[tuple[str, tuple[int, int, int, int]]] = ()


class PngMap:
    """A map of a plain image, in memory until it is saved.

    Args:
        path: the ending says how: .png, or .tif for float32.
        grid: its size.
        dtype: "uint8" or "float32".
        palette: the colour of each class value, for masks.
    """

    def __init__(
        self, path: Path, grid: Grid, dtype: str, palette: Sequence[Color] | None = None
    ) -> None:
        self.path = path
        self.pixels = np.zeros((grid.height, grid.width), dtype=dtype)
        self.palette = palette

    def write(self, top: int, rows: NDArray[Any]) -> None:
        """Take rows (n, W) from `top` on."""
        self.pixels[top : top + len(rows)] = rows

    def finish(self) -> None:
        """Save the file."""
        image = Image.fromarray(self.pixels)
        if self.palette is not None:
            image.putpalette(bytes(_full_palette(self.palette)), "RGB")
        image.save(self.path)


class GeoTiffMap:
    """A map on a grid, on the disk from the first band on: a tiled GeoTIFF, then a COG of it.

    Args:
        path: of the cloud-optimised GeoTIFF.
        grid: of the scene.
        dtype: "uint8", "uint16" or "float32".
        palette: the colour of each class value, for masks.
        nodata: the value of pixels without data.
        unit: what a step of the value means, told to GDAL.
        tags: of the file.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        dtype: str,
        palette: Sequence[Color] | None = None,
        *,
        nodata: float = IGNORE,
        unit: float = 1.0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        import rasterio

        self.path = path
        self.draft = path.with_suffix(".draft.tif")
        # thinned-out copies: the mean of probabilities, the most frequent of classes
        self.resampling = "MODE" if palette is not None else "AVERAGE"
        with warnings.catch_warnings(), _writing(path):
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            self.file = rasterio.open(
                self.draft,
                "w",
                driver="GTiff",
                height=grid.height,
                width=grid.width,
                count=1,
                dtype=dtype,
                crs=grid.crs,
                transform=grid.transform,
                nodata=nodata,
                tiled=True,
                blockxsize=_TILE,
                blockysize=_TILE,
                compress="deflate",
                zlevel=1,
                bigtiff="if_safer",
            )
        if palette is not None:
            table = _full_palette(palette).reshape(-1, 3).tolist()
            self.file.write_colormap(1, {v: (*c, 255) for v, c in enumerate(table)})
        if unit != 1:
            self.file.scales = (unit,)
        self.file.update_tags(**(tags or {}))
        if grid.points is not None and grid.points.rpcs is not None:
            self.file.rpcs = grid.points.rpcs
        elif grid.points is not None:
            self.file.gcps = grid.points.gcps

    def write(self, top: int, rows: NDArray[Any]) -> None:
        """Take rows (n, W) from `top` on."""
        with _writing(self.path):
            self.file.write(rows, 1, window=((top, top + len(rows)), (0, self.file.width)))

    def close(self) -> None:
        """Complete the draft, which polygons are drawn from."""
        with _writing(self.path):
            self.file.close()

    def finish(self) -> None:
        """Write the cloud-optimised file from the draft."""
        import rasterio.shutil

        self.close()
        with _writing(self.path):
            rasterio.shutil.copy(
                self.draft,
                self.path,
                driver="COG",
                compress="DEFLATE",
                predictor="YES",
                blocksize=_TILE,
                overview_resampling=self.resampling,
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
            )
            self._read_back()
        self.draft.unlink()

    def _read_back(self) -> None:
        """Read the whole file: GDAL does not always say that the disk was full."""
        import rasterio

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(self.path) as whole:
                levels = [{}, *({"overview_level": i} for i in range(len(whole.overviews(1))))]
            for level in levels:
                with rasterio.open(self.path, **level) as file:
                    for top in range(0, file.height, _TILE):
                        rows = (top, min(top + _TILE, file.height))
                        file.read(1, window=(rows, (0, file.width)))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn GDAL's errors into one line; of a full disk they speak in many ways."""
    from rasterio._err import CPLE_BaseError  # what `shutil.copy` raises has no public name
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        raise UserError(f"{path}: cannot be written whole ({error}); make room") from None


class Overlay:
    """The later date with the change tinted in its class's colour and outlined, thinned out.

    A pixel of the picture shows change if any pixel that it stands for does.

    Args:
        path: of the PNG.
        grid: of the scene.
        palette: the colour of each class value.
    """

    def __init__(self, path: Path, grid: Grid, palette: Sequence[Color]) -> None:
        self.path = path
        self.palette = np.array(palette, dtype=np.uint8)
        if len(palette) == 2:
            self.palette[1] = SINGLE  # a mask's white is lost on bright roofs
        self.step = -(-max(grid.height, grid.width) // PREVIEW_SIDE)
        shape = (-(-grid.height // self.step), -(-grid.width // self.step))
        self.picture = np.zeros((*shape, 3), dtype=np.uint8)
        self.classes = np.zeros(shape, dtype=np.uint8)

    def write(self, top: int, after: Bytes, classes: Bytes) -> None:
        """Take rows of the later date (3, n, W) and their classes (n, W), 0 or 255 = none."""
        rows = np.arange(top, top + classes.shape[0])
        is_first = rows % self.step == 0
        columns = np.arange(0, classes.shape[1], self.step)
        picked = after[:, is_first][:, :, columns]
        self.picture[rows[is_first] // self.step] = picked.transpose(1, 2, 0)
        change = np.where(classes == IGNORE, 0, classes)
        np.maximum.at(self.classes, rows // self.step, np.maximum.reduceat(change, columns, axis=1))

    def finish(self) -> None:
        """Save the picture."""
        is_change = self.classes > 0
        color = self.palette[self.classes[is_change]]
        mixed = (1 - _TINT) * self.picture[is_change] + _TINT * color
        padded = np.pad(is_change, 1, mode="edge")
        inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        is_edge = ~inside[is_change]
        self.picture[is_change] = np.where(is_edge[:, None], color, np.rint(mixed)).astype(np.uint8)
        Image.fromarray(self.picture).save(self.path)


def code_probability(probability: NDArray[np.float32], valid: Bools, dtype: str) -> NDArray[Any]:
    """Turn probabilities (n, W) into the values of a file."""
    if dtype == "float32":
        return np.where(valid, probability, np.float32(np.nan))
    steps = np.rint(PROBABILITY_STEPS * probability).astype(np.uint8)
    return np.where(valid, steps, np.uint8(IGNORE))


class SceneMaps:
    """All that is written of one scene; its files are open until the `with` ends.

    Args:
        folder: where the files are made, see `whole_folder`.
        name: of the scene, before the files' own.
        scene: gives the grid, both dates and where there is data.
        kinds: of classes.
        output: what is wanted.
    """

    def __init__(self, folder: Path, name: str, scene: Scene, kinds: Kinds, output: Output) -> None:
        self.folder, self.name, self.scene, self.kinds = folder, name, scene, kinds
        self.output, self.stored, grid = output, output.probability, scene.grid
        self.unit = 1 / PROBABILITY_STEPS if self.stored == "uint8" else 1.0
        layers = ["classes_before", "classes_after"] if kinds.task == "semantic" else ["mask"]
        self.has_polygons = grid.has_place and output.polygons != "none"
        if self.has_polygons:
            check_installed(scene.before.path)
        self.probability: PngMap | GeoTiffMap
        self.masks: list[PngMap | GeoTiffMap]
        if scene.is_plain:
            self.probability = PngMap(self._path("probability", self.stored), grid, self.stored)
            self.masks = [PngMap(self._path(m), grid, "uint8", kinds.palette) for m in layers]
        else:
            tags = tags_of(output.about)
            self.probability = GeoTiffMap(
                self._path("probability"),
                grid,
                self.stored,
                nodata=IGNORE if self.stored == "uint8" else float("nan"),
                unit=self.unit,
                tags=tags,
            )
            self.masks = [
                GeoTiffMap(self._path(layer), grid, "uint8", kinds.palette, tags=tags)
                for layer in layers
            ]
        self.transitions: GeoTiffMap | None = None  # 256 from + to, for polygons alone
        if self.has_polygons and kinds.task == "semantic":
            self.transitions = GeoTiffMap(folder / "transitions.tif", grid, "uint16", nodata=0)
        self.overlay = Overlay(folder / f"{name}_overlay.png", grid, kinds.palette)
        self.report: Report | None = None
        if output.has_report:
            self.report = Report(folder, name, grid, self.overlay.palette.tolist())

    def __enter__(self) -> "SceneMaps":
        return self

    def __exit__(self, *error: object) -> None:
        for each in (self.probability, *self.masks, self.transitions):
            if isinstance(each, GeoTiffMap):
                each.close()

    def write(self, top: int, logits: Tensor, threshold: float | None) -> tuple[int, int]:
        """Write a band.

        Args:
            top: its first row.
            logits: (C, n, W).
            threshold: of the change probability; None is the rule of the model itself.

        Returns:
            How many of its pixels have data, and how many of those show change.

        Raises:
            UserError: the logits are not finite.
        """
        check_logits(logits)
        task = self.kinds.task
        before, after, valid = self.scene.read(top, top + logits.shape[1])
        chance = change_probability(logits[None], task=task)[0].cpu().numpy()
        found = predict_classes(logits[None], threshold, task=task)[0].to(torch.uint8).cpu().numpy()
        classes = np.where(valid, found, np.uint8(IGNORE)).reshape(len(self.masks), *valid.shape)
        self.probability.write(top, code_probability(chance, valid, self.stored))
        for mask, rows in zip(self.masks, classes, strict=True):
            mask.write(top, rows)
        if self.transitions is not None:
            first, later = found.astype(np.uint16)
            self.transitions.write(top, (256 * first + later) * valid)
        self.overlay.write(top, after, classes[-1])
        if self.report is not None:
            self.report.write(before, after, classes[-1])
        return int(valid.sum()), int(((classes[-1] > 0) & valid).sum())

    def finish(self, lines: Sequence[str] = ()) -> Found:
        """Complete all files.

        Args:
            lines: what the page says first.

        Returns:
            What came of the polygons; a fault of theirs costs none of the maps.
        """
        found = self._polygons() if self.has_polygons else Found()
        if self.transitions is not None:
            self.transitions.draft.unlink()
        for each in (self.probability, *self.masks, self.overlay):
            each.finish()
        write_place(self.overlay.path, self.scene.grid, self.overlay.step)
        for mask in self.masks:
            write_class_style(mask.path, self.kinds.names, self.kinds.palette)
        has_steps = isinstance(self.probability, PngMap) and self.stored == "uint8"
        write_probability_style(self.probability.path, PROBABILITY_STEPS if has_steps else 1)
        if self.report is not None:
            legend = list(zip(self.kinds.names, self.overlay.palette.tolist(), strict=True))[1:]
            note = f"{found.number} polygons, the largest first" if self.has_polygons else ""
            self.report.finish(lines, legend, found.places, note)
        write_about(self.folder, self.name, self.output.about)
        return found

    def _polygons(self) -> Found:
        """Write the polygons, in the forms that are wanted."""
        classes, output = self.transitions or self.masks[0], self.output
        assert isinstance(classes, GeoTiffMap) and isinstance(self.probability, GeoTiffMap)
        classes.close()
        self.probability.close()
        describe = self.kinds.describe
        base = self.folder / f"{self.name}_polygons"
        try:
            found, num_left_out, ground = find_polygons(
                classes.draft,
                self.probability.draft,
                unit=self.unit,
                min_area=output.min_area,
                fill_holes=output.fill_holes,
                simplify=output.simplify,
            )
            if output.polygons in ("geojson", "both"):
                write_geojson(Path(f"{base}.geojson"), found, ground, describe)
            if output.polygons in ("gpkg", "both"):
                write_geopackage(Path(f"{base}.gpkg"), found, ground, describe, self.name)
        except Exception as error:  # GDAL, GEOS and SQLite raise a dozen types
            for end in (".geojson", ".gpkg"):
                Path(f"{base}{end}").unlink(missing_ok=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Found(fault=f"no polygons could be made ({reason}); the maps are whole")
        largest = sorted(found, key=lambda polygon: -polygon.area)[:MAX_PLACES]
        places = [(_told(polygon, describe(polygon.value)), polygon.box) for polygon in largest]
        return Found(len(found), num_left_out, places=places)

    def _path(self, layer: str, stored: str = "uint8") -> Path:
        ending = "png" if self.scene.is_plain and stored == "uint8" else "tif"
        return self.folder / f"{self.name}_{layer}.{ending}"


def _told(polygon: Polygon, about: Mapping[str, object]) -> str:
    """Return a polygon in words: "1,240 m², 0.93, house"."""
    kind = f"{about['from']} to {about['to']}" if "from" in about else str(about["name"])
    area = f"{polygon.area:,.0f}" if polygon.area >= 10 else f"{polygon.area:.3g}"
    return f"{area} m\u00b2, {polygon.probability:.2f}, {kind}"


def files_of(folder: Path, name: str) -> list[Path]:
    """Return all that is there of a scene's set."""
    files = (folder / f"{name}_{layer}{end}" for layer in LAYERS for end in ENDINGS)
    return [file for file in files if file.exists()]


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if a map of one of these scenes is in the folder already."""
    for name in names:
        if there := files_of(folder, name):
            raise UserError(
                f"{there[0]}: is there already; --overwrite, --skip-existing, or another "
                "--output-dir"
            )


def remove_set(folder: Path, name: str) -> None:
    """Remove what is there of a scene's set, the provenance first: half a set is none."""
    for file in sorted(files_of(folder, name), key=lambda file: file.suffix != ".json"):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _full_palette(palette: Sequence[Color]) -> Bytes:
    """Return 256 colours in a row; those of no class are grey."""
    table = np.full((256, 3), 96, dtype=np.uint8)
    table[: len(palette)] = palette
    return table.reshape(-1)
