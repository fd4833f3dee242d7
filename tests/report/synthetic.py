"""Run folders of any length without any training: what a report reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protomamba.metrics_file import encode_line

CONFUSION = {
    "event": "classification",
    "step": 100,
    "split": "test",
    "classes": ["cat", "dog", "<b>eel</b>"],
    "confusion": [[8, 2, 0], [1, 6, 3], [0, 0, 0]],
}
RANKING = {
    "event": "ranking",
    "step": 100,
    "split": "validation",
    "rows": 5123,
    "items": 20000,
    "figures": {"hit@1": 0.09375, "mrr": 0.125},
    "baselines": {"popularity": {"hit@1": 0.015625, "mrr": 0.03125}, "bigram": {"mrr": 0.0625}},
}
SAMPLE = {"event": "sample", "step": 100, "prompt": "def f", "text": "</script><script>throw 1</script>(x)"}


def train_line(step: int, second: float, **more: Any) -> dict[str, Any]:
    loss, lr = 1 + 4 / math.sqrt(step), 0.003 * math.exp(-step / 1e5)
    figures = {"loss": loss, "lr": lr, "grad_norm": 1.5 + step % 7, "tokens_per_s": 40_000.0 + 13 * (step % 50)}
    return {"event": "train", "step": step, **figures, "ff_loss": 0.0, "clipped": False, **more, "time": second}


def validation_line(step: int, second: float, **more: Any) -> dict[str, Any]:
    figures = {"val_loss": 2 + 4 / math.sqrt(step), "val_nll": 1.25 + 4 / math.sqrt(step), "val_accuracy": 0.5}
    figures |= {"majority_accuracy": 0.25, "val_perplexity": 3.0, "targets": 900, "nearest_cosine": 0.3}
    return {"event": "validation", "step": step, **figures, "best": True, **more, "time": second}


def start_line(second: float = 0.0, step: int = 0, **more: Any) -> dict[str, Any]:
    facts = {"protomamba": "0.2.0", "torch": "2.13.0", "threads": 2, "parameters": 4880, "target_step": 100}
    return {"event": "run", "step": step, **facts, "seed": 1, "resumed_from": None, **more, "time": second}


def write_run(folder: Path, events: list[Mapping[str, Any]], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(encode_line(event) for event in events))
    (folder / "config.json").write_text(json.dumps({"lr": 0.003, "d_model": 64, **(config or {})}))
    return folder


def whole_run(
    folder: Path, steps: int = 100, config: Mapping[str, Any] | None = None, *extra: Mapping[str, Any]
) -> Path:
    """A run that ended: a train line each step ten a second, and ten validations and checkpoints."""
    events: list[Mapping[str, Any]] = [start_line()]
    for step in range(1, steps + 1):
        events.append(train_line(step, step / 10))
        if step % (steps // 10) == 0:
            events.append(validation_line(step, step / 10))
            saved = {"path": "latest.safetensors", "bytes": 3 << 20, "save_ms": 12.5, "best": True}
            events.append({"event": "checkpoint", "step": step, **saved, "time": step / 10})
    end = {"event": "end", "step": steps, "reason": "done", "time": steps / 10}
    return write_run(folder, [*events, *extra, end], config)
