"""Promise 4: a run cut anywhere, any number of times, is to the bit the run that was never cut."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from protomamba.checkpoint import file as checkpoint
from tests.marks import slow
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.judge import difference, same_training
from tests.reliability.promises import Trials
from tests.runs import flags, token_file

STEPS = 26
SHARDS = (130, 97, 41, 160)  # tokens; windows of 8 make batches that straddle shards, and an epoch of 26 steps of 2
WINDOWS = sum((tokens - 1) // 8 for tokens in SHARDS)

SHAPES: list[list[object]] = [
    [],
    ["--layer", "compact"],
    ["--head", "softmax", "--tie-embedding", 1],
    ["--prototypes", "fixed", "--separation", 0],
    ["--precision", "bf16"],
    ["--layer", "examples.lstm_layer:LSTMLayer", "--head", "examples.contrastive_head:ContrastiveHead"],
]
GROWTH: list[list[object]] = [
    [],
    ["--target-layers", 3, "--placement", "specific:0,2", "--freeze", "first:1"],
    ["--target-layers", 2, "--placement", "append", "--freeze", "indices:1", "--freeze-embedding", 1],
    ["--base-layers", 2, "--target-layers", 4, "--placement", "insert:1", "--freeze", "first:2"],
]
STEPPING: list[list[object]] = [
    [],
    ["--bp-cadence-steps", 3, "--ff-lr", 1e-2],
    ["--bp-cadence-steps", 40, "--ff-lr", 1e-2],  # never within the run: only local updates
    ["--grad-clip-norm", 0.05, "--lr-warmup-steps", 9, "--bp-cadence-steps", 2],
    ["--gradient-surgery-method", "gradnorm", "--ff-lr", 1e-2],
    ["--gradient-surgery-method", "cagradstep", "--ff-lr", 1e-2, "--bp-cadence-steps", 2],
]
ORDERS: list[list[object]] = [
    [],
    ["--packed-sequences", 0],
    ["--shuffle-shards", 0],
    ["--eos-token", 3, "--reset-at-eos", 1],
    ["--packed-sequences", 0, "--eos-token", 3, "--reset-at-eos", 1, "--seed", 7],
]


@dataclass(frozen=True)
class CutPlan:
    """One run and where it is cut: (micro-batch counted from the process's start, signal, workers) a process."""

    flags: list[object]
    cuts: list[tuple[int, int, int]]
    last_workers: int

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.flags))}; cuts {self.cuts}, then {self.last_workers} workers"


