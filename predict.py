"""Map the change between two scenes: `python predict.py runs/x/best.pt before.tif after.tif`.

Scenes of any size, PNG, JPEG, TIFF or GeoTIFF; or two folders, whose files are paired by stem.
Nothing needs a label. For each pair it writes the probability of change, the mask of classes and a
picture of both over the later date; for GeoTIFFs on the same grid, with polygons (maps.py,
polygons.py say what is in them). Started by torchrun, several processes share the work.
"""

if __name__ == "__main__":  # Ctrl-C ends it in silence from here on, while modules are imported
    import _signal  # type: ignore[import-not-found] # of `signal`: no file has to be read

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import shlex
import sys
from collections.abc import Mapping, Sequence
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
    later: tuple[str, ...] = option(
        (), "still later dates: each is compared with the one before", positional=True
    )

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
    part: str | None = option(
        None,
        "predict one of N parts, I/N, as one of several jobs; --join then writes the maps",
        form=(r"[1-9]\d*/[1-9]\d*", "I/N: 3/8 is the third of eight"),
    )
    join: bool = option(False, "write the maps from the parts that jobs have predicted")

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

    # against 4 windows of 512, per pixel of a scene, one core of a Xeon with AMX: 2 of 768 are 1.6
    # times as fast (EfficientNet-Lite0) and 1.1 times (ResNet50); 1 of 1,024 is 1.6 and 1.2 times
    # as fast, and its strips take a third more memory
    window: int = option(768, "side of the windows that the model sees", group="windows", above=0)
    overlap: int = option(128, "overlap of neighbouring windows, in pixels", at_least=0)
    batch_size: int = option(2, "windows at once", short="-b", above=0)
    flips: bool = shared("flips")

    device: str = shared("device", group="machine")
    amp: str = shared("amp")


if __name__ == "__main__":  # the imports below take seconds; a wrong word is answered before
    GIVEN = start(Config, description=__doc__, check=lambda given: find_model(given.checkpoint))

from torch import Tensor, nn

from mapping.job import Job, Mapped
from mapping.maps import Kinds, Output, check_free
from mapping.rasters import SceneFault
from mapping.scenes import Series, find_scenes
from mapping.sidecars import is_complete
from metrics import change_probability
from model import restore_model
from networks.sliding_window import Image, predict_logits
from pairs.bands import Reading
from runtime.checkpoint import VERSION, digest_of, read_checkpoint
from runtime.config import as_dict, as_flags
from runtime.devices import explain_out_of_memory, pick_device
from runtime.distributed import agree, from_rank_0, gather, local_rank, rank, run, share, world_size
from runtime.errors import Interrupted, StopRequest, UserError, counted
from runtime.memory import keep_freed_memory
from scoring.record import stored_threshold

SYNTHETIC = (
    "this model was trained on the SYNTHETIC sample alone: expect false alarms on real scenes; "
    "train on labelled pairs of your own"
)


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
    config, model, kinds, cautions = _model_of(Config(**given))
    config, about, scenes, faults = from_rank_0(lambda: prepare(config, kinds))
    job = job_of(config, model, kinds, about | cautions)
    num_pairs = sum(map(len, scenes))
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
                left = "nothing of the next one was written; --skip-existing goes on"
                if config.part:
                    left = "bands that are predicted stay; the same command goes on"
                done = f"stopped after {len(results)} of {num_pairs} scenes"
                raise Interrupted(f"{done}; {left}", number)

        for first in range(0, len(scenes), world_size()):
            group = scenes[first : first + world_size()]
            shared = len(group) < world_size()
            for series in group if shared else share(group):
                own: list[Mapped] | str | None
                try:
                    own = job.run(series, leave_if_asked, shared=shared)
                except SceneFault as fault:  # of a scene that is shared, all processes have it
                    own = str(fault) if not shared or rank() == 0 else None
                _take(gather(own), results, faults)
    if faults:
        raise UserError(_listed(faults, len(results)))
    return results


