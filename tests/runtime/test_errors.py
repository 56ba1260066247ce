import os
import signal

import pytest

from runtime.errors import DivergedError, Interrupted, StopRequest, UserError, run_script


def fail(error: BaseException) -> int:
    def script() -> None:
        raise error

    return run_script(script)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.png: too big"), 2, "error: x.png: too big\n"),
        (UserError("\x1b[2Jx\ud800\r: gone\nü"), 2, "error: \\x1b[2Jx\\ud800\\r: gone\nü\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (DivergedError("loss"), 3, "error: loss\n"),
        (Interrupted("saved", signal.SIGINT), 130, "saved\n"),
        (Interrupted("saved", signal.SIGTERM), 143, "saved\n"),
        (Interrupted("saved", signal.SIGHUP), 129, "saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture
) -> None:
    assert fail(error) == code
    assert capsys.readouterr().err == line


def test_success_is_0_and_our_own_faults_keep_their_traceback() -> None:
    assert run_script(lambda: 5) == 0
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


@pytest.mark.fault("R3", "R27")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_noted_and_its_echo_ignored(
    number: signal.Signals, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("stopping after this step") == 1


@pytest.mark.fault("R3")
def test_an_echo_within_the_handler_is_an_echo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    echoes = [signal.SIGINT]

    def look_at_the_clock() -> float:
        if echoes:
            os.kill(os.getpid(), echoes.pop())
        return 10.0

    monkeypatch.setattr("runtime.errors.time.monotonic", look_at_the_clock)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT and not echoes
    assert capsys.readouterr().err.count("stopping after this step") == 1


@pytest.mark.fault("R27")
def test_a_run_under_nohup_does_not_hear_the_terminal_close() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault("R3")
def test_second_signal_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("runtime.errors.time.monotonic", lambda: now[0])
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 2.5
        os.kill(os.getpid(), signal.SIGINT)
