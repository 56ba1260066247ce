"""A frozen dataclass becomes a command line: one field, one flag, its help and its default.

    epochs: int = option(30, "passes over the training split", above=0)
    ->  --epochs N      passes over the training split (default: 30)

    before: str = option(REQUIRED, "the earlier date", positional=True)
    ->  before          the earlier date

A `bool` becomes --flag/--no-flag, `str | None` is optional, a tuple is comma-separated, and
`--batch_size` is `--batch-size`. A positional tuple takes several words. Nothing here imports
torch, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import platform
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.errors import UserError, visible

VERSION = "0.1.0"  # of this repository, as in CHANGELOG.md
ConfigT = TypeVar("ConfigT")
REQUIRED: Any = dataclasses.MISSING  # as the default of a positional that must be given
FREE = ("machine", "run")  # groups that say how a run goes, not what it learns: they may change

# What people type for what is called otherwise here; shown where the script has the option
OTHER_NAMES = {
    "--gpu": "--device cuda:0",
    "--gpus": "--device cuda",
    "--cpu": "--device cpu",
    "--learning-rate": "--lr",
    "--bs": "--batch-size",
    "--num-workers": "--workers",
    "--dataset": "--data-dir",
    "--data": "--data-dir",
    "--encoder": "--backbone",
    "--model": "--backbone",
    "--pretrained": "--weights",
    "--checkpoint": "--resume",
}
BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (lambda value, bound: value > bound, "a number above"),
    "at_least": (lambda value, bound: value >= bound, "a number of at least"),
    "at_most": (lambda value, bound: value <= bound, "a number of at most"),
    "multiple_of": (lambda value, bound: value % bound == 0, "a multiple of"),
}


def option(
    default: Any,
    help: str,  # noqa: A002 (argparse's word)
    *,
    group: str | None = None,
    short: str | None = None,
    choices: Sequence[str] | None = None,
    form: tuple[str, str] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    multiple_of: int | None = None,
    may_change: bool = False,
    bare: str | None = None,
    aliases: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        default: what a run without the flag takes; `REQUIRED` for a positional without one.
        help: a phrase for `--help`.
        group: the heading in `--help` of this option and of those that follow.
        short: a one-letter flag, such as "-b".
        choices: the only values allowed.
        form: a regular expression that a text must match, and what to give in words.
        above: numbers must be greater than this.
        at_least: numbers must not be smaller than this.
        at_most: numbers must not be greater than this.
        multiple_of: numbers must be divisible by this.
        may_change: may differ from the checkpoint's when a run is resumed, as all options of the
            groups `FREE` may.
        bare: the value when the flag stands without one (`--resume` is `--resume auto`).
        aliases: other spellings of the flag.
        positional: given by its place, without a flag; of type `str` one word, of type
            `tuple[str, ...]` several, at least one if it is `REQUIRED`.
    """
    rule = dict(locals())  # the arguments, by name
    return dataclasses.field(default=rule.pop("default"), metadata=rule)


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field of a config, its type without None, and the group that it stands in."""

    name: str
    kind: Any
    default: Any
    group: str
    rule: Mapping[str, Any]

    @property
    def flag(self) -> str:
        name = self.name.replace("_", "-")
        return name if self.rule["positional"] else f"--{name}"

    @property
    def is_tuple(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def may_change(self) -> bool:
        return self.rule["may_change"] or self.group in FREE


def parse(
    config_class: type,
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    answers: Mapping[str, tuple[str, Callable[[], str]]] | None = None,
    check: Callable[[Any], object] = lambda _: None,
) -> dict[str, Any]:
    """Read the flags that a command line gives, exiting with code 2 on a bad one.

    Args:
        config_class: a frozen dataclass whose fields are `option`s.
        argv: the words after the script's name; `sys.argv[1:]` when None.
        description: of the script, shown by --help as it stands.
        answers: flags that print something and end the script: their help, and what to print.
        check: raises UserError for values that do not go together, or name nothing.

    Returns:
        The given fields alone: `config_class(**given)` fills in the defaults, and a resumed run
        lays them over its saved config.
    """
    parser = _Parser(description)
    options = _options(config_class)
    for one in options:
        parser.add_option(one)
    answers = {"version": ("print the version and exit", _version), **(answers or {})}
    for name, (text, answer) in answers.items():
        parser.add_argument(f"--{name}", action=_Answer, nargs=0, const=answer, help=text)
    words = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_intermixed_args(parser.joined(words)))
    try:
        given = {one.name: _read(one, given[one.name]) for one in options if one.name in given}
        config = config_class(**given)
        validate(config)
        check(config)
    except UserError as error:
        parser.error(str(error))
    return given


class _Answer(argparse.Action):
    """Prints something and ends the script, whatever else its command line says."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const())
        parser.exit(0)


