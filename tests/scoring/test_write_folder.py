from pathlib import Path

import pytest

from runtime.errors import UserError
from scoring.record import check_writable, write_folder


def test_a_folder_appears_whole_and_what_is_there_stays(tmp_path: Path) -> None:
    seen: list[bool] = []

    def fill(folder: Path) -> None:
        (folder / "x").write_text(str(len(seen)))
        seen.append((tmp_path / "deep" / "new").exists())

    names = [write_folder(tmp_path / "deep" / "new", fill).name for _ in range(3)]
    assert names == ["new", "new-2", "new-3"]
    assert seen == [False, True, True]
    assert [(tmp_path / "deep" / name / "x").read_text() for name in names] == ["0", "1", "2"]
    assert {p.name for p in (tmp_path / "deep").iterdir()} == set(names)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for attempt in (check_writable, lambda folder: write_folder(folder, lambda _: None)):
        with pytest.raises(UserError, match=r"file/x: cannot be written \(.*--output-dir"):
            attempt(tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_of_a_failure_nothing_is_left(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", fail)
    assert list(tmp_path.iterdir()) == []
