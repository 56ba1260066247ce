import io
import re
import sys

import pytest

from runtime import progress
from runtime.progress import Bar, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE", 1e-9)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in Bar(range(3), "work", unit="pairs"):
        pass
    lines = log.getvalue().splitlines()
    assert re.fullmatch(r"work: 33 % of 3 pairs, 00:00 passed, 00:00 left", lines[0])
    assert len(lines) == 3 and "\r" not in log.getvalue()


def test_a_log_of_quick_work_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Bar(total=3) as bar:
        bar.update(2)
    assert not log.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for _ in Bar(range(3), "work"):
        pass
    assert "\rwork:   0%|" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (11100, "3 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
