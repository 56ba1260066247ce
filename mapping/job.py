"""One scene from its files to its maps: read, predicted and written at the same time.

all of it     NAME_probability, NAME_mask, ...    see maps.py
a part        NAME_parts/                         see parts.py
joined        the maps, from the parts of all jobs
"""

import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mapping.maps import Found, Kinds, Output, SceneMaps, remove_set
from mapping.parts import Parts, bands_of_part, joined_bands, left_of
from mapping.pipeline import Band, Decision, ahead, predict_scene_bands
from mapping.rasters import Scene, open_scene
from mapping.scenes import ScenePair, Series
from networks.sliding_window import Windows
from runtime.distributed import rank
from runtime.errors import counted
from runtime.files import whole_folder
from runtime.progress import Bar


@dataclass(frozen=True)
class Mapped:
    """What there is to say of a pair.

    Attributes:
        lines: for the user.
        megapixels, seconds: of the pair, and that it took.
        changed: share of the pixels that have data.
        polygons: how many were written.
        fault: of what is missing of its set.
    """

    lines: tuple[str, ...]
    megapixels: float
    seconds: float
    changed: float = 0.0
    polygons: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Job:
    """What is done with each scene.

    Attributes:
        model: `(before, after) -> logits`, on its device.
        kinds: of its classes.
        out: folder of the maps.
        output: what is wanted of each pair; its provenance lacks the dates.
        threshold: of the change probability; None is the rule of the model itself.
        window, overlap: of the windows.
        opening: options of `open_scene`.
        predicting: options of `predict_strips`.
        replaces: what is there of a scene is removed.
        part: its number, from 1, and how many there are; then only that is predicted.
        joins: the parts become the maps.
    """

    model: nn.Module
    kinds: Kinds
    out: Path
    output: Output
    threshold: float | None = None
    window: int = 512
    overlap: int = 128
    opening: Mapping[str, Any] = field(default_factory=dict)
    predicting: Mapping[str, Any] = field(default_factory=dict)
    replaces: bool = False
    part: tuple[int, int] | None = None
    joins: bool = False

    def open(self, series: Series) -> AbstractContextManager[Scene]:
        """Open the dates of a scene."""
        return open_scene(series[0].before, *(pair.after for pair in series), **self.opening)

    def run(
        self,
        series: Series,
        leave_if_asked: Callable[[], None] = lambda: None,
        *,
        shared: bool = False,
    ) -> list[Mapped] | None:
        """Map a scene, or what this job does of it.

        Args:
            series: its pairs.
            leave_if_asked: may raise to end it; then nothing is left behind but whole parts.
            shared: all processes do this together, see `predict_strips`; rank 0 writes.

        Returns:
            What there is to say of each pair, where it was written.
        """
        start = time.perf_counter()
        with self.open(series) as scene:
            windows = Windows(scene.grid.height, scene.grid.width, self.window, self.overlap)
            if shared and rank() > 0:
                with closing(self._predict(scene, windows, series, leave_if_asked, True)) as bands:
                    for _ in bands:
                        pass
                return None
            print(*scene.notes, sep="\n", end="\n" if scene.notes else "", flush=True)
            parts = []
            if self.part or self.joins:
                parts = [Parts(self.out, p.name, self._output_of(p).about) for p in series]
            if self.part:
                return self._keep(scene, windows, series, parts, leave_if_asked, start)
            if self.joins:
                bands = joined_bands(scene, windows, parts, leave_if_asked)
            else:
                bands = self._predict(scene, windows, series, leave_if_asked, shared)
            mapped = self._write(scene, series, bands, start)
        for part in parts:
            shutil.rmtree(part.folder)
        return mapped

    def _write(
        self,
        scene: Scene,
        series: Series,
        bands: Generator[list[Band], None, None],
        start: float,
    ) -> list[Mapped]:
        """Write the maps of all pairs."""
        with (
            whole_folder(self.out) as folder,
            ExitStack() as stack,
            closing(ahead(bands)) as ready,
        ):
            all_maps = [
                stack.enter_context(
                    SceneMaps(folder, pair.name, scene, self.kinds, self._output_of(pair))
                )
                for pair in series
            ]
            for of_pairs in ready:
                for maps, band in zip(all_maps, of_pairs, strict=True):
                    maps.write(band)
                del of_pairs, band  # they hold the rows of a strip
            found = [
                maps.finish(_about_lines(pair, scene, maps))
                for maps, pair in zip(all_maps, series, strict=True)
            ]
            if self.replaces:
                for pair in series:  # what is not made again must not seem to be
                    remove_set(self.out, pair.name)
        seconds = (time.perf_counter() - start) / len(series)
        return [
            self._told(pair, scene, maps, polygons, seconds)
            for pair, maps, polygons in zip(series, all_maps, found, strict=True)
        ]

    def _keep(
        self,
        scene: Scene,
        windows: Windows,
        series: Series,
        parts: list[Parts],
        leave_if_asked: Callable[[], None],
        start: float,
    ) -> list[Mapped]:
        """Predict the bands of a part that are not there yet."""
        assert self.part is not None
        for part in parts:
            part.open()
        whole = bands_of_part(windows, *self.part)
        bands = left_of(whole, parts, windows)
        if bands:
            predicted = self._predict(scene, windows, series, leave_if_asked, False, bands)
            with closing(ahead(predicted)) as ready:
                for of_pairs in ready:
                    for part, band in zip(parts, of_pairs, strict=True):
                        part.write(band)
        seconds = (time.perf_counter() - start) / len(series)
        rows = windows.band(bands[-1])[1] - windows.band(bands[0])[0] if bands else 0
        number, num_parts = self.part
        mapped = []
        for part in parts:
            known = f", {len(whole) - len(bands)} were there" if len(bands) < len(whole) else ""
            line = (
                f"{part.folder}: part {number} of {num_parts} is predicted, {len(whole)} of "
                f"{len(windows.tops)} bands{known}; --join writes the maps when all parts are"
            )
            print(line, flush=True)
            megapixels = rows * scene.grid.width / 1e6
            mapped.append(Mapped((*scene.notes, line), megapixels, seconds))
        return mapped

    def _predict(
        self,
        scene: Scene,
        windows: Windows,
        series: Series,
        leave_if_asked: Callable[[], None],
        shared: bool,
        bands: range | None = None,
    ) -> Generator[list[Band], None, None]:
        """Predict bands of a scene under a progress bar."""
        bands = range(len(windows.tops)) if bands is None else bands
        rows = windows.band(bands[-1])[1] - windows.band(bands[0])[0]
        megapixels = len(series) * rows * windows.width / 1e6
        decide = Decision(self.kinds.task, self.threshold, self.output.probability)
        with Bar(
            total=megapixels,
            desc=series[0].name,
            unit="MP",
            disable=rank() > 0,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]",
        ) as bar:

            def after_batch(part: float) -> None:
                bar.update(part * megapixels)
                if not shared:
                    leave_if_asked()

            predicted = predict_scene_bands(
                self.model, scene, windows, decide,
                bands=bands, after_batch=after_batch, shared=shared, **self.predicting,
            )  # fmt: skip
            with closing(predicted):
                for of_pairs in predicted:
                    yield of_pairs
                    del of_pairs  # before the next one is made
                    if shared:  # all have as many bands, but not as many batches
                        leave_if_asked()

    def _output_of(self, pair: ScenePair) -> Output:
        dates = {"before": str(pair.before), "after": str(pair.after)}
        return replace(self.output, about={**dates, **self.output.about})

    def _told(
        self, pair: ScenePair, scene: Scene, maps: SceneMaps, found: Found, seconds: float
    ) -> Mapped:
        """Say what came of a pair."""
        grid = scene.grid
        num_pixels = grid.height * grid.width
        no_data = 1 - maps.num_valid / num_pixels
        polygons = f", {counted(found.number, 'polygon')}" if maps.has_polygons else ""
        if maps.output.polygons != "none" and not maps.has_polygons:
            polygons = ", no polygons without a place on the map"
        line = (
            f"{self.out / pair.name}_*: {grid.width} x {grid.height}, {maps.changed:.2%} changed"
            f"{polygons}"
            f"{f' and {found.num_left_out} too small (--min-area)' if found.num_left_out else ''}"
            f"{f', {no_data:.1%} without data' if no_data else ''}"
            f", {num_pixels / 1e6 / seconds:.2g} megapixels/s"
        )
        print(line, flush=True)
        fault = f"{self.out / pair.name}_polygons: {found.fault}" if found.fault else ""
        lines = (*scene.notes, line)
        return Mapped(lines, num_pixels / 1e6, seconds, maps.changed, found.number, fault)


def _about_lines(pair: ScenePair, scene: Scene, maps: SceneMaps) -> list[str]:
    """Return what the page of a scene says first."""
    about = maps.output.about
    lines = [f"{pair.before} and {pair.after}", f"{scene.grid}: {maps.changed:.2%} changed"]
    lines += [about["caution"]] if "caution" in about else []
    if "threshold" in about and maps.kinds.has_threshold:
        lines.append(f"change is where its probability is above {about['threshold']:g}")
    if "command" in about:
        lines += [
            f"{about['command']}",
            f"checkpoint {about['checkpoint_sha256']}, version {about['version']}",
        ]
    return lines
