"""Peak resident memory of training steps, measured in a fresh process.

`python -m protomamba.bench.memory BxLxDxLAYERS PRECISION THREADS` is that process; it prints MiB.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from protomamba.bench.shapes import Shape, build, parse_shapes
from protomamba.errors import UserError
from protomamba.kernels import keep_freed_memory

STEPS = 2


def peak_rss_mib(shape: Shape, precision: str) -> float:
    """The most memory that a process held which did nothing but a few steps, torch itself included, in MiB."""
    plain = replace(shape, name=f"{shape.batch}x{shape.length}x{shape.d_model}x{shape.layers}:{shape.layer}")
    command = [sys.executable, "-m", "protomamba.bench.memory", plain.name, precision, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _source()})
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"bench: the process that measures memory on {plain.name} ended with {done.returncode}: {reason}"
        )
    return float(done.stdout)


def _source() -> str:
    """Where this package is imported from, for a process that may find another one or none."""
    import protomamba

    assert protomamba.__file__ is not None
    return os.pathsep.join(
        filter(None, [os.path.dirname(os.path.dirname(protomamba.__file__)), os.environ.get("PYTHONPATH", "")])
    )


def main(name: str, precision: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    keep_freed_memory()
    (shape,) = parse_shapes(name)
    trainer, _ = build(shape, precision)
    tokens_BL, targets_BL = shape.batches()
    for _ in range(STEPS):
        trainer.train_step(tokens_BL, targets_BL)
    print(high_water_mib())


def high_water_mib() -> float:
    """Linux: VmHWM, because ru_maxrss counts what the parent process held when it started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main(*sys.argv[1:])
