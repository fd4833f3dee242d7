"""The four jobs of the gallery, small, as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow

JOBS = Path(__file__).resolve().parents[1] / "examples" / "jobs"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the jobs are bash scripts")
@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("text", "bits_per_byte"),
        slow("events", "popularity"),
        slow("dna", "TATAAAGG"),
        slow("labels", "precision"),
    ],
)
def test_a_job_goes_from_files_to_an_answer(tmp_path: Path, job: str, says: str) -> None:
    # A `python` and a `protomamba` that are this interpreter's, whatever is on the PATH.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, module in (("python", ""), ("protomamba", "-m protomamba")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "ROUGH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(JOBS / f"{job}.sh"), str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout
