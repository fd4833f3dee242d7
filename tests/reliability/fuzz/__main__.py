"""`python -m tests.reliability.fuzz [--count N] [--readers a,b] [--keep]`: a table of readers, inputs and failures.

Each reader runs in a child process of its own: one that ends, hangs or eats memory is a failure of the file it was at,
and the child after it goes on behind that file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from tests.reliability.fuzz.harness import fuzz, good_input, keep, variant
from tests.reliability.fuzz.readers import READERS

VERBOSE = bool(os.environ.get("FUZZ_VERBOSE"))  # show what the readers and a dying child print
ROOT = Path(__file__).parents[3]
FOREIGN_COUNT = 5_000  # where the parser is another project's
SILENCE_S = 1_200  # 200 files take minutes on a loaded machine; one that hangs is ended by its processor time
ADDRESS_SPACE = 12 << 30


def child(name: str, first: int, count: int, place: str) -> None:
    """Fuzz in this process: a line for each failure, and in the file `place` the seed that is being tried."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what readers print is no answer
    at = os.open(place, os.O_WRONLY)
    for seed, found in fuzz(name, first, count):
        os.pwrite(at, seed.to_bytes(8, "little"), 0)
        if found or seed % 200 == 0:
            out.write(json.dumps([seed, found]) + "\n")


def run(name: str, count: int, first: int = 0) -> dict[int, str]:
    """The failures of a reader over `count` files, by seed."""
    failures: dict[int, str] = {}
    start, end = first, first + count
    with tempfile.NamedTemporaryFile() as place:
        while start < end:
            place.truncate(0)
            code = _run_child(name, start, end - start, place.name, failures)
            if code == 0:
                break
            at = Path(place.name).read_bytes()
            assert at, f"{name}: the good input cannot be read"
            failures[int.from_bytes(at, "little")] = f"the process ended ({code})"
            start = int.from_bytes(at, "little") + 1
    return failures


def _run_child(name: str, first: int, count: int, place: str, failures: dict[int, str]) -> int:
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--child", name, str(first), str(count), place]
    errors = None if VERBOSE else subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    assert process.stdout is not None
    with process, process.stdout:
        while True:
            watch = threading.Timer(SILENCE_S, process.kill)
            watch.start()
            line = process.stdout.readline()
            watch.cancel()
            if not line:
                break
            seed, found = json.loads(line)
            if found:
                failures[seed] = found
    return process.returncode


def kind_of(found: str) -> str:
    """A failure without what changes from file to file: the error and its place, or the words without numbers."""
    error, _, place = found.rpartition(" at ")
    return f"{error.partition(':')[0]} at {place}" if error else re.sub(r"[0-9].*|'.*", "", found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--keep", action="store_true", help="put one file of each kind of failure into the corpus")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), int(options.child[2]), options.child[3])
        return 0
    failed = 0
    for name in options.readers.split(","):
        count = min(options.count, FOREIGN_COUNT) if READERS[name].foreign else options.count
        failures = run(name, count, options.first)
        failed += len(failures)
        print(f"{name:<22}{count:>9,} files {len(failures):>6,} failures", flush=True)
        kinds = Counter(map(kind_of, failures.values()))
        for kind, times in kinds.most_common(12):
            seed, found = next((seed, each) for seed, each in failures.items() if kind_of(each) == kind)
            print(f"    {times:>6,} x {found} (seed {seed})", flush=True)
            if options.keep:
                with good_input(READERS[name]) as (_, good):
                    print(f"           kept as {keep(name, variant(READERS[name], good, seed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
