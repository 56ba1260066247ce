"""How a script starts: it lives on without a reader, leaves at Ctrl-C, and shares the cores."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import start
from runtime.start import choose_threads, usable_cores

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from runtime.config import option
from runtime.errors import run_script
from runtime.start import start

@dataclass(frozen=True)
class Config:
    name: str = option("x", "a name")

GIVEN = start(Config, description=None)

def script():
    for number in range(3):
        print("line", number, GIVEN.get("name"), flush=True)
        print("warning", number, file=sys.stderr, flush=True)
        time.sleep(0.1)  # until a reader has gone
    Path("done").write_text("to the end")
"""
RUN = "sys.exit(run_script(script))"


def shell(line: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of bash in which S is the script."""
    (tmp_path / "script.py").write_text(SCRIPT + RUN)
    return subprocess.run(
        ["bash", "-c", f'S() {{ {sys.executable} script.py "$@"; }}\n{line}'],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.fault("R28")
@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("S | head -n 1", 0, b"warning 0\nwarning 1\nwarning 2\n"),
        ("S >&-", 0, b"warning 0\nwarning 1\nwarning 2\n"),
        ("S 2>&-", 0, b""),
        ("S 2>/dev/full", 0, b""),
        ("S >&- 2>&- <&-", 0, b""),
        ("S > /dev/full 2>/dev/full", 2, b""),
        ("(S 2>&1 >/dev/null) | head -n 1", 0, b""),
    ],
)
def test_a_script_goes_on_when_its_output_is_gone(
    line: str, code: int, error: bytes, tmp_path: Path
) -> None:
    done = shell(f"set -o pipefail; {line}", tmp_path)
    assert (done.returncode, done.stderr) == (code, error)
    assert (tmp_path / "done").read_text() == "to the end"


@pytest.mark.fault("R28")
def test_output_that_is_lost_is_said_once_and_is_no_success(tmp_path: Path) -> None:
    done = shell("S >/dev/full", tmp_path)
    said = done.stderr.decode()
    assert done.returncode == 2 and (tmp_path / "done").exists()
    assert said.count("standard output cannot be written (No space left on device); going on") == 1
    assert said.endswith(
        "error: standard output lacks what was printed last (No space left on device)\n"
    )
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.fault("D25")
@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"\udcc3\udcbc\udcff"),
        ({"PYTHONIOENCODING": "ascii"}, rb"\xfc\udcff"),
        ({"PYTHONUTF8": "1"}, b"\xc3\xbc\\udcff"),
    ],
)
def test_any_name_can_be_printed(locale: dict[str, str], expected: bytes, tmp_path: Path) -> None:
    done = shell(r"S --name $'\xc3\xbc\xff\e[31m'", tmp_path, **locale)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == b"line 0 " + expected + rb"\x1b[31m"


def interrupted_while(importing: Callable[[Path], list[str]], tmp_path: Path) -> None:
    run = subprocess.Popen(
        importing(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not (tmp_path / "importing").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)
    assert (run.returncode, *said) == (130, "", "interrupted\n")


@pytest.mark.fault("R33")
def test_ctrl_c_while_modules_are_imported_is_one_word(tmp_path: Path) -> None:
    def script(folder: Path) -> list[str]:
        (folder / "slow.py").write_text("import time; open('importing', 'w'); time.sleep(60)")
        (folder / "script.py").write_text(f"{SCRIPT}import slow\n")
        return [sys.executable, "script.py"]

    interrupted_while(script, tmp_path)


@pytest.mark.fault("R33")
def test_ctrl_c_while_main_imports_torch(tmp_path: Path) -> None:
    def script(folder: Path) -> list[str]:
        (folder / "torch.py").write_text("import time; open('importing', 'w'); time.sleep(60)")
        program = (
            f"import sys, runpy; sys.argv = ['main.py']; sys.path.insert(0, {str(folder)!r})\n"
        )
        program += f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')"
        return [sys.executable, "-c", program]

    interrupted_while(script, tmp_path)


@pytest.mark.fault("R33")
@pytest.mark.parametrize("script", ["main", "evaluate", "predict", "export"])
def test_ctrl_c_at_the_first_import_is_silent(script: str) -> None:
    program = f"""
import os, signal, sys
class First:
    def find_spec(self, name, path=None, target=None):
        if name in ("runtime", "pairs"):
            os.kill(os.getpid(), signal.SIGINT)
sys.argv, sys.meta_path = ["x"], [First(), *sys.meta_path]
with open({str(ROOT / script) + ".py"!r}) as file:
    exec(compile(file.read(), "x", "exec"), {{"__name__": "__main__", "__doc__": ""}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_container(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(start, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == expected
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    choose_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ.get("OMP_NUM_THREADS", "8") == str(expected)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "usable_cores", lambda: 1)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "3"
