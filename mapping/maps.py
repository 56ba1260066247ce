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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mapping.files import Color, GeoTiffMap, Overlay, PngMap, ignored_place_warnings
from mapping.pipeline import PROBABILITY_STEPS, Band
from mapping.polygons import (
    Polygon,
    check_installed,
    find_polygons,
    write_geojson,
    write_geopackage,
)
from mapping.rasters import Scene
from mapping.report import MAX_PLACES, Report
from mapping.sidecars import (
    tags_of,
    write_about,
    write_class_style,
    write_place,
    write_probability_style,
)
from pairs.images import IGNORE
from runtime.errors import UserError, counted
from visualize import PALETTE

LAYERS = ("probability", "mask", "classes_before", "classes_after", "overlay", "polygons",
          "report", "about")  # fmt: skip
# all that may be there of a layer, with what other programs leave beside it
ENDINGS = (".png", ".tif", ".geojson", ".gpkg", ".html", ".json", ".qml", ".pgw", "_files",
           ".png.aux.xml", ".tif.aux.xml", ".gpkg-wal", ".gpkg-shm")  # fmt: skip


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
            check_installed(scene.dates[0].path, output.polygons)
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
        self.num_valid = self.num_changed = 0
        self.report: Report | None = None
        if output.has_report:
            self.report = Report(folder, name, grid, self.overlay.palette.tolist())

    def __enter__(self) -> "SceneMaps":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Complete the drafts."""
        for each in (self.probability, *self.masks, self.transitions):
            if isinstance(each, GeoTiffMap):
                each.close()

    def write(self, band: Band) -> None:
        """Write a band; they come from top to bottom."""
        top, last = band.top, band.classes[-1]
        valid = last != IGNORE
        self.probability.write(top, band.probability)
        for mask, rows in zip(self.masks, band.classes, strict=True):
            mask.write(top, rows)
        if self.transitions is not None:
            first, later = band.classes.astype(np.uint16)
            self.transitions.write(top, (256 * first + later) * valid)
        self.overlay.write(top, band.after, last)
        if self.report is not None:
            self.report.write(band.before, band.after, last)
        self.num_valid += int(np.count_nonzero(valid))
        self.num_changed += int(np.count_nonzero(last) - np.count_nonzero(~valid))

    @property
    def changed(self) -> float:
        """The share of the pixels with data that show change."""
        return self.num_changed / max(self.num_valid, 1)

    def finish(self, lines: Sequence[str] = ()) -> Found:
        """Complete all files, those that take long at the same time.

        Args:
            lines: what the page says first.

        Returns:
            What came of the polygons; a fault of theirs costs none of the maps.
        """
        maps = (self.probability, *self.masks)
        self.close()
        with ignored_place_warnings(), ThreadPoolExecutor() as pool:
            polygons = pool.submit(self._polygons) if self.has_polygons else None
            files = [pool.submit(each.finish) for each in (*maps, self.overlay)]
            for file in files:
                file.result()
            found = polygons.result() if polygons else Found()
        for each in (*maps, self.transitions):
            if isinstance(each, GeoTiffMap):
                each.draft.unlink()
        write_place(self.overlay.path, self.scene.grid, self.overlay.step)
        for mask in self.masks:
            write_class_style(mask.path, self.kinds.names, self.kinds.palette)
        has_steps = isinstance(self.probability, PngMap) and self.stored == "uint8"
        write_probability_style(self.probability.path, PROBABILITY_STEPS if has_steps else 1)
        if self.report is not None:
            legend = list(zip(self.kinds.names, self.overlay.palette.tolist(), strict=True))[1:]
            note = ""
            if self.has_polygons:
                note = f"{counted(found.number, 'polygon')}; in the list the largest first, with "
                note += "area, mean probability and class"
            self.report.finish(lines, legend, found.places, note)
        write_about(self.folder, self.name, self.output.about)
        return found

    def _polygons(self) -> Found:
        """Write the polygons, in the forms that are wanted."""
        classes, output = self.transitions or self.masks[0], self.output
        assert isinstance(classes, GeoTiffMap) and isinstance(self.probability, GeoTiffMap)
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
