"""MLflow: mlflow.db and mlruns/ in the store, or the server that MLFLOW_TRACKING_URI names.

It works through a client with explicit ids: MLflow's global run would leak into whatever comes
next. A store holds absolute paths: it does not move with the repository. MLflow's usage statistics
stay off unless MLFLOW_DISABLE_TELEMETRY says otherwise. No user, password, token or query of an
address is written or printed.

A server is a stranger: each call has a time limit, and each answer a limit of size.
"""

import json
import math
import os
import posixpath
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from runtime.errors import without_secrets
from runtime.files import locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An unreachable server costs 4 s at the start; by default MLflow tries for minutes. What could not
# be sent goes with the next epoch, so nothing is lost by not trying again at once.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}
BEST = "val_best"  # behind train and val in the alphabet
SHOWN = ("change_iou", "change_dice", "mean_iou_of_change", "scd_score")
NAMES = ("name", "output_dir", "resume", "data_dir")  # options that say where, not how
VIEW = "best"
MAX_BATCH = 1000  # metrics that MLflow takes at once
MAX_ANSWER = 32 * 2**20  # bytes
MAX_SECONDS = 30  # of a call to a server
MIN_UPLOAD = 100_000  # bytes a second, below which an upload is given up


@dataclass
class About:
    """What MLflow is told of a run.

    Args:
        run_dir: the run's folder, whose name is the run's.
        tags: what else to find the run by.
        options: MLflow's params.
        first_step: the first step that this process will log.
        run_id: the MLflow run to go on with.
        is_guest: see `Tracker`.
        history: rows of metrics.csv, for a new run that goes on with one the store does not know.
    """

    run_dir: Path
    tags: Mapping[str, str]
    options: Mapping[str, bool | int | float | str]
    first_step: int
    run_id: str | None
    is_guest: bool
    history: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


