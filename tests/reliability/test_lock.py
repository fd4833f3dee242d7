"""Promise 9: the second run in a folder is refused by name, and a lock that a killed run left is taken over."""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.marks import slow
from tests.reliability.forked import ForkServer
from tests.reliability.judge import difference
from tests.reliability.promises import Trials
from tests.runs import flags, token_file


@pytest.mark.parametrize("count", [2, slow(100)])
def test_two_runs_in_one_folder(
    count: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, rng, tokens = trials(9), random.Random(count), token_file(tmp_path)
    assert server.run(flags(tmp_path / "uncut", tokens, "--steps", 30)).code == 0
    for number in range(count):
        run = [*flags(tmp_path / str(number), tokens, "--steps", 30, "--resume", "auto"), "--save-every", 1]
        first = server.start(run)
        first.wait_until("protomamba  ")
        first.send(signal.SIGSTOP)  # held, so that it is surely there while the others try
        refused = [server.run(run), server.run([*run, "--resume", tmp_path / "uncut" / "latest.safetensors"])]
        problem = None
        for ended in refused:
            if ended.code != 1 or f"pid {first.pid} on host {socket.gethostname()}" not in ended.output:
                problem = f"exit {ended.code}: {ended.output[-300:]}"
        kill = rng.random() < 0.7
        first.send(signal.SIGKILL if kill else signal.SIGCONT)
        if first.wait().code != (-signal.SIGKILL if kill else 0):
            problem = problem or f"the first run: {first.said()[-300:]}"
        again = server.run(run)
        problem = problem or (
            again.output[-300:] if again.code else difference(tmp_path / "uncut", tmp_path / str(number))
        )
        counted.add(problem)
    counted.finish()
