"""A run from its options to its last checkpoint.

run = open_run(Config, given, Path("runs"), stack)      options, and where it stopped
run.start(learner, data)                                its folder, or its state
tracker = stack.enter_context(run.open_tracker(data, store))
train_one_epoch(..., after_update=lambda: run.save_if_due(learner))
run.save_epoch(learner, scores)                         last.pt, and best.pt if it is the best
"""

import dataclasses
import math
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairs.labels import LabelEncoding
from runtime.checkpoint import read_checkpoint, restore, save_checkpoint, versions
from runtime.config import as_dict, differences, from_dict
from runtime.distributed import (
    agree,
    from_rank_0,
    is_restarted,
    launch_id,
    rank,
    wait_for_all,
    world_size,
)
from runtime.errors import DataFault, Interrupted, StopRequest, UserError
from runtime.files import write_json
from runtime.options import find_model
from runtime.tracking import Tracker
from training.engine import Learner, check_finite
from training.run_folder import (
    OPTIONS,
    check_name,
    claimed,
    find_checkpoint,
    find_launch,
    new_run_folder,
    read_options,
    sweep,
)
from training.splits import Data


@dataclass
class Run:
    """A run: its options, its folder, and where it stopped. Every process has one, rank 0 writes.

    Attributes:
        config: the options.
        runs: the folder of all runs.
        last: the checkpoint that the run goes on from; None for a new run.
        state: its content; None also where the run was ended before it saved any.
        held: holds the lock of the folder, and listens for signals, until it is closed.
        folder: of the run, from `start` on.
        best: epoch and scores of the best epoch so far.
        mlflow_run_id: for the next process that goes on.
        is_new: whether nothing is saved yet.
    """

    config: Any
    runs: Path
    last: Path | None
    state: dict[str, Any] | None
    held: ExitStack
    folder: Path = field(init=False)
    best: dict[str, Any] = field(init=False)
    mlflow_run_id: str | None = field(init=False)
    is_new: bool = field(init=False)

    @property
    def how_to_resume(self) -> str:
        """The command that goes on with the run."""
        return f"go on with: python main.py --resume {shlex.quote(str(self.folder))}"

    def start(self, learner: Learner, data: Data) -> None:
        """Make the folder of a new run, or put the learner where the run stopped.

        Raises:
            UserError: the data or the classes are others, or all epochs are done.
        """
        headline = data.confusion(learner.progress.device).headline
        self.no_best = {"epoch": 0, "change_iou": -1.0, headline: -1.0}
        self.headline = headline
        self.val_has_change = data.checked.splits["val"].holds_change
        self.best = self.no_best
        self.mlflow_run_id = None
        if self.last and self.state:
            self._restore(self.last, self.state, learner, data)
        self.folder = from_rank_0(self._open_folder)
        self.weights = learner.weights
        self.about = {
            "model_kwargs": learner.model_kwargs,
            "config": as_dict(self.config),
            "weights": self.weights,
            "data": data.about(),
        }
        self.first_epoch = learner.progress.epoch + 1 if self.last else 0
        self.is_new, self.state = not self.state, None  # its tensors would stay in memory
        self.save_every = SaveEvery(self.config.save_every)
        self.stop = self.held.enter_context(StopRequest(is_silent=rank() > 0))

    def open_tracker(self, data: Data, store: Path) -> Tracker:
        """Return the tracker of the run; `store` is the folder of mlflow.db."""
        tracker = Tracker(
            self.folder,
            config=as_dict(self.config),
            tags={"dataset": data.name, "weights": self.weights},
            store=store,
            use_mlflow=self.config.mlflow,
            first_step=self.first_epoch,
            mlflow_run_id=self.mlflow_run_id,
        )
        self.mlflow_run_id = tracker.mlflow_run_id
        tracker.log_datasets(
            data.name,
            digest=data.checked.fingerprint,
            source=str(data.root),
            num_pairs={split: found.pairs for split, found in data.checked.splits.items()},
        )
        return tracker

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether an epoch is better than all before, by loss where val holds no change to find."""
        if not self.val_has_change:
            return scores["loss"] < self.best.get("loss", math.inf)
        return scores[self.headline] > self.best[self.headline]

    def save(self, learner: Learner) -> Path:
        """Write last.pt, keeping the one before; return its path.

        It is whole on the disk before any process goes on.
        """
        check_finite(learner.progress)
        if from_rank_0(self._make_again):
            self.best = self.no_best  # its weights were in the folder
        self._write("last.pt", learner.parts(), keep_previous=True)
        self.save_every.restart()
        return self.folder / "last.pt"

    def save_if_due(self, learner: Learner, *, is_due: bool = False) -> None:
        """Save if the time has come, or if a signal asks to leave; all processes together.

        Raises:
            Interrupted: by a signal, after saving.
        """
        is_due = is_due or self.save_every.after_update()
        signal_number, is_due_for_one = agree(self.stop.signal_number, is_due)
        if signal_number or is_due_for_one:
            path = self.save(learner)
            if signal_number:
                raise Interrupted(f"saved {path}\n{self.how_to_resume}", signal_number)

    def save_epoch(self, learner: Learner, scores: Mapping[str, float]) -> None:
        """Save the end of an epoch with its scores on val: best.pt if it is the best, and last.pt.

        Raises:
            Interrupted: by a signal, after saving.
        """
        learner.progress.start(learner.progress.epoch + 1)
        if from_rank_0(self._make_again):
            self.best = self.no_best
        if self.is_best(scores):
            self.best = {"epoch": learner.progress.epoch, **scores}
            self._write("best.pt", {"model": learner.model})
        if self.config.keep == "all":
            self._write(f"epoch-{learner.progress.epoch:04}.pt", {"model": learner.model})
        self.save_if_due(learner, is_due=True)

    @contextmanager
    def saved_if_data_fails(self, learner: Learner) -> Iterator[None]:
        """Save where a file of the data went or changed: the state of the run is whole."""
        try:
            yield
        except DataFault as fault:
            if world_size() > 1:  # the others are in the middle of a step
                raise
            raise UserError(f"{fault}; saved {self.save(learner)}, {self.how_to_resume}") from None

    def _restore(self, last: Path, state: dict[str, Any], learner: Learner, data: Data) -> None:
        if state["data"]["fingerprint"] != data.checked.fingerprint:
            raise UserError(
                f"{last}: was trained on other images or labels than {data.root} holds now; give "
                "their folder by --data-dir, or begin a new run without --resume"
            )
        check_same_classes(state["data"], data.checked.encoding, last)
        restore(learner.parts(), state, last)
        self.best = {**self.no_best, **state["best"]}
        self.mlflow_run_id = state.get("mlflow_run_id")
        if learner.progress.epoch >= self.config.epochs:
            epochs = self.config.epochs
            raise UserError(f"{last}: all {epochs} epochs are done; --epochs N adds more")

    def _open_folder(self) -> Path:
        """Return the folder, made if it is new, in which config.json says how the run goes on."""
        if self.last:
            sweep(self.last.parent)
            write_json(self.last.parent / OPTIONS, self._options())
            return self.last.parent
        name = self.config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{self.config.backbone}"
        folder = new_run_folder(self.runs, name, self._options())
        self.held.enter_context(claimed(folder))
        return folder

    def _options(self) -> dict[str, Any]:
        return {**as_dict(self.config), "versions": versions(), "launch": launch_id()}

    def _make_again(self) -> bool:
        """Make the folder again if somebody has removed it; return whether that was so."""
        if (self.folder / OPTIONS).exists():
            return False
        had_best = self.best["epoch"] and not (self.folder / "best.pt").exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / OPTIONS, self._options())
        if not (self.folder / ".lock").exists():
            self.held.enter_context(claimed(self.folder))
        lost = "; the next epoch counts as the best, for best.pt is lost" if had_best else ""
        print(f"warning: {self.folder}: was removed, and is made again{lost}", flush=True)
        return bool(had_best)

    def _write(self, file: str, parts: Mapping[str, Any], *, keep_previous: bool = False) -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        if rank() == 0:
            more = {"best": dict(self.best), "mlflow_run_id": self.mlflow_run_id}
            content = {**self.about, **states, **more}
            save_checkpoint(self.folder / file, content, keep_previous=keep_previous)
        wait_for_all()


def open_run(
    config_class: type,
    given: Mapping[str, Any],
    runs: Path,
    held: ExitStack,
    check: Callable[[Any, bool], None],
) -> Run:
    """Return a run with its options, and of one to go on with what it saved.

    Such a run is claimed until `held` ends. A process that torchrun has started again goes on with
    the run that it began.

    Args:
        config_class: of the options.
        given: the options that the command line gives.
        runs: the folder of the runs, unless --output-dir names another.
        held: is closed when the run ends.
        check: raises UserError for options that cannot be; is told whether the run is new.

    Raises:
        UserError: an unknown name, a file that is not there, or an option that may not change.
    """

    def choose() -> tuple[Any, Path, Path | None, dict[str, Any] | None]:
        config, last, state = config_class(**given), None, None
        folder = Path(config.output_dir or runs)
        wanted = dict(given)
        if is_restarted() and (own := find_launch(launch_id(), folder)):
            wanted["resume"] = str(own)
            config = config_class(**wanted)
        begins = config.resume == "auto" and config.name and not (folder / config.name).exists()
        if config.resume and not begins:
            last, state = find_checkpoint(
                config.resume, folder, config.name, lambda f: held.enter_context(claimed(f))
            )
            saved: Any = from_dict(
                config_class, state["config"] if state else read_options(last.parent)
            )
            config = dataclasses.replace(saved, **wanted)
            if changed := differences(saved, config):
                raise UserError(f"{last}: a resumed run keeps its options; {'; '.join(changed)}")
        if state is None and config.init:
            config = dataclasses.replace(config, **architecture_of(config.init, given))
        check(config, state is None)
        if state is None:
            check_name(config.name)
        return config, folder, last, state

    return Run(*from_rank_0(choose), held)


def architecture_of(start: str, given: Collection[str]) -> dict[str, Any]:
    """Return those options of the model that a run starts from that the user has not chosen."""
    known = read_checkpoint(find_model(start))["model_kwargs"]
    return {
        name: known[name]
        for name in ("task", "backbone", "fusion", "upsample")
        if name in known and name not in given
    }


def check_same_classes(saved: Mapping[str, Any], encoding: LabelEncoding, last: Path) -> None:
    """Raise UserError if classes are no longer what a run has learned."""
    now = (list(encoding.names), list(encoding.values))
    learned = (list(saved.get("class_names") or now[0]), list(saved.get("mask_values") or now[1]))
    if learned != now:
        before, after = (
            ", ".join(f"{name} {value}" for name, value in zip(*classes, strict=False))
            for classes in (learned, now)
        )
        raise UserError(f"{last}: its classes were {before}; now they are {after} (classes.json)")


class SaveEvery:
    """When to save within an epoch: after so much time, or so many updates, since the last save.

    Args:
        text: "90s", "10m", "1h", or a number of updates: "500".

    Raises:
        UserError: it is neither.
    """

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\d+)([smh]?)", text)
        if not found or not int(found[1]):
            raise UserError(
                f"--save-every {text}: give a time, such as 90s, 10m or 1h, or a number of "
                "updates, such as 500"
            )
        unit = {"s": 1, "m": 60, "h": 3600}.get(found[2], 0)
        self.seconds = int(found[1]) * unit if unit else float("inf")
        self.updates = float("inf") if unit else int(found[1])
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.monotonic()
        self._updates = 0

    def after_update(self) -> bool:
        """Count an update and tell whether it is time to save."""
        self._updates += 1
        return self._updates >= self.updates or time.monotonic() - self._since >= self.seconds