class Mlflow:
    """One run of a store or a server.

    Attributes:
        run_id: of the run, for the checkpoint.
    """

    def __init__(self, about: About, *, store: Path, experiment: str) -> None:
        self.about = about
        self.run_id = about.run_id or ""
        self.owns_run = True
        self.last_step = 0
        self.unsent: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self.non_finite = 0
        self.database: Path | None = None
        self.link: Path | None = None
        if named := os.environ.get("MLFLOW_TRACKING_URI"):
            self.uri, root = named, None
            if named.startswith("sqlite:///") and "?" not in named:
                self.database = Path(named.removeprefix("sqlite:///"))
        else:
            # named outright: an old mlruns/ in the working folder changes what MLflow would choose
            self.database, root = store / "mlflow.db", (store / "mlruns" / experiment).as_uri()
            self.uri = f"sqlite:///{self._plain(store).as_posix()}/mlflow.db"
        self.is_server = self.uri.startswith(("http://", "https://"))
        try:
            self._limited(lambda: self._open(experiment, root))
        except Exception as error:
            self._unlink()
            kind = ServerIsSlowError if isinstance(error, ServerIsSlowError) else RuntimeError
            raise kind(f"{named or self.database}: {error}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers, with those that could not be sent before."""
        self.keep(values, step)
        self._call(self._send)

    def keep(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers until MLflow has taken them; it would store an infinite one as 1.8e308."""
        self.last_step = max(self.last_step, step)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.non_finite += len(values) - len(finite)
        now = int(time.time() * 1000)
        self.unsent += [(mlflow_name(name), value, now, step) for name, value in finite.items()]

    def log_summary(self, scores: Mapping[str, float], step: int) -> None:
        """Send the best scores, which the view `VIEW` of all runs shows with what differs.

        Their charts, of a point each, stand on the page of a run behind the curves.
        """
        self.log({f"{BEST}/{name}": value for name, value in scores.items()}, step)
        self._call(self._write_view)

    def _write_view(self) -> None:
        group = self.client.get_run(self.run_id).info.experiment_id
        runs = self.client.search_runs([group], max_results=100)
        options: dict[str, set[str]] = {}
        for run in runs:
            for name, value in run.data.params.items():
                options.setdefault(name, set()).add(value)
        names = sorted(name for name in options if len(options[name]) > 1)
        known = {name for run in runs for name in run.data.metrics}
        best = [f"{BEST}/{name}" for name in SHOWN]
        scores = [f"metrics.`{name}`" for name in best if name in known]
        columns = [
            "attributes.`Created`",
            *scores,
            "metrics.`val/loss`",
            *(f"params.`{name}`" for name in names if name not in NAMES),
        ]
        view = {"selectedColumns": columns, "orderByKey": columns[1], "orderByAsc": False}
        self.client.set_experiment_tag(group, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        """Store a picture among the artifacts."""
        path = f"figures/{name}_{step:04}.png"
        self._call(lambda: self.client.log_figure(self.run_id, figure, path))

    def log_artifact(self, path: Path, folder: str | None) -> None:
        """Send a file; into a store on the same disk it is linked, which takes no room."""

        def send() -> None:
            place = self._local_artifacts()
            if not place or not _link(path, place / (folder or "")):
                self.client.log_artifact(self.run_id, str(path), folder)

        self._call(send, path.stat().st_size / MIN_UPLOAD)

    def log_datasets(
        self, name: str, *, digest: str, source: str, num_pairs: Mapping[str, int]
    ) -> None:
        """Name the data of the run, see `Tracker.log_datasets`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        uri = json.dumps({"uri": without_secrets(source)})
        inputs = []
        for split, num in num_pairs.items():
            # named by split, because the same name and digest twice would be one entry
            dataset = Dataset(f"{name} {split}", digest[:36], "local", uri,
                              profile=json.dumps({"num_pairs": num}))  # fmt: skip
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
        self._call(lambda: self.client.log_inputs(self.run_id, inputs))

    def log_model(self, folder: Path) -> None:
        """Store a model that `export_model` has written."""
        from mlflow.entities import LoggedModelOutput

        size = sum(path.stat().st_size for path in folder.rglob("*"))

        def send() -> None:
            group = self.client.get_run(self.run_id).info.experiment_id
            entry = self.client.create_logged_model(group, "model", self.run_id)
            self.client.log_model_artifacts(entry.model_id, str(folder))
            self.client.finalize_logged_model(entry.model_id, "READY")
            output = LoggedModelOutput(entry.model_id, self.last_step)
            self.client.log_outputs(self.run_id, [output])

        self._call(send, size / MIN_UPLOAD)

    def close(self, status: str) -> None:
        """Send what is left and end the run: FINISHED, FAILED or KILLED."""
        if self.unsent:
            self._call(self._send)
        if self.owns_run:
            self._call(lambda: self.client.set_terminated(self.run_id, status))
        self._unlink()

    # ---- a call that ends

    def _call(self, call: Callable[[], object], more_seconds: float = 0) -> None:
        if self.database:
            _check_sqlite(self.database)
        self._limited(call, more_seconds)

    def _limited(self, call: Callable[[], object], more_seconds: float = 0) -> None:
        """Wait for a call to a server no longer than that; it may send a byte a second for ever."""
        if not self.is_server:
            call()
            return
        seconds = MAX_SECONDS + more_seconds
        fault: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                fault.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise ServerIsSlowError(f"no whole answer within {seconds:.0f} s")
        if fault:
            raise fault[0]

    # ---- opening

    def _plain(self, store: Path) -> Path:
        """Return a path of a folder that an address can hold: SQLAlchemy decodes %20 and cuts at ?.

        The next process may go another way, for nothing of it is stored.
        """
        if not set(store.as_posix()) & set("%?#"):
            return store
        self.link = Path(tempfile.mkdtemp()) / "store"
        self.link.symlink_to(store, target_is_directory=True)
        return self.link

    def _unlink(self) -> None:
        if self.link:
            shutil.rmtree(self.link.parent, ignore_errors=True)

    def _open(self, experiment: str, root: str | None) -> None:
        from mlflow import MlflowClient

        lock = self.database and self.database.with_name(f"{self.database.name}.lock")
        # several runs that create a database or an experiment at once trip over each other
        with locked(lock) if lock else nullcontext():
            if self.database and self.database.exists():
                _check_sqlite(self.database)
            self.client: Any = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(experiment)
            group = (
                found.experiment_id if found else self.client.create_experiment(experiment, root)
            )
            if not self._continue_run():
                self._start_run(group)

    def _start_run(self, experiment_id: str) -> None:
        from mlflow.entities import Param

        run_dir, old = self.about.run_dir, self.about.run_id
        tags = {
            **self.about.tags,
            "run_dir": str(run_dir),
            "mlflow.source.name": Path(sys.argv[0]).name,
        }
        if old:
            tags["evaluation_of" if self.about.is_guest else "resumed_from"] = old
            for step, row in self.about.history.items():
                self.keep({name: float(value) for name, value in row.items()}, step)
        tags = {name: without_secrets(value)[:5000] for name, value in tags.items()}
        run = self.client.create_run(experiment_id, tags=tags, run_name=run_dir.name)
        self.run_id = run.info.run_id
        params = [Param(name, value) for name, value in self._params().items()]
        self.client.log_batch(self.run_id, params=params)

    def _continue_run(self) -> bool:
        from mlflow.exceptions import MlflowException

        if not self.about.run_id:
            return False
        try:
            run = self.client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise
        if run.info.lifecycle_stage != "active":
            return False
        with suppress(ValueError):
            self.non_finite = int(run.data.tags.get("non_finite_metrics", 0))
        if self.about.is_guest:
            self.owns_run = False
            return True
        self.client.update_run(self.run_id, "RUNNING")
        # params cannot be changed once they are logged, so a tag says what is new
        before, now = run.data.params, self._params()
        news = [f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
        number = 1 + sum(tag.startswith("resume.") for tag in run.data.tags)
        text = "; ".join([f"from step {self.about.first_step}", *news])
        self.client.set_tag(self.run_id, f"resume.{number}", text[:5000])
        return True

    def _params(self) -> dict[str, str]:
        return {mlflow_name(n): str(value)[:500] for n, value in self.about.options.items()}

    def _send(self) -> None:
        from mlflow.entities import Metric, RunTag

        tags = [RunTag("non_finite_metrics", str(self.non_finite))] if self.non_finite else []
        while self.unsent or tags:
            metrics = [Metric(*metric) for metric in self.unsent[:MAX_BATCH]]
            self.client.log_batch(self.run_id, metrics=metrics, tags=tags)
            del self.unsent[:MAX_BATCH]
            tags = []

    def _local_artifacts(self) -> Path | None:
        """Return the folder of the run's artifacts where it is on this machine."""
        if not self.database:
            return None
        address = urlsplit(self.client.get_run(self.run_id).info.artifact_uri)
        return Path(url2pathname(address.path)) if address.scheme == "file" else None


def _link(path: Path, folder: Path) -> bool:
    """Give a file a second name in a folder, if its drive can do that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).unlink(missing_ok=True)
        os.link(path, folder / path.name)
    except OSError:
        return False
    return True


class ServerIsSlowError(Exception):
    """A server has not answered in time, and its connection is still open: ask it no more."""


def import_mlflow() -> None:
    """Import MLflow, which takes 2 to 3 s, and put a limit on what it reads from a server."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401
    from mlflow.utils import request_utils

    make_session = request_utils._get_request_session
    if getattr(make_session, "is_limited", False):
        return

    def limited_session(*args: Any, **kwargs: Any) -> Any:
        session = make_session(*args, **kwargs)
        session.hooks["response"] = [_read_to_the_limit]
        return session

    limited_session.is_limited = True  # type: ignore[attr-defined]
    request_utils._get_request_session = limited_session


def _read_to_the_limit(response: Any, **_: object) -> None:
    """Read the answer here, before `requests` reads whatever comes."""
    content = bytearray()
    for part in response.raw.stream(2**16, decode_content=True):
        content += part
        if len(content) > MAX_ANSWER:
            response.close()
            raise OSError(f"the answer has more than {MAX_ANSWER >> 20} MB")
    response._content = bytes(content)


def mlflow_name(name: str) -> str:
    """Turn any name into one that MLflow takes for a metric or a param."""
    name = posixpath.normpath(re.sub(r"[^\w\-. /]", "_", name)).lstrip("./")
    return name[:250] or "_"


def _check_sqlite(path: Path) -> None:
    """Raise within a second where MLflow would wait 20 for a lock; a deleted file stays deleted."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=1, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error
