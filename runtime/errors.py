"""What a user can get wrong, and how a script ends: one clear line and an exit code.

0    done
1    an unexpected error: our fault, with its traceback
2    UserError: usage, configuration, data, checkpoint
3    DivergedError: the loss or the weights are no longer finite
129  SIGHUP, the terminal was closed;  130  Ctrl-C;  143  SIGTERM: a training run in progress was
     saved before
"""

import errno
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from urllib.parse import parse_qsl, urlsplit

STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a write does not say of which file


class UserError(Exception):
    """Something the user can mend. The message names the value, the file and the remedy."""

    exit_code = 2


class DataFault(UserError):
    """A file went or changed while a run was using it, or a process that reads them died.

    It is raised where a batch is asked for, so the state of a run is whole and can be saved.
    """


class DivergedError(UserError):
    """Training left the finite numbers; the last good checkpoint is kept."""

    exit_code = 3


class Interrupted(Exception):
    """A signal asked a script to end, and nothing is lost.

    Args:
        message: what was saved, and of training the command that resumes.
        signal_number: 2 for Ctrl-C, 15 for SIGTERM, 1 for SIGHUP.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """Notes Ctrl-C, SIGTERM and SIGHUP, so that a run can end where its state is whole.

    The first signal only sets `signal_number`. A second one more than two seconds later leaves at
    once: torchrun and the terminal both deliver the first, so an echo must not count.

    Args:
        is_silent: says nothing when the first arrives, for all but one of several processes.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        self.signal_number = 0
        self.is_silent = is_silent
        self._first = math.inf
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOPPING:
            is_hangup = number not in (signal.SIGINT, signal.SIGTERM)
            if not (is_hangup and signal.getsignal(number) is signal.SIG_IGN):  # nohup wants so
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number = number  # before any call: in one the echo may come in
            self._first = time.monotonic()
            if not self.is_silent:
                line = "\nstopping after this step; again to leave at once"
                print(line, file=sys.stderr, flush=True)
        elif time.monotonic() - self._first > 2:
            raise KeyboardInterrupt


def counted(number: int, noun: str) -> str:
    """Return "1 pair" or "3 pairs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def visible(text: str) -> str:
    """Escape what a terminal would obey: messages repeat names and values of foreign files."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def run_script(script: Callable[[], object], may_speak: Callable[[], bool] = lambda: True) -> int:
    """Run a script's body and turn its end into an exit code, without a traceback for users.

    Args:
        script: the body.
        may_speak: asked before saying why the script ended early; see `distributed.run`.
    """

    def end(why: object, code: int) -> int:
        if may_speak():
            print(why, file=sys.stderr, flush=True)
        return code

    signal.signal(signal.SIGINT, signal.default_int_handler)  # `start` has set another
    try:
        script()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except UserError as error:
        return end(f"error: {visible(str(error))}", error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return end(f"error: {visible(where)}{error.strerror}", 2)
    except MemoryError as error:
        why = visible(str(error).splitlines()[0]) if str(error) else "there is no memory left"
        return end(f"error: {why}; close other programs, or give less at once", 2)
    except Interrupted as stop:
        return end(stop, stop.exit_code)
    except KeyboardInterrupt:
        return end("interrupted", 130)
    if lost := getattr(sys.stdout, "lost", None):
        return end(f"error: standard output lacks what was printed last ({lost.strerror})", 2)
    return 0


def without_secrets(text: str) -> str:
    """Drop user:password@, query and fragment from every URI in a text."""
    text = re.sub(r"(\w[\w+.-]*://)[^/\s]*@", r"\1", text)
    for secret in _secrets_of_environment():  # libraries take an address apart in their messages
        text = text.replace(secret, "***")
    return re.sub(r"(\w[\w+.-]*://[^\s?#]*)[?#]\S*", r"\1", text)


def _secrets_of_environment() -> list[str]:
    """Return what must not be repeated of how to reach MLflow, the longest first."""
    environment = os.environ
    found = [environment.get(f"MLFLOW_TRACKING_{name}") for name in ("TOKEN", "PASSWORD")]
    with suppress(ValueError):  # what is no address at all
        address = urlsplit(environment.get("MLFLOW_TRACKING_URI", ""))
        found += [address.username, address.password, address.query, address.fragment]
        found += [value for _, value in parse_qsl(address.query)]
    # shorter ones would cut words apart, and protect nothing
    return sorted({text for text in found if text and len(text) > 3}, key=len, reverse=True)
