"""The fault matrix is covered, and the rows that only a whole run can show."""

import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import no_file_above, save_tree
from fault_matrix import ROWS, covered_by
from PIL import Image
from tiny import TINY, install_tiny

import main
from main import train
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError, run_script
from training import splits
from training.run_folder import new_run_folder


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test(row: str) -> None:
    assert covered_by()[row], f"no test is marked fault({row!r}): {ROWS[row]}"


def test_every_mark_names_a_row() -> None:
    assert set(covered_by()) <= set(ROWS)


# ---- rows that only a whole run can show


SMALL = {
    "backbone": TINY,
    "weights": "none",
    "crop_size": 32,
    "batch_size": 2,
    "workers": 0,
    "device": "cpu",
    "mlflow": False,
    "amp": "off",
    "epochs": 1,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr(splits, "PATCH_SIZE", 32)
    install_tiny(monkeypatch)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "levir", train=4, val=2)


@pytest.mark.fault("R4")
def test_a_full_disk_costs_what_was_not_yet_saved(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "runs" / "a"
    # of a size that is told in MB
    train({**SMALL, "backbone": "resnet18", "data_dir": str(tree), "name": "a"})
    kept = {name: (run / name).read_bytes() for name in ("last.pt", "best.pt")}
    with no_file_above(10_000), pytest.raises(UserError) as error:
        train({"resume": "auto", "epochs": 3, "draw_every": 1})
    assert re.search(
        r"needs \d\d+ MB and no file may have more than \d+ MB .*and resume", str(error.value)
    )
    # one picture, of which a copy goes beside the others: said once
    assert capsys.readouterr().out.count("not drawn (File too large)") == 1
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert not list(run.glob("*.tmp"))
    train({"resume": "auto", "epochs": 3})
    assert read_checkpoint(run / "last.pt")["progress"]["epoch"] == 3


@pytest.mark.fault("R4")
def test_a_full_disk_at_the_start_is_one_line(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = {**SMALL, "data_dir": str(tree), "cache": "none"}
    with no_file_above(100):
        assert run_script(lambda: train(given)) == 2
    errors = capsys.readouterr().err
    assert "config.json" in errors and "File too large" in errors
    assert len(errors.splitlines()) == 1
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


@pytest.mark.fault("R12", "D15")
def test_a_read_only_installation_trains_elsewhere(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(main, "ROOT", tmp_path / "file")  # below a file nothing can be made
    given = {**SMALL, "data_dir": str(tree), "draw_every": 1, "epochs": 2}
    with pytest.raises(UserError, match=r"file/runs/.*: cannot be made .*--output-dir"):
        train(given)
    capsys.readouterr()
    train({**given, "output_dir": str(tmp_path / "out"), "name": "a"})
    said = capsys.readouterr().out
    assert said.count("no cache of") == 2  # of each split, for each may end otherwise
    assert said.count("not drawn") == 1
    assert (tmp_path / "out" / "a" / "validation_predictions.png").is_file()


@pytest.mark.fault("D14")
@pytest.mark.parametrize("value", [0, 255])
def test_a_split_of_one_class_trains(
    value: int, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in (tree / "val" / "label").iterdir():
        Image.fromarray(np.full((32, 32), value, np.uint8)).save(path)
    if value == 0:
        for path in (tree / "train" / "label").iterdir():
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    best = train({**SMALL, "data_dir": str(tree), "name": "a"})
    assert all(math.isfinite(score) for score in best.values())
    assert "nan" not in (tmp_path / "runs" / "a" / "metrics.csv").read_text()
    assert "its scores will say little" in capsys.readouterr().out


@pytest.mark.fault("R13")
def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def begin(_: int) -> Path:
        barrier.wait()
        return new_run_folder(tmp_path / "runs", "a", {})

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(begin, range(8)))
    assert len(made) == 8
    assert made == {path for path in (tmp_path / "runs").iterdir() if path.is_dir()}


SCRIPT = """
import sys
from pathlib import Path
import main
from training import splits
from runtime.errors import run_script
main.ROOT, splits.PATCH_SIZE = Path(sys.argv[1]), 32
sys.exit(run_script(lambda: main.train({})))
"""


def start(root: Path, given: dict[str, Any], **more: Any) -> subprocess.Popen:
    script = SCRIPT.replace("{}", repr({**given, "backbone": "resnet18"}))
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__file__).parent)} | more
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("R13")
def test_two_runs_at_once_are_those_one_after_the_other(tree: Path, tmp_path: Path) -> None:
    given = {**SMALL, "data_dir": str(tree), "name": "a", "epochs": 2}
    runs = [start(tmp_path, given) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    tables = [(tmp_path / "runs" / name / "metrics.csv").read_text() for name in ("a", "a-2")]
    columns = [line.split(",")[:4] for table in tables for line in table.splitlines()]
    assert columns[:3] == columns[3:]
    first, second = (read_checkpoint(tmp_path / "runs" / n / "last.pt") for n in ("a", "a-2"))
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())


