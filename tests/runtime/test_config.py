import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from main import Config
from runtime import config as cli
from runtime.config import option
from runtime.errors import UserError


@dataclass(frozen=True)
class Small:
    count: int = option(3, "a 100 % count", short="-c", above=0)
    rate: float = option(0.5, "a rate", at_least=0)
    side: int = option(64, "a side", multiple_of=32)
    fast: bool = option(False, "a switch")
    maybe: bool | None = option(None, "a switch without a default")
    kind: str = option("a", "a choice", choices=("a", "b"))
    where: str | None = option(None, "a place", bare="auto", may_change=True, aliases=["--place"])
    values: tuple[int, ...] | None = option(None, "numbers")
    limits: tuple[float, ...] | None = option(None, "numbers with fractions")
    span: str = option("1s", "a time", form=(r"\d+s", "a time, such as 3s"), group="machine")


@dataclass(frozen=True)
class Placed:
    first: str = option(cli.REQUIRED, "a word", positional=True)
    the_rest: tuple[str, ...] = option(cli.REQUIRED, "words", positional=True)
    count: int = option(3, "a count", short="-c", above=0)


@dataclass(frozen=True)
class PlacedOrNot:
    first: str | None = option(None, "a word", positional=True)
    numbers: tuple[int, ...] = option((), "numbers", positional=True)
    fast: bool = option(False, "a switch")


def test_positionals_stand_before_between_and_after_flags() -> None:
    expected = {"first": "a_b", "the_rest": ("--b", "c"), "count": 4}
    for line in ("-c 4 a_b -- --b c", "a_b -c 4 -- --b c"):
        assert cli.parse(Placed, line.split()) == expected
    assert cli.parse(Placed, ["a", "b", "-c", "4", "c"])["the_rest"] == ("b", "c")


def test_positionals_with_a_default_may_be_left_out() -> None:
    assert cli.parse(PlacedOrNot, []) == {}
    assert cli.parse(PlacedOrNot, ["--fast"]) == {"fast": True}
    line = ["a", "1", "--fast", "2"]
    assert cli.parse(PlacedOrNot, line) == {"first": "a", "numbers": (1, 2), "fast": True}


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("argv", "says"),
    [("", "required: first, the-rest"), ("a", "required: the-rest"), ("a b -c 0", "--count 0")],
)
def test_missing_positional_exits_with_2(
    argv: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Placed, argv.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_positionals_round_trip_and_show_in_help(capsys: pytest.CaptureFixture) -> None:
    config = Placed("a", ("b", "c"))
    assert cli.from_dict(Placed, json.loads(json.dumps(cli.as_dict(config)))) == config
    assert cli.differences(config, Placed("a", ("b",))) == ["the-rest: b,c, now b"]
    with pytest.raises(SystemExit):
        cli.parse(Placed, ["--help"])
    shown = capsys.readouterr().out
    assert "[options] first the-rest ...\n" in shown
    assert "default: 3" in shown and "MISSING" not in shown


def test_only_given_flags_come_back() -> None:
    assert cli.parse(Small, []) == {}
    line = "-c 4 --rate=2 --fast --no-maybe --kind b --where --values 0,128,255 --limits -1,-.5"
    argv = line.split()
    assert cli.parse(Small, argv) == {
        "count": 4, "rate": 2.0, "fast": True, "maybe": False, "kind": "b", "where": "auto",
        "values": (0, 128, 255), "limits": (-1.0, -0.5),
    }  # fmt: skip


def test_underscores_and_aliases_are_the_same_flag() -> None:
    assert cli.parse(Config, ["--batch_size=4", "--data-path", "a_b"]) == {
        "batch_size": 4,
        "data_dir": "a_b",
    }


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("-c 0", "--count 0: give a number above 0"),
        ("-c x", "--count x: give a whole number"),
        ("--rate 1,2", "--rate 1,2: give a number"),
        ("--rate -1", "--rate -1.0: give a number of at least 0"),
        ("--rate nan", "--rate nan: give a finite number"),
        ("--side 33", "--side 33: give a multiple of 32"),
        ("--kind c", "--kind c: choose one of a, b"),
        ("--span 3x", "--span 3x: give a time, such as 3s"),
        ("--values 0;1", "give whole numbers, such as 0,255"),
        ("--limits 0,x", "--limits 0,x: give numbers, such as 0,0.5"),
        ("--unknown 1", "error: --unknown is no option; see python "),
        ("--valuse 1", "--valuse is no option; did you mean --values?"),
        ("--coun 1", "--coun is no option; did you mean --count?"),
        ("--elsewhere 1", "--elsewhere is no option; see"),
        ("--lr 1", "--lr is no option; see"),
        ("word", "word is one word too many; see"),
        ("--\x1b[31m 1", "error: --\\x1b[31m is no option"),
    ],
)
def test_bad_flag_exits_with_2(argv: str, says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Small, argv.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said and said.count("\n") == 1


def test_dict_round_trip_through_json() -> None:
    config = Small(count=7, values=(0, 1), maybe=True)
    assert cli.from_dict(Small, json.loads(json.dumps(cli.as_dict(config)))) == config


@pytest.mark.fault("C4")
@pytest.mark.parametrize(
    "values",
    [
        {"colour": 1},
        {"count": "3"},
        {"count": 0},
        {"count": True},
        {"rate": False},
        {"kind": "c"},
        {"kind": ["a"]},
        {"fast": "yes"},
        {"fast": 1},
        {"where": 7},
        {"values": [0, "x"]},
        {"values": [0, [1]]},
        {"values": [True]},
        {"values": 5},
        {7: 7},
    ],
)
def test_wrong_config_is_named(values: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(values)))):
        cli.from_dict(Small, values)


