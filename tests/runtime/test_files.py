import os
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.files import whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.fault("U4")
def test_files_appear_when_all_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), whole_folder(out) as folder:
        (folder / "a.txt").write_text("half")
        raise RuntimeError
    assert names(out) == []
    with whole_folder(out) as folder:
        (folder / "a.txt").write_text("whole")
        assert not (out / "a.txt").exists()
    assert names(out) == ["a.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written to"), whole_folder(tmp_path / "file"):
        pass


@pytest.mark.fault("U4")
def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-killed").mkdir()
    (tmp_path / ".unfinished-killed" / "half.tif").write_text("half")
    os.utime(tmp_path / ".unfinished-killed", (1, 1))
    with whole_folder(tmp_path) as other:
        os.utime(other, (1, 1))
        with whole_folder(tmp_path) as folder:
            (folder / "a.txt").write_text("whole")
        assert other.is_dir()
        (other / "b.txt").write_text("whole")
    assert names(tmp_path) == ["a.txt", "b.txt"]
