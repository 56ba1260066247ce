"""What an evaluation says: every number in one dictionary, its table and its JSON.

    {"split": ..., "flips": ..., "runs": [RUN, ...]}  of several also "mean" and "std": PROTOCOLS
    RUN          {"checkpoint": ..., "caution": ..., "protocols": PROTOCOLS, "robustness": [...]}
    PROTOCOLS    {protocol: {"average_precision": ..., "points": {point: POINT}}}
    POINT        {"threshold": ..., "scores": {name: value}, "intervals": {name: [low, high]},
                  "confusion": [[...], ...]}     rows = truth, columns = prediction, in pixels
    "comparison" [{"checkpoint": ..., "with": ..., "protocols": {protocol: {point: DIFFERENCE}}}]

Table and page are drawn from that dictionary, so whatever they show is in the JSON as well. What
becomes of it is in `record.py`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from metrics import SCORE_NAMES
from runtime.errors import visible
from scoring.corruptions import CORRUPTIONS, LOSSLESS
from scoring.counts import OBJECT_NAMES, PER_IMAGE_NAMES, compare
from scoring.evaluation import BY_VAL, ProtocolResult

CURVE_NAMES = {
    "average_precision": "average precision (area under P-R)",
    "calibration_error": "expected calibration error",
}
FEW_PAIRS = 10
WITH_INTERVAL = ("change_iou", "change_dice")  # in the table; the JSON has all of them
LABEL_WIDTH, CELL_WIDTH = 42, 11
WIDE_CELL, WIDEST_CELL = 14, 22  # of seeds, of a comparison

Report = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint, evaluated.

    Attributes:
        path: of the checkpoint, in the folder of its run.
        state: its content.
        report: its part of the report.
        results: by protocol.
        figures: by name.
        views: the worst pairs, as `runtime.page` has views.
    """

    path: Path
    state: dict[str, Any]
    report: Report
    results: dict[str, ProtocolResult]
    figures: dict[str, Figure]
    views: list[dict[str, Any]]

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path.resolve().parent


# ---- the numbers


def protocols_report(results: Mapping[str, ProtocolResult], seed: int) -> Report:
    """Return every number of every protocol; `seed` is of the bootstrap."""
    return {
        protocol: {
            "description": result.description,
            "average_precision": result.counts.histogram.average_precision(),
            "calibration_error": result.counts.calibration().error,
            "points": {
                point: {
                    "threshold": threshold,
                    "scores": result.counts.scores(point),
                    "intervals": result.counts.intervals(point, seed=seed),
                    "confusion": result.counts.confusion(point).matrix.tolist(),
                }
                for point, threshold in result.points.items()
            },
        }
        for protocol, result in results.items()
    }


def summarize(runs: Sequence[Report]) -> Report:
    """Return mean and standard deviation (n - 1) over runs of every number of the protocols."""
    protocols = [run["protocols"] for run in runs]
    return {"mean": _combined(protocols, mean), "std": _combined(protocols, stdev)}


def comparison(evaluated: Sequence[Evaluated], seed: int) -> list[Report]:
    """Compare each checkpoint with the first one on the same images; `seed` is of the bootstrap."""
    first, *others = evaluated
    return [
        {
            "checkpoint": str(other.path),
            "with": str(first.path),
            "protocols": {
                protocol: {
                    point: asdict(
                        compare(result.counts, other.results[protocol].counts, point, seed=seed)
                    )
                    for point in result.points
                }
                for protocol, result in first.results.items()
            },
        }
        for other in others
    ]


# ---- the table


def text(report: Report) -> str:
    """Return the table with what it is of above, and what its words mean below."""
    runs = report["runs"]
    lines = [*about(report), ""]
    if "comparison" in report:
        for run in runs:
            lines += [run["checkpoint"], *_aligned(score_rows([run], report["rule"])), ""]
        for pair in report["comparison"]:
            lines += [compared(pair), *_aligned(comparison_rows(pair), WIDEST_CELL), ""]
    else:
        rows = score_rows(runs, report["rule"])
        lines += [*_aligned(rows, CELL_WIDTH if len(runs) == 1 else WIDE_CELL), ""]
    if "robustness" in runs[0]:
        lines += [*robustness(report), ""]
    notes = notes_of(report)
    width = max(map(len, notes)) + 2
    return visible("\n".join([*lines, *(f"{word:{width}}{says}" for word, says in notes.items())]))


