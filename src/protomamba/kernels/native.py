"""Finds and loads the native kernels, picks the CPU level, hands them torch's thread pool, chooses the path."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protomamba.errors import ConfigError, UserError
from protomamba.kernels.arguments import OPS, Field

# From the lowest to the highest; the index is what pm_cpu_level returns.
LEVELS = ("baseline", "avx2", "avx512", "avx512vnni")
MODES = ("auto", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
ABI = 5

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_log = logging.getLogger("protomamba")
_mode: str | None = None
# OpenMP's threads do not follow into a forked process, and a child that waits for them waits for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
_level: str | None = None


class _CField(ctypes.Structure):
    """`Field` of csrc/layout.h."""

    _fields_ = (("name", ctypes.c_char_p), ("kind", ctypes.c_char_p), ("offset", ctypes.c_int64))


class Library:
    """One loaded level of the native kernels: each op of `arguments.OPS` is a function of the fields of its struct."""

    if TYPE_CHECKING:

        def __getattr__(self, op: str) -> Callable[..., None]: ...

    def __init__(self, level: str) -> None:
        self._path = path = library_dir() / f"libprotomamba_{level}{_SUFFIX}"
        if not path.is_file():
            raise UserError(f"{path}: no native kernels there; build them with a C++ compiler: pip install -e .")
        try:
            self._dll = ctypes.CDLL(str(path))
            self._parallel_for, self._torch = _torch_pool()
        except OSError as error:
            raise UserError(f"{path}: cannot be loaded: {error}") from error
        if self._dll.pm_abi() != ABI:
            raise UserError(f"{path}: expected ABI {ABI}, found {self._dll.pm_abi()}; rebuild it: pip install -e .")
        self.level = level
        self.cpu_level = int(self._dll.pm_cpu_level())
        # Whether the op matmul is faster here than torch's libraries.
        self.fast_matmul = bool(self._dll.pm_fast_matmul())
        self._dll.pm_scan_chunk_floats.restype = ctypes.c_int64
        self._dll.pm_scan_chunk_floats.argtypes = [ctypes.c_int64] * 4
        for op in OPS:
            self._check(op)
            function = self._dll[f"pm_{op}"]
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
            setattr(self, op, self._caller(op, _with_memory(op, function)))

    def _caller(self, op: str, then: Callable[[bytes], Any]) -> Callable[..., Any]:
        return OPS[op].compile(then, self._parallel_for, torch.get_num_threads)

    def _check(self, op: str) -> None:
        """UserError unless the library's idea of the op's argument struct is that of `arguments`, field by field."""
        for place, (mine, its) in enumerate(zip_longest(OPS[op].fields(), self.fields(op))):
            if mine != its:
                raise UserError(
                    f"{self._path}: field {place} of the arguments of {op}: expected {_told(mine)}, "
                    f"found {_told(its)}; rebuild it: pip install -e ."
                )

    def fields(self, op: str) -> list[Field]:
        """The fields of the op's argument struct as the library has them; none if it lacks the op."""
        try:
            describe = self._dll[f"pm_{op}_fields"]
        except AttributeError:
            return []
        described = ctypes.POINTER(_CField)()
        describe.restype = ctypes.c_int64
        count = describe(ctypes.byref(described))
        return [Field(f.name.decode(), f.kind.decode(), f.offset) for f in described[:count]]

    def pack(self, op: str, **fields: Any) -> bytes:
        """The argument struct of an op, for structs that point to others."""
        packed: bytes = self._caller(op, bytes)(**fields)
        return packed

    def scan_chunk_floats(self, batch: int, length: int, width: int, states: int) -> int:
        """The number of floats in which a scan keeps the states at its chunks' starts for the backward pass."""
        return int(self._dll.pm_scan_chunk_floats(batch, length, width, states))

    def map(self, which: str, x: Tensor) -> Tensor:
        """exp, exp2, sigmoid or softplus of a contiguous float32 tensor, as the kernels compute it."""
        out = torch.empty_like(x)
        code = ("exp", "exp2", "sigmoid", "softplus").index(which)
        sizes = ctypes.c_int64(code), ctypes.c_int64(x.numel())
        self._dll.pm_map(sizes[0], ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), sizes[1])
        return out


def _with_memory(op: str, function: Callable[[bytes], int]) -> Callable[[bytes], None]:
    """The op, which raises MemoryError where the system refused it working memory."""

    def call(packed: bytes) -> None:
        if refused := function(packed):
            raise MemoryError(f"the native op {op} tried to allocate {refused} bytes")

    return call


