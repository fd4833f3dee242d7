"""Where a run starts: at step 0 in an empty folder, or at the checkpoint it resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from protomamba import __version__
from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import Checkpoint
from protomamba.checkpoint.folder import Resumable, find_resumable
from protomamba.errors import UserError

if TYPE_CHECKING:
    from protomamba.train.run import Run


class Start:
    """What was asked for: a checkpoint to resume from, "auto" or nothing, and how many steps to train beyond it."""

    def __init__(self, resume: str | Path | Resumable | None, further_steps: int | None) -> None:
        self.resume, self.further_steps = resume, further_steps

    def begin(self, run: Run) -> list[str]:
        """Resume, or make sure that no other run is overwritten; notes for the user."""
        found, folder = self._find(run), run.folder
        if folder is not None and (found is None or found.path.resolve().parent != folder.folder.resolve()):
            folder.refuse_if_occupied()
        return self._restore(run, found) if found else []

    def _find(self, run: Run) -> Resumable | None:
        """The checkpoint to resume from: on every rank the one that rank 0 finds."""
        if self.resume is None or isinstance(self.resume, Resumable):
            return self.resume
        leads = run.comm.rank == 0
        found = self._look_up(run, self.resume) if leads else None
        path = run.comm.all_gather_object(str(found.path) if found else None)[0]
        return found if leads or path is None else Resumable(Path(path), checkpoint.load(path))

    def _look_up(self, run: Run, resume: str | Path) -> Resumable | None:
        if resume == "auto":
            if run.folder is None:
                raise ValueError('resume="auto" needs a folder')
            return find_resumable(run.folder.folder)
        return Resumable(Path(resume), checkpoint.load(resume))

    def _restore(self, run: Run, found: Resumable) -> list[str]:
        loaded, trainer = found.checkpoint, run.trainer
        notes = [*found.warnings, *version_notes(loaded)]
        if "stream" not in loaded.parts:
            raise UserError(f"{found.path}: contains no run to resume, only weights and optimizer state")
        trainer.restore(loaded)
        run.stream.load_state_dict(loaded.part("stream"))
        notes += run.callbacks.load_state(loaded.parts.get("callbacks", {}))
        run.resumed_from = found.path
        if self.further_steps is not None:
            trainer.further(self.further_steps)
            notes.append(
                f"warm-up and decay restart over these {self.further_steps:,} further steps; "
                "leave out --steps to continue to the run's own target"
            )
        if trainer.global_step == trainer.schedule_start:
            run.best.stale_validations = 0  # further steps have patience of their own
        return notes + _adopted(run, found)


def _adopted(run: Run, found: Resumable) -> list[str]:
    """Continue in the run's own folder; notes on what is given up where an older checkpoint was chosen."""
    if run.folder is None:
        return []
    step, newest = run.trainer.global_step, run.folder.adopt(found.path, found.checkpoint)
    if run.best.best_step == step:
        run.folder.keep_as_best(found.path)  # a kill between the two names of one save left best behind
    if newest <= step:
        return []
    return [
        f"steps {step + 1:,} to {newest:,} in {run.folder.folder} are discarded: the run replaces their "
        "checkpoints, their metrics go to metrics.superseded.jsonl; another --out-dir keeps them"
    ]


def version_notes(loaded: Checkpoint) -> list[str]:
    """One line if another version of the package wrote the checkpoint."""
    wrote = loaded.config.get("protomamba", "0.1.0")
    if wrote == __version__:
        return []
    return [
        f"the checkpoint was written by protomamba {wrote}, this is {__version__}: resuming is exact to the bit "
        "within a version only"
    ]
