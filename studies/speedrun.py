"""The shortest planned budget on one core whose run ends at 1.90, and 1.80, bits a byte of the standard library.

    python studies/speedrun.py --budgets 50,100 --seeds 0,1,2 --models demo,transformer,lstm       # make speedrun
    python studies/speedrun.py --models demo+optimizer=muon+lr=6e-3 --budgets 60 --seeds 0         # try a lever

A model is `demo` (the demo's recipe), `transformer` or `lstm` (plain torch, speedrun_models.py), with +FIELD=VALUE for
any field of the run's configuration, or of the other models' settings. A budget is processor time of the training steps
alone on one thread: a few steps are timed first, then as many are planned as it holds, the whole schedule laid over
them. Bits a byte are those of the head's own probabilities on fixed held-out windows on which nothing was fitted.

A run leaves a line in OUT_DIR/speedrun.jsonl and is not repeated; runs take turns by seed, then budget, then model.
The table of docs/speedrun.md is written from all lines there are. How fast the core was meanwhile (it may be shared)
stands beside each run as the rate of a fixed matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import speedrun_models
import torch
from common import Session, write_between_marks

from protomamba.data.corpus import default_corpus
from protomamba.demo import demo_config
from protomamba.run_config import RunConfig

GOALS = (1.90, 1.80)
OTHERS = {"transformer": speedrun_models.TRANSFORMER, "lstm": speedrun_models.LSTM}
WARM_STEPS, TIMED_STEPS = 3, 12  # before the run, on a model of its own
WARM_UP, FLOOR = 0.02, 0.02  # of the other models' schedule: shares of the steps and of the rate
MATRIX, PRODUCTS = 512, 20


class Run(NamedTuple):
    """What is trained: steps of it, one after another, and what it then answers."""

    step: Callable[[int, int], None]  # number of the step, and of how many
    bits: Callable[[], float]
    tokens: int  # a step


def ours(folder: Path, changes: dict[str, str], seed: int) -> Run:
    """The demo's recipe with changes."""
    base = demo_config("hpn", folder)
    given = {**base.model_dump(exclude_unset=True), "seed": seed, **changes}
    config = RunConfig(**{name: tuple(v.split(",")) if name.endswith("_option") else v for name, v in given.items()})
    session = Session.start(config)
    held_out = Session.start(base.model_copy(update={"seed": 0})).held_out

    def step(index: int, count: int) -> None:
        session.trainer.schedule_steps = count
        session.train(1)

    def bits() -> float:
        found = session.trainer.evaluate(held_out)
        assert found.nll is not None
        return found.nll / math.log(2)

    return Run(step, bits, config.batch_size * config.seq_len * config.grad_accum)


def theirs(kind: str, folder: Path, changes: dict[str, str], seed: int) -> Run:
    """A transformer or an LSTM on the same stream: linear warm-up, then a cosine."""
    settings = {**OTHERS[kind], **{name: float(value) for name, value in changes.items()}}
    sizes = {"batch_size": int(settings["batch"]), "seq_len": int(settings["length"]), "seed": seed}
    stream = Session.start(demo_config("hpn", folder).model_copy(update=sizes))
    held_out = Session.start(demo_config("hpn", folder).model_copy(update={"seed": 0})).held_out
    torch.manual_seed(seed)
    model, at = speedrun_models.build(kind, settings)

    def step(index: int, count: int) -> None:
        warm = max(1, round(WARM_UP * count))
        down = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (index - warm) / max(1, count - warm))) / 2
        tokens_BL, targets_BL, _ = stream.batches(index)
        at(settings["lr"] * ((index + 1) / warm if index < warm else down))(tokens_BL, targets_BL)

    def bits() -> float:
        windows = int(settings["length"]) if kind == "transformer" else demo_config("hpn", folder).seq_len
        return statistics.fmean(speedrun_models.nats(model, x, y, windows) for x, y, _ in held_out) / math.log(2)

    return Run(step, bits, sizes["batch_size"] * sizes["seq_len"])


