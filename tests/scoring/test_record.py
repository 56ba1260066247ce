import csv
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from data_helpers import save_tree

from dataset import open_dataset
from metrics import Confusion, ScoreHistogram
from runtime.checkpoint import digest_of
from scoring import counts
from scoring.counts import STEPS, Prediction, SplitCounts, add_to_histogram, count_image
from scoring.evaluation import BY_VAL, DEFAULT, ProtocolResult
from scoring.figures import draw_all, worst_views
from scoring.record import stored_threshold, write_results
from scoring.report import Evaluated, Report, comparison, protocols_report, text

ODD_CLASSES = ("no $change$", "\ud800\x1b[31m", "x" * 50_000 + "\u5efa")
ODD_PAIR = "caf\udce9\x1b[2J\n$x$"  # as Python reads a name that is not UTF-8


def evaluated_on(path: Path, tree: Path) -> Evaluated:
    source = open_dataset(tree).source
    draw = torch.Generator().manual_seed(0)
    batch = Prediction.of_logits(3 * torch.randn(len(source), 3, 32, 32, generator=draw), "change")
    points: dict[str, float | None] = {DEFAULT: None, BY_VAL: 0.25}
    empty = functools.partial(Confusion, 3, names=ODD_CLASSES)
    histogram, images, worst = ScoreHistogram(num_bins=STEPS), [], []
    for i in range(len(source)):
        one = Prediction(batch.change[i], batch.change_classes[i], batch.classes[i])
        truth = source.channels(i)[6:].numpy()
        add_to_histogram(histogram, one, truth)
        images.append(count_image(ODD_PAIR, one, truth, points=points, empty=empty))
        worst.append((i, one))
    counted = SplitCounts(images, histogram, empty)
    results = {"patches": ProtocolResult("in words", points, counted, True, worst)}
    report: Report = {
        "checkpoint": str(path),
        "epoch": 1,
        "caution": None,
        "protocols": protocols_report(results, 0),
    }
    figures = draw_all(results, [], source, title=f"run {ODD_PAIR}", rule="argmax")
    return Evaluated(path, {}, report, results, figures, worst_views(results["patches"], source))


@pytest.mark.fault("D24", "D25")
def test_foreign_text_ends_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "NUM_RESAMPLES", 20)
    tree = save_tree(tmp_path / "set", train=1, val=3)
    both = [evaluated_on(tmp_path / f"run {k}$" / "best.pt", tree) for k in (1, 2)]
    report: Report = {
        "data": ODD_PAIR,
        "split": "val",
        "place": "val",
        "flips": True,
        "pairs": 3,
        "val_pairs": 3,
        "has_change": True,
        "val_has_change": True,
        "classes": list(ODD_CLASSES),
        "rule": "argmax",
        "note": "",
        "min_object_pixels": 10,
        "runs": [one.report for one in both],
        "comparison": comparison(both, 0),
    }
    folder = write_results(tmp_path / "out", report, both)
    assert json.loads((folder / "scores.json").read_text("ascii"))["classes"] == list(ODD_CLASSES)
    for name in ("scores.txt", "report.html", "1-run 1$/images.csv"):
        assert "\x1b" not in (folder / name).read_text("utf-8")
    shown = text(report).replace(str(tmp_path), "")
    assert max(map(len, shown.splitlines())) < 200
    with (folder / "2-run 2$" / "images.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["pair"] == r"caf\udce9\x1b[2J" + "\n$x$"


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
