"""What an evaluation leaves behind: a folder that appears whole, and numbers in the run's trackers.

    report.html                scores, the worst pairs to swipe, figures; opens from disk
    scores.json, scores.txt    every number; the table
    images.csv                 a row for each image, protocol and operating point
    robustness.csv             a row for each corruption and level
    *.png                      the figures

With several checkpoints the last three lie in a folder for each.
"""

import csv
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metrics import change_scores
from runtime.checkpoint import digest_of
from runtime.errors import UserError, visible
from runtime.figures import save_figure
from runtime.files import new_folder, read_json
from runtime.options import written_at
from runtime.page import png_uri, write_page
from runtime.tracking import Tracker
from scoring.counts import ImageCounts
from scoring.evaluation import ProtocolResult
from scoring.report import (
    FEW_PAIRS,
    Evaluated,
    Report,
    about,
    as_json,
    compared,
    comparison_rows,
    notes_of,
    robustness,
    score_rows,
    text,
)

NOT_IN_PAGE = "worst_pairs"  # the figure of what the page shows to swipe


def write_results(wanted: Path | None, report: Report, evaluated: Sequence[Evaluated]) -> Path:
    """Write everything into a new folder.

    Args:
        wanted: the folder; what is there already stays, see `write_folder`. When None it is
            evaluation/<split> in the run's folder, or with several checkpoints beside that of the
            first; of other data than the training's it is evaluation/<data>-<split>. What was
            averaged over mirror images ends with -flips.
        report: of all checkpoints.
        evaluated: the checkpoints.

    Returns:
        The folder.

    Raises:
        UserError: nothing can be written there.
    """
    run_dir = evaluated[0].run_dir
    home = run_dir if len(evaluated) == 1 else run_dir.parent

    def fill(folder: Path) -> None:
        (folder / "scores.json").write_text(as_json(report) + "\n", "utf-8")
        (folder / "scores.txt").write_text(text(report) + "\n", "utf-8")
        parts = _parts(folder, evaluated)
        for one, part in zip(evaluated, parts, strict=True):
            part.mkdir(exist_ok=True)
            _write_rows(part / "images.csv", _image_rows(one.results))
            if "robustness" in one.report:
                _write_rows(part / "robustness.csv", one.report["robustness"]["rows"])
            for name, figure in one.figures.items():
                save_figure(figure, part / f"{name}.png")
        write_page(folder / "report.html", _page(report, evaluated, parts))

    return write_folder(wanted or home / "evaluation" / report["place"], fill)


def _page(report: Report, evaluated: Sequence[Evaluated], parts: Sequence[Path]) -> dict[str, Any]:
    """Return the content of report.html; the figures are in the folders already."""
    title, *lines = about(report)
    notes = [f"{word}: {says}" for word, says in notes_of(report).items()]
    sections: list[dict[str, Any]] = []

    def add(title: str, rows: Sequence[Sequence[str]], lines: Sequence[str] = ()) -> None:
        table = {"head": rows[0], "rows": rows[1:]}
        sections.append({"title": title, "table": table, "lines": lines})

    if "comparison" in report:
        for pair in report["comparison"]:
            add("Comparison", comparison_rows(pair), [compared(pair)])
        for run in report["runs"]:
            add(f"Scores of {run['checkpoint']}", score_rows([run], report["rule"]))
    else:
        add("Scores", score_rows(report["runs"], report["rule"]))
    sections[-1]["lines"] = notes
    if "robustness" in report["runs"][0]:
        sections.append({"title": "Robustness", "lines": robustness(report)})
    for one, part in zip(evaluated, parts, strict=True):
        whose = f" of {one.run_dir.name}" if len(evaluated) > 1 else ""
        figures = [
            {"title": name, "src": png_uri(part / f"{name}.png")}
            for name in one.figures
            if name != NOT_IN_PAGE
        ]
        sections.append({"title": f"Pairs with the most wrong pixels{whose}", "views": one.views})
        sections.append({"title": f"Figures{whose}", "figures": figures})
    return {"title": title, "about": lines, "sections": sections}