def draw(rng: random.Random) -> CutPlan:
    """A random plan: 1 to 5 cuts, some at the epoch's end, at a shard's end, or right after a resume."""
    accumulate = rng.choice([1, 1, 2, 3])
    save_every = rng.choice([1, 2, 5, 7])
    run = [
        *("--grad-accum", accumulate, "--save-every", save_every, "--val-every", rng.choice([3, 4, 50])),
        *(part for choices in (SHAPES, GROWTH, STEPPING, ORDERS) for part in rng.choice(choices)),
        *("--steps", STEPS, "--keep-last", rng.choice([0, 1, 3])),
    ]
    boundary = WINDOWS // 2  # the batch in which an epoch ends
    shard_end = rng.choice([(sum((t - 1) // 8 for t in SHARDS[: n + 1])) // 2 for n in range(3)])
    cuts = []
    for _ in range(rng.randint(1, 5)):
        at = rng.choice([0, 1, rng.randrange(STEPS * accumulate), boundary, boundary + 1, shard_end])
        cuts.append((at, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), rng.choice([0, 1, 2, 4])))
    return CutPlan(run, cuts, rng.choice([0, 1, 2, 4]))


def shards(folder: Path) -> Path:
    folder.mkdir()
    for number, count in enumerate(SHARDS):
        np.save(folder / f"{number}.npy", np.array([(i * (number + 1) + i // 9) % 13 for i in range(count)]))
    return folder


def run_plan(plan: CutPlan, server: ForkServer, home: Path, data: list[object]) -> str | None:
    """None if the cut run ends as the uncut one; batches are compared by hash, whatever process asked for them."""
    home.mkdir()
    base = [*flags(home / "uncut", home)[:-4], *data, *plan.flags]
    ended = server.run([*base, "--out-dir", home / "uncut"], Plan(batches=str(home / "uncut-batches")))
    if ended.code != 0:
        return f"the uncut run failed: {ended.output}"
    cut = [*base, "--out-dir", home / "cut", "--resume", "auto"]
    for at, number, workers in plan.cuts:
        planned = Plan(at_batch=at, signal=number, batches=str(home / "cut-batches"))
        ended = server.run([*cut, "--prefetch-workers", workers], planned)
        wanted = -signal.SIGKILL if number == signal.SIGKILL else 75
        if ended.code not in (0, wanted):
            return f"exit {ended.code} after signal {number}: {ended.output}"
    ended = server.run([*cut, "--prefetch-workers", plan.last_workers], Plan(batches=str(home / "cut-batches")))
    if ended.code != 0:
        return f"the last process failed: {ended.output}"
    uncut_hashes, cut_hashes = hashes(home / "uncut-batches"), hashes(home / "cut-batches")
    if uncut_hashes != cut_hashes:
        return f"batches differ: {sorted(uncut_hashes ^ cut_hashes)[:2]}"
    return difference(home / "uncut", home / "cut")


def hashes(file: Path) -> set[str]:
    return set(file.read_text().splitlines()) if file.exists() else set()


@pytest.mark.parametrize("plans", [6, slow(200)])
def test_random_cut_plans(plans: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, rng = trials(4), random.Random(plans)
    data: list[object] = ["--token-dir", shards(tmp_path / "shards"), "--shard-ext", "npy"]
    for number in range(plans):
        plan = draw(rng)
        problem = run_plan(plan, server, tmp_path / str(number), data)
        counted.add(problem and f"plan {number} ({plan}): {problem}")
    counted.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_every_micro_batch_of_a_run_may_be_the_last(
    number: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """One process a micro-batch or two: a run of nothing but cuts, in the middle of accumulation and between."""
    counted, tokens = trials(4), token_file(tmp_path, count=250)
    run = ["--grad-accum", 2, "--save-every", 1, "--steps", 6, "--bp-cadence-steps", 2]
    assert server.run(flags(tmp_path / "uncut", tokens, *run)).code == 0
    for _ in range(20):
        # A kill at the third micro-batch: the first step is saved, the second half done.
        at = 1 if number == signal.SIGTERM else 3
        ended = server.run(flags(tmp_path / "cut", tokens, *run, "--resume", "auto"), Plan(at_batch=at, signal=number))
        if ended.code == 0:
            break
    counted.add(difference(tmp_path / "uncut", tmp_path / "cut") if ended.code == 0 else "never finished")
    counted.finish()


def test_the_judge_sees_one_bit(server: ForkServer, tmp_path: Path) -> None:
    """The comparison behind all of this fails where it should."""
    tokens = token_file(tmp_path)
    for name, more in (("one", []), ("same", []), ("other", ["--lr", 1.0000001e-2])):
        assert server.run(flags(tmp_path / name, tokens, "--steps", 4, *more)).code == 0
    assert difference(tmp_path / "one", tmp_path / "same") is None
    assert "lines differ" in str(same_training(tmp_path / "one", tmp_path / "other"))
    latest = tmp_path / "same" / "latest.safetensors"
    loaded = checkpoint.load(latest)
    moment = loaded.parts["optimizer"]["moments"]["norm_f.weight"]["exp_avg"]
    moment[0] = torch.nextafter(moment[0], torch.tensor(9.0))
    checkpoint.save(latest, loaded.parts, config=loaded.config, info=loaded.info)
    assert "norm_f.weight.exp_avg" in str(difference(tmp_path / "one", tmp_path / "same"))
