"""What only a `Run` with its folder can show, without a model that learns."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metrics import Confusion
from runtime.checkpoint import read_checkpoint
from training.engine import Progress
from training.run import Run


@dataclass(frozen=True)
class Options:
    name: str = "a"
    epochs: int = 9
    save_every: str = "1h"
    keep: str = "needed"


class Part:
    def state_dict(self) -> dict[str, Any]:
        return {"w": torch.ones(3)}


def started(tmp_path: Path, stack: ExitStack, **options: Any) -> tuple[Run, Any]:
    """A run of epochs that take no time, after its first checkpoint."""
    confusion = Confusion(2, torch.device("cpu"))
    learner: Any = SimpleNamespace(
        progress=Progress(confusion), model=Part(), model_kwargs={}, weights="none",
        parts=lambda: {"model": Part(), "optimizer": Part(), "progress": learner.progress},
    )  # fmt: skip
    checked = SimpleNamespace(splits={"val": SimpleNamespace(holds_change=True)})
    data: Any = SimpleNamespace(confusion=lambda _: confusion, about=dict, checked=checked)
    run = Run(Options(**options), tmp_path, None, None, stack)
    run.start(learner, data)
    run.save(learner)
    return run, learner


def scores(value: float) -> dict[str, float]:
    return {"change_iou": value, "loss": 1.0}


@pytest.mark.fault("R32")
def test_a_removed_folder_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        run, learner = started(tmp_path, stack)
        run.save_epoch(learner, scores(0.5))
        shutil.rmtree(run.folder)
        run.save_epoch(learner, scores(0.25))
        assert "was removed, and is made again; the next epoch" in capsys.readouterr().out
        assert {path.name for path in run.folder.iterdir()} == {
            "best.pt", "last.pt", "config.json", ".lock",
        }  # fmt: skip
        state = read_checkpoint(run.folder / "last.pt")
        assert state["progress"]["epoch"] == 2 and state["best"]["epoch"] == 2
        run.save_epoch(learner, scores(0.125))
        assert run.best["epoch"] == 2
    assert capsys.readouterr().out == ""


def test_all_weights_stay_if_asked_for(tmp_path: Path) -> None:
    for keep in ("needed", "all"):
        with ExitStack() as stack:
            run, learner = started(tmp_path, stack, name=keep, keep=keep)
            for value in (0.5, 0.25):
                run.save_epoch(learner, scores(value))
        names = sorted(path.name for path in run.folder.glob("epoch-*.pt"))
        assert names == (["epoch-0001.pt", "epoch-0002.pt"] if keep == "all" else [])
        assert (run.folder / "last.previous.pt").is_file()
