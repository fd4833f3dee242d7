"""What others are given: one wheel for every Python with all CPU levels inside, and an sdist that needs no compiler."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = ("baseline", "avx2", "avx512", "avx512vnni") if X86 else ("baseline",)
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARIES = {f"protomamba/kernels/libprotomamba_{level}{SUFFIX}" for level in LEVELS}
MANYLINUX = (2, 28)
# Python knows it since 3.11.4.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}

# A scan and a whole step, with what they ran on; the package's folder shows that no checkout was imported.
PROBE = """
import sys
# An editable installation finds its package before any path does.
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
import json, pathlib, torch, protomamba
from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, batch_from_tokens, kernels
torch.manual_seed(0)
u, delta, B, C = torch.randn(2, 9, 24), torch.rand(2, 9, 24), torch.randn(2, 9, 5), torch.randn(2, 9, 5)
scan = (u, delta, -torch.rand(24, 5), B, C)
far = (kernels.selective_scan(*scan) - kernels.reference.selective_scan(*scan)).abs().max().item()
model = SequenceModel(ModelConfig(vocab_size=50, d_model=16, n_layer=1))
trainer = Trainer(model, TrainConfig(lr=1e-2, bp_cadence_steps=1))
batch = batch_from_tokens(list(range(50)), cursor=0, batch_size=2, seq_len=8)
losses = [trainer.train_step(*batch).loss for _ in range(5)]
home = str(pathlib.Path(protomamba.__file__).parents[1])
print(json.dumps({"home": home, "far": far, "losses": losses, "native": kernels.available()[0]}))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    return folder


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX")} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(package: Path, target: Path, **environment: str) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--target", str(target))
    run(*pip, str(package), cwd=target.parent, **environment)


def probe(target: Path) -> dict[str, object]:
    """What PROBE prints in a process that sees this installation first and no program at all."""
    nothing = target.parent / "no-programs"
    nothing.mkdir(exist_ok=True)
    out = run(sys.executable, "-W", "error", "-c", PROBE, cwd=nothing, PYTHONPATH=str(target), PATH=str(nothing))
    found: dict[str, object] = json.loads(out.splitlines()[-1])
    assert found["home"] == str(target)
    return found


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_wheel_holds_what_runs_and_nothing_else(dist: Path) -> None:
    wheel = only(dist, "*.whl")
    assert re.fullmatch(r"protomamba-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    carried = (f for ending in ("*.py", "*.css", "*.js") for f in (ROOT / "src").rglob(ending))
    sources = {f.relative_to(ROOT / "src").as_posix() for f in carried}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources | LIBRARIES | {"protomamba/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_sources_and_nothing_built(dist: Path) -> None:
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= names
    assert {f.relative_to(ROOT).as_posix() for f in (ROOT / "src").rglob("csrc/*")} <= names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".pyc")) or name.startswith((".ci", ".git/"))]


def test_two_builds_in_two_folders_are_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    """With the same compiler and the same SOURCE_DATE_EPOCH, which is all that may change a wheel of the same sources.

    One CPU level, for time: what could tell two builds apart (paths, clocks, orders) is not a matter of the level.
    """
    wheels = []
    for name in ("here", "elsewhere/and-deeper"):
        with tarfile.open(only(dist, "*.tar.gz")) as archive:
            archive.extractall(tmp_path / name, **SAFELY)
        tree = only(tmp_path / name, "protomamba-*")
        one_level = ("-C", "cmake.define.PROTOMAMBA_LEVELS=baseline")
        run(sys.executable, "-m", "build", "--wheel", *one_level, str(tree), SOURCE_DATE_EPOCH="1700000000")
        wheels.append(only(tree / "dist", "*.whl"))
    assert wheels[0].name == wheels[1].name
    one, other = (zipfile.ZipFile(wheel) for wheel in wheels)
    assert sum(name.endswith(SUFFIX) for name in one.namelist()) == 1
    assert one.namelist() == other.namelist()
    assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_libraries_need_no_newer_runtime_than_manylinux_2_28(dist: Path) -> None:
    archive = zipfile.ZipFile(only(dist, "*.whl"))
    for name in LIBRARIES:
        content = archive.read(name)
        versions = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"\0GLIBC_([\d.]+)\0", content)}
        assert versions and max(versions) <= MANYLINUX
        assert not re.search(rb"GLIBCXX_|libgomp|libtorch|libpython", content)


def test_the_wheel_runs_natively_without_a_compiler(dist: Path, tmp_path: Path) -> None:
    install(only(dist, "*.whl"), tmp_path / "installed")
    found = probe(tmp_path / "installed")
    assert found["native"] is True
    assert 0 < float(str(found["far"])) < 1e-4  # not the same code, the same function
    check_learning(found)


def test_the_sdist_installs_without_a_compiler_and_runs_on_the_reference_path(dist: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-compiler")
    install(only(dist, "*.tar.gz"), tmp_path / "installed", CC=missing, CXX=missing)
    found = probe(tmp_path / "installed")
    assert not list((tmp_path / "installed").rglob(f"*{SUFFIX}"))
    assert found["native"] is False and found["far"] == 0
    check_learning(found)


def check_learning(found: dict[str, object]) -> None:
    losses = found["losses"]
    assert isinstance(losses, list) and losses[-1] < losses[0]
