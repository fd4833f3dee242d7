"""The wheels of a release for x86_64 and arm64 Linux with an old glibc, made on one machine without a cross toolchain.

    python tools/wheels.py --out dist                 # both; make wheels installs what this needs: ziglang, auditwheel
    python tools/wheels.py --arch aarch64 --twice     # one, built twice: the bytes must be the same

zig's C++ compiler brings glibc 2.17's own link stubs, so nothing newer can slip in; auditwheel checks it and gives the
wheel its name. The x86_64 wheel is then installed without dependencies, and trains natively with an empty PATH; the
libraries of the aarch64 wheel run the kernel tests' cases under qemu where it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.17"
LEVELS = {"x86_64": ("baseline", "avx2", "avx512", "avx512vnni"), "aarch64": ("baseline",)}
STEP = """
import protomamba
from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, batch_from_tokens, kernels
trainer = Trainer(SequenceModel(ModelConfig(vocab_size=50, d_model=16, n_layer=1)), TrainConfig(lr=1e-2))
loss = trainer.train_step(*batch_from_tokens(list(range(50)), cursor=0, batch_size=2, seq_len=8)).loss
print(f"protomamba {protomamba.__version__}, loss {loss:.3f},", kernels.available()[1])
assert kernels.available()[0] and "site-packages" in protomamba.__file__
"""
LEVEL = "from protomamba import kernels; print(kernels.available()[1])"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def zig(arch: str) -> str:
    return f"{sys.executable} -m ziglang c++ -target {arch}-linux-gnu.{GLIBC}"


def build(arch: str, folder: Path) -> Path:
    """The wheel of this architecture under its manylinux name. The time stamps in it are those of the last commit."""
    settings = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": arch, "CMAKE_SHARED_LINKER_FLAGS": "-s"}
    flags = [word for name, value in settings.items() for word in ("-C", f"cmake.define.{name}={value}")]
    stamp = run("git", "log", "-1", "--format=%ct").strip()
    command = (sys.executable, "-m", "build", "--wheel", "--outdir", folder, "-C", "install.strip=false", *flags, ROOT)
    run(*command, CXX=zig(arch), SOURCE_DATE_EPOCH=stamp)
    (wheel,) = folder.glob("*.whl")
    if wheel.name.endswith("-any.whl"):
        raise SystemExit("the kernels were not built: the wheel holds Python alone")
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
    run(sys.executable, "-m", "wheel", "tags", "--platform-tag", tag, "--remove", wheel, SOURCE_DATE_EPOCH=stamp)
    (named,) = folder.glob("*.whl")
    if f'"{tag}"' not in run(sys.executable, "-m", "auditwheel", "show", named).replace("\n", " "):
        raise SystemExit(f"{named.name}: auditwheel does not find it to be {tag}")
    return named


def check_content(wheel: Path, arch: str) -> None:
    """Exactly the package's modules and its libraries."""
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n and not n.endswith("/")}
    tracked = run("git", "ls-files", "src/protomamba").split()
    sources = {name.removeprefix("src/") for name in tracked if "/csrc/" not in name}
    expected = sources | {f"protomamba/kernels/libprotomamba_{level}.so" for level in LEVELS[arch]}
    if inside != expected:
        raise SystemExit(f"{wheel.name}: too much: {sorted(inside - expected)}, missing: {sorted(expected - inside)}")


def install_and_step(wheel: Path, folder: Path) -> str:
    """One step in a new environment: the wheel alone is installed there; torch and the rest are this environment's."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    (site / "dependencies.pth").write_text(f"{here}\n")
    told = run(folder / "bin" / "python", "-c", STEP, PATH="", PYTHONPATH="").strip()
    level = run(sys.executable, "-c", LEVEL).strip()
    if not told.endswith(level):
        raise SystemExit(f"{wheel.name}: {told}, where this environment finds {level}")
    return told


def emulate(wheel: Path, cases: Path, folder: Path) -> str:
    """The kernel tests' cases on the wheel's libraries, under qemu."""
    qemu, libraries = shutil.which("qemu-aarch64"), Path("/usr/aarch64-linux-gnu")
    if not qemu or not libraries.is_dir():
        return "not run: qemu-user and libc6-arm64-cross are not installed"
    zipfile.ZipFile(wheel).extractall(folder)
    runner = folder / "runner"
    run(*zig("aarch64").split(), "-O2", "-std=c++17", "tests/native/runner.cpp", "-o", runner, "-ldl", "-pthread")
    library = folder / "protomamba" / "kernels" / "libprotomamba_baseline.so"
    return run(qemu, "-L", libraries, runner, library, cases).strip().splitlines()[-1].removeprefix(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--arch", choices=LEVELS, action="append", help="[both]")
    parser.add_argument("--twice", action="store_true", help="build each twice and compare the bytes")
    parser.add_argument("--cases", type=Path, default=ROOT / "build/cases.bin", help="of tests.native.write_cases")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for arch in options.arch or LEVELS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            wheel = build(arch, folder / "first")
            check_content(wheel, arch)
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
            if options.twice:
                again = build(arch, folder / "second").read_bytes()
                same = again == wheel.read_bytes()
                print("  built again:", "the same bytes" if same else "OTHER BYTES")
                if not same:
                    raise SystemExit(1)
            native = platform.machine() == arch
            ran = install_and_step(wheel, folder / "env") if native else emulate(wheel, options.cases, folder / "arm")
            print(f"  {ran}")
            shutil.copy(wheel, options.out)


if __name__ == "__main__":
    main()
