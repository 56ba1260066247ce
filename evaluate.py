"""Score a trained model: `python evaluate.py runs/NAME/best.pt`, `python evaluate.py --help`.

Every protocol side by side, at the model's own threshold and at the one chosen on val; intervals,
curves, calibration, the worst pairs; `--robustness` corrupts the later date. Several checkpoints
(seeds) give mean and standard deviation; `--compare runs/a runs/b` says whether b is better than a.
All of it goes to <run>/evaluation/<split>/, or with several checkpoints beside their runs, and to
the MLflow run of the training; report.html there opens in any browser. `--flips` scores what
`predict.py --flips` maps, in <split>-flips. Started by torchrun, several processes share the
images.
"""

if __name__ == "__main__":  # Ctrl-C ends it in silence from here on, while modules are imported
    import _signal  # type: ignore[import-not-found] # of `signal`: no file has to be read

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairs.labels import MIN_PIXELS
from runtime.config import REQUIRED, option
from runtime.options import find_model, shared
from runtime.start import start

NUMBERS = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by --amp
ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """The options of an evaluation."""

    checkpoints: tuple[str, ...] = option(
        REQUIRED,
        "a run's best.pt or its folder; several (seeds) give mean and deviation",
        positional=True,
    )

    data_dir: str | None = option(
        None,
        "folder of the dataset; else the one of the training",
        group="data",
        aliases=["--data-path"],
    )
    split: str = option(
        "test",
        "split that is scored; the threshold is chosen on val",
        choices=("test", "val", "train"),
    )
    mask_values: tuple[int, ...] | None = option(
        None, "label value of class 0, 1, ...; else as in training"
    )
    folders: tuple[str, ...] | None = shared("folders")
    pairs: str | None = shared("pairs")
    skip_broken: bool = shared("skip_broken")

    bands: tuple[int, ...] | None = option(
        None, "red, green and blue of the images, counted from 1; else as in training"
    )
    scale: tuple[float, ...] | None = option(
        None, "values that become 0 and 255; else as in training"
    )
    alpha: int | None = option(
        None, "band that is 0 where there is no data; else as in training", above=0
    )

    protocols: str = option(
        "patches,whole,sliding",
        "patches, whole (image), sliding (windows)",
        group="what to measure",
    )
    window: int = option(512, "side of a sliding window", above=0)
    overlap: int = option(128, "overlap of neighbouring windows, in pixels", at_least=0)
    flips: bool = shared("flips")
    min_object: int = option(MIN_PIXELS, "pixels of the smallest object that counts", above=0)
    compare: bool = option(
        False, "each model minus the first: difference in change IoU, paired bootstrap over images"
    )
    robustness: bool = option(False, "score with the later date shifted, turned, blurred, ...")
    robustness_pairs: int = option(
        64, "pairs for --robustness, spread over the split; 0: all", at_least=0
    )
    seed: int = option(0, "seed of the bootstrap", at_least=0)

    device: str = shared("device", group="machine")
    amp: str = shared("amp")
    batch_size: int | None = option(
        None, "patches at once in each process; else as in training", short="-b", above=0
    )
    cache: str = shared("cache")
    cache_gb: float = shared("cache_gb")
    workers: int | None = shared("workers")

    output_dir: str | None = option(
        None,
        "folder for the results; one that is there stays, and -2, -3, ... is made",
        group="run",
        short="-o",
        aliases=["--output"],
    )
    json: bool = option(False, "print JSON instead of the table")
    mlflow: bool = option(True, "log to MLflow as well")


if __name__ == "__main__":  # the imports below take seconds; a wrong word is answered before
    GIVEN = start(
        Config,
        description=__doc__,
        check=lambda given: [find_model(word) for word in given.checkpoints],
    )

import torch

from model import restore_model
from pairs.bands import Reading
from runtime.checkpoint import digest_of, read_checkpoint
from runtime.devices import describe, pick_device, pick_precision, pick_workers
from runtime.distributed import (
    from_rank_0,
    in_turn,
    local_rank,
    local_world_size,
    rank,
    run,
    world_size,
)
from runtime.errors import UserError, counted
from runtime.memory import keep_freed_memory
from scoring.data import EvaluationData, check_classes, kind_of, open_data
from scoring.evaluation import (
    ROBUSTNESS_PROTOCOL,
    ProtocolResult,
    evaluate_protocol,
    measure_robustness,
)
from scoring.figures import draw_all, worst_views
from scoring.protocols import PATCH_SIZE, PROTOCOLS, Predictor
from scoring.record import check_writable, log_results, write_results
from scoring.report import (
    Evaluated,
    Report,
    as_json,
    comparison,
    protocols_report,
    summarize,
    text,
)


