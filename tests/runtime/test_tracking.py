import contextlib
import csv
import errno
import json
import logging
import math
import os
import shutil
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from runtime import tracking
from runtime.errors import Interrupted, without_secrets
from runtime.files import locked
from runtime.tracking import Tracker
from runtime.tracking_mlflow import MLFLOW_SETTINGS, mlflow_name

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"lr": 1e-3, "epochs": 3, "amp": None, "mask_values": (0, 255), "encoder": {"depth": 5}}

# from Python 3.13 on: MLflow leaves connections of its cached store to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*noload.* loader strategy"),  # MLflow in SQLAlchemy 2.1
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored.*sqlite3:pytest.PytestUnraisableExceptionWarning"
    ),
]


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        features = self.norm(self.encoder(torch.cat([before, after])))
        return self.head(torch.cat(features.chunk(2), dim=1))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in MLFLOW_SETTINGS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's folder with an empty database, whose migrations take seconds."""
    folder = tmp_path_factory.mktemp("template")
    Tracker(make(folder / "run"), config={}, tags={}, store=folder).close()
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, migrated: Path) -> Path:
    """A store of one's own, with the path that breaks naive URIs."""
    folder = make(tmp_path / "my störe")
    with sqlite3.connect(migrated) as source, sqlite3.connect(folder / "mlflow.db") as target:
        source.backup(target)
        target.execute("DELETE FROM tags")
        target.execute("DELETE FROM runs")
        # MLflow bakes absolute paths in
        target.execute("DELETE FROM experiments")
    source.close()
    target.close()
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make(tmp_path / "runs" / "first run")


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What the tracker warned of; anything that another logger said counts as well."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(), logging.getLogger("mlflow")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def track(run_dir: Path, store: Path, **more: Any) -> Tracker:
    return Tracker(
        run_dir, **{"config": CONFIG, "tags": {"dataset": "toy"}, "store": store, **more}
    )


def without_mlflow(run_dir: Path, **more: Any) -> Tracker:
    return track(run_dir, run_dir, use_mlflow=False, **more)


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    found = event_accumulator.EventAccumulator(str(run_dir))
    found.Reload()
    return found


def client(store: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store}/mlflow.db")


# ---- metrics.csv


def test_a_row_per_epoch_keeps_every_digit(run_dir: Path) -> None:
    with without_mlflow(run_dir) as tracker:
        tracker.log({"train/loss": 0.1 + 0.2, "lr": torch.tensor(0.5)}, 1)  # type: ignore[dict-item]
        tracker.log({"lr": math.nan, "train/loss": 1e-17}, 2)
    text = (run_dir / "metrics.csv").read_text()
    assert text == "step,train/loss,lr\n1,0.30000000000000004,0.5\n2,1e-17,nan\n"


def test_a_new_column_widens_the_table(run_dir: Path) -> None:
    with without_mlflow(run_dir) as tracker:
        tracker.log({"a": 1}, 1)
        tracker.log({"b": 2, "a": 3}, 2)
    assert table(run_dir) == [
        {"step": "1", "a": "1.0", "b": ""},
        {"step": "2", "a": "3.0", "b": "2.0"},
    ]


@pytest.mark.fault("R21")
def test_resuming_drops_the_rows_that_come_again(run_dir: Path) -> None:
    with without_mlflow(run_dir) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": step / 3}, step)
    with without_mlflow(run_dir, first_step=3) as tracker:
        assert [row["step"] for row in table(run_dir)] == ["1", "2"]
        tracker.log({"loss": 9.0}, 3)
    assert [row["loss"] for row in table(run_dir)] == [repr(1 / 3), repr(2 / 3), "9.0"]


