"""Map the change between two scenes: `python predict.py runs/x/best.pt before.tif after.tif`.

Scenes of any size, PNG, JPEG, TIFF or GeoTIFF; or two folders, whose files are paired by stem.
Nothing needs a label. For each pair it writes the probability of change, the mask of classes and a
picture of both over the later date; for GeoTIFFs on the same grid, with polygons (maps.py,
polygons.py say what is in them). Started by torchrun, several processes share the work.
"""

import shlex
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pairs.labels import MIN_PIXELS
from runtime.config import REQUIRED, option
from runtime.options import find_model, shared
from runtime.start import start


@dataclass(frozen=True)
class Config:
    """The options of a prediction."""

    checkpoint: str = option(REQUIRED, "best.pt of a run", positional=True)
    before: str = option(REQUIRED, "the earlier date: a file or a folder", positional=True)
    after: str = option(REQUIRED, "the later date: a file or a folder", positional=True)

    output_dir: str = option(
        "predictions",
        "folder of what is written",
        group="what comes out",
        short="-o",
        aliases=["--output"],
    )
    overwrite: bool = option(False, "replace all that is there of a scene")
    skip_existing: bool = option(
        False, "pass over scenes that are mapped: go on where a run was stopped"
    )
    threshold: float | None = option(
        None,
        "threshold of the change probability; else as evaluate.py chose it on val, else 0.5",
        at_least=0,
        at_most=1,
    )
    probability: str = option(
        "uint8",
        "how the probability is stored: uint8 (254 p, 255 = no data) or float32",
        choices=("uint8", "float32"),
    )
    min_area: float | None = option(
        None,
        f"area of the smallest polygon in square metres; else that of {MIN_PIXELS} pixels; "
        "0 keeps all",
        at_least=0,
    )
    fill_holes: float = option(
        0.0, "fill holes of polygons up to so many square metres", at_least=0
    )
    polygons: str = option(
        "geojson",
        "GeoJSON in longitude and latitude, GeoPackage in the scene's own CRS",
        choices=("geojson", "gpkg", "both", "none"),
    )
    simplify: float = option(
        0.0, "metres by which outlines of polygons may be simplified; 0 keeps them", at_least=0
    )
    report: bool = option(True, "write NAME_report.html, a page to look at")

    align: bool = option(
        False, "resample the later date onto the grid of the earlier one", group="what goes in"
    )
    allow_vrt: bool = option(
        False,
        "open VRTs and all else that GDAL knows, which may open any other file or address",
    )
    bands: tuple[int, ...] | None = option(
        None,
        "red, green and blue of both dates, counted from 1: 4,3,2; or one; else as in training",
    )
    scale: tuple[float, ...] | None = option(
        None,
        "values of both dates that become 0 and 255; else as in training, else 8 bits as they are, "
        "others between the percentiles of each date",
    )
    alpha: int | None = option(
        None,
        "the band that is 0 where there is no data; else as in training, else, without --bands, "
        "the one that the file calls so",
        above=0,
    )

    window: int = option(512, "side of the windows that the model sees", group="windows", above=0)
    overlap: int = option(128, "overlap of neighbouring windows, in pixels", at_least=0)
    batch_size: int = option(4, "windows at once", short="-b", above=0)
    flips: bool = option(False, "average over mirror images: four times the cost")

    device: str = shared("device", group="machine")
    amp: str = shared("amp")


if __name__ == "__main__":  # the imports below take seconds; a wrong word is answered before
    GIVEN = start(Config, description=__doc__, check=lambda given: find_model(given.checkpoint))

import torch
from torch import Tensor, nn

from mapping.grids import Grid
from mapping.maps import Kinds, Output, SceneMaps, check_free, remove_set
from mapping.rasters import Scene, SceneFault, ScenePair, find_scenes, open_scene
from mapping.sidecars import is_complete
from metrics import change_probability
from model import restore_model
from networks.sliding_window import Image, predict_bands, predict_logits
from pairs.bands import Reading
from runtime.checkpoint import VERSION, digest_of, read_checkpoint
from runtime.config import as_dict, as_flags
from runtime.devices import explain_out_of_memory, keep_freed_memory, pick_device
from runtime.distributed import agree, from_rank_0, gather, local_rank, rank, run, share, world_size
from runtime.errors import Interrupted, StopRequest, UserError
from runtime.files import whole_folder
from runtime.progress import Bar
from scoring.record import stored_threshold


