"""Ops after a fork or a spawn: OpenMP's threads stay behind, and a child that waited for them waited for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

from protomamba import kernels
from protomamba.kernels.cases import CASES, Sizes

SIZES = Sizes(B=4, L=200, D=32, E=64, N=4)
PATIENCE_S = 60


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def answer() -> float:
    inputs = CASES["mamba_block"].inputs(SIZES, torch.Generator().manual_seed(1))
    return float(CASES["mamba_block"].call(kernels, inputs)[0].double().sum())


def forked_code(expected: float) -> int:
    """0 where a forked child computes the same; it is ended by an alarm where it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what is tried
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        os._exit(0 if answer() == expected else 1)
    return os.waitpid(pid, 0)[1]


def test_a_fork_after_a_call_on_two_threads(two_threads: None) -> None:
    """Before, the child hung: the first parallel loop waited for the parent's threads."""
    assert forked_code(answer()) == 0


def test_forks_from_threads(two_threads: None) -> None:
    expected, codes = answer(), list[int]()
    threads = [threading.Thread(target=lambda: codes.append(forked_code(expected))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_multiprocessing(method: str, two_threads: None) -> None:
    expected = answer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert [pool.apply_async(answer).get(300) for _ in range(4)] == [expected] * 4
