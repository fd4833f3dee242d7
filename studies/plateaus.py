"""Tasks that start with a plateau, heads side by side: nothing to learn at all, then something, and a recall task.

    python studies/plateaus.py uniform --classes 16,257,4096 --steps 20000 --heads learned
    python studies/plateaus.py then --classes 16,257,4096 --steps 20000 --heads learned --seeds 0,1,2
    python studies/plateaus.py recall --heads learned,softmax,fixed --seeds 0,1,2,3,4

uniform: targets drawn evenly, of every token or of one a row, at a constant rate; how near prototypes come to one
another beside as many random directions, and the cross entropy beside log V, the best there is. then: the same, and
after it a source whose next token is known four times in five, told by the one before or, with --lag, by one further
back, until LEVEL of what can be known is predicted; beside a fresh model that starts with that source. The rate being
constant, the schedule is a fresh one for both. recall: random tokens, a marker somewhere, its follower asked for at the
end, until every answer of 512 rows is right.

Each run leaves a line in OUT_DIR/plateaus.jsonl and is not repeated; `table` prints what is there, as
docs/prototypes.md has it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer

HEADS: dict[str, dict[str, Any]] = {
    "learned": {"head": "hpn"},
    "fixed": {"head": "hpn", "prototypes": "fixed"},
    "softmax": {"head": "softmax"},
}
ROWS, IGNORED = 8, -100
LENGTH = {"uniform": 64, "recall": 256}
SYMBOLS = 16  # of the recall task, and one marker
RECALL_LIMIT, RECALL_EVERY, RECALL_JUDGED = 16_000, 250, 512
KNOWN = 0.8  # of the source that follows a plateau: how often the next token is the one that its predecessor tells
LEVEL, SOURCE_LIMIT, SOURCE_JUDGED = 0.97, 20_000, 32

Batch = tuple[Tensor, Tensor]


def uniform(classes: int, one_a_row: bool, generator: torch.Generator, rows: int = ROWS) -> Batch:
    """Tokens and targets of independent, even draws."""
    ids_BL = torch.randint(classes, (rows, LENGTH["uniform"]), generator=generator)
    targets_BL = torch.randint(classes, ids_BL.shape, generator=generator)
    if one_a_row:
        targets_BL[:, :-1] = IGNORED
    return ids_BL, targets_BL


def source(followers_V: Tensor, lag: int, one_a_row: bool, generator: torch.Generator, rows: int = ROWS) -> Batch:
    """A chain in which token v is followed, `lag` tokens on, by followers_V[v] with chance KNOWN, else by any."""
    ids_BL = torch.randint(len(followers_V), (rows, LENGTH["uniform"] + 1), generator=generator)
    known_BL = torch.rand(rows, LENGTH["uniform"], generator=generator) < KNOWN
    for t in range(lag - 1, LENGTH["uniform"]):
        told_B = followers_V[ids_BL[:, t + 1 - lag]]
        ids_BL[:, t + 1] = torch.where(known_BL[:, t], told_B, ids_BL[:, t + 1])
    inputs_BL, targets_BL = ids_BL[:, :-1].contiguous(), ids_BL[:, 1:].contiguous()
    targets_BL[:, : LENGTH["uniform"] - 1 if one_a_row else lag - 1] = IGNORED
    return inputs_BL, targets_BL


def recall(generator: torch.Generator, rows: int = ROWS) -> Batch:
    """Random tokens, a marker at a random place; the last token is the marker again, its target what followed it."""
    length = LENGTH["recall"]
    ids_BL = torch.randint(SYMBOLS, (rows, length), generator=generator)
    place_B = torch.randint(length - 2, (rows,), generator=generator)
    everyone_B = torch.arange(rows)
    ids_BL[everyone_B, place_B], ids_BL[:, -1] = SYMBOLS, SYMBOLS
    targets_BL = torch.full_like(ids_BL, IGNORED)
    targets_BL[:, -1] = ids_BL[everyone_B, place_B + 1]
    return ids_BL, targets_BL


def trainer_of(head: str, seed: int, lr: float, **shape: int) -> Trainer:
    """Two Mamba layers at a constant rate, without clipping."""
    model = SequenceModel(ModelConfig(n_layer=2, **shape, **HEADS[head]), seed=seed)
    return Trainer(
        model,
        TrainConfig(lr=lr, schedule="constant", lr_warmup_steps=0, grad_clip_norm=0.0, steps=10**9),
    )


def run_uniform(head: str, classes: int, one_a_row: bool, seed: int, steps: int) -> dict[str, Any]:
    return plateau(trainer_of(head, seed, 2e-3, vocab_size=classes, d_model=128), classes, one_a_row, seed, steps)


def plateau(trainer: Trainer, classes: int, one_a_row: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train on even targets, and what that left."""
    generator = torch.Generator().manual_seed(seed + 1)
    losses = [trainer.train_step(*uniform(classes, one_a_row, generator)).loss for _ in range(steps)]
    drawn = torch.Generator().manual_seed(10**6)
    found = trainer.evaluate([(*uniform(classes, one_a_row, drawn, 64), None) for _ in range(512 if one_a_row else 16)])
    assert found.nll is not None
    return {
        "loss": sum(losses[-200:]) / 200,
        "excess_nats": found.nll - math.log(classes),
        **trainer.model.head.diagnostics(),
    }