def prepared(name: str, folder: Path, seed: int) -> Run:
    kind, *words = name.split("+")
    changes = dict(word.split("=", 1) for word in words)
    if kind == "demo":
        return ours(folder, changes, seed)
    if kind in OTHERS:
        return theirs(kind, folder, changes, seed)
    raise SystemExit(f"--models {kind!r}: expected one of demo, {', '.join(OTHERS)}, with +FIELD=VALUE")


def timed(step: Callable[[int, int], None], count: int, of: int) -> float:
    """Processor seconds of the first `count` of so many steps."""
    started = time.process_time()
    for index in range(count):
        step(index, of)
    return time.process_time() - started


def gflops() -> float:
    """The rate of a matrix product on this core now."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    seconds = []
    for _ in range(PRODUCTS):
        started = time.process_time()
        a @ b
        seconds.append(time.process_time() - started)
    return 2e-9 * MATRIX**3 / statistics.median(seconds)


def run(name: str, budget: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train for the budget, and the line that tells of it."""
    trial = prepared(name, folder, seed)
    timed(trial.step, WARM_STEPS, 10**6)
    each = timed(trial.step, TIMED_STEPS, 10**6) / TIMED_STEPS
    steps = max(1, round(budget / each))
    before, fresh = gflops(), prepared(name, folder, seed)
    seconds = timed(fresh.step, steps, steps)
    return {
        "model": name,
        "budget": budget,
        "seed": seed,
        "bits": fresh.bits(),
        "seconds": seconds,
        "steps": steps,
        "tokens": steps * fresh.tokens,
        "gflops": (before + gflops()) / 2,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each model and budget, and the shortest budgets that reached the goals."""
    rows = [
        "| model | budget s | seeds | bits a byte | seconds | steps | ms a step | core GFLOP/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    reached: dict[str, dict[float, float]] = {}
    for name, budget in sorted({(line["model"], line["budget"]) for line in lines}):
        runs = [line for line in lines if (line["model"], line["budget"]) == (name, budget)]
        mean = {key: statistics.fmean(run[key] for run in runs) for key in ("bits", "seconds", "steps", "gflops")}
        spread = f" ({min(r['bits'] for r in runs):.3f}-{max(r['bits'] for r in runs):.3f})" if len(runs) > 1 else ""
        step_ms = 1e3 * mean["seconds"] / mean["steps"]
        rows.append(
            f"| {name} | {budget:g} | {len(runs)} | {mean['bits']:.3f}{spread} | {mean['seconds']:.0f} | "
            f"{mean['steps']:,.0f} | {step_ms:.1f} | {mean['gflops']:.0f} |"
        )
        for goal in GOALS:
            if mean["bits"] <= goal:
                reached.setdefault(name, {}).setdefault(goal, budget)
    rows += [
        "",
        "| model | " + " | ".join(f"shortest budget to {goal:.2f}, s" for goal in GOALS) + " |",
        "|---|---:|---:|",
    ]
    for name in sorted({line["model"] for line in lines}):
        found = (reached.get(name, {}).get(goal) for goal in GOALS)
        rows.append(f"| {name} | " + " | ".join("not reached" if b is None else f"{b:g}" for b in found) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="50,100,200", help="seconds of processor time [%(default)s]")
    parser.add_argument("--seeds", default="0,1,2", help="[%(default)s]")
    parser.add_argument("--models", default="demo,transformer,lstm", help="[%(default)s]")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/speedrun"), help="[%(default)s]")
    parser.add_argument("--docs-dir", type=Path, help="where speedrun.md gets the table; none: printed alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    default_corpus(given.out_dir / "corpus")
    results = given.out_dir / "speedrun.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    there = {(line["model"], line["budget"], line["seed"]) for line in lines}
    for seed in (int(s) for s in given.seeds.split(",")):
        for budget in (float(b) for b in given.budgets.split(",")):
            for name in given.models.split(","):
                if (name, budget, seed) in there:
                    continue
                lines.append(run(name, budget, seed, given.out_dir))
                with results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(json.dumps(lines[-1]), flush=True)
    if given.docs_dir:
        write_between_marks(given.docs_dir / "speedrun.md", "python studies/speedrun.py", table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
