import json
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
    where: str | None = option(None, "a place", bare="auto", resumable=True, aliases=["--place"])
    values: tuple[int, ...] | None = option(None, "numbers")
    limits: tuple[float, ...] | None = option(None, "numbers with fractions")


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
    assert "first the-rest [the-rest ...]" in shown
    assert "default: 3" in shown and "MISSING" not in shown


def test_only_given_flags_come_back() -> None:
    assert cli.parse(Small, []) == {}
    line = "-c 4 --rate=2 --fast --no-maybe --kind b --where --values 0,128,255 --limits 0,0.5"
    argv = line.split()
    assert cli.parse(Small, argv) == {
        "count": 4, "rate": 2.0, "fast": True, "maybe": False, "kind": "b", "where": "auto",
        "values": (0, 128, 255), "limits": (0.0, 0.5),
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
        ("-c x", "invalid int value: 'x'"),
        ("--rate -1", "--rate -1.0: give a number of at least 0"),
        ("--rate nan", "--rate nan: give a finite number"),
        ("--side 33", "--side 33: give a multiple of 32"),
        ("--kind c", "choose from"),
        ("--values 0;1", "give whole numbers, such as 0,255"),
        ("--limits 0,x", "'0,x': give numbers, such as 0,0.5"),
        ("--unknown 1", "error: --unknown is no option; see python "),
        ("--valuse 1", "--valuse is no option; did you mean --values?"),
        ("--coun 1", "--coun is no option; did you mean --count?"),
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
    assert cli.differences(Small(), Small(where="x")) == []
    assert cli.differences(Small(), Small(count=4)) == ["--count: 3, now 4"]


def test_help_shows_every_option_without_importing_torch() -> None:
    main = Path(__file__).parents[2] / "main.py"
    script = (
        "import sys, runpy; sys.argv = ['main.py', '--help']\n"
        f"sys.path.insert(0, {str(main.parent)!r})\n"
        f"try: runpy.run_path({str(main)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    for flag in ("--data-dir", "-b N, --batch-size N", "--resume [TEXT]", "--amp {auto,off,"):
        assert flag in done.stdout