def score(given: dict[str, Any]) -> None:
    """Evaluate; with --json nothing but JSON goes to stdout."""
    if not given.get("json"):
        evaluate(given)
        return
    with contextlib.redirect_stdout(sys.stdout if rank() else sys.stderr):
        report = evaluate(given)
    print(as_json(report))


def evaluate(given: dict[str, Any]) -> Report:
    """Evaluate from the options that a command line gives.

    Returns:
        Every number, as `scoring/report.py` describes.

    Raises:
        UserError: anything the user can mend.
    """
    config = Config(**given)
    protocols = choose_protocols(config)
    checkpoints = read_checkpoints(config.checkpoints)
    if config.compare and len(checkpoints) < 2:
        raise UserError("--compare: give two models or more")
    device = pick_device(config.device, local_rank())
    amp = pick_precision(config.amp, device)
    keep_freed_memory()
    with in_turn():
        first, state = next(iter(checkpoints.items()))
        data = open_data(
            state,
            first,
            config.split,
            data_dir=config.data_dir,
            pairs=config.pairs,
            folders=config.folders,
            mask_values=config.mask_values,
            reading=Reading.asked(config.bands, config.scale, config.alpha),
            skip_broken=config.skip_broken,
            home=ROOT / "data",
            cache=config.cache,
            cache_gb=config.cache_gb,
        )
    wanted = Path(config.output_dir) if config.output_dir else None
    from_rank_0(lambda: check_writable(wanted or next(iter(checkpoints)).parent))
    print(
        f"device  {describe(device)}, {NUMBERS[amp]}"
        f"{f', each of {world_size()} processes' if world_size() > 1 else ''}",
        flush=True,
    )
    if config.data_dir is None and config.pairs is None:
        warn_of_other_data(checkpoints, data)
    protocols, note = leave_out_equal_ones(protocols, data, config.window)
    measured = [
        measure(config, predictor_of(config, path, state, data, device, amp), protocols, data)
        for path, state in checkpoints.items()
    ]

    def publish() -> Report:
        evaluated = [
            describe_checkpoint(config, path, state, found, data)
            for (path, state), found in zip(checkpoints.items(), measured, strict=True)
        ]
        report = report_of(config, data, evaluated, measured[0].rule, note)
        folder = write_results(wanted, report, evaluated)
        log_results(folder, report, evaluated, store=ROOT, use_mlflow=config.mlflow)
        print(f"\n{text(report)}\n\nfiles   {folder}\nlook    {folder / 'report.html'}")
        return report

    return from_rank_0(publish)


def warn_of_other_data(checkpoints: Mapping[Path, dict[str, Any]], data: EvaluationData) -> None:
    """Say which of several models learned from other data than the one that is scored on."""
    first = next(iter(checkpoints))
    for path, state in checkpoints.items():
        if path != first and state["data"].get("fingerprint") != data.fingerprint and rank() == 0:
            print(
                f"warning: {path} was trained on other data; all are scored on {data.name}, that "
                f"of {first} (--data-dir sets another)"
            )


def predictor_of(
    config: Config,
    path: Path,
    state: dict[str, Any],
    data: EvaluationData,
    device: torch.device,
    amp: str,
) -> Predictor:
    """Build the model of a checkpoint, and say how to ask it.

    Raises:
        UserError: its classes are not those of the data, or it is broken.
    """
    check_classes(state["data"], data.names, path)
    return Predictor(
        restore_model(state, path).to(device).eval(),
        amp=amp,
        batch_size=config.batch_size or state["config"].get("batch_size", 8),
        num_workers=pick_workers(config.workers, local_world_size()),
        window=config.window,
        overlap=config.overlap,
        flips=config.flips,
    )


def report_of(
    config: Config, data: EvaluationData, evaluated: Sequence[Evaluated], rule: str, note: str
) -> Report:
    """Put the reports of all checkpoints together, see `scoring/report.py`."""
    runs = [one.report for one in evaluated]
    knows_data = all(run["trained_on_this_data"] for run in runs)
    result = next(iter(evaluated[0].results.values()))
    place = config.split if knows_data else f"{data.folder}-{config.split}"
    return {
        "data": data.name,
        "split": config.split,
        "place": f"{place}-flips" if config.flips else place,
        "flips": config.flips,
        "pairs": len(data.split),
        "val_pairs": len(data.val) if data.val else 0,
        "has_change": result.counts.histogram.has_change(),
        "val_has_change": result.val_has_change,
        "classes": list(data.names),
        "rule": rule,
        "note": note,
        "min_object_pixels": config.min_object,
        "runs": runs,
        **({"comparison": comparison(evaluated, config.seed)} if config.compare else {}),
        **(summarize(runs) if len(runs) > 1 else {}),
    }


