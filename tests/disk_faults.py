"""Disks that fail or kill the process at a chosen call, and a small real training loop to try them on.

Run as a program it is the kill test: it forks one training run for each (call, before or after), each of which kills
itself with SIGKILL there, then looks at what is left, resumes it and prints what it found as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from protomamba.checkpoint.folder import RunDir, RunLock, find_resumable
from protomamba.metrics_file import read_metrics
from protomamba.storage import Disk, SaveError
from protomamba.train.callbacks.metrics import MetricsLog

STEPS = 3


class CountingDisk(Disk):
    """Passes every call on and lists its name in `calls`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        return call()


def _counted(name: str) -> Callable[..., Any]:
    def method(self: CountingDisk, *args: Any) -> Any:
        self.calls.append(name)
        return self.around(name, lambda: getattr(Disk, name)(self, *args))

    return method


for _name in ("free_bytes", "open", "write", "fsync", "close", "replace", "fsync_dir", "link", "unlink"):
    setattr(CountingDisk, _name, _counted(_name))


class FailingDisk(CountingDisk):
    """The n-th call (from 0) fails with `code`; with `forever` every later one does too."""

    def __init__(self, n: int, code: int, forever: bool = False) -> None:
        super().__init__()
        self.n, self.code, self.forever = n, code, forever

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        index = len(self.calls) - 1
        if index != self.n and not (self.forever and index > self.n):
            return call()
        if name == "close":  # a close that reports an error has closed the file all the same
            call()
        raise OSError(self.code, os.strerror(self.code))


class ShortDisk(CountingDisk):
    """Every write passes at most `most` bytes on."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def write(self, fd: int, data: memoryview) -> int:
        self.calls.append("write")
        return os.write(fd, data[: self.most])


class KillingDisk(CountingDisk):
    """SIGKILL to this very process before or after the n-th call."""

    def __init__(self, n: int, after: bool) -> None:
        super().__init__()
        self.n, self.after = n, after

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        due = len(self.calls) - 1 == self.n
        if due and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class TinyRun:
    """Three steps of AdamW on a linear layer, saved after each, resumed from whatever its folder holds."""

    def __init__(self, folder: Path, disk: Disk | None = None, keep_last: int = 1) -> None:
        self.folder, self.disk = folder, disk or Disk()
        self.keep_last = keep_last
        self.errors: list[SaveError] = []

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"state": self.generator.get_state()},
            "trainer": {"step": self.step},
        }

    def run(self) -> torch.Tensor:
        """Train to STEPS and return the weights; save errors are collected, as `--on-save-error continue` would."""
        self._start()
        with RunLock(self.folder):
            found = find_resumable(self.folder)
            run_dir = RunDir(self.folder, self.keep_last, self.disk)
            if found:
                self._load(found.checkpoint.parts)
                run_dir.adopt(found.path, found.checkpoint)
            resumed_step = self.step if found else None
            with MetricsLog(run_dir.metrics, resumed_step=resumed_step, disk=self.disk) as log:
                log.log("run", resumed_from=str(found.path) if found else None)
                while self.step < STEPS:
                    log.log("train", step=self.step + 1, loss=self._train_step())
                    self._save(run_dir, log)
        return self.model.weight.detach().clone()

    def _start(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.model = torch.nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.generator))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step = 0

    def _load(self, parts: dict[str, Any]) -> None:
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.generator.set_state(parts["rng"]["state"])
        self.step = parts["trainer"]["step"]

    def _train_step(self) -> float:
        loss = self.model(torch.randn(4, 5, generator=self.generator)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _save(self, run_dir: RunDir, log: MetricsLog) -> None:
        try:
            log.sync()
            report = run_dir.save(self.parts(), config={"lr": 0.1}, step=self.step, best=self.step == 2)
            run_dir.write_state({"step": self.step})
            log.log("checkpoint", step=self.step, path=str(report.path), bytes=report.bytes, save_ms=report.save_ms)
        except SaveError as error:
            self.errors.append(error)


def acknowledged_step(folder: Path) -> int:
    """The last step whose save the run has acknowledged in metrics.jsonl; 0 if none."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((e["step"] for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "checkpoint"), default=0)


def what_is_wrong(folder: Path, uncut: torch.Tensor, acknowledged: int) -> str | None:
    """None if the folder holds all acknowledged steps and a run resumed in it ends bit-identical to the uncut one."""
    found = find_resumable(folder)
    step = found.checkpoint.parts["trainer"]["step"] if found else 0
    if found and found.warnings:
        return f"damage: {found.warnings}"
    if step < acknowledged:
        return f"step {acknowledged} was acknowledged, the newest checkpoint is of step {step}"
    if not torch.equal(TinyRun(folder).run(), uncut):
        return f"resumed from step {step}: weights differ from those of the uncut run"
    steps = [event["step"] for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "train"]
    if steps != list(range(1, STEPS + 1)):
        return f"train lines of steps {steps}"
    left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
    return f"left behind: {left}" if left else None


def _killed_run(folder: Path, n: int, after: bool) -> bool:
    """Fork a run that kills itself at call n; whether it died of that."""
    child = os.fork()
    if child == 0:
        TinyRun(folder, KillingDisk(n, after)).run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at_each_call(stride: int) -> dict[str, Any]:
    """Kill a run before and after every `stride`-th call of its disk."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        counting = CountingDisk()
        uncut = TinyRun(_made(Path(home, "uncut")), counting).run()
        failures, trials = [], 0
        for n in range(0, len(counting.calls), stride):
            for after in (False, True):
                folder = _made(Path(home, f"{n}-{after}"))
                trials += 1
                problem = None if _killed_run(folder, n, after) else "was not killed"
                problem = problem or what_is_wrong(folder, uncut, acknowledged_step(folder))
                if problem:
                    failures.append(f"call {n} ({counting.calls[n]}), after={after}: {problem}")
    return {"calls": len(counting.calls), "trials": trials, "failures": failures}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}

if __name__ == "__main__":
    print(json.dumps(kill_at_each_call(int(sys.argv[1]))))
