"""The folder of a run: its names, its lock, and which checkpoints are in it.

    config.json               the resolved configuration
    latest.safetensors        the newest checkpoint
    step-00000200.safetensors the `keep_last` checkpoints before it
    best.safetensors          the one with the best validation loss
    run_state.json            a mirror for people; the checkpoint is the truth
    metrics.jsonl             see `metrics`
    lock                      see `run_lock`

Each checkpoint notes the step and the id of its run. Only files that carry this run's id are ever deleted, and the
numbered ones are always older than `latest`: a run that resumes from an earlier step abandons what came after it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import Checkpoint, CheckpointError, SaveError, SaveReport
from protomamba.checkpoint.lock import RunLock
from protomamba.errors import UserError
from protomamba.storage import (
    DISK,
    Disk,
    PathText,
    commit_link,
    make_folder,
    remove_stale_temporaries,
    write_json,
)

__all__ = ["Resumable", "RunDir", "RunLock", "find_resumable", "make_folder"]

LATEST = "latest.safetensors"
BEST = "best.safetensors"
_NUMBERED = re.compile(r"step-(\d{8,})\.safetensors")
# Written whole beside the checkpoints, by this module and by the callback of the report.
_OTHER_FILES = ("config.json", "run_state.json", "report.html")


def _is_ours(name: str) -> bool:
    return name in (LATEST, BEST, *_OTHER_FILES) or _NUMBERED.fullmatch(name) is not None


class RunDir:
    """The checkpoints of one run. Make it while holding the folder's `RunLock`; it removes what killed saves left."""

    def __init__(self, folder: str | os.PathLike[str], keep_last: int = 1, disk: Disk = DISK) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.run_id = secrets.token_hex(8)
        self._disk = disk
        # The step of `latest`, once this process has written it or read it whole.
        self._latest_step: int | None = None
        make_folder(self.folder)
        remove_stale_temporaries(self.folder, _is_ours)

    @property
    def latest(self) -> Path:
        return self.folder / LATEST

    @property
    def best(self) -> Path:
        return self.folder / BEST

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def refuse_if_occupied(self) -> None:
        """For a run that starts fresh: UserError if another run's checkpoints would be overwritten."""
        found = sorted(_checkpoints(self.folder))
        if found:
            raise UserError(
                f"{self.folder}: already contains a run ({found[0].name}): resume with --resume auto,"
                " or choose another --out-dir"
            )

    def adopt(self, source: Path, resumed: Checkpoint) -> int:
        """Go on with the run of a checkpoint of this folder; one from elsewhere starts a run of its own here.

        Returns the newest step that the folder holds of the run.
        """
        if source.resolve().parent == self.folder.resolve() and "run_id" in resumed.info:
            self.run_id = resumed.info["run_id"]
            if source.name == LATEST:
                self._latest_step = resumed.info["step"]
        infos = (_info_or_none(path) or {} for path in _checkpoints(self.folder))
        return max((info["step"] for info in infos if info.get("run_id") == self.run_id), default=0)

    def save(
        self,
        parts: Mapping[str, Mapping[Any, Any]],
        *,
        config: Mapping[str, Any],
        step: int,
        latest: bool = True,
        best: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> SaveReport:
        """Save as `latest`, as `best` or, written once, as both; the former `latest` becomes a numbered checkpoint.

        `save_ms` of the report is the time of all of it. Raises SaveError as `checkpoint.save`; whatever fails, the
        newest whole checkpoint stays reachable.
        """
        started = time.perf_counter()
        note = {**(info or {}), "step": step, "run_id": self.run_id}
        if not latest:
            return checkpoint.save(self.best, parts, config=config, info=note, disk=self._disk)
        self._keep_latest(before=step)
        self._latest_step = None
        report = checkpoint.save(self.latest, parts, config=config, info=note, disk=self._disk)
        self._latest_step = step
        if best:
            self.keep_as_best(self.latest)
        self._prune(before=step)
        return replace(report, save_ms=(time.perf_counter() - started) * 1e3)

    def keep_as_best(self, source: Path) -> None:
        """Make `best` the checkpoint `source`; nothing happens where it is already. SaveError as for a checkpoint."""
        commit_link(source, self.best, self._disk)

    def holds_best(self, step: int) -> bool:
        """Whether `best` is this run's checkpoint of that step."""
        info = _info_or_none(self.best)
        return info is not None and (info.get("run_id"), info.get("step")) == (self.run_id, step)

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_json(self.folder / "config.json", config, self._disk)

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write run_state.json; `state` must be finite (JSON has no NaN)."""
        write_json(self.folder / "run_state.json", {"run_id": self.run_id, **state}, self._disk)

    def require_space(self, checkpoint_bytes: int) -> None:
        """UserError unless the run's checkpoints fit: `keep_last` older ones, latest, best, and one being written."""
        needed = (self.keep_last + 3) * checkpoint_bytes
        present = {(s.st_dev, s.st_ino): s.st_size for s in map(Path.stat, _checkpoints(self.folder))}
        missing = needed - sum(present.values())
        try:
            free = self._disk.free_bytes(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot determine its free space: {error.strerror}") from error
        if free < missing:
            raise UserError(
                f"{self.folder}: the run's checkpoints need {missing:,} bytes ({self.keep_last} kept + latest + best"
                f" + one being written, {checkpoint_bytes:,} each), {free:,} are free: make room, or lower --keep-last"
            )

    def _keep_latest(self, before: int) -> None:
        """Give `latest` its numbered name as well, if it is whole, of this run and older than the step to be saved."""
        if self.keep_last == 0 or not self.latest.exists():
            return
        if self._latest_step is None:
            try:
                info = checkpoint.load(self.latest).info
            except CheckpointError:
                return
            if info.get("run_id") != self.run_id:
                return
            self._latest_step = info["step"]
        if self._latest_step < before:
            commit_link(self.latest, os.path.join(self.folder, numbered_name(self._latest_step)), self._disk)

    def _prune(self, before: int) -> None:
        numbers = {name: number for name in os.listdir(self.folder) if (number := _number(name)) is not None}
        mine = sorted(filter(self._is_mine, numbers), key=numbers.__getitem__)
        older = [name for name in mine if numbers[name] < before]
        kept = set(older[max(0, len(older) - self.keep_last) :])
        for name in mine:
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self._disk.unlink(os.path.join(self.folder, name))
        except OSError as error:
            raise SaveError(f"{self.latest}: saved, but {name} could not be removed: {error.strerror}") from error

    def _is_mine(self, name: str) -> bool:
        info = _info_or_none(os.path.join(self.folder, name))
        return info is not None and info.get("run_id") == self.run_id


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".safetensors" and _is_ours(path.name)]


def numbered_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _number(name: str) -> int | None:
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Resumable:
    """A whole checkpoint to go on from; `warnings` says, one line each, what was passed over to get to it."""

    path: Path
    checkpoint: Checkpoint
    warnings: list[str] = field(default_factory=list)


def find_resumable(folder: str | os.PathLike[str]) -> Resumable | None:
    """The newest whole checkpoint of the run in `folder`; None if there is none at all.

    `latest` comes first; if it is damaged or gone, the other checkpoints of the same run follow by falling step. If
    there are checkpoints and none is whole, CheckpointError: a fresh start would bury them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    candidates = _candidates(folder)
    warnings: list[str] = []
    if candidates and candidates[0].name != LATEST:
        warnings.append(f"{folder / LATEST}: missing")
    for path in candidates:
        try:
            found = checkpoint.load(path)
        except CheckpointError as error:
            warnings.append(str(error))
            continue
        if warnings:
            warnings.append(f"resuming from {path} (step {found.info.get('step', 'unknown')})")
        return Resumable(path, found, warnings)
    if warnings:
        raise CheckpointError(
            folder,
            "run",
            "no checkpoint is intact: " + "; ".join(warnings) + "; to start over, choose another --out-dir",
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    infos = {path: _info_or_none(path) for path in _checkpoints(folder)}
    run_id = (infos.get(folder / LATEST) or _run_state(folder)).get("run_id")

    def rank(path: Path) -> tuple[bool, int]:
        info = infos[path] or {}
        return path.name == LATEST, info.get("step", _number(path.name) or 0)

    # A damaged header tells no run id: the file stays in the list, so that it is reported.
    wanted = [path for path, info in infos.items() if not (info and run_id and info.get("run_id") != run_id)]
    return sorted(wanted, key=rank, reverse=True)


def _info_or_none(path: PathText) -> dict[str, Any] | None:
    try:
        return checkpoint.read_info(path)
    except CheckpointError:
        return None


def _run_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "run_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
