"""Promise 7: a file that shrinks, changes or disappears during training, and files spoilt at random: one line each."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main
from tests.marks import slow
from tests.reliability.forked import ForkServer
from tests.reliability.judge import acknowledged
from tests.reliability.promises import Trials
from tests.runs import TINY, flags, token_file

CHANGES: dict[str, Callable[[Path], object]] = {
    "shrinks": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "disappears": lambda path: path.unlink(),
    "changes": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x01\x00"),
    "becomes a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bin", "npy"])
def test_a_file_that_changes_during_training(
    kind: str, change: str, workers: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted = trials(7)
    tokens = np.arange(5000, dtype=np.uint16) % 13
    path = tmp_path / f"tokens.{kind}"
    np.save(path, tokens) if kind == "npy" else path.write_bytes(tokens.tobytes())
    out = tmp_path / "run"
    run = [*flags(out, path), "--steps", 10**6, "--save-every", 1, "--prefetch-workers", workers]
    child = server.start(run)
    child.wait_until("\nstep ")
    CHANGES[change](path)
    ended = child.wait()
    said = [line for line in ended.output.splitlines() if line.startswith("protomamba: ")]
    problem = (
        None if ended.code == 1 and len(said) == 1 and path.name in said[0] else f"{ended.code}: {ended.output[-300:]}"
    )
    whole = checkpoint.load(out / "latest.safetensors").info["step"] >= acknowledged(out)
    counted.add(problem or (None if whole else "the checkpoint is older than the last line"))
    counted.finish()


def spoil(data: bytes, rng: random.Random) -> bytes:
    """A few random bytes somewhere, a piece cut out, or a piece put in."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([0, 1, 5, 100]))
    return data[:start] + rng.randbytes(rng.choice([0, 1, 3])) + data[stop:]


@pytest.mark.parametrize("count", [30, slow(600)])
def test_files_spoilt_at_random_train_or_are_refused_in_one_line(
    count: int, tmp_path: Path, trials: Callable[[int], Trials], capsys: pytest.CaptureFixture[str]
) -> None:
    counted, rng = trials(7), random.Random(count)
    text = token_file(tmp_path, count=300).read_bytes()
    np.save(tmp_path / "whole.npy", np.arange(300, dtype=np.int32) % 13)
    wholes = {
        "txt": text,
        "npy": (tmp_path / "whole.npy").read_bytes(),
        "bin": (np.arange(300) % 13).astype("<u2").tobytes(),
    }
    for number in range(count):
        kind = rng.choice(sorted(wholes))
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(spoil(wholes[kind], rng))
        arguments = [
            *TINY,
            "--out-dir",
            str(tmp_path / "runs" / str(number)),
            "--token-file",
            str(path),
            "--steps",
            "1",
        ]
        code = main(["train", *arguments, "--vocab-size", "64"])
        said = capsys.readouterr().err
        good = code == 0 or (code == 1 and said.count("\n") == 1 and path.name in said)
        counted.add(None if good else f"{path.name} ({path.read_bytes()[:60]!r}): exit {code}: {said}")
    counted.finish()


def test_a_stopped_run_goes_on_when_it_is_continued(
    server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """SIGSTOP and SIGCONT, as a job shell sends them, workers included (promise 8)."""
    counted, tokens = trials(8), token_file(tmp_path)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        child = server.start(flags(out, tokens, "--steps", 60, "--prefetch-workers", workers))
        child.wait_until("\nstep ")
        child.send(signal.SIGSTOP)
        child.send(signal.SIGCONT)
        counted.add(None if child.wait().code == 0 else child.said()[-300:])
    counted.finish()
