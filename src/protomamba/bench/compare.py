"""`make bench-compare REF=<commit>`: the training step of another commit and of the files here, timed in turns.

The other commit is checked out into a temporary git worktree and built there; nothing is downloaded, its packages are
those of this environment. Each build steps in a process of its own. A ratio is formed within a pair of turns whose
order alternates; shown are its median and the interval that holds the true median with 95 % confidence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from protomamba.bench import child
from protomamba.bench.shapes import NEVER, Shape, parse_shapes
from protomamba.errors import ConfigError, UserError

TURN_SECONDS = 0.15
CONFIDENCE = 0.95
WIDTH = 120  # of a table in a pipe


class Comparison(NamedTuple):
    """Milliseconds a step of the other commit and of this one, medians, and the ratio new / old within pairs."""

    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float


class Build:
    """A process that steps with the package in `source`; `close` ends it."""

    def __init__(self, source: Path, task: dict[str, Any]) -> None:
        command = [sys.executable, "-P", child.__file__]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        self._source = source
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask(json.dumps(task))

    def step(self, count: int) -> float:
        """The seconds that so many steps took."""
        return float(self._ask(str(count)))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which the empty answer tells
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(
                f"bench-compare: the process of {self._source} ended with {self.close()}; its error is above"
            )
        return answer

    def close(self) -> int:
        """End the process; its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()


def compare(old: Path, new: Path, task: dict[str, Any], pairs: int) -> Comparison:
    """`pairs` pairs of measurements of the packages in two source folders, after a warm-up of each."""
    with ExitStack() as stack:
        builds = [Build(source, task) for source in (old, new)]
        for build in builds:
            stack.callback(build.close)
        count = max(1, math.ceil(TURN_SECONDS / max(build.step(2) / 2 for build in builds)))
        seconds: list[list[float]] = [[], []]
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 else (1, 0):
                seconds[which].append(builds[which].step(count) / count)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    low, high = interval(ratios)
    return Comparison(1e3 * median(seconds[0]), 1e3 * median(seconds[1]), median(ratios), low, high)


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which two of these sorted values the median lies with CONFIDENCE, whatever the distribution."""
    n = len(ordered)
    outside, rank = 2.0**-n, 0  # P(fewer than rank + 1 of n values are below the median)
    while rank + 1 < n / 2 and 2 * (outside + math.comb(n, rank + 1) * 2.0**-n) <= 1 - CONFIDENCE:
        rank += 1
        outside += math.comb(n, rank) * 2.0**-n
    return ordered[rank], ordered[n - 1 - rank]


@contextmanager
def checkout(root: Path, ref: str) -> Iterator[Path]:
    """The source folder of a commit, checked out in a temporary worktree and built, or that of a folder as it is.

    UserError if git or the build fails.
    """
    if (Path(ref) / "src" / "protomamba").is_dir():
        yield Path(ref) / "src"
        return
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        place = Path(folder) / "tree"
        run(["git", "-C", str(root), "worktree", "add", "--detach", str(place), ref])
        try:
            build_kernels(place)
            yield place / "src"
        finally:
            run(["git", "-C", str(root), "worktree", "remove", "--force", str(place)])


def build_kernels(root: Path) -> None:
    """Build the native libraries of a checkout into its package folder."""
    if shutil.which("cmake") is None:
        raise UserError("bench-compare: cmake is not on the path; install it: pip install cmake")
    where = ["-S", str(root), "-B", str(root / "build" / "compare")]
    run(["cmake", *where, "-DSKBUILD_STATE=editable", "-DCMAKE_BUILD_TYPE=Release"])
    run(["cmake", "--build", where[-1], "-j"])


def run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"bench-compare: {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise UserError(f"bench-compare: {' '.join(command)} ended with {done.returncode}: {lines[-1]}")


def task_of(shape: Shape, precision: str, threads: int, clock: str) -> dict[str, Any]:
    """What a child has to do for this shape."""
    model = {"d_model": shape.d_model, "n_layer": shape.layers, "vocab_size": shape.vocab_size}
    return {
        "rows": shape.batch,
        "length": shape.length,
        "model": model if shape.layer == "mamba" else {**model, "layer": shape.layer},
        "train": {"steps": NEVER, "precision": precision},
        "threads": threads,
        "clock": clock,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench-compare", description="time the training step of two commits alternately"
    )
    parser.add_argument("ref", help="the commit to compare with, or a folder with a built checkout")
    parser.add_argument("--shapes", default="S,M,L,demo", help="as in protomamba bench [%(default)s]")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="[%(default)s]")
    parser.add_argument("--pairs", type=int, default=30, metavar="N", help="pairs of measurements [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads [%(default)s]")
    parser.add_argument("--clock", default="wall", choices=tuple(child.CLOCKS), help="[%(default)s]")
    found = parser.parse_args(arguments)
    if found.pairs < 6:
        raise ConfigError(f"--pairs {found.pairs}: expected at least 6, or there is no interval to give")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print. The exit code: 0, or that of a UserError."""
    try:
        chosen = parse(sys.argv[1:] if arguments is None else arguments)
        _compare_all(chosen, Console(width=None if sys.stdout.isatty() else WIDTH))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _compare_all(chosen: argparse.Namespace, console: Console) -> None:
    new = Path(child.__file__).resolve().parents[2]
    shapes = parse_shapes(chosen.shapes)
    title = f"{chosen.precision}, {chosen.threads} threads, {chosen.pairs} pairs, {chosen.clock} clock"
    table = Table(title=f"Training step, here against {chosen.ref} ({title})", title_justify="left")
    for heading in ("shape", "old ms", "new ms", "new / old", "95 % of the median"):
        table.add_column(heading, justify="left" if heading == "shape" else "right", no_wrap=True)
    with checkout(new.parent, chosen.ref) as old:
        for shape in shapes:
            found = compare(old, new, task_of(shape, chosen.precision, chosen.threads, chosen.clock), chosen.pairs)
            figures = f"{found.old_ms:.2f}", f"{found.new_ms:.2f}", f"{found.ratio:.3f}"
            table.add_row(shape.text, *figures, f"{found.low:.3f}-{found.high:.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