def predict(given: dict[str, Any]) -> list["Mapped"]:
    """Predict from the options that a command line gives.

    As many scenes at a time as there are processes, each by one; of those that are left over, all
    processes share the windows.

    Returns:
        What there is to say of each scene.

    Raises:
        UserError: anything the user can mend; of the pair that it concerns nothing is written.
        Interrupted: by a signal; what is written is whole.
    """
    config, model, kinds = _model_of(Config(**given))
    config, about, scenes, faults = from_rank_0(lambda: prepare(config, kinds))
    results: list[Mapped] = []
    shared = False
    with (
        StopRequest(is_silent=rank() > 0) as stop,
        explain_out_of_memory(
            f"--batch-size {config.batch_size} and --window {config.window}",
            f"--batch-size {max(1, config.batch_size // 2)}, or a smaller --window",
        ),
    ):

        def leave_if_asked() -> None:
            (number,) = agree(stop.signal_number) if shared else (stop.signal_number,)
            if number:
                raise Interrupted(
                    f"stopped after {len(results)} of {len(scenes)} scenes; nothing of the next "
                    "one was written; --skip-existing goes on",
                    number,
                )

        for first in range(0, len(scenes), world_size()):
            group = scenes[first : first + world_size()]
            shared = len(group) < world_size()
            for pair in group if shared else share(group):
                own: Mapped | str | None
                try:
                    own = predict_pair(
                        model,
                        kinds,
                        pair,
                        Path(config.output_dir),
                        config=config,
                        about=about,
                        leave_if_asked=leave_if_asked,
                        shared=shared,
                    )
                except SceneFault as fault:  # of a scene that is shared, all processes have it
                    own = str(fault) if not shared or rank() == 0 else None
                found = [mapped for mapped in gather(own) if mapped]
                for number, one in enumerate(found):
                    if isinstance(one, str):
                        faults.append(one)
                        continue
                    if number:  # rank 0 has said its own
                        print(*one.lines, sep="\n", flush=True)
                    results.append(one)
                    faults += [one.fault] if one.fault else []
    if faults:
        raise UserError(_listed(faults, len(results)))
    return results


def _model_of(config: Config) -> tuple[Config, nn.Module, Kinds]:
    """Return the options with those of the training, the model, and what its classes are."""
    check(config)
    path = find_model(config.checkpoint)
    state = read_checkpoint(path)
    reading = reading_of(config).over(Reading.saved(state["data"], path))
    device = pick_device(config.device, local_rank())
    keep_freed_memory()
    model = restore_model(state, path).to(device).eval()
    if rank() == 0 and state["data"].get("is_sample"):
        print(
            "this model was trained on the SYNTHETIC sample alone: expect false alarms on real "
            "scenes; train on labelled pairs of your own"
        )
    kinds = Kinds.of(model.task, model.num_classes, state["data"])
    return replace(config, **vars(reading)), model, kinds


def _listed(faults: Sequence[str], num_mapped: int) -> str:
    """Return what to say at the end of the scenes that are not whole."""
    if len(faults) == 1 and not num_mapped:
        return faults[0]
    return "\n  ".join([f"{num_mapped} scenes are mapped; {len(faults)} have faults:", *faults])


def predict_scene(
    model: nn.Module,
    before: Image,
    after: Image,
    **options: Any,
) -> Tensor:
    """Return the probability of change of a scene in memory.

    Args:
        model: `(before, after) -> logits`, see `model.load_model`; it computes where it is,
            in eval mode, and is left in the mode that it was in.
        before: (H, W, 3) or (3, H, W), uint8 or float32 in [0, 1].
        after: the same shape and dtype.
        options: window, overlap, batch_size, flips and amp of `predict_bands`.

    Returns:
        (H, W) float32 in [0, 1], on the CPU. With several classes it is that of any change.

    Raises:
        ValueError: the dates do not match, or the overlap is not smaller than the window.
    """
    logits = predict_logits(model, before, after, **options)
    return change_probability(logits[None], task=getattr(model, "task", "change"))[0]


