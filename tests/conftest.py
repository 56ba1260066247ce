"""One thread a test process, as many run at once; and the rows of the fault matrix that passed."""

import os
from collections.abc import Iterator

import pytest
from fault_matrix import ROWS

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for subprocesses


@pytest.fixture(scope="module")
def tiny_network() -> Iterator[str]:
    """Let the tests of a file build a tiny network by the name that this gives."""
    from tiny import TINY, install_tiny

    with pytest.MonkeyPatch.context() as patch:
        install_tiny(patch)
        yield TINY


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in item.iter_markers("fault"):
        item.user_properties += [("fault", row) for row in mark.args]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    def rows(outcome: str) -> set[object]:
        reports = terminalreporter.stats.get(outcome, [])
        return {
            row
            for report in reports
            for name, row in getattr(report, "user_properties", ())
            if name == "fault"
        }

    if passed := rows("passed") - rows("failed") - rows("error"):
        terminalreporter.write_line(f"fault matrix: {len(passed)} of {len(ROWS)} rows passed here")