def test_only_options_that_matter_count_as_different() -> None:
    assert cli.differences(Small(), Small(where="x", span="2s")) == []
    assert cli.differences(Small(), Small(count=4)) == ["--count: 3, now 4"]


@pytest.mark.parametrize(
    "line", ["--values -1,2", "--values=-1,2", "--values -1,2 --fast", "--fast --values -1,2"]
)
def test_a_list_may_begin_with_a_minus(line: str) -> None:
    assert cli.parse(Small, line.split())["values"] == (-1, 2)


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--gpu 0", "--gpu is no option; did you mean --device cuda:0?"),
        ("--gpu", "--gpu is no option; did you mean --device cuda:0?"),
        ("--num_workers=2", "--num-workers is no option; did you mean --workers?"),
        ("--epoch 3", "--epoch is no option; did you mean --epochs?"),
        ("tests", "tests stands alone; did you mean --data-dir tests?"),
        ("--verbose", "--verbose is no option; see"),
    ],
)
def test_the_hint_is_a_likely_one_or_none(
    argv: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit):
        cli.parse(Config, argv.split())
    assert says in capsys.readouterr().err


def test_answers_come_before_anything_that_is_missing(capsys: pytest.CaptureFixture) -> None:
    answers = {"list": ("list all", lambda: "all of it")}
    for argv, says in (("--list", "all of it\n"), ("--version", f"{cli.VERSION} (Python 3.")):
        with pytest.raises(SystemExit) as stop:
            cli.parse(Placed, argv.split(), answers=answers)
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(says)


ANSWERS = [
    ("main.py --help", 0, "--resume [TEXT]"),
    ("main.py --list", 0, "cross_attention"),
    ("main.py --version", 0, cli.VERSION),
    ("main.py --backbone resnet5", 2, "--backbone resnet5: choose one of resnet18"),
    ("main.py --fusion no", 2, "--fusion no: choose one of concat"),
    ("main.py --loss no", 2, "--loss no: 'no' is none"),
    ("main.py --weights /no.pth", 2, "--weights /no.pth: no such file"),
    ("main.py --data-dir /no", 2, "no such folder; expected DIR/train/A"),
    ("main.py --resume /no/last.pt", 2, "--resume /no/last.pt: no such run or checkpoint"),
    ("main.py --device gpu", 2, "--device gpu: give auto, cpu"),
    ("main.py --name a/b", 2, "--name a/b: give a plain name, without a path"),
    ("evaluate.py /no", 2, "/no: no such run or checkpoint"),
    ("predict.py /no b.png a.png", 2, "/no: no such run or checkpoint"),
    ("export.py /no", 2, "/no: no such run or checkpoint"),
    ("evaluate.py --help", 0, "--protocols TEXT"),
    ("predict.py --help", 0, "--threshold X"),
    ("export.py --help", 0, "    best.onnx       for onnxruntime"),
]


@pytest.mark.fault("R16")
@pytest.mark.parametrize(("line", "code", "says"), ANSWERS, ids=[line for line, _, _ in ANSWERS])
def test_it_is_answered_before_torch_is_imported(line: str, code: int, says: str) -> None:
    script, *words = line.split()
    path = Path(__file__).parents[2] / script
    program = (
        f"import sys, runpy; sys.argv = {[script, *words]}\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        f"except SystemExit as stop: assert stop.code == {code}\n"
        "assert not {'torch', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert says in done.stdout + done.stderr


def test_help_stands_in_groups() -> None:
    main = Path(__file__).parents[2] / "main.py"
    done = subprocess.run([sys.executable, main, "--help"], capture_output=True, text=True)
    titles = re.findall(r"^(\w+):$", done.stdout, re.MULTILINE)
    assert titles == ["options", "data", "model", "loss", "training", "machine", "run"]
    assert re.search(r"-b( N)?, --batch-size N", done.stdout)  # Python 3.13 names the value once
    assert "{auto,off,bf16,fp16}" in done.stdout