def check(config: Config) -> None:
    """Raise UserError for options that do not go together."""
    if config.overwrite and config.skip_existing:
        raise UserError("--overwrite and --skip-existing: give one of them")
    if config.overlap >= config.window:
        raise UserError(f"--overlap {config.overlap}: give less than --window {config.window}")
    reading_of(config)


def reading_of(config: Config) -> Reading:
    """Return how the files are read; raise UserError for options that make no sense."""
    return Reading.asked(config.bands, config.scale, config.alpha)


def opened(pair: ScenePair, config: Config) -> AbstractContextManager[Scene]:
    """Open both dates of a scene as the options say."""
    return open_scene(
        pair.before,
        pair.after,
        reading=reading_of(config),
        align=config.align,
        allow_vrt=config.allow_vrt,
    )


def prepare(
    config: Config, kinds: Kinds
) -> tuple[Config, dict[str, Any], list[ScenePair], list[str]]:
    """Judge all that can be judged before the first window.

    Returns:
        The options with the threshold chosen, the provenance, the scenes to map, and what is wrong
        with those that cannot be.

    Raises:
        UserError: nothing can be mapped, or maps are there.
    """
    scenes = find_scenes(Path(config.before), Path(config.after))
    sound, faults = _judged(scenes, config)
    path, out = find_model(config.checkpoint), Path(config.output_dir)
    if config.threshold is None and kinds.has_threshold:
        if chosen := stored_threshold(path):
            threshold, source = chosen
            print(f"threshold {threshold:g}, chosen on val ({source}); --threshold sets another")
            config = replace(config, threshold=threshold)
        else:
            print(
                "threshold 0.5, which fits few scenes: with a few labelled pairs of your own as "
                "val, evaluate.py chooses a better one; --threshold sets it"
            )
    about = provenance(config, path)
    if config.skip_existing:
        todo = [scene for scene in sound if not is_complete(out, scene.name, about)]
        print(f"{len(sound) - len(todo)} of {len(scenes)} scenes are mapped already")
        sound = todo
    elif not config.overwrite:
        check_free(out, (scene.name for scene in sound))
    return config, about, sound, faults


def _judged(scenes: Sequence[ScenePair], config: Config) -> tuple[list[ScenePair], list[str]]:
    """Return the scenes that can be mapped, by their headers, and the faults of the others."""
    sound, faults = [], []
    for scene in scenes:
        try:
            with opened(scene, config):
                sound.append(scene)
        except SceneFault as fault:
            if len(scenes) == 1:
                raise
            faults.append(str(fault))
    if not sound:
        raise UserError(_listed(faults, 0))
    return sound, faults


# Options that change no pixel of a map
_HARMLESS = {"checkpoint", "before", "after", "output_dir", "overwrite", "skip_existing", "report",
             "batch_size", "device"}  # fmt: skip


def provenance(config: Config, path: Path) -> dict[str, Any]:
    """Return what made the maps, for their tags and NAME_about.json."""
    given = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default
    }
    words = [shlex.quote(str(given.pop(name))) for name in ("checkpoint", "before", "after")]
    return {
        "checkpoint": str(path),
        "checkpoint_sha256": digest_of(path),
        "threshold": 0.5 if config.threshold is None else config.threshold,
        "options": {k: v for k, v in as_dict(config).items() if k not in _HARMLESS},
        "command": f"python predict.py {' '.join(words)} {as_flags(given)}".strip(),
        "version": VERSION,
    }


@dataclass(frozen=True)
class Mapped:
    """What there is to say of a scene.

    Attributes:
        lines: for the user.
        megapixels, seconds: of the scene, and that it took.
        changed: share of the pixels that have data.
        polygons: how many were written.
        fault: of what is missing of its set.
    """

    lines: tuple[str, ...]
    megapixels: float
    seconds: float
    changed: float
    polygons: int
    fault: str = ""