@pytest.mark.slow
@pytest.mark.fault("R12", "R14", "R23", "R25", "R8")
def test_a_bare_environment_and_its_secrets(tree: Path, tmp_path: Path) -> None:
    """No home, no display, another working directory, an odd name, a tracking server's token."""
    secret = "hunter2"
    run = start(
        tmp_path,
        {**SMALL, "data_dir": "levir", "name": "höhe 1 高", "mlflow": True, "draw_every": 1},
        HOME="/dev/null/none",
        XDG_CACHE_HOME="",
        DISPLAY="",
        MPLBACKEND="TkAgg",
        SOME_TOKEN=secret,
        MLFLOW_TRACKING_URI=f"http://me:{secret}@127.0.0.1:9/?token={secret}",
    )
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "Traceback" not in errors and secret not in said + errors
    assert errors.count("the run goes on without") == 1
    folder = tmp_path / "runs" / "höhe 1 高"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "last.pt", "best.pt", "metrics.csv"} <= {path.name for path in files}
    assert (folder / "validation_predictions.png").is_file()
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("levir", "runs", "images")
                and path.name != "data"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("R14")
def test_a_clock_that_jumps_back_does_no_harm(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train({**SMALL, "data_dir": str(tree), "name": "a"})
    train({"resume": "auto", "epochs": 2})
    table = (tmp_path / "runs" / "a" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", "1", "2"]


@pytest.mark.fault("R17")
def test_a_run_without_a_good_checkpoint_does_not_begin_anew(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train({**SMALL, "data_dir": str(tree), "name": "a", "epochs": 2})
    run = tmp_path / "runs" / "a"
    for name in ("last.pt", "last.previous.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run_script(lambda: train({**SMALL, "data_dir": str(tree), "resume": "auto"})) == 2
    errors = capsys.readouterr().err
    assert str(run / "last.pt") in errors and str(run / "last.previous.pt") in errors
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault("R26")
def test_no_server_is_told_to_listen_to_others() -> None:
    root = Path(main.__file__).parent
    words = re.compile(r"0\.0\.0\.0|--bind_all|--host[= ](?!127\.0\.0\.1|localhost)|--listen")
    ours = ("*.py", "*.md", "*/*.md", "*/*.py", "*/*/*.py", "*/*.ipynb", ".ci/*")
    paths = [p for pattern in ours for p in root.glob(pattern)
             if p.relative_to(root).parts[0] not in ("tests", "runs")]  # fmt: skip
    assert len(paths) > 60
    assert not [path for path in paths if words.search(path.read_text("utf-8"))]
    servers = [line for path in paths for line in path.read_text("utf-8").splitlines()
               if "mlflow ui" in line or "tensorboard --logdir" in line]  # fmt: skip
    assert servers  # that listen on this machine only, unless told otherwise
