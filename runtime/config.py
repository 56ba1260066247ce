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
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from runtime.errors import UserError, visible

ConfigT = TypeVar("ConfigT")
REQUIRED: Any = dataclasses.MISSING  # as the default of a positional that must be given


def option(
    default: Any,
    help: str,  # noqa: A002 (argparse's word)
    *,
    short: str | None = None,
    choices: Sequence[str] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    multiple_of: int | None = None,
    resumable: bool = False,
    bare: str | None = None,
    aliases: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        default: what a run without the flag takes; `REQUIRED` for a positional without one.
        help: one line for `--help`.
        short: a one-letter flag, such as "-b".
        choices: the only values allowed.
        above: numbers must be greater than this.
        at_least: numbers must not be smaller than this.
        at_most: numbers must not be greater than this.
        multiple_of: numbers must be divisible by this.
        resumable: may differ from the checkpoint's when a run is resumed.
        bare: the value when the flag stands without one (`--resume` is `--resume auto`).
        aliases: other spellings of the flag.
        positional: given by its place, without a flag; of type `str` one word, of type
            `tuple[str, ...]` several, at least one if it is `REQUIRED`.
    """
    metadata = {
        "help": help,
        "short": short,
        "choices": choices,
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
        "multiple_of": multiple_of,
        "resumable": resumable,
        "bare": bare,
        "aliases": aliases,
        "positional": positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    config_class: type,
    argv: Sequence[str] | None = None,
    *,
    switches: Mapping[str, str] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Read the flags that a command line gives, exiting with code 2 on a bad one.

    Args:
        config_class: a frozen dataclass whose fields are `option`s.
        argv: the words after the script's name; `sys.argv[1:]` when None.
        switches: flags that are no options of a run, with their help; a given one is True.
        about: passed to `argparse.ArgumentParser` (description, epilog).

    Returns:
        The given fields alone: `config_class(**given)` fills in the defaults, and a resumed run
        lays them over its saved config.
    """
    parser = _Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, **about)
    for field, kind in _fields(config_class):
        _add(parser, field, kind)
    for name, text in (switches or {}).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, action="store_true", dest=name, help=text)
    words = list(map(_hyphens, sys.argv[1:] if argv is None else argv))
    given = vars(parser.parse_intermixed_args(words))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        names = {field.name for field, _ in _fields(config_class)}
        validate(config_class(**{name: given[name] for name in names & set(given)}))
    except UserError as error:
        parser.error(str(error))
    return given


class _Parser(argparse.ArgumentParser):
    """Ends in one line, as all our errors do, and guesses which flag was meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"{unknown[1]} is no option"
            known = [flag for action in self._actions for flag in action.option_strings]
            if near := difflib.get_close_matches(unknown[1], known, n=1):
                message += f"; did you mean {near[0]}?"
        self.exit(2, visible(f"error: {message}; see python {self.prog} --help\n"))


def validate(config: Any) -> None:
    """Check every value against its bounds and its choices.

    Raises:
        UserError: names the flag, the value and what is allowed.
    """
    for field in dataclasses.fields(config):
        value, rule, flag = getattr(config, field.name), field.metadata, _flag(field)
        if value is None:
            continue
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{flag} {value}: choose one of {', '.join(rule['choices'])}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"{flag} {value}: give a finite number")
        if rule["above"] is not None and value <= rule["above"]:
            raise UserError(f"{flag} {value}: give a number above {rule['above']}")
        if rule["at_least"] is not None and value < rule["at_least"]:
            raise UserError(f"{flag} {value}: give a number of at least {rule['at_least']}")
        if rule["at_most"] is not None and value > rule["at_most"]:
            raise UserError(f"{flag} {value}: give a number of at most {rule['at_most']}")
        if rule["multiple_of"] is not None and value % rule["multiple_of"]:
            raise UserError(f"{flag} {value}: give a multiple of {rule['multiple_of']}")


def differences(saved: Any, current: Any) -> list[str]:
    """Name the options that may not change on resuming, yet do: "--crop-size: 256, now 128"."""
    return [
        f"{_flag(f)}: {_text(getattr(saved, f.name))}, now {_text(getattr(current, f.name))}"
        for f in dataclasses.fields(saved)
        if not f.metadata["resumable"] and getattr(saved, f.name) != getattr(current, f.name)
    ]


def from_dict(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Turn `as_dict`'s result back into a config, checking names, types and bounds.

    Raises:
        UserError: an unknown name, a wrong type or a value out of bounds.
    """
    hints = typing.get_type_hints(config_class)
    kinds = {f.name: kind for f, kind in _fields(config_class)}
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


def _fields(config_class: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(config_class)
    return [(f, _required_type(hints[f.name])) for f in dataclasses.fields(config_class)]


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


def _flag(field: dataclasses.Field) -> str:
    name = field.name.replace("_", "-")
    return name if field.metadata["positional"] else f"--{name}"


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    rule = field.metadata
    has_default = field.default not in (None, REQUIRED, ())
    shown = f" (default: {_text(field.default)})" if has_default else ""
    words: dict[str, Any] = {"help": (rule["help"] + shown).replace("%", "%%")}
    if rule["positional"]:
        _add_positional(parser, field, kind, words)
        return
    words["dest"] = field.name
    flags = [_flag(field), *rule["aliases"]]
    if kind is bool:
        words["action"] = argparse.BooleanOptionalAction
        parser.add_argument(_flag(field), **words)
        return
    if rule["short"]:
        flags.insert(0, rule["short"])
    if rule["choices"]:
        words["choices"] = rule["choices"]
    if rule["bare"]:
        words |= {"nargs": "?", "const": rule["bare"]}
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        words |= {"type": _tuple_of(element), "metavar": "N,N" if element is int else "X,X"}
    else:
        words |= {"type": kind}
        if not rule["choices"]:
            words["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    parser.add_argument(*flags, **words)


def _add_positional(
    parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, words: dict[str, Any]
) -> None:
    if field.metadata["choices"]:
        words["choices"] = field.metadata["choices"]
    is_required = field.default is REQUIRED
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        words["nargs"] = "+" if is_required else "*"
    elif not is_required:
        words["nargs"] = "?"
    parser.add_argument(field.name, type=kind, metavar=_flag(field), **words)


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


def _tuple_of(element: type) -> Callable[[str], tuple[Any, ...]]:
    """'0,128,255' -> (0, 128, 255)."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(element(word) for word in text.split(","))
        except ValueError:
            kind = "whole numbers, such as 0,255" if element is int else "numbers, such as 0,0.5"
            raise argparse.ArgumentTypeError(f"{text!r}: give {kind}") from None

    return read