class _Parser(argparse.ArgumentParser):
    """Ends in one line, as all our errors do, and guesses which flag was meant."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            usage="python %(prog)s [options]",
            description=description,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._headings: dict[str, argparse._ArgumentGroup] = {}
        self._takes_value: dict[str, bool] = {"--help": False, "--version": False}

    def add_option(self, one: _Option) -> None:
        """Add an option's flag, or its place, under the heading of its group."""
        rule = one.rule
        has_default = one.default not in (None, REQUIRED, ())
        default = f" (default: {_text(one.default)})" if has_default else ""
        words: dict[str, Any] = {"help": (rule["help"] + default).replace("%", "%%")}
        if rule["positional"]:
            many, is_required = one.is_tuple, one.default is REQUIRED
            nargs = ("+" if is_required else "*") if many else (None if is_required else "?")
            self.add_argument(one.name, metavar=one.flag, nargs=nargs, **words)
            shown = f"{one.flag} ..." if many else one.flag
            self.usage = f"{self.usage} {shown if is_required else f'[{shown}]'}"
            return
        if one.group not in self._headings:
            self._headings[one.group] = self.add_argument_group(one.group)
        heading = self._headings[one.group]
        flags = [*filter(None, [rule["short"]]), one.flag, *rule["aliases"]]
        self._takes_value |= dict.fromkeys(flags, one.kind is not bool)
        if one.kind is bool:
            self._takes_value[f"--no-{one.flag[2:]}"] = False
            heading.add_argument(one.flag, action=argparse.BooleanOptionalAction, **words)
            return
        if rule["bare"]:
            words |= {"nargs": "?", "const": rule["bare"]}
        heading.add_argument(*flags, dest=one.name, metavar=_metavar(one), **words)

    def joined(self, words: Sequence[str]) -> list[str]:
        """Join flags with negative values, which argparse takes for flags: --scale=-1,1."""
        result: list[str] = []
        for word in words:
            if re.match(r"-[\d.]", word) and result and self._takes_value.get(result[-1]):
                flag = result.pop()
                result.append(f"{flag}={word}" if flag.startswith("--") else f"{flag}{word}")
            else:
                result.append(word)
        return result

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line, and exit with code 2."""
        if unknown := re.match(r"unrecognized arguments: (\S+)(?: (\S+))?", message):
            message = self._unknown(unknown[1], unknown[2])
        self.exit(2, visible(f"error: {message}; see python {self.prog} --help\n"))

    def _unknown(self, word: str, value: str | None) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            path = Path(word)
            for option in ("--resume",) if path.suffix == ".pt" else ("--data-dir",):
                if option in self._takes_value and path.exists():
                    return f"{word} stands alone; did you mean {option} {word}?"
            return f"{word} is one word too many"
        message = f"{flag} is no option"
        meant = OTHER_NAMES.get(flag, "")
        if flag == "--gpu" and value and value.isdigit():
            meant = f"--device cuda:{value}"
        if meant.partition(" ")[0] not in self._takes_value:
            known = {known.lstrip("-"): known for known in self._takes_value}
            near = difflib.get_close_matches(flag.lstrip("-"), known, n=1, cutoff=0.75)
            meant = known[near[0]] if near else ""
        return f"{message}; did you mean {meant}?" if meant else message


def validate(config: Any) -> None:
    """Check every value against its bounds and its choices.

    Raises:
        UserError: names the flag, the value and what is allowed.
    """
    for one in _options(type(config)):
        value, rule = getattr(config, one.name), one.rule
        if value is None:
            continue
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{one.flag} {value}: choose one of {', '.join(rule['choices'])}")
        if rule["form"] and not re.fullmatch(rule["form"][0], value):
            raise UserError(f"{one.flag} {value}: give {rule['form'][1]}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"{one.flag} {value}: give a finite number")
        for name, (is_within, words) in BOUNDS.items():
            if rule[name] is not None and not is_within(value, rule[name]):
                raise UserError(f"{one.flag} {value}: give {words} {rule[name]}")


def differences(saved: Any, current: Any) -> list[str]:
    """Name the options that may not change on resuming, yet do: "--crop-size: 256, now 128"."""
    return [
        f"{one.flag}: {_text(getattr(saved, one.name))}, now {_text(getattr(current, one.name))}"
        for one in _options(type(saved))
        if not one.may_change and getattr(saved, one.name) != getattr(current, one.name)
    ]


def from_dict(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Turn `as_dict`'s result back into a config, checking names, types and bounds.

    Raises:
        UserError: an unknown name, a wrong type or a value out of bounds.
    """
    hints = typing.get_type_hints(config_class)
    kinds = {one.name: one.kind for one in _options(config_class)}
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"config: {reprlib.repr(name)} is unknown to this version")
        read[name] = tuple(value) if isinstance(value, list) else value
        may_be_none = value is None and type(None) in typing.get_args(hints[name])
        if not may_be_none and not _is_a(read[name], kinds[name]):
            expected = typing.get_origin(kinds[name]) or kinds[name]
            raise UserError(f"config: {name} is {reprlib.repr(value)}, not {expected.__name__}")
    config = config_class(**read)
    validate(config)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Return the config as JSON's types: tuples become lists."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def as_flags(values: Mapping[str, Any]) -> str:
    """Write options as a command line has them: "--lr 0.002 --no-freeze-backbone"."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {_text(value)}")
    return " ".join(words)


def _options(config_class: type) -> list[_Option]:
    hints = typing.get_type_hints(config_class)
    found, group = [], "options"
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"] or group
        kind = _required_type(hints[field.name])
        found.append(_Option(field.name, kind, field.default, group, field.metadata))
    return found


def _required_type(hint: Any) -> Any:
    """`str | None` -> `str`."""
    if isinstance(hint, types.UnionType):
        return next(a for a in hint.__args__ if a is not type(None))
    return hint


def _is_a(value: Any, kind: Any) -> bool:
    """Whether JSON's value is of a field's type; True is no number, and 1 is a float."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, kind.__args__[0]) for v in value)
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**1023)
    return type(value) is kind


