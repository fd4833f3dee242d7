"""An op whose working memory is refused says so with the bytes; it used to end the process by SIGABRT."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba.kernels import blas, native

MIB = 1 << 20
MANY = 4 * MIB  # rows or channels, so that what one call needs is more than the heap has free
STATES = MIB // 16  # so many that a chunk of them is more than it, and one row of them less
Call = Callable[[native.Library], None]

ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")  # which maps terabytes
pytestmark = pytest.mark.skipif(ASAN or not Path("/proc/self/statm").exists(), reason="needs a limit and /proc")


def floats(*shape: int) -> Tensor:
    """Memory that no op gets to see, since each is refused its own first."""
    return torch.empty(shape)


def scan(E: int, N: int, **more: Any) -> dict[str, Any]:
    u_BLE, B_BLN = floats(1, 1, E), floats(1, 1, N)
    lanes = {"u": u_BLE, "delta": u_BLE, "Bm": B_BLN, "Cm": B_BLN, "y": u_BLE, "A": floats(E, N)}
    return {"B": 1, "L": 1, "E": E, "N": N, "is_bf16": 0, "softplus": 1, **lanes, **more}


def conv(E: int, K: int, **more: Any) -> dict[str, Any]:
    u_BLE, weight_EK = floats(1, 1, E), floats(E, K)
    return {"B": 1, "L": 1, "E": E, "K": K, "is_bf16": 0, "u": u_BLE, "y": u_BLE, "weight": weight_EK, **more}


def norm_backward(library: native.Library) -> None:
    x_TD, row_D = floats(2, MANY), floats(MANY)
    rows = {"x": x_TD, "dy": x_TD, "dx": x_TD, "weight": row_D, "dweight": row_D, "scale": floats(2)}
    library.norm_backward(T=2, D=MANY, out_is_bf16=0, eps=1e-5, **rows)


def conv_backward(library: native.Library) -> None:
    dy_BLE, dweight_EK = floats(1, 1, MANY), floats(MANY, 4)
    library.conv_backward(**conv(MANY, 4, dy=dy_BLE, du=dy_BLE, dweight=dweight_EK))


def product(library: native.Library) -> None:
    w, y, x = floats(1), floats(MANY, 1), floats(MANY, 1)
    library.product(T=MANY, rows=1, columns=1, x_stride=1, kind=1, x=x, w=w, y=y)


def step(library: native.Library) -> None:
    library.step(B=MANY, D=1, E=1, N=1, R=1, K=4, eps=1e-5, kind=0)


def square_sums(library: native.Library) -> None:
    library.square_sums(count=MANY)


# What is refused: a buffer of the call, or a thread's own scratch memory.
CALLS: dict[str, Call] = {
    "scan_forward": lambda library: library.scan_forward(**scan(E=MANY, N=8)),
    "scan_forward, a thread's": lambda library: library.scan_forward(**scan(E=1, N=STATES)),
    "scan_backward": lambda library: library.scan_backward(**scan(E=MANY, N=8)),
    "scan_backward, a thread's": lambda library: library.scan_backward(**scan(E=1, N=STATES, dA=floats(1, STATES))),
    "conv_forward, a thread's": lambda library: library.conv_forward(**conv(E=1, K=MANY)),
    "conv_backward": conv_backward,
    "norm_backward": norm_backward,
    "product": product,
    "step": step,
    "square_sums": square_sums,
}


def without_memory(call: Call, library: native.Library) -> str:
    """What a forked child with no address space left is told of the call."""
    answer, answers = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
    if pid == 0:
        try:
            call(StarvedAtTheCall(library))  # type: ignore[arg-type]
            os.write(answers, b"nothing was refused")
        except MemoryError as error:
            os.write(answers, str(error).encode())
        finally:
            os._exit(0)
    os.close(answers)
    with os.fdopen(answer) as told:
        text = told.read()
    assert os.waitpid(pid, 0)[1] == 0, text
    return text


def _use_up_the_heap(held: int) -> None:
    """Take what earlier tests have freed and malloc keeps: it would be given out without asking the system."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    resource.setrlimit(resource.RLIMIT_AS, (held, resource.RLIM_INFINITY))
    while libc.malloc(MIB // 16):
        pass


class StarvedAtTheCall:
    """A library whose ops may not have 16 MiB more than what their arguments hold already."""

    def __init__(self, library: native.Library) -> None:
        self._library = library

    def __getattr__(self, op: str) -> Callable[..., None]:
        def starved(**arguments: Any) -> None:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _use_up_the_heap(held)
            resource.setrlimit(resource.RLIMIT_AS, (held + 16 * MIB, resource.RLIM_INFINITY))
            getattr(self._library, op)(**arguments)

        return starved


@pytest.mark.parametrize("name", CALLS)
def test_refused_memory_is_an_error_with_the_bytes(name: str, library: native.Library) -> None:
    told = without_memory(CALLS[name], library)
    op = name.partition(",")[0]
    assert told.startswith(f"the native op {op} tried to allocate ") and int(told.split()[-2]) > 16 * MIB, told


def test_after_memory_was_refused_a_thread_asks_for_it_anew(library: native.Library) -> None:
    """It must not believe that it has what it was refused."""

    def twice(starved: native.Library) -> None:
        try:
            CALLS["conv_forward, a thread's"](starved)
        except MemoryError:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            CALLS["conv_forward, a thread's"](library)

    assert without_memory(twice, library) == "nothing was refused"


GROWTH = """
import torch
from protomamba.kernels import blas
matmul = blas.Blas("onednn")
torch.set_num_threads(1)
w_OI = torch.randn(2048, 128)
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
matmul.linear(torch.randn(600, 128), w_OI)
for rows in range(600, 100, -1):
    matmul.linear(torch.randn(rows, 128), w_OI)
    if rows == 400:
        before = held()
print((held() - before) * 4096 >> 20)
"""


@pytest.mark.skipif(blas.linear_op() is None, reason="this torch is built without oneDNN")
def test_products_of_many_shapes_do_not_take_memory_for_ever() -> None:
    """oneDNN keeps what it compiled for each number of rows: 300 more of them took hundreds of MiB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True, timeout=300)
    assert int(done.stdout) < 32