def _take(
    found: Sequence[list[Mapped] | str | None], results: list[Mapped], faults: list[str]
) -> None:
    """Note what all processes have done; rank 0 has said its own."""
    for number, one in enumerate(found):
        if isinstance(one, str):
            faults.append(one)
            continue
        for mapped in one or ():
            if number:
                print(*mapped.lines, sep="\n", flush=True)
            results.append(mapped)
            faults += [mapped.fault] if mapped.fault else []


def _model_of(config: Config) -> tuple[Config, nn.Module, Kinds, dict[str, str]]:
    """Return the options with those of the training, the model, its classes, and a caution."""
    check(config)
    path = find_model(config.checkpoint)
    state = read_checkpoint(path)
    reading = reading_of(config).over(Reading.saved(state["data"], path))
    device = pick_device(config.device, local_rank())
    keep_freed_memory(one_arena=True)
    model = restore_model(state, path).to(device).eval()
    is_sample = bool(state["data"].get("is_sample"))
    if rank() == 0 and is_sample:
        print(SYNTHETIC)
    kinds = Kinds.of(model.task, model.num_classes, state["data"])
    cautions = {"caution": SYNTHETIC} if is_sample else {}
    return replace(config, **vars(reading)), model, kinds, cautions


def _listed(faults: Sequence[str], num_mapped: int) -> str:
    """Return what to say at the end of the scenes that are not whole."""
    if len(faults) == 1 and not num_mapped:
        return faults[0]
    said = f"mapped: {counted(num_mapped, 'scene')}; with faults: {len(faults)}"
    return "\n  ".join([said, *faults])


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
        options: window, overlap, batch_size, flips and amp of `predict_bands`; windows are those
            of the script if nothing else is said.

    Returns:
        (H, W) float32 in [0, 1], on the CPU. With several classes it is that of any change.

    Raises:
        ValueError: the dates do not match, or the overlap is not smaller than the window.
    """
    options = {"window": Config.window, "batch_size": Config.batch_size, **options}
    logits = predict_logits(model, before, after, **options)
    return change_probability(logits[None], task=getattr(model, "task", "change"))[0]


def check(config: Config) -> None:
    """Raise UserError for options that do not go together."""
    if config.overwrite and config.skip_existing:
        raise UserError("--overwrite and --skip-existing: give one of them")
    if config.overlap >= config.window:
        raise UserError(f"--overlap {config.overlap}: give less than --window {config.window}")
    if part_of(config) and config.join:
        raise UserError("--part and --join: give one of them, --join when all parts are predicted")
    if (config.part or config.join) and world_size() > 1:
        raise UserError("--part and --join: each is one process; start them without torchrun")
    reading_of(config)


def reading_of(config: Config) -> Reading:
    """Return how the files are read; raise UserError for options that make no sense."""
    return Reading.asked(config.bands, config.scale, config.alpha)


def job_of(
    config: Config, model: nn.Module, kinds: Kinds, about: Mapping[str, Any] | None = None
) -> Job:
    """Return what is done with each scene.

    Args:
        config: the options.
        model: `(before, after) -> logits`, on its device.
        kinds: of its classes.
        about: the provenance.
    """
    return Job(
        model,
        kinds,
        Path(config.output_dir),
        Output(
            config.probability,
            config.polygons,
            config.min_area,
            config.fill_holes,
            config.simplify,
            config.report,
            about or {},
        ),
        config.threshold,
        config.window,
        config.overlap,
        opening={
            "reading": reading_of(config),
            "align": config.align,
            "allow_vrt": config.allow_vrt,
        },
        predicting={"batch_size": config.batch_size, "flips": config.flips, "amp": config.amp},
        replaces=config.overwrite or config.skip_existing,
        part=part_of(config),
        joins=config.join,
    )


def part_of(config: Config) -> tuple[int, int] | None:
    """Return the number of the part, from 1, and how many there are."""
    if config.part is None:
        return None
    number, total = map(int, config.part.split("/"))
    if number > total:
        raise UserError(f"--part {config.part}: give 1/{total} to {total}/{total}")
    return number, total


def prepare(config: Config, kinds: Kinds) -> tuple[Config, dict[str, Any], list[Series], list[str]]:
    """Judge all that can be judged before the first window.

    Returns:
        The options with the threshold chosen, the provenance, the scenes to map, and what is wrong
        with those that cannot be.

    Raises:
        UserError: nothing can be mapped, or maps are there.
    """
    scenes = find_scenes(*map(Path, (config.before, config.after, *config.later)))
    sound, faults = _judged(scenes, config, kinds)
    path, out = find_model(config.checkpoint), Path(config.output_dir)
    if config.threshold is None and kinds.has_threshold:
        config = _with_threshold(config, path)
    about = provenance(config, path)
    if config.skip_existing:
        todo = [left for s in sound for left in _left(s, out, about)]
        num_there = sum(map(len, sound)) - sum(map(len, todo))
        print(f"{num_there} of {counted(sum(map(len, scenes)), 'scene')} mapped already")
        sound = todo
    elif not config.overwrite:
        check_free(out, (pair.name for series in sound for pair in series))
    return config, about, sound, faults


def _with_threshold(config: Config, path: Path) -> Config:
    """Return the options with the threshold that evaluate.py has chosen, if it has."""
    for flips in (config.flips, not config.flips):
        if chosen := stored_threshold(path, flips=flips):
            threshold, source = chosen
            how = "" if flips == config.flips else f" {'with' if flips else 'without'} --flips"
            print(
                f"threshold {threshold:g}, chosen on val{how} ({source}); --threshold sets another"
            )
            return replace(config, threshold=threshold)
    words = f"{path.parent.name} --split val{' --flips' if config.flips else ''}"
    print(
        "threshold 0.5, which fits few scenes: on labelled pairs, your own with --data-dir, "
        f"`python evaluate.py {words}` finds a better one for --threshold"
    )
    return config


def _left(series: Series, out: Path, about: Mapping[str, Any]) -> list[Series]:
    """Return the pairs of a scene that are not mapped, as series of neighbours."""
    left: list[Series] = [[]]
    for pair in series:
        if is_complete(out, pair.name, about):
            left.append([])
        else:
            left[-1].append(pair)
    return [neighbours for neighbours in left if neighbours]


def _judged(
    scenes: Sequence[Series], config: Config, kinds: Kinds
) -> tuple[list[Series], list[str]]:
    """Return the scenes that can be mapped, by their headers, and the faults of the others."""
    job = job_of(config, nn.Identity(), kinds)
    sound, faults = [], []
    for series in scenes:
        try:
            with job.open(series):
                sound.append(series)
        except SceneFault as fault:
            if len(scenes) == 1:
                raise
            faults.append(str(fault))
    if not sound:
        raise UserError(_listed(faults, 0))
    return sound, faults


# Options that change no pixel of a map
_HARMLESS = {"checkpoint", "before", "after", "output_dir", "overwrite", "skip_existing", "report",
             "batch_size", "device", "later", "part", "join"}  # fmt: skip


def provenance(config: Config, path: Path) -> dict[str, Any]:
    """Return what made the maps, for their tags and NAME_about.json."""
    given = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default
    }
    dates = [given.pop("before"), given.pop("after"), *given.pop("later", ())]
    words = [shlex.quote(str(word)) for word in (given.pop("checkpoint"), *dates)]
    return {
        "checkpoint": str(path),
        "checkpoint_sha256": digest_of(path),
        "threshold": 0.5 if config.threshold is None else config.threshold,
        "options": {k: v for k, v in as_dict(config).items() if k not in _HARMLESS},
        "command": f"python predict.py {' '.join(words)} {as_flags(given)}".strip(),
        "version": VERSION,
    }


if __name__ == "__main__":
    sys.exit(run(lambda: predict(GIVEN)))
