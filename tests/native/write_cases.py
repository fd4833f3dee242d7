"""Runs the kernel tests at one CPU level and writes their cases and float64 answers for `runner.cpp`.

    python -m tests.native.write_cases build/cases.bin                  # all of tests/kernels at the baseline level
    python -m tests.native.write_cases build/few.bin -k "scan or norm"  # a selection, as pytest's -k

The level's vectors must be as wide as those of the library that will be tried: NEON's are the baseline's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protomamba.kernels import native
from tests.kernels import closeness
from tests.native.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]


class Plugin:
    """Gives each test's calls and judgements to the recorder, and ends its case with it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.recorder.finish(report.nodeid.removeprefix("tests/kernels/"))

    def watch(self) -> None:
        """Before the test modules take assert_close by name."""
        inner = closeness.assert_close

        def watched(
            actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, dtype: torch.dtype
        ) -> None:
            self.recorder.judged(actual, expected, kind, dtype)
            inner(actual, expected, kind, dtype)

        closeness.assert_close = watched


def write_maps(recorder: Recorder) -> None:
    """exp and its kin on a sample of all floats of their ranges."""
    from tests.kernels import test_math

    for which, name in enumerate(("exp", "exp2", "sigmoid", "softplus")):
        x = torch.cat(list(test_math.floats(*test_math.RANGE[name], stride=100_003)))
        recorder.map(which, name, x, test_math.ULP[name], test_math.EXACT[name](x.double()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--level", default="baseline", choices=native.LEVELS)
    parser.add_argument("-k", dest="chosen", help="only these tests, as pytest's -k")
    options = parser.parse_args()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    chosen = options.level + (f" and ({options.chosen})" if options.chosen else "")
    with options.file.open("wb") as file:
        recorder = Recorder(native.load(options.level), file)
        recorder.start()
        plugin = Plugin(recorder)
        plugin.watch()
        # These judge nothing. The first makes the library be loaded anew, the second leaves no memory to record in.
        left_out = [f"--ignore={ROOT / 'tests/kernels' / name}" for name in ("test_native.py", "test_memory.py")]
        tests = [str(ROOT / "tests/kernels"), *left_out, "-k", chosen]
        status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *tests], [plugin])
        write_maps(recorder)
        recorder.close()
    print(
        f"{options.file}: {recorder.cases} cases, {recorder.held} results, {options.file.stat().st_size / 1e6:.1f} MB"
    )
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