def predict_pair(
    model: nn.Module,
    kinds: Kinds,
    pair: ScenePair,
    out: Path,
    *,
    config: Config,
    about: Mapping[str, Any] | None = None,
    leave_if_asked: Callable[[], None] = lambda: None,
    shared: bool = False,
) -> Mapped | None:
    """Predict one pair and write its maps: NAME_probability, NAME_mask, ... in `out`.

    Args:
        model: `(before, after) -> logits`, on its device.
        kinds: of its classes.
        pair: the files.
        out: folder of the maps.
        config: the options.
        about: the provenance.
        leave_if_asked: may raise to end it; then nothing is left behind.
        shared: all processes do this together, see `predict_bands`; rank 0 writes.

    Returns:
        What there is to say, where it was written.
    """
    start = time.perf_counter()
    with (
        opened(pair, config) as scene,
        closing(_bands(model, scene, pair.name, config, leave_if_asked, shared)) as bands,
    ):
        if shared and rank() > 0:
            for _ in bands:
                pass
            return None
        print(*scene.notes, sep="\n", end="\n" if scene.notes else "", flush=True)
        grid, num_valid, num_changed = scene.grid, 0, 0
        output = Output(
            config.probability,
            config.polygons,
            config.min_area,
            config.fill_holes,
            config.simplify,
            config.report,
            {"before": str(pair.before), "after": str(pair.after), **(about or {})},
        )
        with (
            whole_folder(out) as folder,
            SceneMaps(folder, pair.name, scene, kinds, output) as maps,
        ):
            for top, logits in bands:
                valid, is_change = maps.write(top, logits, config.threshold)
                num_valid += valid
                num_changed += is_change
            changed = num_changed / max(num_valid, 1)
            found = maps.finish(_about_lines(pair, grid, changed, output))
            if config.overwrite or config.skip_existing:
                remove_set(out, pair.name)  # what is not made again must not seem to be
    seconds, megapixels = time.perf_counter() - start, grid.height * grid.width / 1e6
    no_data = 1 - num_valid / (grid.height * grid.width)
    line = (
        f"{out / pair.name}_*: {grid.width} x {grid.height}, {changed:.2%} changed"
        f"{f', {found.number} polygons' if maps.has_polygons else ''}"
        f"{f' and {found.num_left_out} too small (--min-area)' if found.num_left_out else ''}"
        f"{f', {no_data:.1%} without data' if no_data else ''}"
        f", {megapixels / seconds:.2g} megapixels/s"
    )
    print(line, flush=True)
    fault = f"{out / pair.name}_polygons: {found.fault}" if found.fault else ""
    return Mapped((*scene.notes, line), megapixels, seconds, changed, found.number, fault)


def _about_lines(pair: ScenePair, grid: Grid, changed: float, output: Output) -> list[str]:
    """Return what the page of a scene says first."""
    lines = [f"{pair.before} and {pair.after}", f"{grid}: {changed:.2%} changed"]
    if "command" in output.about:
        lines += [
            f"{output.about['command']}",
            f"checkpoint {output.about['checkpoint_sha256']}, version {output.about['version']}",
        ]
    return lines


def _bands(
    model: nn.Module,
    scene: Scene,
    name: str,
    config: Config,
    leave_if_asked: Callable[[], None],
    shared: bool,
) -> Generator[tuple[int, Tensor], None, None]:
    """Predict a scene under a progress bar."""
    grid = scene.grid
    megapixels = grid.height * grid.width / 1e6
    with Bar(
        total=megapixels,
        desc=name,
        unit="MP",
        disable=rank() > 0,
        bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:

        def read_rows(top: int, bottom: int) -> tuple[Tensor, Tensor]:
            before, after, _ = scene.read(top, bottom)
            return torch.from_numpy(before), torch.from_numpy(after)

        def after_batch(part: float) -> None:
            bar.update(part * megapixels)
            if not shared:
                leave_if_asked()

        for band in predict_bands(
            model,
            read_rows,
            grid.height,
            grid.width,
            window=config.window,
            overlap=config.overlap,
            batch_size=config.batch_size,
            flips=config.flips,
            amp=config.amp,
            after_batch=after_batch,
            shared=shared,
        ):
            yield band
            if shared:  # all have as many bands, but not as many batches
                leave_if_asked()


if __name__ == "__main__":
    sys.exit(run(lambda: predict(GIVEN)))
