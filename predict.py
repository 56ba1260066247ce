"""Map the change between two scenes: `python predict.py runs/x/best.pt before.tif after.tif`.

Scenes of any size, PNG, JPEG, TIFF or GeoTIFF; or two folders, whose files are paired by stem.
Nothing needs a label. For each pair it writes the probability of change, the mask of classes and a
picture of both over the later date; for GeoTIFFs on the same grid, with polygons (maps.py,
polygons.py say what is in them). Started by torchrun, several processes share the work.
"""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
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
    overwrite: bool = option(False, "replace what is there")
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
from tqdm import tqdm

from mapping.maps import Kinds, SceneMaps, check_free
from mapping.rasters import Scene, ScenePair, find_scenes, open_scene
from metrics import change_probability
from model import restore_model
from networks.sliding_window import Image, predict_bands, predict_logits
from pairs.bands import Reading
from runtime.checkpoint import read_checkpoint
from runtime.devices import explain_out_of_memory, keep_freed_memory, pick_device
from runtime.distributed import agree, from_rank_0, gather, local_rank, rank, run, share, world_size
from runtime.errors import Interrupted, StopRequest, UserError
from runtime.files import whole_folder
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
    config = Config(**given)
    check(config)
    path = find_model(config.checkpoint)
    state = read_checkpoint(path)
    reading = reading_of(config).over(Reading.saved(state["data"], path))
    config = replace(config, **vars(reading))
    device = pick_device(config.device, local_rank())
    keep_freed_memory()
    model = restore_model(state, path).to(device).eval()
    kinds = Kinds.of(model.task, model.num_classes, state["data"])
    config, scenes = from_rank_0(lambda: prepare(config, kinds))
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
                    "one was written",
                    number,
                )

        for first in range(0, len(scenes), world_size()):
            group = scenes[first : first + world_size()]
            shared = len(group) < world_size()
            for pair in group if shared else share(group):
                own = predict_pair(
                    model,
                    kinds,
                    pair,
                    Path(config.output_dir),
                    config=config,
                    leave_if_asked=leave_if_asked,
                    shared=shared,
                )
                found = [mapped for mapped in gather(own) if mapped]
                for other in found[1:]:
                    print(*other.lines, sep="\n", flush=True)
                results += found
    return results


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


def prepare(config: Config, kinds: Kinds) -> tuple[Config, list[ScenePair]]:
    """Return the options with the threshold chosen, and the scenes.

    Raises:
        UserError: a file that cannot be read, or maps that are there.
    """
    scenes = find_scenes(Path(config.before), Path(config.after))
    for scene in scenes:
        with opened(scene, config):
            pass
    path = find_model(config.checkpoint)
    if config.threshold is None and kinds.has_threshold:
        if chosen := stored_threshold(path):
            threshold, source = chosen
            print(f"threshold {threshold:g}, chosen on val ({source}); --threshold sets another")
            config = replace(config, threshold=threshold)
        else:
            print("threshold 0.5; evaluate.py chooses one on val, --threshold sets it")
    if not config.overwrite:
        check_free(Path(config.output_dir), (scene.name for scene in scenes))
    return config, scenes


@dataclass(frozen=True)
class Mapped:
    """What there is to say of a scene.

    Attributes:
        lines: for the user.
        megapixels, seconds: of the scene, and that it took.
        changed: share of the pixels that have data.
        polygons: how many were written.
    """

    lines: tuple[str, ...]
    megapixels: float
    seconds: float
    changed: float
    polygons: int


def predict_pair(
    model: nn.Module,
    kinds: Kinds,
    pair: ScenePair,
    out: Path,
    *,
    config: Config,
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
        with (
            whole_folder(out) as folder,
            SceneMaps(folder, pair.name, scene, kinds, config.probability) as maps,
        ):
            for top, logits in bands:
                valid, is_change = maps.write(top, logits, config.threshold)
                num_valid += valid
                num_changed += is_change
            num_polygons, num_left_out = maps.finish(config.min_area, config.fill_holes)
    seconds, megapixels = time.perf_counter() - start, grid.height * grid.width / 1e6
    changed, no_data = num_changed / max(num_valid, 1), 1 - num_valid / (grid.height * grid.width)
    line = (
        f"{out / pair.name}_*: {grid.width} x {grid.height}, {changed:.2%} changed"
        f"{f', {num_polygons} polygons' if grid.has_place else ''}"
        f"{f' and {num_left_out} too small (--min-area)' if num_left_out else ''}"
        f"{f', {no_data:.1%} without data' if no_data else ''}"
        f", {megapixels / seconds:.2f} megapixels/s"
    )
    print(line, flush=True)
    return Mapped((*scene.notes, line), megapixels, seconds, changed, num_polygons)


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
    with tqdm(
        total=megapixels,
        desc=name,
        unit="MP",
        leave=False,
        disable=True if rank() else None,  # where nobody watches
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