def _told(field: Field | None) -> str:
    return "none" if field is None else f"{field.name} ({field.kind} at byte {field.offset})"


def _torch_pool() -> tuple[int, ctypes.CDLL]:
    """The address of libtorch's torch_parallel_for (torch/csrc/stable/c/shim.h, torch >= 2.10)."""
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu{_SUFFIX}"
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "torch_parallel_for"):
        raise OSError(f"torch {torch.__version__} has no torch_parallel_for; torch >= 2.10 is needed")
    address = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    assert address is not None
    return address, library


def library_dir() -> Path:
    """Where the libraries are: beside this file, or PROTOMAMBA_LIBRARY_DIR."""
    return Path(os.environ.get("PROTOMAMBA_LIBRARY_DIR") or Path(__file__).parent)


@functools.cache
def load(level: str) -> Library:
    """The library of one level. UserError if it is missing or this CPU cannot run it."""
    library = Library(level)
    if LEVELS.index(level) > library.cpu_level:
        raise UserError(f"CPU level {level}: this CPU supports no more than {LEVELS[library.cpu_level]}")
    return library


def levels() -> list[str]:
    """The levels that are built and that this CPU can run, highest first; empty without native kernels."""
    found = []
    for level in reversed(LEVELS):
        try:
            load(level)
        except UserError:
            continue
        found.append(level)
    return found


@functools.cache
def _best() -> Library:
    forced = _level or os.environ.get("PROTOMAMBA_CPU_LEVEL")
    if forced:
        if forced not in LEVELS:
            raise ConfigError(f"PROTOMAMBA_CPU_LEVEL: expected one of {', '.join(LEVELS)}, got {forced!r}")
        return load(forced)
    baseline = load("baseline")
    for level in reversed(LEVELS[: baseline.cpu_level + 1]):
        if (library_dir() / f"libprotomamba_{level}{_SUFFIX}").is_file():
            return load(level)
    return baseline


def available() -> tuple[bool, str]:
    """Whether native kernels can be used here, and why (not)."""
    try:
        return True, f"native kernels, CPU level {_best().level}"
    except ConfigError:
        raise
    except UserError as error:
        return False, str(error)


def set_kernels(mode: str) -> None:
    """Chooses the path of every op: "auto" (native where possible), "native" (an error otherwise) or "reference"."""
    global _mode
    if mode not in MODES:
        raise ConfigError(f"kernels: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "native":
        _best()
    _mode = mode


def set_level(level: str | None) -> None:
    """Forces a CPU level from here on; None goes back to PROTOMAMBA_CPU_LEVEL or the best one."""
    global _level
    _level = level
    _best.cache_clear()
    default.cache_clear()


def get_kernels() -> str:
    """The mode in force: what set_kernels chose, else PROTOMAMBA_KERNELS, else "auto"."""
    if _mode is None:
        set_kernels(os.environ.get("PROTOMAMBA_KERNELS") or "auto")
        assert _mode is not None
    return _mode


@functools.cache
def default() -> Library | None:
    """The library that ops use unless `set_kernels` says otherwise; None without one that this CPU can run."""
    found, why = available()
    if found:
        return _best()
    _log.warning("kernels: the reference path is used, which is slow: %s", why)
    return None


def select(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES) -> Library | None:
    """The library to run `op` on x with, or None for the reference path."""
    mode = get_kernels()
    if mode == "reference" or in_transform():
        return None
    if x.dtype in dtypes and x.device.type == "cpu":
        return default() if mode == "auto" else _best()
    if mode == "native":
        raise ValueError(f"{op}: kernels are set to native, which does not take {x.dtype} on {x.device}; set auto")
    return None


def in_transform() -> bool:
    """Whether torch.func (grad, vmap, ...) runs: it sees through plain torch operations alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient through any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def apply(function: type[torch.autograd.Function], *inputs: object) -> Any:
    """function.apply(*inputs), which torch leaves untyped. Outside of autocast: the nodes choose their own dtypes."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return function.apply(*inputs)  # type: ignore[no-untyped-call]
    return function.apply(*inputs)  # type: ignore[no-untyped-call]


def floats(*shape: int) -> Tensor:
    """An uninitialised float32 tensor, whatever torch's default dtype is: what the kernels write."""
    return torch.empty(shape, dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """x itself if its lanes are adjacent, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
