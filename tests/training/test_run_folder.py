import json
import os
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from training.run_folder import (
    claimed,
    find_checkpoint,
    find_launch,
    new_run_folder,
    sweep,
    write_json,
)


def save(path: Path, value: float, *, resumable: bool = True, age: int = 0) -> None:
    state = {"model": {"w": torch.full((9,), value)}, "model_kwargs": {}, "config": {}, "data": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {
        "optimizer": {},
        "weights": "none",
        "best": {"epoch": 0, "change_iou": -1.0},
        "data": {"fingerprint": "x"},
        "progress": {"epoch": 1, "batch": 0},
    }
    save_checkpoint(path, {**state, **run} if resumable else state)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))


def test_a_run_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run_folder.PATIENCE", 0.1)
    (tmp_path / "last.pt.1.tmp").write_text("half of a checkpoint")
    with claimed(tmp_path):
        sweep(tmp_path)
        assert not list(tmp_path.glob("*.tmp"))
        unfinished = tmp_path / "last.pt.2.tmp"
        unfinished.write_text("being written")
        with pytest.raises(UserError, match="still running"), claimed(tmp_path):
            pass
        assert unfinished.exists()
    with claimed(tmp_path):
        sweep(tmp_path)
        assert not unfinished.exists()


@pytest.mark.fault("R9")
def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    made = [new_run_folder(tmp_path / "runs", "a", {}).name for _ in range(3)]
    assert made == ["a", "a-2", "a-3"]


@pytest.mark.fault("R14")
@pytest.mark.parametrize("name", ["with space", "höhe-高さ"])
def test_odd_names_work(name: str, tmp_path: Path) -> None:
    assert new_run_folder(tmp_path, name, {}).is_dir()


@pytest.mark.fault("R16")
@pytest.mark.parametrize("name", ["../x", "a/b", "..", "."])
def test_a_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a plain name"):
        new_run_folder(tmp_path / "runs", name, {})
    assert not (tmp_path / "x").exists()


@pytest.mark.fault("R12")
def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs"):
        new_run_folder(tmp_path / "runs", "a", {})


def test_auto_takes_the_newest_run_or_the_named(tmp_path: Path) -> None:
    save(tmp_path / "old" / "last.pt", 1, age=100)
    save(tmp_path / "new" / "last.pt", 2)
    (tmp_path / "empty").mkdir()
    path, state = find_checkpoint("auto", tmp_path, None)
    assert state
    assert path == tmp_path / "new" / "last.pt"
    assert state["model"]["w"][0] == 2
    for old in (("auto", tmp_path, "old"), (str(tmp_path / "old"), tmp_path, None)):
        _, state = find_checkpoint(*old)
        assert state and state["model"]["w"][0] == 1


@pytest.mark.fault("C1")
def test_auto_passes_over_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "a"
    save(run / "last.previous.pt", 1)
    (run / "last.pt").write_bytes(b"half")
    path, state = find_checkpoint("auto", tmp_path, None)
    assert state
    assert path.name == "last.previous.pt"
    assert state["model"]["w"][0] == 1
    assert "last.pt: not a readable checkpoint" in capsys.readouterr().out
    assert (run / "last.damaged").read_bytes() == b"half"
    (run / "last.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="not a readable"):  # named by hand, it is an error
        find_checkpoint(str(run / "last.pt"), tmp_path, None)


@pytest.mark.fault("R17")
def test_all_damaged_names_them_all(tmp_path: Path) -> None:
    for name in ("last.pt", "last.previous.pt"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"half")
    with pytest.raises(UserError, match=r"last\.pt.*last\.previous\.pt"):
        find_checkpoint("auto", tmp_path, None)


def test_a_name_that_is_not_there_brings_those_that_are(tmp_path: Path) -> None:
    save(tmp_path / "old" / "last.pt", 1, age=100)
    save(tmp_path / "new" / "last.pt", 2)
    with pytest.raises(UserError, match="no such run or checkpoint; the newest are .*new, .*old"):
        find_checkpoint(str(tmp_path / "nwe"), tmp_path, None)


DEEP = 99_999 * "["
HOSTILE = [DEEP, '{"launch": ' + DEEP, "1" * 400, '{"launch": 1e999}', "[]", "\x00", '"a"']


@pytest.mark.fault("R30")
def test_hostile_neighbours_do_not_block(tmp_path: Path) -> None:
    save(tmp_path / "good" / "last.pt", 1, age=100)
    for number, content in enumerate(HOSTILE):
        (tmp_path / f"bad-{number}").mkdir()
        (tmp_path / f"bad-{number}" / "config.json").write_text(content)
    for name in ("pipe", "loop", "loops"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    os.mkfifo(tmp_path / "pipe" / "last.pt")
    for name in ("config.json", "last.pt", "metrics.csv"):
        (tmp_path / "loop" / name).symlink_to(name)
    (tmp_path / "loops" / "config.json").symlink_to("/dev/zero")
    (tmp_path / "round").symlink_to("round")
    path, state = find_checkpoint("auto", tmp_path, None)
    assert state and path == tmp_path / "good" / "last.pt"
    assert find_launch("x", tmp_path) is None
    with pytest.raises(UserError, match=r"no such run or checkpoint; the newest are \S*good$"):
        find_checkpoint("nowhere", tmp_path, None)


def test_a_run_is_resumed_by_its_name_or_its_best(tmp_path: Path) -> None:
    save(tmp_path / "a" / "last.pt", 1)
    (tmp_path / "a" / "best.pt").touch()
    for word in ("a", str(tmp_path / "a"), str(tmp_path / "a" / "best.pt")):
        path, state = find_checkpoint(word, tmp_path, None)
        assert state and path == tmp_path / "a" / "last.pt"


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint under"):
        find_checkpoint("auto", tmp_path / "runs", None)
    with pytest.raises(UserError, match=r"no last\.pt"):
        find_checkpoint(str(tmp_path), tmp_path, None)
    with pytest.raises(UserError, match="no such run or checkpoint"):
        find_checkpoint(str(tmp_path / "x.pt"), tmp_path, None)


def test_best_is_not_for_resuming(tmp_path: Path) -> None:
    save(tmp_path / "best.pt", 1, resumable=False)
    with pytest.raises(UserError, match="weights only"):
        find_checkpoint(str(tmp_path / "best.pt"), tmp_path, None)


def test_json_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", {"name": "ö", "values": [1, 2]})
    assert json.loads((tmp_path / "c.json").read_text("utf-8")) == {"name": "ö", "values": [1, 2]}
    assert os.listdir(tmp_path) == ["c.json"]