def stored_threshold(checkpoint: Path, *, flips: bool = False) -> tuple[float, Path] | None:
    """Return the threshold that evaluate.py chose on val for a checkpoint, and the file it is in.

    Of the mean over mirror images or of the image alone, as `flips` says. Of overlapping windows if
    that protocol was evaluated, else of the first one. The newest counts that is beside the
    checkpoint, or beside its run where several were evaluated together. One of another checkpoint,
    of other data than the training's, of fewer than `FEW_PAIRS`, or that cannot be read, or for
    which val held no change, does not count.
    """
    run_dir = checkpoint.resolve().parent
    found = [p for home in (run_dir, run_dir.parent) for p in home.glob("evaluation/*/scores.json")]
    digest = digest_of(checkpoint) if found else ""
    for path in sorted(found, key=written_at, reverse=True):
        try:
            report = read_json(path)
            run = next(r for r in report["runs"] if r["sha256"] == digest)
            if not run["trained_on_this_data"] or report["val_pairs"] < FEW_PAIRS:
                continue
            if report.get("flips", False) != flips:  # older files do not say
                continue
            if not report.get("val_has_change", True):  # older files do not say
                continue
            protocols = run["protocols"]
            protocol = protocols.get("sliding") or next(iter(protocols.values()))
            threshold = float(protocol["points"]["val"]["threshold"])
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, StopIteration):
            continue
        if 0 <= threshold <= 1:
            return threshold, path
    return None


def check_writable(folder: Path) -> None:
    """Find out before hours of work whether a folder can be made and written to.

    Raises:
        UserError: it cannot.
    """
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            return
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); --output-dir") from None


def write_folder(wanted: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder that appears whole, under the name wanted or wanted-2, wanted-3, ...

    Args:
        wanted: a folder that is there already stays as it is.
        fill: writes into the folder that it is given.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        return new_folder(wanted, fill)
    except OSError as error:
        raise UserError(f"{wanted}: cannot be written ({error.strerror}); --output-dir") from None


def log_results(
    folder: Path, report: Report, evaluated: Sequence[Evaluated], *, store: Path, use_mlflow: bool
) -> None:
    """Add scores and figures to the MLflow run of each training, and to TensorBoard.

    Names begin with evaluation/<split>/<protocol>/<operating point>/, or of other data than that
    of the training evaluation/<data>-<split>/; with `--flips` it is <split>-flips. The step is the
    epoch of the checkpoint. TensorBoard's files lie with the results, where they are a run of their
    own.
    Nothing here can fail: see `tracking.py`.

    Args:
        folder: of the results.
        report: of all checkpoints.
        evaluated: the checkpoints.
        store: folder of mlflow.db, where no server is named.
        use_mlflow: False leaves MLflow out.
    """
    prefix = f"evaluation/{report['place']}"
    for one, part in zip(evaluated, _parts(folder, evaluated), strict=True):
        epoch = one.report["epoch"]
        scores = {
            f"{prefix}/{protocol}/{point}/{name}": value
            for protocol, of in one.report["protocols"].items()
            for point, at in of["points"].items()
            for name, value in at["scores"].items()
            if math.isfinite(value)  # there is no mean over no images
        }
        for row in one.report.get("robustness", {}).get("rows", ()):
            name = f"{prefix}/robustness/{row['corruption']}/{row['level']:g}/change_iou"
            scores[name] = row["change_iou"]
        with Tracker(
            part,
            config=one.state["config"],
            tags={"evaluated": str(one.path), "split": report["split"], "dataset": report["data"]},
            store=store,
            use_mlflow=use_mlflow,
            mlflow_run_id=one.state.get("mlflow_run_id"),
            guest=True,
        ) as tracker:
            tracker.log_scores(scores, epoch)
            for name, figure in one.figures.items():
                tracker.log_figure(f"{prefix}/{name}", figure, epoch)
            tracker.log_artifact(folder / "scores.json", prefix)


def _parts(folder: Path, evaluated: Sequence[Evaluated]) -> list[Path]:
    """Return the folder of each checkpoint's own files."""
    if len(evaluated) == 1:
        return [folder]
    return [folder / f"{number}-{one.run_dir.name}" for number, one in enumerate(evaluated, 1)]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _image_rows(results: Mapping[str, ProtocolResult]) -> list[dict[str, Any]]:
    return [
        {
            "pair": visible(image.name),
            "height": image.size[0],
            "width": image.size[1],
            "protocol": protocol,
            "point": point,
            "threshold": "" if threshold is None else threshold,
            **_image_scores(image, point),
        }
        for protocol, result in results.items()
        for point, threshold in result.points.items()
        for image in result.counts.images
    ]


def _image_scores(image: ImageCounts, point: str) -> dict[str, float]:
    pixels = image.pixels(point)
    counts = (torch.tensor(n) for n in (pixels.tp, pixels.fp, pixels.fn))
    scores = change_scores(*counts)
    return {
        "change_iou": scores["change_iou"].item(),
        "change_dice": scores["change_dice"].item(),
        "tp_pixels": pixels.tp,
        "fp_pixels": pixels.fp,
        "fn_pixels": pixels.fn,
        "tn_pixels": pixels.tn,
        "wrong_class_pixels": pixels.wrong_class,
        **image.objects[point].as_dict(),
    }