@pytest.mark.fault("R4")
def test_a_full_disk_costs_one_warning_and_no_row(
    run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with without_mlflow(run_dir) as tracker:
        tracker.log({"loss": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for step in range(2, 7):
                tracker.log({"loss": 1.0}, step)
            assert len(table(run_dir)) == 1
        tracker.log({"loss": 1.0}, 7)
    assert [row["step"] for row in table(run_dir)] == list("1234567")
    assert len(warned) == 1
    assert "metrics.csv" in warned[0]
    assert "No space left" in warned[0]
    assert not list(run_dir.glob("*.tmp"))


SPREADSHEET = "step;train/loss;note\r\n1;0,5;\r\n2;0,25;warm-up ends; see mail\r\n"
EDITED = {
    "mark": "\ufeffstep,train/loss\n1,0.5\n2,0.25\n".encode(),
    "semicolons": SPREADSHEET.encode(),
    "utf-16": SPREADSHEET.replace(";", "\t").encode("utf-16"),
    "note": b"step,train/loss,note\n1,0.5,\n2,0.25,good\n",
    "note in a number": b"step,train/loss\n1,0.5\n2,0.25\n3,see above\n",
    "open quote": b'step,train/loss\n1,0.5\n2,0.25\n3,"0.125\n4,0.1\n',
    "power cut": b"step,train/loss\n1,0.5\n2,0.25\n4,0.\x00\n5",
}


@pytest.mark.fault("R29")
@pytest.mark.parametrize("name", EDITED)
def test_an_edited_table_is_kept_and_read(name: str, run_dir: Path, warned: list[str]) -> None:
    (run_dir / "metrics.csv").write_bytes(EDITED[name])
    (run_dir / "metrics.edited.csv").write_text("an older one")
    with without_mlflow(run_dir, first_step=3) as tracker:
        tracker.log({"train/loss": 0.125}, 3)
    assert [(row["step"], row["train/loss"]) for row in table(run_dir)] == [
        ("1", "0.5"), ("2", "0.25"), ("3", "0.125"),
    ]  # fmt: skip
    assert (run_dir / "metrics.edited-2.csv").read_bytes() == EDITED[name]
    assert (run_dir / "metrics.edited.csv").read_text() == "an older one"
    assert len(warned) == 1 and "kept as metrics.edited-2.csv" in warned[0]


@pytest.mark.fault("R29")
def test_a_table_that_cannot_be_read_is_kept(run_dir: Path, warned: list[str]) -> None:
    content = b"\xff\xfes\x00" + os.urandom(999)
    (run_dir / "metrics.csv").write_bytes(content)
    with without_mlflow(run_dir, first_step=3) as tracker:
        tracker.log({"train/loss": 0.125}, 3)
    assert [row["step"] for row in table(run_dir)] == ["3"]
    assert (run_dir / "metrics.edited.csv").read_bytes() == content
    assert len(warned) == 1


@pytest.mark.fault("R32")
def test_a_removed_folder_is_made_again(run_dir: Path, warned: list[str]) -> None:
    with without_mlflow(run_dir) as tracker:
        tracker.log({"train/loss": 0.5}, 1)
        shutil.rmtree(run_dir)
        tracker.log({"train/loss": 0.25}, 2)
    assert [row["step"] for row in table(run_dir)] == ["1", "2"]
    points = events(run_dir).Scalars("curves/loss, train")
    assert [(e.step, e.value) for e in points] == [(2, 0.25)]
    assert not warned


# ---- TensorBoard


def test_tensorboard_has_curves_picture_options_and_charts(run_dir: Path) -> None:
    figure = Figure(figsize=(2, 1))
    canvas = figure.canvas
    with without_mlflow(run_dir) as tracker:
        tracker.log({"train/loss": 2.0, "val/loss": 3.0}, 1)
        tracker.log_figure("predictions", figure, 1)
        tracker.log_summary({"change_iou": 0.75, "iou/road": 0.5}, 1)
    assert figure.canvas is canvas
    found = events(run_dir)
    assert found.Scalars("curves/loss, val")[0].value == 3.0
    assert found.Scalars("summary/best change_iou")[0].value == 0.75
    assert not [tag for tag in found.Tags()["scalars"] if "road" in tag]
    assert sorted(found.Tags()["scalars"])[0].startswith("curves/")  # what the page opens on
    assert (found.Images("predictions")[0].width, found.Images("predictions")[0].height) == (
        200,
        100,
    )
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| encoder.depth | 5 |" in text
    layout = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"curves/loss, train" in layout
    assert b"curves/loss, val" in layout
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert len(list(run_dir.glob("events*"))) == 1


def test_options_that_differ_stand_first_in_the_table_of_runs(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata  # type: ignore[import-untyped]

    for name, lr in (("b", 0.1), ("a", 0.2), ("c", 0.1)):
        run_dir, options = make(tmp_path / name), {"lr": lr, "epochs": 3, "name": name}
        (run_dir / "config.json").write_text(json.dumps(options))
        with without_mlflow(run_dir, config=options) as tracker:
            tracker.log_summary({"change_iou": 0.5}, 1)
    content = events(tmp_path).SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    differs = {info.name: info.differs for info in experiment.hparam_infos}
    assert differs == {"lr": True, "epochs": False, "name": False}
    assert [info.name.tag for info in experiment.metric_infos] == ["summary/best change_iou"]


def test_mlflow_shows_the_best_scores_and_what_differs(store: Path, tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        with track(make(tmp_path / name), store, config={"lr": lr, "epochs": 3}) as tracker:
            tracker.log_summary({"change_iou": 0.5, "accuracy": 0.9}, 1)
    group = client(store).get_experiment_by_name("change-detection")
    view = json.loads(group.tags["mlflow.sharedViewState.best"])
    assert view["selectedColumns"][1:] == [
        "metrics.`val_best/change_iou`", "metrics.`val/loss`", "params.`lr`",
    ]  # fmt: skip
    assert view["orderByKey"] == "metrics.`val_best/change_iou`"


def test_tensorboard_forgets_what_a_resumed_run_repeats(run_dir: Path) -> None:
    with without_mlflow(run_dir) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": 1.0}, step)
    with without_mlflow(run_dir, first_step=3) as tracker:
        tracker.log({"loss": 2.0}, 3)
    assert [(e.step, e.value) for e in events(run_dir).Scalars("run/loss")] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]


def test_the_pr_curve_has_exact_counts(run_dir: Path) -> None:
    counts = torch.zeros(2, 4, dtype=torch.int64)
    counts[0] = torch.tensor([50, 30, 15, 5])
    counts[1] = torch.tensor([1, 2, 3, 4])
    with without_mlflow(run_dir) as tracker:
        tracker.log_pr_curve("pr", counts, 1)
    proto = events(run_dir).Tensors("pr")[0].tensor_proto
    tp, fp, tn, fn, precision, recall = torch.tensor(proto.float_val).view(6, -1).tolist()
    assert tp == [10, 9, 7, 4, 0]
    assert fp == [100, 50, 20, 5, 0]
    assert tn == [0, 50, 80, 95, 100]
    assert fn == [0, 1, 3, 6, 10]
    assert precision == pytest.approx([10 / 110, 9 / 59, 7 / 27, 4 / 9, 0])
    assert recall == pytest.approx([1, 0.9, 0.7, 0.4, 0])


@pytest.mark.fault("R19")
@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "tensorboard"])
def test_without_tensorboard_the_table_is_written(
    run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [n for n in sys.modules if n.startswith(("torch.utils.tensorboard", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with without_mlflow(run_dir) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log_pr_curve("pr", torch.ones(2, 4), 1)
    assert len(table(run_dir)) == 1
    assert len(warned) == 1
    assert warned[0].startswith("TensorBoard: ")


@pytest.mark.fault("R4")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_events_on_a_full_disk_cost_one_warning(
    run_dir: Path, warned: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with without_mlflow(run_dir) as tracker:
        (file,) = run_dir.glob("events*")
        file.unlink()
        file.symlink_to("/dev/full")
        for step in range(1, 6):
            tracker.log({"loss": 1.0}, step)
    assert len(table(run_dir)) == 5
    assert len(warned) == 1
    assert "No space left" in warned[0]
    assert capfd.readouterr().err == ""


# ---- MLflow


@pytest.mark.fault("R19")
def test_mlflow_has_the_whole_run(store: Path, run_dir: Path, warned: list[str]) -> None:
    # an old store in the working folder must not be taken
    make(Path.cwd() / "mlruns" / "0")
    Path("mlruns/0/meta.yaml").write_text("experiment_id: '0'\n")
    with track(run_dir, store) as tracker:
        tracker.log({"train/loss": 0.5, "IoU(%)": 50.0, "val/x": math.inf, "val/y": math.nan}, 1)
        tracker.log({"train/loss": 0.25}, 2)
        tracker.log_summary({"change_iou": 0.75}, 2)
        tracker.log_figure("predictions", Figure(), 2)
        tracker.log_artifact(run_dir / "metrics.csv")
        tracker.log_datasets("toy", digest="d" * 64, source="https://me:pw@host/toy?key=1",
                             num_pairs={"train": 8, "val": 2})  # fmt: skip
    assert warned == []
    assert tracker.mlflow_run_id
    run = client(store).get_run(tracker.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first run"
    assert run.data.params == {"lr": "0.001", "epochs": "3", "amp": "None",
                               "mask_values": "(0, 255)", "encoder.depth": "5"}  # fmt: skip
    assert run.data.metrics == {"train/loss": 0.25, "IoU___": 50.0, "val_best/change_iou": 0.75}
    assert run.data.tags["non_finite_metrics"] == "2"
    assert run.data.tags["dataset"] == "toy"
    history = client(store).get_metric_history(tracker.mlflow_run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert inputs["train"].profile == '{"num_pairs": 8}'
    assert inputs["val"].source == '{"uri": "https://host/toy"}'
    artifacts = store / "mlruns" / "change-detection" / tracker.mlflow_run_id / "artifacts"
    assert (artifacts / "metrics.csv").is_file()
    assert (artifacts / "figures" / "predictions_0002.png").is_file()


def test_no_global_run_is_left(store: Path, run_dir: Path) -> None:
    import mlflow

    with track(run_dir, store):
        assert mlflow.active_run() is None
        assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Interrupted("saved", 15), "KILLED"),
    ],
)
def test_an_exception_becomes_the_status(
    store: Path, run_dir: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), track(run_dir, store) as tracker:
        raise error
    assert client(store).get_run(tracker.mlflow_run_id).info.status == status


@pytest.mark.fault("R19", "R21")
def test_resuming_continues_the_run(store: Path, run_dir: Path, warned: list[str]) -> None:
    killed = track(run_dir, store)  # never closed, like a killed one
    killed.log({"loss": 1.0, "bad": math.nan}, 1)
    options = {"first_step": 2, "mlflow_run_id": killed.mlflow_run_id}
    with track(run_dir, store, **options, config={**CONFIG, "epochs": 6, "new": 1}) as resumed:
        resumed.log({"loss": 0.5, "bad": math.inf}, 2)
    with track(run_dir, store, **options | {"first_step": 3}):  # a finished one runs again
        assert client(store).get_run(killed.mlflow_run_id).info.status == "RUNNING"
    assert warned == []
    assert resumed.mlflow_run_id == killed.mlflow_run_id
    run = client(store).get_run(killed.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "3"
    assert run.data.tags["resume.1"] == "from step 2; epochs: 3 -> 6; new: None -> 1"
    assert run.data.tags["resume.2"] == "from step 3"
    assert run.data.tags["non_finite_metrics"] == "2"
    history = client(store).get_metric_history(killed.mlflow_run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FINISHED"])
def test_a_guest_adds_to_a_run_and_leaves_its_status(
    status: str, store: Path, run_dir: Path, warned: list[str]
) -> None:
    owner = track(run_dir, store)
    owner.log({"loss": 1.0}, 1)
    if status != "RUNNING":
        owner.close(status)
    before = client(store).get_run(owner.mlflow_run_id)
    visit = make(run_dir / "evaluation" / "test")
    more = {"mlflow_run_id": owner.mlflow_run_id, "guest": True, "config": {"other": 1}}
    with track(visit, store, **more) as guest:
        guest.log_scores({"evaluation/test/change_iou": 0.5, "none": math.nan}, 7)
        guest.log_artifact(run_dir / "metrics.csv", "evaluation/test")
    assert warned == [] and guest.mlflow_run_id == owner.mlflow_run_id
    after = client(store).get_run(owner.mlflow_run_id)
    assert after.info.status == status and after.info.end_time == before.info.end_time
    assert after.data.params == before.data.params
    assert after.data.metrics == {"loss": 1.0, "evaluation/test/change_iou": 0.5}
    names = [f.path for f in client(store).list_artifacts(owner.mlflow_run_id, "evaluation/test")]
    assert names == ["evaluation/test/metrics.csv"]
    assert table(run_dir) == [{"step": "1", "loss": "1.0"}]
    assert not (visit / "metrics.csv").exists() and list(visit.glob("*tfevents*"))
    owner.close()


def test_a_guest_of_an_unknown_run_says_what_it_belongs_to(store: Path, run_dir: Path) -> None:
    with track(run_dir, store, mlflow_run_id="0" * 32, guest=True) as guest:
        guest.log_scores({"x": 1.0}, 3)
    run = client(store).get_run(guest.mlflow_run_id)
    assert run.info.run_id != "0" * 32 and run.info.status == "FINISHED"
    assert run.data.tags["evaluation_of"] == "0" * 32 and "resumed_from" not in run.data.tags
    with track(run_dir, store, guest=True) as alone:
        alone.log_scores({"x": 2.0}, 3)
    assert "evaluation_of" not in client(store).get_run(alone.mlflow_run_id).data.tags


@pytest.mark.fault("R21")
@pytest.mark.parametrize("unknown", ["0" * 32, "not an id/"])
def test_an_unknown_id_becomes_a_new_run_with_the_history(
    store: Path, run_dir: Path, unknown: str
) -> None:
    with without_mlflow(run_dir) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 0.5}, 2)
    with track(run_dir, store, first_step=2, mlflow_run_id=unknown) as tracker:
        tracker.log({"loss": 0.25}, 2)
    assert tracker.mlflow_run_id not in (None, unknown)
    run = client(store).get_run(tracker.mlflow_run_id)
    assert run.data.tags["resumed_from"] == unknown
    history = client(store).get_metric_history(tracker.mlflow_run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.25)]


@pytest.mark.fault("R19")
def test_a_deleted_database_costs_one_warning(
    store: Path, run_dir: Path, warned: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with track(run_dir, store) as tracker:
        tracker.log({"loss": 1.0}, 1)
        (store / "mlflow.db").unlink()
        for step in range(2, 7):
            tracker.log({"loss": 1.0}, step)
        tracker.log_figure("predictions", Figure(), 6)
    assert len(table(run_dir)) == 6
    assert len(warned) == 1
    assert warned[0].startswith("MLflow: ")
    assert not (store / "mlflow.db").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.fault("R8", "R19")
def test_what_a_locked_database_refused_is_sent_later(
    store: Path, run_dir: Path, warned: list[str]
) -> None:
    with track(run_dir, store) as tracker:
        other = sqlite3.connect(store / "mlflow.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        tracker.log({"loss": 1.0}, 1)
        other.execute("ROLLBACK")
        other.close()
        tracker.log({"loss": 0.5}, 2)
    assert len(warned) == 1
    # its own words: ours came first, so the 20 s that MLflow waits were not spent
    assert warned[0].startswith(f"MLflow: {store / 'mlflow.db'}: database is locked")
    history = client(store).get_metric_history(tracker.mlflow_run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]


@pytest.mark.fault("R8")
def test_three_failures_are_enough(store: Path, run_dir: Path, warned: list[str]) -> None:
    calls = []

    class Broken:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            raise RuntimeError("server says no at https://me:pw@host/api?token=1")

    tracker = track(run_dir, store)
    assert tracker._mlflow.back_end
    tracker._mlflow.back_end.client = Broken()
    for step in range(1, 9):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert calls == ["log_batch"] * 3
    assert warned == ["MLflow: server says no at https://host/api (the run goes on without)"]


@pytest.mark.fault("R8")
def test_an_unreachable_server_is_asked_once(
    tmp_path: Path, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from urllib3.connectionpool import HTTPConnectionPool

    with socket.socket() as closed:  # bound but not listening: refuses at once
        closed.bind(("127.0.0.1", 0))
        uri = f"http://me:s3cret@127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        timeouts = []
        make_request = HTTPConnectionPool._make_request

        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            timeouts.append(kwargs["timeout"].connect_timeout)
            return make_request(self, *args, **kwargs)

        monkeypatch.setattr(HTTPConnectionPool, "_make_request", count)
        with track(run_dir, tmp_path / "store", mlflow_run_id="a" * 32) as tracker:
            for step in (1, 2, 3):
                tracker.log({"loss": 1.0}, step)
    assert timeouts == [4]
    assert tracker.mlflow_run_id == "a" * 32  # so that a later resume finds the run again
    assert len(warned) == 1
    assert "s3cret" not in warned[0]
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "store").exists()


class MlflowServer(ThreadingHTTPServer):
    """As much of MLflow's protocol as a run needs, until it dies."""

    daemon_threads = True
    batches: list[int]


class Answer(BaseHTTPRequestHandler):
    server: MlflowServer

    def do_GET(self) -> None:
        group = {"experiment_id": "1", "name": "x", "lifecycle_stage": "active"}
        self.answer({"experiment": group} if "get-by-name" in self.path else {})

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        self.server.batches += [metric["step"] for metric in content.get("metrics", [])]
        info = {"run_id": "r" * 32, "run_uuid": "r" * 32, "experiment_id": "1", "status": "RUNNING",
                "start_time": 1, "lifecycle_stage": "active", "artifact_uri": "x"}  # fmt: skip
        self.answer({"run": {"info": info, "data": {}}} if "runs/create" in self.path else {})

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.fault("R8")
def test_a_server_that_dies_midway_costs_one_warning(
    tmp_path: Path, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with MlflowServer(("127.0.0.1", 0), Answer) as server:
        server.batches = []
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        tracker = track(run_dir, tmp_path / "store")
        for step in (1, 2):
            tracker.log({"loss": 1.0}, step)
        server.shutdown()
        thread.join()
        server.server_close()
        for step in range(3, 9):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert server.batches == [1, 2]
    assert tracker.mlflow_run_id == "r" * 32
    assert len(warned) == 1 and warned[0].startswith("MLflow: ")
    assert [row["step"] for row in table(run_dir)] == list("12345678")
    assert "run/loss" in events(run_dir).Tags()["scalars"]


class Hostile(socketserver.StreamRequestHandler):
    """Answers without end: a byte now and then, or as many as there are."""

    def handle(self) -> None:
        self.request.recv(2**16)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        piece, pause = {"header": (b"X", 0.05), "body": (b" ", 0.05), "endless": (2**20 * b" ", 0)}[
            self.server.kind  # type: ignore[attr-defined]
        ]
        self.request.sendall(head if piece == b"X" else head + b"\r\n")
        with contextlib.suppress(OSError):
            while not self.server.is_over.wait(pause):  # type: ignore[attr-defined]
                self.request.sendall(piece)
                self.server.sent += len(piece)  # type: ignore[attr-defined]


@pytest.mark.fault("R31")
@pytest.mark.parametrize("kind", ["header", "body", "endless"])
def test_a_server_without_end_costs_one_warning(
    kind: str, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.tracking_mlflow.MAX_SECONDS", 1)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        server.kind, server.sent = kind, 0  # type: ignore[attr-defined]
        server.is_over = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        with track(run_dir, run_dir) as tracker:
            for step in (1, 2, 3):
                tracker.log({"loss": 1.0}, step)
        server.is_over.set()  # type: ignore[attr-defined]
        server.shutdown()
    assert len(warned) == 1
    reason = "more than 32 MB" if kind == "endless" else "no whole answer within 1 s"
    assert reason in warned[0]
    assert server.sent < 2**26  # type: ignore[attr-defined]
    assert len(table(run_dir)) == 3


ODD_ADDRESSES = {
    "bracket": "http://[",
    "empty": "http://",
    "path": "//",
    "port": "http://x:y:z",
    "byte": "\udcff",
}


@pytest.mark.fault("R31")
@pytest.mark.parametrize("address", ODD_ADDRESSES.values(), ids=ODD_ADDRESSES)  # as text for xdist
def test_an_address_that_is_none_costs_one_warning(
    address: str, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with track(run_dir, run_dir) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert len(warned) == 1
    assert len(table(run_dir)) == 1


@pytest.mark.fault("R34")
def test_a_store_may_have_any_path(
    tmp_path: Path, migrated: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "a b%20c#d?e é")
    shutil.copy(migrated, store)
    run_dir = make(store / "runs" / "r")
    for _ in range(2):
        with track(run_dir, store) as tracker:
            tracker.log({"loss": 1.0}, 1)
            tracker.log_artifact(run_dir / "metrics.csv")
    assert warned == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["elsewhere", store.name]
    assert not list(Path.cwd().iterdir())
    monkeypatch.chdir(store)
    from mlflow import MlflowClient

    here = MlflowClient("sqlite:///mlflow.db")  # as the run's last lines say
    run = here.get_run(str(tracker.mlflow_run_id))
    assert run.data.metrics == {"loss": 1.0}
    assert [f.path for f in here.list_artifacts(run.info.run_id)] == ["metrics.csv"]


@pytest.mark.fault("R19")
def test_without_mlflow_the_table_is_written(
    tmp_path: Path, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with track(run_dir, tmp_path) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log_model(TwoConvs())
    assert tracker.mlflow_run_id is None
    assert len(table(run_dir)) == 1
    assert len(warned) == 1
    assert warned[0].startswith("MLflow: ")


def test_mlflow_can_be_left_out(
    tmp_path: Path, run_dir: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import would warn
    with track(run_dir, tmp_path, use_mlflow=False, mlflow_run_id="b" * 32) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert tracker.mlflow_run_id == "b" * 32
    assert warned == []
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.fault("R25")
def test_no_secret_is_written(store: Path, run_dir: Path) -> None:
    secret = "https://me:hunter2@host/data?token=hunter2#hunter2"
    config = {"data_dir": secret, "nested": {"source": f"see {secret}"}}
    with track(run_dir, store, config=config, tags={"dataset": secret}) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log_summary({"loss": 1.0}, 1)
        tracker.log_datasets("toy", digest="d", source=secret, num_pairs={"train": 8})
    with track(run_dir, store, config={"data_dir": secret + "x"}, tags={}, first_step=2,
               mlflow_run_id=tracker.mlflow_run_id):  # fmt: skip
        pass
    files = [p for folder in (store, run_dir) for p in folder.rglob("*") if p.is_file()]
    assert {"mlflow.db", "metrics.csv"} <= {p.name for p in files}
    assert not [p for p in files if b"hunter2" in p.read_bytes()]
    assert "https://host/data" in client(store).get_run(tracker.mlflow_run_id).data.params.values()


@pytest.mark.fault("R25")
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql+psycopg2://u:p@ss@db:5432/x", "postgresql+psycopg2://db:5432/x"),
        ("at http://h:80/a?b=c&d=e, then http://u@h", "at http://h:80/a then http://h"),
        ("sqlite:////home/a@b/my runs/mlflow.db", "sqlite:////home/a@b/my runs/mlflow.db"),
        ("a@b: who? #1", "a@b: who? #1"),
    ],
)
def test_secrets_are_cut_out_of_text(text: str, clean: str) -> None:
    assert without_secrets(text) == clean


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("val/iou change-2.0", "val/iou change-2.0"),
        ("val@iou", "val_iou"),
        ("/a//b/../c/", "a/c"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_suit_mlflow(name: str, clean: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert mlflow_name(name) == clean
    _validate_metric_name(mlflow_name(name))


def test_the_lock_excludes_and_is_given_back(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(TimeoutError, match="has been locked"),
        locked(tmp_path / "lock", 0.1),
    ):
        raise AssertionError("two hold one lock")
    with locked(tmp_path / "lock", 0.1):
        pass


FIRST_USE = """
import sys
from pathlib import Path
from runtime.tracking import Tracker
store, name = Path(sys.argv[1]), sys.argv[2]
run_dir = store / "runs" / name
run_dir.mkdir(parents=True)
with Tracker(run_dir, config={}, tags={}, store=store) as tracker:
    tracker.log({"loss": float(name)}, 1)
"""


@pytest.mark.fault("R20")
@pytest.mark.slow
def test_three_processes_may_create_the_store_at_once(tmp_path: Path) -> None:
    store = make(tmp_path / "new störe")
    command = [sys.executable, "-c", FIRST_USE, str(store)]
    runs = [
        subprocess.Popen([*command, name], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for name in "123"
    ]
    assert [process.communicate()[1] for process in runs] == [""] * 3
    assert [process.returncode for process in runs] == [0] * 3
    (group,) = (e for e in client(store).search_experiments() if e.name == "change-detection")
    found = client(store).search_runs([group.experiment_id])
    assert sorted(run.data.metrics["loss"] for run in found) == [1, 2, 3]
    assert {run.info.status for run in found} == {"FINISHED"}


def test_logging_stays_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    root, noisy = logging.getLogger(), logging.getLogger("mlflow.some.module")
    handlers, level = root.handlers[:], root.level
    with tracking.quiet():
        root.addHandler(logging.StreamHandler())
        root.setLevel(logging.CRITICAL)  # as importing mlflow.pytorch does
        noisy.error("not shown")
    assert (root.handlers, root.level) == (handlers, level)
    assert capsys.readouterr().err == ""
    assert noisy.isEnabledFor(logging.ERROR)


# ---- the model

PAIR_SIZES = [(1, 6, 32, 32), (5, 6, 33, 70), (2, 6, 96, 64)]


def trained_two_convs() -> TwoConvs:
    torch.manual_seed(0)
    model = TwoConvs().train()
    model(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))  # moves the BatchNorm statistics
    return model


@pytest.mark.skipif(torch.__version__ < "2.12", reason="its exporter refuses the dynamic batch")
def test_the_logged_model_gives_the_same_logits(
    store: Path, run_dir: Path, warned: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow.pytorch

    model = trained_two_convs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with track(run_dir, store) as tracker:
        tracker.log_model(model)
    assert warned == []
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    run = client(store).get_run(tracker.mlflow_run_id)
    (output,) = run.outputs.model_outputs
    logged = client(store).get_logged_model(output.model_id)
    assert logged.status == "READY"
    loaded = mlflow.pytorch.load_model(logged.artifact_location)
    model.eval()
    for size in PAIR_SIZES:
        pair = torch.rand(size)
        torch.testing.assert_close(loaded(pair), model(pair[:, :3], pair[:, 3:]).detach())


LOAD = """
import sys
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model(f"runs:/{sys.argv[2]}/model")
pairs = torch.load(sys.argv[3])
torch.save([model(pair) for pair in pairs], sys.argv[4])
assert "tracking" not in sys.modules
"""


@pytest.mark.slow
def test_the_logged_model_runs_without_this_repository(
    store: Path, run_dir: Path, tmp_path: Path
) -> None:
    model = trained_two_convs()
    with track(run_dir, store) as tracker:
        tracker.log_model(model)
    pairs = [torch.rand(size) for size in PAIR_SIZES]
    torch.save(pairs, tmp_path / "pairs.pt")
    uri = f"sqlite:///{store}/mlflow.db"
    files = [str(tmp_path / name) for name in ("pairs.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOAD, uri, str(tracker.mlflow_run_id), *files],
                   cwd=tmp_path, check=True)  # fmt: skip
    model.eval()
    for logits, pair in zip(torch.load(tmp_path / "logits.pt"), pairs, strict=True):
        torch.testing.assert_close(logits, model(pair[:, :3], pair[:, 3:]).detach())


def test_a_model_that_cannot_be_exported_costs_one_warning(
    store: Path, run_dir: Path, warned: list[str]
) -> None:
    class Chooses(TwoConvs):
        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            return before if before.sum() > 0 else after

    with track(run_dir, store) as tracker:
        tracker.log_model(Chooses())
        tracker.log({"loss": 1.0}, 1)
    assert len(warned) == 1
    assert warned[0].startswith("the MLflow model: ")
    assert client(store).get_run(tracker.mlflow_run_id).data.metrics == {"loss": 1.0}