def run_then(head: str, classes: int, one_a_row: bool, seed: int, steps: int, lag: int) -> dict[str, Any]:
    fresh, after = (trainer_of(head, seed, 2e-3, vocab_size=classes, d_model=128) for _ in range(2))
    figures = plateau(after, classes, one_a_row, seed, steps)
    reached = {
        name: steps_to_learn(each, classes, lag, one_a_row, seed)
        for name, each in (("from_the_start", fresh), ("after_the_plateau", after))
    }
    return {**figures, **reached}


def steps_to_learn(trainer: Trainer, classes: int, lag: int, one_a_row: bool, seed: int) -> int | None:
    """Steps on a source until it predicts LEVEL of what the rule itself does; None: not within SOURCE_LIMIT."""
    generator = torch.Generator().manual_seed(seed + 2)
    followers_V = torch.randperm(classes, generator=generator)
    ids_BL, targets_BL = source(followers_V, lag, False, torch.Generator().manual_seed(10**6), SOURCE_JUDGED)
    told_BL = followers_V[ids_BL[:, : LENGTH["uniform"] + 1 - lag]]
    wanted = LEVEL * float((told_BL == targets_BL[:, lag - 1 :]).float().mean())
    steps = 0
    while steps < SOURCE_LIMIT:
        for _ in range(more := max(5, steps // 50)):
            trainer.train_step(*source(followers_V, lag, one_a_row, generator))
        steps += more
        if trainer.evaluate([(ids_BL, targets_BL)]).accuracy >= wanted:
            return steps
    return None


def run_recall(head: str, seed: int, steps: int) -> dict[str, Any]:
    trainer = trainer_of(head, seed, 1e-3, vocab_size=SYMBOLS + 1, d_model=64)
    generator, accuracy = torch.Generator().manual_seed(seed + 1), 0.0
    while trainer.global_step < steps and accuracy < 1.0:
        for _ in range(RECALL_EVERY):
            trainer.train_step(*recall(generator))
        judged = torch.Generator().manual_seed(10**6)
        accuracy = trainer.evaluate([(*recall(judged, RECALL_JUDGED), None)]).accuracy
        print(f"{head} {seed}: step {trainer.global_step:,}, accuracy {accuracy:.3f}", flush=True)
    return {
        "reached": trainer.global_step if accuracy == 1.0 else None,
        "accuracy": accuracy,
        **trainer.model.head.diagnostics(),
    }


def cases(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for head in given.heads.split(","):
        for seed in (int(s) for s in given.seeds.split(",")):
            if given.task == "recall":
                yield {"head": head, "seed": seed, "steps": given.steps or RECALL_LIMIT}
                continue
            for classes in (int(v) for v in given.classes.split(",")):
                for one_a_row in (False, True) if given.one_a_row is None else (bool(given.one_a_row),):
                    steps = given.steps or 20_000
                    case = {"head": head, "classes": classes, "one_a_row": one_a_row, "seed": seed, "steps": steps}
                    yield {**case, "lag": given.lag} if given.task == "then" else case


def where_from(result: dict[str, Any]) -> str:
    return "one a row" if result["one_a_row"] else "every token"


def table(results: list[dict[str, Any]]) -> str:
    """What there is of both tasks, as Markdown."""
    rows = [
        "| classes | targets | steps | seed | nearest cosine | of random directions | nats above log V |",
        "|---" * 7 + "|",
    ]
    for r in (r for r in results if "nearest_cosine" in r and r["task"] != "recall"):
        cosines = f"{r['nearest_cosine']:.3f} | {r['random_cosine']:.3f}"
        case = f"| {r['classes']:,} | {where_from(r)} | {r['steps']:,} | {r['seed']} |"
        rows.append(f"{case} {cosines} | {r['excess_nats']:.4f} |")
    rows += [
        "",
        "| classes | targets | told by | plateau | head | seed | steps to learn from the start | after it | ratio |",
    ]
    rows += ["|---" * 9 + "|"]
    for r in (r for r in results if r["task"] == "then"):
        told = f"{r['lag']} before" if r["lag"] > 1 else "the last"
        case = f"| {r['classes']:,} | {where_from(r)} | {told} | {r['steps']:,} | {r['head']} | {r['seed']} |"
        both = r["from_the_start"], r["after_the_plateau"]
        first, second = (f"{steps:,}" if steps else f"not within {SOURCE_LIMIT:,}" for steps in both)
        rows.append(f"{case} {first} | {second} | {f'{both[1] / both[0]:.2f}' if all(both) else ''} |")
    rows += ["", "| head | seed | steps until every answer is right |", "|---" * 3 + "|"]
    for r in (r for r in results if r["task"] == "recall"):
        reached = f"{r['reached']:,}" if r["reached"] else f"not within {r['steps']:,} ({r['accuracy']:.2f})"
        rows.append(f"| {r['head']} | {r['seed']} | {reached} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("uniform", "then", "recall", "table"))
    parser.add_argument("--heads", default="learned")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--classes", default="16,257,4096")
    parser.add_argument("--one-a-row", type=int, choices=(0, 1), help="uniform, then: only this kind of target")
    parser.add_argument("--lag", type=int, default=1, help="then: which of the tokens before tells the next")
    parser.add_argument("--steps", type=int, help="20,000 of uniform and then, 16,000 of recall")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/prototypes"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    kept = given.out_dir / "plateaus.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for case in cases(given) if given.task != "table" else ():
        if any(all(r.get(k) == v for k, v in {"task": given.task, **case}.items()) for r in results):
            continue
        started = time.process_time()
        found = {"uniform": run_uniform, "then": run_then, "recall": run_recall}[given.task](**case)
        results.append({"task": given.task, **case, **found, "processor_s": time.process_time() - started})
        print(results[-1], flush=True)
        with kept.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
