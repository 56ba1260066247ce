"""Kill -9 at any moment: a run that is resumed ends as if nothing had happened, bit for bit."""

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import save_tree

import main
from runtime.checkpoint import read_checkpoint
from runtime.tracking_tensorboard import chart_of

# Runs main.py with a disk so slow that many a kill falls into the writing of a file
SLOW_DISK = """
import os, runpy, sys, time
import torch
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.15), fsync(file))
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def command(tmp_path: Path, name: str) -> list[str]:
    return [
        sys.executable, "-u", "-c", SLOW_DISK, main.__file__, f"--data-dir={tmp_path / 'levir'}",
        "--backbone=resnet18", "--weights=none", "--crop-size=64", "--batch-size=2", "--workers=0",
        "--device=cpu", "--amp=off", "--cache=none", "--no-mlflow", "--epochs=4", "--save-every=2",
        f"--output-dir={tmp_path / 'runs'}", f"--name={name}",
    ]  # fmt: skip


def check_files(run: Path) -> None:
    """Raise unless every file of a run is whole, whatever moment it was killed at."""
    if not run.exists():
        return
    json.loads((run / "config.json").read_text())
    for path in run.glob("*.pt"):
        read_checkpoint(path)
    if (run / "metrics.csv").exists():
        steps = [row["step"] for row in rows(run)]
        assert steps == [str(i + 1) for i in range(len(steps))]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        del row["pairs_per_second"], row["data_wait_share"]
    return table


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def scalars(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    events = event_accumulator.EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(chart_of("val/loss"))]


def kill_and_resume(tmp_path: Path, num_kills: int) -> None:
    save_tree(tmp_path / "levir", train=7, val=2, size=(64, 64))
    start = time.monotonic()
    subprocess.run(command(tmp_path, "straight"), check=True, capture_output=True, timeout=300)
    seconds = time.monotonic() - start
    draw, killed, run = random.Random(0), 0, tmp_path / "runs" / "a"
    while killed < num_kills:
        victim = subprocess.Popen(
            [*command(tmp_path, "a"), "--resume=auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert victim.stdout is not None
        for line in victim.stdout:  # most of the time is Python's start, where nothing can be lost
            if line.startswith("data "):
                break
        time.sleep(draw.uniform(0, 0.5 * seconds))
        victim.kill()
        said, _ = victim.communicate(timeout=60)
        assert "Traceback" not in said, said
        check_files(run)
        killed += 1
        if victim.returncode != -9 or (run.exists() and _is_over(run)):
            assert_as_undisturbed(tmp_path)
            run.rename(run.with_name(f"ended-{killed}"))  # and a new one to kill
    done = subprocess.run(
        [*command(tmp_path, "a"), "--resume=auto"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check_files(run)
    assert_as_undisturbed(tmp_path)


def _is_over(run: Path) -> bool:
    last = run / "last.pt"
    return last.exists() and read_checkpoint(last)["progress"]["epoch"] == 4


def assert_as_undisturbed(tmp_path: Path) -> None:
    run, straight = tmp_path / "runs" / "a", tmp_path / "runs" / "straight"
    assert rows(run) == rows(straight)
    assert scalars(run) == scalars(straight)
    for file in ("last.pt", "best.pt"):
        first, second = read_checkpoint(run / file), read_checkpoint(straight / file)
        for part in ("model", "best", "optimizer", "progress"):
            assert_equal(first.get(part), second.get(part))
    assert not list(run.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.fault("R1", "R2")
@pytest.mark.parametrize("num_kills", [3, 20])
def test_killed_at_any_moment_it_ends_bit_for_bit_equal(num_kills: int, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, num_kills)
