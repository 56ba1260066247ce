"""The script for a GPU goes through on a CPU, with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

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
