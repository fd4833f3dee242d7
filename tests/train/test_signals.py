"""Promise 5 of the reliability design, as far as it is the handler's: real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from protomamba.train import signals
from protomamba.train.signals import STOPPED_EXIT_CODE, StopRequest

LOOP = """
import sys
from protomamba.train.signals import STOPPED_EXIT_CODE, StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        pass
    print("saving", flush=True)
    if sys.argv[1] == "slow":
        sum(range(10**12))  # deep in C: Python gets no chance to run a handler
    print("saved", flush=True)
sys.exit(STOPPED_EXIT_CODE)
"""


def hang_up(mode: str, ignored: bool) -> tuple[str, int]:
    """What a loop said that was sent SIGHUP twice, and how it ended."""
    setting = signal.SIG_IGN if ignored else signal.SIG_DFL
    command = [sys.executable, "-c", LOOP, mode]
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGHUP, setting)
    try:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        if ignored:
            process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGHUP)
        if mode == "slow":
            time.sleep(0.2)
            assert process.poll() is None, "a second SIGHUP, of the shell, is no wish for haste"
            process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    return said, process.returncode


def test_a_terminal_that_goes_away_saves_and_its_second_signal_changes_nothing() -> None:
    said, code = hang_up("quick", ignored=False)
    assert "SIGHUP: finishing this step and saving" in said and code == STOPPED_EXIT_CODE
    said, code = hang_up("slow", ignored=False)
    assert "SIGHUP: finishing this step and saving" in said and code == -signal.SIGTERM


def test_under_nohup_it_changes_nothing_at_all() -> None:
    said, code = hang_up("quick", ignored=True)
    assert "SIGHUP" not in said and "SIGTERM: finishing" in said and code == STOPPED_EXIT_CODE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_one_signal_stops_in_order_and_a_second_at_once(number: signal.Signals) -> None:
    for mode in ("quick", "slow"):
        command = [sys.executable, "-c", LOOP, mode]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline() == "saving\n"
            if mode == "slow":
                process.send_signal(number)
            out, err = process.stdout.read(), process.stderr.read()
        assert f"{number.name}: finishing this step and saving" in err
        if mode == "quick":
            assert (out, process.returncode) == ("saved\n", STOPPED_EXIT_CODE)
        else:
            assert (out, process.returncode) == ("", -number)


def test_the_former_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopRequest() as stop:
        assert not stop.requested and stop.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.signal is signal.SIGTERM
    assert {number: signal.getsignal(number) for number in former} == former
    assert capfd.readouterr().err.startswith("\nSIGTERM: ")


def test_an_echo_of_the_first_signal_is_not_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signals.time, "sleep", echo)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL] * 2


def test_a_closed_stderr_is_no_obstacle() -> None:
    code = "import os, signal\nfrom protomamba.train.signals import StopRequest\nos.close(2)\n"
    code += (
        "with StopRequest() as stop:\n    signal.raise_signal(signal.SIGINT)\n    os._exit(7 if stop.requested else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


def test_in_another_thread_only_request_stops() -> None:
    seen = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)
            stop.request()
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False, True] and signal.getsignal(signal.SIGTERM) is before