def score_rows(runs: Sequence[Report], rule: str) -> list[list[str]]:
    """Return the scores by protocol and threshold, each row its label and cells.

    The numbers are of one run, or mean and deviation of several; the first row is the head.
    """
    protocols = [run["protocols"] for run in runs]
    columns = [(name, point) for name, of in protocols[0].items() for point in of["points"]]

    def points(column: tuple[str, str]) -> list[Report]:
        return [of_run[column[0]]["points"][column[1]] for of_run in protocols]

    def threshold(column: tuple[str, str]) -> str:
        found = [point["threshold"] for point in points(column)]
        return rule if found[0] is None else _cell(found, digits=5) + "*"

    has_val = any(point == BY_VAL for _, point in columns)
    rows = [
        ["", *_once_each(columns)],
        [
            f"threshold ({'* = the best one on val' if has_val else 'no val to choose one on'})",
            *map(threshold, columns),
        ],
    ]
    for key, label in _labels(points(columns[0])[0]["scores"]).items():
        rows.append([label, *(_cell([p["scores"][key] for p in points(c)]) for c in columns)])
        if key in WITH_INTERVAL and len(runs) == 1:
            ends = [points(column)[0]["intervals"][key] for column in columns]
            rows.append(["    95 % interval", *(f"{low:.2f}-{high:.2f}" for low, high in ends)])
    for key, label in CURVE_NAMES.items():  # of a protocol, whatever the threshold
        cells = {name: _cell([of_run[name][key] for of_run in protocols]) for name, _ in columns}
        rows.append([label, *_once_each(columns, cells)])
    return rows


def comparison_rows(pair: Report) -> list[list[str]]:
    """Return the differences of a comparison by protocol and threshold, as `score_rows`."""
    columns = [(name, point) for name, of in pair["protocols"].items() for point in of]
    found = [pair["protocols"][name][point] for name, point in columns]
    return [
        ["", *_once_each(columns)],
        ["threshold", *("val's *" if point == BY_VAL else "its own" for _, point in columns)],
        ["difference in change IoU", *(f"{of['value']:+.4f}" for of in found)],
        [
            "    95 % interval",
            *("{:+.4f} to {:+.4f}".format(*of["interval"]) for of in found),
        ],
        ["    higher in this share of the draws", *(f"{of['share_higher']:.4f}" for of in found)],
    ]


def as_json(report: Report) -> str:
    """Return JSON as its standard has it, in ASCII: a number that is not finite becomes null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def about(report: Report) -> list[str]:
    """Return what was evaluated on what, and whether the scores are better than they should be."""
    runs = report["runs"]
    lines = [f"{report['split']} split of {report['data']}, {report['pairs']} pairs"]
    lines += [f"{run['checkpoint']} (epoch {run['epoch']})" for run in runs]
    if len(runs) > 1 and "comparison" not in report:
        lines.append(f"mean ± standard deviation of {len(runs)} checkpoints")
    if report["flips"]:
        lines.append("--flips: the mean over four mirror images of each patch, image or window")
    cautions = dict.fromkeys(run["caution"] for run in runs if run["caution"])
    return lines + [f"OPTIMISTIC: {caution}" for caution in cautions]


def notes_of(report: Report) -> dict[str, str]:
    """Return what the words of the table mean."""
    notes = {name: of["description"] for name, of in report["runs"][0]["protocols"].items()}
    if report["val_pairs"]:
        notes["*"] = (
            f"threshold of the highest change IoU on the {report['val_pairs']} pairs of val, "
            "by protocol"
        )
        if not report["val_has_change"]:
            notes["*"] = "0.5, as nothing changed in val"
        elif report["val_pairs"] < FEW_PAIRS:
            notes["*"] += "; so few pairs choose badly"
    if len(report["runs"]) == 1 or "comparison" in report:
        notes["interval"] = f"95 %, bootstrap over the {report['pairs']} images"
    if not report["has_change"]:
        notes["no change"] = (
            "nothing changed in this split: scores of the change class are 1 if nothing is "
            "predicted, else 0"
        )
    notes["empty"] = "an image where nothing changed; = 1 if nothing is predicted there, else 0"
    notes["objects"] = (
        f"of {report['min_object_pixels']} pixels or more; found: half of it predicted; "
        "predicted falsely: nothing changed beneath"
    )
    if report["note"]:
        notes["note"] = report["note"]
    return notes


def _aligned(rows: Sequence[Sequence[str]], width: int = CELL_WIDTH) -> list[str]:
    return [
        f"{label:{LABEL_WIDTH}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for label, *cells in rows
    ]


def _once_each(
    columns: Sequence[tuple[str, str]], cells: Mapping[str, str] | None = None
) -> list[str]:
    """Return the protocol's name, or its cell, over the last of its columns alone."""
    names = [name for name, _ in columns]
    return [
        (cells[name] if cells else name) if name not in names[i + 1 :] else ""
        for i, name in enumerate(names)
    ]


def compared(pair: Report) -> str:
    """Say which difference `comparison_rows` shows."""
    return f"{pair['checkpoint']} minus {pair['with']}, paired: each draw has the same images"


def robustness(report: Report) -> list[str]:
    """Return the change IoU by corruption and level, of several runs the means."""
    runs = [run["robustness"] for run in report["runs"]]
    rule = "argmax" if report["rule"] == "argmax" else f"threshold {report['rule']}"
    how = f"{runs[0]['protocol']} of {runs[0]['rows'][0]['pairs']} pairs, {rule}"
    lines = [f"IoU of the change class with the later date corrupted ({how})"]
    for name, corruption in CORRUPTIONS.items():
        cells = []
        for rows in zip(*(run["rows"] for run in runs), strict=True):
            if rows[0]["corruption"] == name:
                level = "none" if rows[0]["level"] == LOSSLESS else f"{rows[0]['level']:g}"
                cells.append(f"{level:>6}: {mean(row['change_iou'] for row in rows):.4f}")
        lines.append(f"{corruption.label:24}" + " ".join(cells))
    return lines


def _labels(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return what to call each score, in the order of the table."""
    known = SCORE_NAMES | PER_IMAGE_NAMES
    labels = {key: name for key, name in known.items() if key in scores}
    of_classes = {"iou": "IoU", "dice": "Dice"}
    for key in scores:
        kind, _, name = key.partition("/")
        if name and kind in of_classes:
            labels[key] = visible(f"{of_classes[kind]} of {name[:LABEL_WIDTH]}")[: LABEL_WIDTH - 1]
    return labels | OBJECT_NAMES


def _cell(values: Sequence[float], digits: int = 4) -> str:
    if any(math.isnan(value) for value in values):
        return "-"
    if len(values) > 1:
        digits = 1 if isinstance(values[0], int) else digits - 1
        return f"{mean(values):.{digits}f}±{stdev(values):.{digits}f}"
    return str(values[0]) if isinstance(values[0], int) else f"{values[0]:.{digits}f}"


def _combined(values: Sequence[Any], how: Callable[[Sequence[float]], float]) -> Any:
    """Combine dictionaries of the same keys, number by number; words and intervals are dropped."""
    first = values[0]
    if isinstance(first, Mapping):
        parts = {key: _combined([value[key] for value in values], how) for key in first}
        return {key: part for key, part in parts.items() if part is not None and part != {}}
    is_number = isinstance(first, int | float) and not isinstance(first, bool)
    if not is_number:
        return None
    is_whole = all(math.isfinite(value) for value in values)  # `stdev` raises for NaN
    return how([float(value) for value in values]) if is_whole else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