def _read(one: _Option, value: Any) -> Any:
    """Turn what argparse found, text or a list of texts, into a value of the option's type.

    Raises:
        UserError: it is no such value.
    """
    element = one.kind.__args__[0] if one.is_tuple else one.kind
    if not isinstance(value, str | list) or (element is str and not one.is_tuple):
        return value
    words = value if isinstance(value, list) else value.split(",") if one.is_tuple else [value]
    try:
        read = tuple(element(word) for word in words)
    except ValueError:
        wanted = {
            (int, False): "a whole number",
            (float, False): "a number",
            (int, True): "whole numbers, such as 0,255",
            (float, True): "numbers, such as 0,0.5",
        }[element, one.is_tuple]
        shown = " ".join(value) if isinstance(value, list) else value
        raise UserError(f"{one.flag} {shown}: give {wanted}") from None
    return read if one.is_tuple else read[0]


def _metavar(one: _Option) -> str:
    if one.rule["choices"]:
        return f"{{{','.join(one.rule['choices'])}}}"
    if one.is_tuple:
        return "N,N" if one.kind.__args__[0] is int else "X,X"
    return {int: "N", float: "X", str: "TEXT"}[one.kind]


def _hyphens(word: str) -> str:
    """--batch_size=4 -> --batch-size=4; values and other words stay."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _version() -> str:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return f"{VERSION} (Python {platform.python_version()}, torch {torch})"
