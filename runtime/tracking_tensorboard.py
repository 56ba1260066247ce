"""TensorBoard: an event file in the run's folder.

    curves         loss and the scores that say most, of train and val: what the page opens on
    more scores    all others
    run            learning rate, speed
    summary        the best scores, a dot each, which the table of HPARAMS needs

Groups stand on the page in the order of the alphabet. `SummaryWriter` would write from a thread,
whose faults go to the terminal; here each call writes and fails by itself.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.files import read_json, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Option = bool | int | float | str
HEADLINES = ("loss", "change_iou", "mean_iou_of_change", "scd_score")
BEST = ("change_iou", "change_dice", "mean_iou_of_change", "scd_score")
NAMES = ("name", "output_dir", "resume", "launch")  # options that say where, not how
COLUMNS = "events.out.tfevents.0000000000.columns"
PICTURE_WIDTH = 2000  # pixels; a card shows fewer, and event files are kept for good


class TensorBoard:
    """Writes the events of one process.

    Args:
        run_dir: the run's folder.
        options: shown as a table, and the columns of HPARAMS.
        first_step: what an earlier process has logged from there on is not shown; 0 for a new run.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Option], first_step: int) -> None:
        from torch.utils.tensorboard import summary

        self.summary: Any = summary
        self.options = options
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.path = run_dir / f"{name}.{time.time_ns()}"  # read in the order of their names
        self.charts: set[str] = set()
        self._start(first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to the chart of each number."""
        names = {name.removeprefix("train/") for name in values if name.startswith("train/")}
        if new := names - self.charts:
            self.charts |= new
            pairs = {n: [chart_of(f"train/{n}"), chart_of(f"val/{n}")] for n in sorted(names)}
            layout = {"train and val": {n: ["Multiline", tags] for n, tags in pairs.items()}}
            self._write(step, self.summary.custom_scalars(layout))
        scalars = [self.summary.scalar(chart_of(name), value) for name, value in values.items()]
        self._write(step, *scalars)

    def log_summary(self, scores: Mapping[str, float], step: int) -> None:
        """Write the row of this run in HPARAMS, and the columns of all runs beside it.

        Args:
            scores: of the best epoch.
            step: the last epoch.
        """
        values = {f"summary/best {name}": scores[name] for name in BEST if name in scores}
        columns, start, end = self.summary.hparams(dict(self.options), values)
        dots = [self.summary.scalar(name, value) for name, value in values.items()]
        self._write(step, start, end, *dots)
        self._write_columns(columns)

    def _write_columns(self, summary: Any) -> None:
        """Say which options differ between the runs in this folder: TensorBoard shows those first.

        TensorBoard takes the columns of the first run that has any, so they stand in a file above
        all runs, which each run that ends writes anew.
        """
        from tensorboard.plugins.hparams.metadata import (  # type: ignore[import-untyped]
            PLUGIN_NAME,
        )
        from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
            HParamsPluginData,
        )

        runs = self.path.parent.parent
        found = [read_json(folder / "config.json") for folder in runs.glob("[!.]*")]
        others = [options for options in found if isinstance(options, dict)]
        metadata = summary.value[0].metadata.plugin_data
        assert metadata.plugin_name == PLUGIN_NAME
        content = HParamsPluginData.FromString(metadata.content)
        for info in content.experiment.hparam_infos:
            seen = {repr(options.get(info.name)) for options in others}
            info.differs = len(seen) > 1 and info.name not in NAMES
        metadata.content = content.SerializeToString()
        with whole_file(runs / COLUMNS) as beside:
            beside.write_bytes(_records(_version(), _event(0, summary)))

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        """Add a picture, as a PNG of at most `PICTURE_WIDTH`."""
        from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
            Summary,
        )

        dpi = min(figure.dpi, PICTURE_WIDTH / figure.get_figwidth())
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=dpi)
        width, height = (round(inches * dpi) for inches in figure.get_size_inches())
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
        )
        self._write(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def log_pr_curve(self, name: str, counts: Tensor, step: int) -> None:
        """Add a precision-recall curve, see `Tracker.log_pr_curve`."""
        # Column i counts the pixels at or above i / num_bins, which are the thresholds that
        # TensorBoard writes beside num_bins + 1 columns; at the last one nothing is predicted.
        predicted = counts.detach().cpu().double().flip(1).cumsum(1).flip(1)
        predicted = torch.cat([predicted, predicted.new_zeros(2, 1)], dim=1)
        (fp, tp), (negatives, positives) = predicted, predicted[:, :1]
        precision, recall = tp / (tp + fp).clamp(min=1), tp / positives.clamp(min=1)
        columns = (tp, fp, negatives - fp, positives - tp, precision, recall)
        arrays = [column.numpy() for column in columns]
        curve = self.summary.pr_curve_raw(name, *arrays, len(tp))
        self._write(step, curve)

    def _start(self, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
            Event,
            SessionLog,
        )

        self._append(_version())
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=first_step, session_log=start))
        table = "\n".join(f"| {name} | {value} |" for name, value in self.options.items())
        text = f"| option | value |\n| --- | --- |\n{table}"
        self._write(first_step, self.summary.text("config", text))

    def _write(self, step: int, *summaries: Any) -> None:
        if not self.path.exists():  # the run's folder was removed
            self._start(0)
        self._append(*(_event(step, summary) for summary in summaries))

    def _append(self, *events: Any) -> None:
        """Append events, all or none: half of one would hide what comes after it."""
        left = memoryview(_records(*events))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise


def _version() -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _event(step: int, summary: Any) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, summary=summary)


def _records(*events: Any) -> bytes:
    from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
        RecordWriter,
    )

    content = io.BytesIO()
    records = RecordWriter(content)
    for event in events:
        records.write(event.SerializeToString())
    return content.getvalue()


def chart_of(name: str) -> str:
    """Return the chart of a number: "train/loss" -> "curves/loss, train"."""
    split, slash, score = name.partition("/")
    if not slash:
        return f"run/{name}"
    if split not in ("train", "val"):
        return name
    return f"{'curves' if score in HEADLINES else 'more scores'}/{score}, {split}"