def choose_protocols(config: Config) -> list[str]:
    """Return the protocols that were asked for.

    Raises:
        UserError: one is not known, or the windows cannot overlap like that.
    """
    names = [name.strip() for name in config.protocols.split(",")]
    for name in names:
        if name not in PROTOCOLS or names.count(name) > 1:
            raise UserError(f"--protocols {config.protocols}: give some of {','.join(PROTOCOLS)}")
    if config.overlap >= config.window:
        raise UserError(f"--overlap {config.overlap}: give less than --window {config.window}")
    return names


def read_checkpoints(given: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """Read the checkpoints; of a run's folder its best.pt.

    Raises:
        UserError: one is not there or broken, is given twice, or is of another task.
    """
    states: dict[Path, dict[str, Any]] = {}
    for word in given:
        path = find_model(word)
        if path in states:
            raise UserError(f"{path}: is given twice")
        states[path] = read_checkpoint(path)
    kinds = {path: kind_of(state["model_kwargs"]) for path, state in states.items()}
    first = next(iter(kinds))
    for path, kind in kinds.items():
        if kind != kinds[first]:
            raise UserError(f"{path}: its classes are not those of {first}; evaluate them apart")
    readings = {path: Reading.saved(state["data"], path) for path, state in states.items()}
    for path, reading in readings.items():
        if reading != readings[first]:
            raise UserError(
                f"{path}: it reads other bands or another scale than {first}; evaluate them apart"
            )
    return states


def leave_out_equal_ones(
    protocols: list[str], data: EvaluationData, window: int
) -> tuple[list[str], str]:
    """Return the protocols that differ, and a note on those that would only say the same again."""
    sizes = {*data.split.sizes, *(data.val.sizes if data.val else [])}
    if sizes != {(PATCH_SIZE, PATCH_SIZE)} or window < PATCH_SIZE or len(protocols) == 1:
        return protocols, ""
    first, *others = protocols
    return [first], (
        f"all images are {PATCH_SIZE} x {PATCH_SIZE}: {' and '.join(others)} would be the same"
    )


@dataclass(frozen=True)
class Measured:
    """What was counted of a checkpoint: by protocol, and under corruptions if asked for."""

    results: dict[str, ProtocolResult]
    robustness: list[dict[str, Any]]
    rule: str  # of the model by itself


def measure(
    config: Config, predictor: Predictor, protocols: Sequence[str], data: EvaluationData
) -> Measured:
    """Measure all that was asked for; several processes share each split."""
    results = {
        protocol: evaluate_protocol(
            predictor,
            protocol,
            data.split,
            data.val,
            names=data.names,
            min_pixels=config.min_object,
        )
        for protocol in protocols
    }
    rows: list[dict[str, Any]] = []
    if config.robustness:
        rows = measure_robustness(
            predictor,
            data.split,
            max_pairs=config.robustness_pairs,
            names=data.names,
            min_pixels=config.min_object,
        )
    return Measured(results, rows, predictor.rule)


def describe_checkpoint(
    config: Config, path: Path, state: dict[str, Any], measured: Measured, data: EvaluationData
) -> Evaluated:
    """Turn counts into a report and figures."""
    # a folder that has got another split since is still the one of the training
    is_own = config.data_dir is None and state["config"].get("data_dir") == data.chosen
    knows_data = is_own or state["data"].get("fingerprint") == data.fingerprint
    report: Report = {
        "checkpoint": str(path),
        "sha256": digest_of(path),
        "epoch": int((state.get("progress") or state.get("best") or {}).get("epoch", 0)),
        "trained_on_this_data": knows_data,
        "caution": caution_of("train" if data.is_all else config.split, knows_data),
        "protocols": protocols_report(measured.results, config.seed),
    }
    if measured.robustness:
        report["robustness"] = {"protocol": ROBUSTNESS_PROTOCOL, "rows": measured.robustness}
    run_name, num_pairs = path.resolve().parent.name, len(data.split)
    title = f"{run_name} on the {config.split} split of {data.name}, {counted(num_pairs, 'pair')}"
    if config.flips:
        title += ", --flips"
    if report["caution"]:
        title += f"\nOPTIMISTIC: {report['caution']}"
    figures = draw_all(
        measured.results, measured.robustness, data.split, title=title, rule=measured.rule
    )
    views = worst_views(next(iter(measured.results.values())), data.split)
    return Evaluated(path, state, report, measured.results, figures, views)


def caution_of(split: str, knows_data: bool) -> str | None:
    """Say why scores on a split are better than they would be on new pairs, if they are."""
    if split == "train" and knows_data:
        return "the model learned from these pairs"
    if split == "val":
        chosen = "the checkpoint and the thresholds" if knows_data else "the thresholds"
        return f"{chosen} with * were chosen on these pairs"
    return None


if __name__ == "__main__":
    sys.exit(run(lambda: score(GIVEN)))
