import os
from pathlib import Path

import pytest

from runtime.checkpoint import digest_of
from runtime.errors import UserError
from scoring.record import check_writable, stored_threshold, write_folder


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


@pytest.mark.fault("R30")
def test_hostile_scores_are_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "best.pt").write_bytes(b"x")
    digest = digest_of(run / "best.pt")

    def scores(threshold: str) -> str:
        point = f'{{"points": {{"val": {{"threshold": {threshold}}}}}}}'
        one = f'{{"sha256": "{digest}", "trained_on_this_data": 1, "protocols": {{"x": {point}}}}}'
        return f'{{"val_pairs": 999, "runs": [{one}]}}'

    def put(name: str, content: str) -> None:
        (run / "evaluation" / name).mkdir(parents=True)
        (run / "evaluation" / name / "scores.json").write_text(content)

    put("good", scores("0.25"))
    for number, content in enumerate([99_999 * "[", scores("1" * 400), scores("null"), "3", ""]):
        put(f"bad-{number}", content)
    (run / "evaluation" / "loop").mkdir()
    (run / "evaluation" / "loop" / "scores.json").symlink_to("scores.json")
    (run / "evaluation" / "pipe").mkdir()
    os.mkfifo(run / "evaluation" / "pipe" / "scores.json")
    found = stored_threshold(run / "best.pt")
    assert found == (0.25, run / "evaluation" / "good" / "scores.json")
