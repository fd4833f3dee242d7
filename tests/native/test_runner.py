"""The native runner: it accepts what Python accepted, and says what it finds wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from protomamba.kernels import native, reference
from tests.native.recorder import Recorder

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(not COMPILER or not native.levels(), reason="needs a C++ compiler and native kernels")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("runner") / "runner"
    command = [str(COMPILER), "-std=c++17", str(HERE / "runner.cpp"), "-o", str(program), "-ldl", "-pthread"]
    subprocess.run(command, check=True)
    return program


def write_case(cases: Path, spoil: float = 0.0) -> None:
    """One product by the library, and its answers, off by `spoil`."""
    library = native.Library("baseline")
    x_TI, w_OI, y_TO = torch.randn(3, 20), torch.randn(9, 20), torch.full((3, 9), torch.nan)
    with cases.open("wb") as file:
        recorder = Recorder(library, file)
        recorder.start()
        library.product(T=3, rows=9, columns=20, x_stride=20, kind=0, x=x_TI, w=w_OI, y=y_TO)
        expected = reference.product(x_TI.double(), w_OI.double()) + spoil
        recorder.judged({"y": y_TO}, {"y": expected}, "forward", torch.float32)
        recorder.finish("a product")
        recorder.close()


def play(runner: Path, cases: Path) -> subprocess.CompletedProcess[str]:
    (path,) = native.library_dir().glob("libprotomamba_baseline.*")
    return subprocess.run([str(runner), str(path), str(cases)], capture_output=True, text=True)


def test_right_results_are_accepted_at_any_number_of_threads(runner: Path, tmp_path: Path) -> None:
    write_case(tmp_path / "cases.bin")
    done = play(runner, tmp_path / "cases.bin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 cases, 1 results held, 0 wrong" in done.stdout


def test_a_wrong_result_is_named_once_for_each_number_of_threads(runner: Path, tmp_path: Path) -> None:
    write_case(tmp_path / "cases.bin", spoil=1e-3)
    done = play(runner, tmp_path / "cases.bin")
    assert done.returncode == 1
    assert done.stdout.count("WRONG a product: y is off by") == 3


def test_a_file_that_ends_too_early_is_no_pass(runner: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases.bin"
    write_case(cases)
    cases.write_bytes(cases.read_bytes()[:-9])
    done = play(runner, cases)
    assert done.returncode == 2 and "ends too early" in done.stderr
