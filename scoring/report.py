"""What an evaluation says: every number in one dictionary, and the table and JSON of it.

    {"split": ..., "runs": [RUN, ...]}      of several runs also "mean" and "std": PROTOCOLS
    RUN          {"checkpoint": ..., "caution": ..., "protocols": PROTOCOLS, "robustness": [...]}
    PROTOCOLS    {protocol: {"average_precision": ..., "points": {point: POINT}}}
    POINT        {"threshold": ..., "scores": {name: value}, "intervals": {name: [low, high]},
                  "confusion": [[...], ...]}     rows = truth, columns = prediction, in pixels

The table is drawn from that dictionary, so whatever it shows is in the JSON as well.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from metrics import SCORE_NAMES
from scoring.corruptions import CORRUPTIONS, LOSSLESS
from scoring.counts import OBJECT_NAMES, PER_IMAGE_NAMES
from scoring.evaluation import BY_VAL, ProtocolResult

CURVE_NAMES = {
    "average_precision": "average precision (area under P-R)",
    "calibration_error": "expected calibration error",
}
FEW_PAIRS = 10
WITH_INTERVAL = ("change_iou", "change_dice")  # in the table; the JSON has all of them
LABEL_WIDTH, CELL_WIDTH, WIDE_CELL = 42, 11, 14  # of seeds the cells are wide

Report = dict[str, Any]


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


def text(report: Report) -> str:
    """Return the table with what it is of above, and what its words mean below."""
    runs, pairs = report["runs"], report["pairs"]
    about = [f"{report['split']} split of {report['data']}, {pairs} pairs"]
    about += [f"{run['checkpoint']} (epoch {run['epoch']})" for run in runs]
    if len(runs) > 1:
        about.append(f"mean ± standard deviation of {len(runs)} checkpoints")
    cautions = dict.fromkeys(run["caution"] for run in runs if run["caution"])
    about += [f"OPTIMISTIC: {caution}" for caution in cautions]
    notes = {name: of["description"] for name, of in runs[0]["protocols"].items()}
    if report["val_pairs"]:
        notes["*"] = (
            f"threshold of the highest change IoU on the {report['val_pairs']} pairs of val, "
            "by protocol"
        )
        if report["val_pairs"] < FEW_PAIRS:
            notes["*"] += "; so few pairs choose badly"
    if len(runs) == 1:
        notes["interval"] = f"95 %, bootstrap over the {pairs} images"
    notes["empty"] = "an image where nothing changed; = 1 if nothing is predicted there, else 0"
    notes["objects"] = (
        f"of {report['min_object_pixels']} pixels or more; found: half of it predicted; "
        "predicted falsely: nothing changed beneath"
    )
    if report["note"]:
        notes["note"] = report["note"]
    width = max(map(len, notes)) + 2
    below = [f"{word:{width}}{meaning}" for word, meaning in notes.items()]
    stress = ["", *_robustness(report)] if "robustness" in runs[0] else []
    return "\n".join([*about, "", table(report), *stress, "", *below])


def table(report: Report) -> str:
    """Draw the scores by protocol and threshold: of one run, or mean and deviation of several."""
    runs = [run["protocols"] for run in report["runs"]]
    columns = [(protocol, point) for protocol, of in runs[0].items() for point in of["points"]]

    width = CELL_WIDTH if len(runs) == 1 else WIDE_CELL

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:{LABEL_WIDTH}}" + "".join(f"{cell:>{width}}" for cell in cells)

    def points(protocol: str, point: str) -> list[Report]:
        return [run[protocol]["points"][point] for run in runs]

    # the last column of a protocol bears its name, the first what is the same at every threshold
    following = [*(protocol for protocol, _ in columns[1:]), None]
    is_last = [protocol != after for (protocol, _), after in zip(columns, following, strict=True)]
    is_first = [True, *is_last[:-1]]
    has_val = any(point == BY_VAL for _, point in columns)
    lines = [
        line("", [p if last else "" for (p, _), last in zip(columns, is_last, strict=True)]),
        line(
            f"threshold ({'* = the best one on val' if has_val else 'no val to choose one on'})",
            [
                _cell([p["threshold"] for p in points(*column)], digits=5) + "*"
                if points(*column)[0]["threshold"] is not None
                else report["rule"]
                for column in columns
            ],
        ),
    ]
    for key, label in _labels(points(*columns[0])[0]["scores"]).items():
        of_columns = [[p["scores"][key] for p in points(*column)] for column in columns]
        lines.append(line(label, [_cell(values) for values in of_columns]))
        if key in WITH_INTERVAL and len(runs) == 1:
            ends = [points(*column)[0]["intervals"][key] for column in columns]
            lines.append(line("    95 % interval", [f"{low:.2f}-{high:.2f}" for low, high in ends]))
    for key, label in CURVE_NAMES.items():  # of a protocol, whatever the threshold
        cells = [
            _cell([r[p][key] for r in runs]) if first else ""
            for (p, _), first in zip(columns, is_first, strict=True)
        ]
        lines.append(line(label, cells))
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """Return JSON as its standard has it: a number that is not finite becomes null."""
    return json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)


def _robustness(report: Report) -> list[str]:
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
            labels[key] = f"{of_classes[kind]} of {name}"[: LABEL_WIDTH - 1]
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
