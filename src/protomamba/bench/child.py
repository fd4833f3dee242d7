"""One build's side of a comparison: a process of its own that takes training steps when told to.

`python -P child.py` reads a line of JSON (what to step), answers "ready", then reads a number of steps a line and
answers with the seconds that they took. It is run with the import path of any commit, so it uses public names only.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

# An editable installation finds its own package before any path: here the path alone decides whose build this is.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import protomamba  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def zipf(count: int, classes: int, seed: int) -> Tensor:
    """`count` classes, int64, drawn with chances in proportion to 1 / rank: about what text has."""
    chance_V = 1.0 / torch.arange(1.0, classes + 1.0, dtype=torch.float64)
    return torch.multinomial(chance_V, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def batch(rows: int, length: int, classes: int) -> tuple[Tensor, Tensor]:
    """Tokens and the targets that follow them, (rows, length) each: the same ones each time."""
    ids = zipf(rows * (length + 1), classes, seed=1).view(rows, length + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build(task: dict[str, Any]) -> Any:
    """A trainer that clips and updates on every step."""
    torch.set_num_threads(task["threads"])
    model = protomamba.SequenceModel(protomamba.ModelConfig(**task["model"]), seed=0)
    config = protomamba.TrainConfig(bp_cadence_steps=1, ff_lr=0.0, grad_clip_norm=1e-3, **task["train"])
    return protomamba.Trainer(model, config)


def main() -> None:
    task = json.loads(sys.stdin.readline())
    trainer, now = build(task), CLOCKS[task["clock"]]
    tokens_BL, targets_BL = batch(task["rows"], task["length"], task["model"]["vocab_size"])
    print("ready", flush=True)
    for line in sys.stdin:
        start = now()
        for _ in range(int(line)):
            trainer.train_step(tokens_BL, targets_BL)
        print(now() - start, flush=True)


if __name__ == "__main__":
    main()
