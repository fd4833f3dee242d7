"""The choice of path, and what must not depend on it: the same bits at any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.errors import ConfigError, UserError
from protomamba.kernels import blas, matmul, native
from protomamba.kernels.arguments import Arguments

from . import test_conv, test_scan


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PROTOMAMBA_")}
    program = "import torch\nfrom protomamba import kernels\n" + code
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)


def scan_with_gradients() -> list[Tensor]:
    inputs = {key: x.requires_grad_() for key, x in test_scan.make_inputs((3, 150, 200, 16)).items()}
    outputs = kernels.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    return [*outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values()))]


def long_scan_with_gradients() -> list[Tensor]:
    """Batch 1 is split over channels, whose shares of the gradients of B and C are added up."""
    inputs = {key: x.requires_grad_() for key, x in test_scan.make_inputs((1, 200, 300, 5)).items()}
    y_BLE = kernels.selective_scan(**inputs, delta_softplus=True)
    return [y_BLE, *torch.autograd.grad(y_BLE.square().sum(), list(inputs.values()))]


def conv_with_gradients() -> list[Tensor]:
    inputs = {key: x.requires_grad_() for key, x in test_conv.make_inputs((2, 150, 200, 4)).items()}
    y_BLE = kernels.causal_conv(**inputs)
    return [y_BLE, *torch.autograd.grad(y_BLE.square().sum(), list(inputs.values()))]


def norm_with_gradients() -> list[Tensor]:
    x, w = torch.randn(301, 70, requires_grad=True), torch.randn(70, requires_grad=True)
    y = kernels.rms_norm(x, w)
    return [y, *torch.autograd.grad(y.square().sum(), (x, w))]


def prototype_loss_with_gradients() -> list[Tensor]:
    z, p = torch.randn(301, 70, requires_grad=True), torch.randn(50, 70, requires_grad=True)
    loss = kernels.prototype_loss(z, p, torch.randint(-5, 50, (301,)))
    return [loss, *torch.autograd.grad(loss, (z, p))]


OPS = [
    scan_with_gradients,
    long_scan_with_gradients,
    conv_with_gradients,
    norm_with_gradients,
    prototype_loss_with_gradients,
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_same_bits_at_1_2_and_4_threads(library: native.Library, op: Callable[[], list[Tensor]]) -> None:
    results = []
    for threads in (1, 2, 4, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        results.append(op())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 70), (512, 31), (5, 200)], ids=str)
def test_transpose(level: str, shape: tuple[int, int]) -> None:
    x_RC = torch.randn(shape[0], shape[1] + 3)[:, 3:]
    assert torch.equal(blas.transpose(x_RC), x_RC.t())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            Arguments("rows columns in_row: int", "out x: pointer"),
            r"field 4 .* expected out \(pointer at byte 40\), found x",
        ),
        (
            Arguments("rows columns in_row: int", "x: pointer"),
            r"field 5 .* expected none, found out \(pointer at byte 48",
        ),
        (
            Arguments("rows columns: int", "in_row: float", "x out: pointer"),
            r"expected in_row \(float at byte 32\), found",
        ),
    ],
    ids=["two pointers swapped", "one missing", "another kind"],
)
def test_a_struct_that_differs_from_the_librarys_is_refused_when_loading(
    library: native.Library, declared: Arguments, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native.OPS, "transpose", declared)
    with pytest.raises(UserError, match=f"{message}.*rebuild it"):
        native.Library(library.level)


def test_an_op_that_the_library_lacks_is_refused_when_loading(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native.OPS, "untold", Arguments("x: pointer"))
    with pytest.raises(UserError, match=r"field 0 of the arguments of untold: expected pool .*found none; rebuild it"):
        native.Library(library.level)


def test_a_call_takes_the_fields_of_its_struct_by_name(library: native.Library) -> None:
    x_RC, out_CR = torch.randn(2, 3), torch.empty(3, 2)
    with pytest.raises(TypeError, match="in_row"):
        library.transpose(rows=2, columns=3, x=x_RC, out=out_CR)
    with pytest.raises(TypeError, match="in_"):
        library.transpose(rows=2, columns=3, in_row=3, in_=x_RC, out=out_CR)
    library.transpose(rows=2, columns=3, in_row=3, x=x_RC, out=out_CR)
    assert torch.equal(out_CR, x_RC.t())


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="kernels: expected one of auto, native, reference, got 'fast'"):
        kernels.set_kernels("fast")


def test_describe_names_the_path(level: str) -> None:
    described = kernels.describe()
    assert described["threads"] == "1"
    if level == "reference":
        assert described["kernels"] == "reference" and described["cpu_level"] == "none"
    else:
        assert described["kernels"] == "native" and described["cpu_level"] == level


def test_native_that_cannot_be_honoured_is_an_error(library: native.Library) -> None:
    with pytest.raises(ValueError, match=r"rms_norm: kernels are set to native, which does not take torch.float64"):
        kernels.rms_norm(torch.randn(2, 3).double(), torch.ones(3).double())


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """What is decided once a process is decided again within the test, and once more after it."""
    mode = native.get_kernels()
    native.set_level(None)
    matmul.backend.cache_clear()
    yield
    native.set_level(None)
    matmul.backend.cache_clear()
    native.set_kernels(mode)


@pytest.mark.parametrize(
    ("variable", "ask"),
    [("PROTOMAMBA_MATMUL", matmul.backend), ("PROTOMAMBA_CPU_LEVEL", kernels.available)],
    ids=["matmul", "level"],
)
def test_an_unknown_value_in_the_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, variable: str, ask: Callable[[], object]
) -> None:
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(ConfigError, match=f"{variable}: expected one of .*, got 'fastest'"):
        ask()


def test_a_forced_level_is_taken(library: native.Library, monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("PROTOMAMBA_CPU_LEVEL", library.level)
    assert kernels.describe()["cpu_level"] == library.level


def test_a_level_this_cpu_has_not_is_an_error(monkeypatch: pytest.MonkeyPatch, library: native.Library) -> None:
    monkeypatch.setattr(native, "Library", lambda level: type("Old", (), {"cpu_level": 0})())
    native.load.cache_clear()
    try:
        with pytest.raises(UserError, match="CPU level avx512: this CPU supports no more than baseline"):
            native.load("avx512")
    finally:
        native.load.cache_clear()


@pytest.mark.parametrize("name", matmul.BACKENDS)
def test_all_products_agree(monkeypatch: pytest.MonkeyPatch, fresh_choice: None, name: str) -> None:
    monkeypatch.setenv("PROTOMAMBA_MATMUL", name)
    x_TI, w_OI, dy_TO, add_TO = torch.randn(33, 20), torch.randn(17, 20), torch.randn(33, 17), torch.randn(33, 17)
    torch.testing.assert_close(matmul.linear(x_TI, w_OI), x_TI @ w_OI.t())
    torch.testing.assert_close(matmul.linear(x_TI, w_OI, add_TO), x_TI @ w_OI.t() + add_TO)
    torch.testing.assert_close(matmul.grad_input(dy_TO, w_OI, x_TI), dy_TO @ w_OI + x_TI)
    for a, b in ((dy_TO, x_TI), (x_TI, dy_TO)):
        torch.testing.assert_close(matmul.grad_weight(a, b), a.t() @ b)
        strided = torch.cat([a, a], 1)[:, : a.shape[1]]
        torch.testing.assert_close(matmul.grad_weight(strided, b), a.t() @ b)


def test_without_libraries_the_reference_path_says_so_once(tmp_path: Path) -> None:
    code = "for _ in range(2): print(kernels.rms_norm(torch.ones(1, 2), torch.ones(2)).sum().item() > 1.9)\n"
    code += "print(kernels.available()[0])"
    done = run_python(code, PROTOMAMBA_LIBRARY_DIR=str(tmp_path))
    assert done.stdout.split() == ["True", "True", "False"]
    assert done.stderr.count("the reference path is used") == 1 and "no native kernels there" in done.stderr


def test_without_libraries_native_is_an_error(tmp_path: Path) -> None:
    done = run_python("kernels.set_kernels('native')", PROTOMAMBA_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0 and "no native kernels there" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_can_be_kept() -> None:
    assert run_python("print(kernels.keep_freed_memory())").stdout.strip() in ("True", "False")
