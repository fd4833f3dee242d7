"""Memory that runs out: one line with needed and allowed bytes, exit 1, and the last checkpoint as it was."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from protomamba.checkpoint import file as checkpoint
from protomamba.kernels import native
from protomamba.memory import Limit, out_of_memory
from protomamba.train.callbacks import memory
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.promises import Trials
from tests.runs import flags, token_file, train


@pytest.mark.parametrize("where", ["step", "save", "worker", "kernel"])
def test_a_limit_reached_is_told_with_bytes(
    where: str, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    if where == "kernel" and not native.available()[0]:
        pytest.skip("needs native kernels")
    counted = trials(14)
    run = [*flags(tmp_path / "run", token_file(tmp_path), "--steps", 9, "--save-every", 1), "--prefetch-workers", 1]
    ended = server.run(run, Plan(starve=where))
    told = re.search(r"^protomamba: out of memory: .*", ended.output, re.MULTILINE)
    assert ended.code == 1 and told, ended.output[-500:]
    assert re.search(
        r"holds [\d,]+ of [\d,]+ bytes, which the limit of the address space \(ulimit -v\) allows", told[0]
    )
    assert where == "save" or re.search(
        r"(1,073,741,824 bytes|1\.00 GiB|134,217,7\d\d bytes) more were needed", told[0]
    )
    assert "Traceback" not in ended.output
    checkpoint.verify(tmp_path / "run" / "latest.safetensors")
    assert server.run([*run, "--resume", "auto"]).code == 0
    counted.add(None)
    counted.finish()


def test_after_a_kill_the_next_start_says_so(
    server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted = trials(14)
    run = flags(tmp_path / "run", token_file(tmp_path), "--steps", 6, "--save-every", 1)
    assert server.run(run, Plan(at_batch=3, signal=signal.SIGKILL)).code == -signal.SIGKILL
    told = "the last run here (pid "
    again = server.run([*run, "--resume", "auto"])
    assert again.code == 0 and told in again.output and "ended without a final record" in again.output, again.output
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(told in event.get("text", "") for event in events if event["event"] == "warning")
    assert told not in server.run([*run, "--resume", "auto", "--steps", "1"]).output
    counted.add(None)
    counted.finish()


@pytest.mark.parametrize(("allowed", "kind"), [(10**13, "note:"), (10**4, "may be killed without warning")])
def test_what_is_needed_is_held_against_the_limit(
    allowed: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: Limit(allowed, "the control group (memory.max)", 5))
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 2) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"and the control group (memory.max) allows {allowed:,}" in said and kind in said
    assert ("step 1 took the process to" in said) == (allowed == 10**4)


def test_other_errors_are_none_of_memory() -> None:
    assert out_of_memory(RuntimeError("shapes do not fit")) is None and out_of_memory(OSError(5, "x")) is None
    assert "an unknown number of bytes more" in str(out_of_memory(MemoryError()))
    assert "bytes free" in str(out_of_memory(OSError(12, "Cannot allocate memory")))
