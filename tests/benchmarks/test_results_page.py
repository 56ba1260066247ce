"""The page of the benchmarks shows every result that there is."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_page_is_made_of_all_results() -> None:
    report = runpy.run_path(str(FOLDER / "report.py"))["report"]
    text, others = report(FOLDER / "results")
    assert not others
    assert text == (FOLDER / "README.md").read_text(), "python benchmarks/report.py"
