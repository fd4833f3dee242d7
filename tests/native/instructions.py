"""Instructions of five ops at the AVX2 level, here and at another commit, both built in this job.

    python -m tests.native.instructions HEAD~1        # make test-instructions REF=HEAD~1

Each side runs the cases of its own version of this file by the runner under callgrind, on its own library; more
than 3 % above the other commit fails. Needs valgrind, CMake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVEL, MORE = "avx2", 1.03
# The finder of an editable installation would have each side import the installed checkout.
OF_ITS_OWN = (
    "import runpy, sys; "
    "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]; "
    "runpy.run_module('tests.native.instructions', run_name='__main__', alter_sys=True)"
)
OPS = ("scan_forward", "scan_backward", "conv_backward", "prototype_loss_forward", "stack_step")


def write(path: Path) -> None:
    """The cases: every op once, on shapes that take a few million instructions and have tails."""
    import torch

    from protomamba import ModelConfig, SequenceModel, kernels
    from protomamba.kernels import native
    from tests.native.recorder import Recorder

    torch.manual_seed(0)
    native.set_level(LEVEL)
    with path.open("wb") as file:
        recorder = Recorder(native.load(LEVEL), file)
        recorder.start()
        u_BLE, delta_BLE = torch.randn(2, 2, 130, 100).requires_grad_()
        B_BLN, C_BLN = torch.randn(2, 2, 130, 16)
        y_BLE = kernels.selective_scan(u_BLE, delta_BLE - 3, -torch.rand(100, 16), B_BLN, C_BLN, delta_softplus=True)
        torch.autograd.grad(y_BLE.square().sum(), u_BLE)
        u_BLE = torch.randn(2, 130, 100).requires_grad_()
        torch.autograd.grad(kernels.causal_conv(u_BLE, torch.randn(100, 1, 4), torch.randn(100)).square().sum(), u_BLE)
        kernels.prototype_loss(torch.randn(200, 100), torch.randn(50, 100), torch.arange(200) % 50)
        model = SequenceModel(ModelConfig(vocab_size=300, d_model=100, n_layer=2, head="softmax"), seed=0).eval()
        with torch.no_grad():
            _, state = model.features(torch.tensor([[1, 2]]), return_state=True)
            model.make_decode_fn(state)(torch.tensor([3]))
        recorder.finish("five ops", keep=True)
        recorder.close()


def run(*command: str | Path, cwd: Path = ROOT, **more: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{cwd / 'src'}:{cwd}", **more}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def build(checkout: Path, folder: Path) -> None:
    """The AVX2 library, the runner and the cases of one checkout."""
    run("cmake", "-S", checkout, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DPROTOMAMBA_RUNNER=ON")
    run("cmake", "--build", folder, "--parallel", "2", "--target", f"protomamba_{LEVEL}", "runner")
    write_it = (sys.executable, "-c", OF_ITS_OWN, "--write", folder / "ops.bin")
    run(*write_it, cwd=checkout, PROTOMAMBA_LIBRARY_DIR=str(folder))


def count(folder: Path, op: str) -> int:
    """Instructions below the op's entry, on one thread."""
    out = folder / f"callgrind.{op}"
    tool = ("valgrind", "--tool=callgrind", "--collect-atstart=no", f"--toggle-collect=pm_{op}")
    program = (folder / "runner", folder / f"libprotomamba_{LEVEL}.so", folder / "ops.bin", "1")
    run(*tool, f"--callgrind-out-file={out}", *program)
    totals = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    assert totals is not None
    return int(totals[1])


def compare(ref: str) -> int:
    """Prints a line an op; 1 if one of them has grown beyond `MORE`."""
    with tempfile.TemporaryDirectory() as name:
        other, folders = Path(name) / "checkout", (Path(name) / "before", Path(name) / "now")
        run("git", "worktree", "add", "--detach", other, ref)
        try:
            if not (other / "tests/native/instructions.py").is_file():
                print(f"{ref} cannot count its instructions yet: nothing to compare with")
                return 0
            for checkout, folder in zip((other, ROOT), folders, strict=True):
                build(checkout, folder)
            worse = False
            for op in OPS:
                before, now = (count(folder, op) for folder in folders)
                mark = "  TOO MANY" if now > MORE * before else ""
                worse |= bool(mark)
                print(f"{op:24} {before:12,} -> {now:12,}  {now / before - 1:+.2%}{mark}")
        finally:
            run("git", "worktree", "remove", "--force", other)
    return int(worse)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?", default="HEAD~1")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write)
        return 0
    return compare(options.ref)


if __name__ == "__main__":
    raise SystemExit(main())
