"""The script for a GPU goes through on a CPU, with tiny sizes."""

import argparse
import io
import json
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


SLOW = [
    pytest.param(part, marks=pytest.mark.slow)
    for part in ("step", "peers", "run", "scene", "compile")
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["trace", *SLOW])
def test_each_part_writes_its_figures(parts: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--only", parts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"gpu_{parts}-cpu.json").read_text())
    assert "fault" not in json.dumps(found)
    assert found["hardware"] and found["versions"]["torch"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))


def test_a_part_that_there_is_not_is_an_error(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "out"), "--only", "trace,runn"])
    with pytest.raises(SystemExit, match="2"):
        gpu["main"]()
    assert "--only runn: choose of tests, step, peers, run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tests_that_fail_are_a_part_that_failed(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(stdout=io.StringIO("one FAILED\n"), returncode=1)
    stand_in = SimpleNamespace(Popen=lambda *_, **__: nullcontext(process), PIPE=-1, STDOUT=-2)
    monkeypatch.setitem(gpu["tests"].__globals__, "subprocess", stand_in)
    arguments = argparse.Namespace(tiny=True, out=tmp_path, part="tests", device="cpu")
    with pytest.raises(SystemExit, match="1"):
        gpu["tests"](arguments)
    assert json.loads((tmp_path / "gpu_tests-cpu.json").read_text())["exit_code"] == 1
