"""What tests ask of a run folder: what was acknowledged, whether its lines parse, whether two runs are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protomamba.checkpoint import file as checkpoint
from tests.runs import assert_equal

CLOCKS = {"tokens_per_s", "step_ms", "save_ms", "time"}


def lines_of(folder: Path) -> list[bytes]:
    file = folder / "metrics.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The finished lines of metrics.jsonl of these events, without what a clock has written into them."""
    found = [json.loads(line) for line in lines_of(folder) if line.endswith(b"\n")]
    return [{k: v for k, v in event.items() if k not in CLOCKS} for event in found if event["event"] in names]


def acknowledged(folder: Path) -> int:
    """The last step whose save the run has acknowledged by a `checkpoint` line; 0 if none."""
    return max((event["step"] for event in events(folder, "checkpoint")), default=0)


def broken_lines(folder: Path) -> str | None:
    """The first finished line that is no JSON object; one that a kill tore has no end and does not count."""
    for number, line in enumerate(lines_of(folder), 1):
        try:
            good = isinstance(json.loads(line), dict)
        except ValueError:
            good = not line.endswith(b"\n")
        if not good:
            return f"line {number}: {line!r}"
    return None


def same_training(uncut: Path, other: Path) -> str | None:
    """None if two finished runs hold the same: every step's line once, validations, weights and moments, to the bit."""
    for name in ("train", "validation"):
        ours, theirs = ([_figures(event) for event in events(folder, name)] for folder in (uncut, other))
        if ours != theirs:
            at = next((a["step"] for a, b in zip(ours, theirs, strict=False) if a != b), "the end")
            return f"{name} lines differ at step {at}: {len(ours)} and {len(theirs)} lines"
    one, two = (checkpoint.load(folder / "latest.safetensors").parts for folder in (uncut, other))
    found = _unequal({**one, "callbacks": {}}, {**two, "callbacks": {}}, "latest")
    left = [path.name for path in other.iterdir() if path.name.endswith(".tmp")]
    return found or (f"left behind: {left}" if left else None)


def difference(uncut: Path, other: Path) -> str | None:
    """As `same_training`, and best.safetensors and the record of the best validation are the same too."""
    for name in ("latest.safetensors", "best.safetensors"):
        if (uncut / name).exists() != (other / name).exists():
            return f"{name} is in one folder only"
        if (uncut / name).exists():
            one, two = checkpoint.load(uncut / name), checkpoint.load(other / name)
            if one.info["step"] != two.info["step"]:
                return f"{name}: step {one.info['step']} and {two.info['step']}"
            if found := _unequal(one.parts, two.parts, name):
                return found
    return same_training(uncut, other)


def _figures(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "best"}


def _unequal(one: Any, other: Any, name: str) -> str | None:
    try:
        assert_equal(one, other, name)
    except AssertionError as error:
        return str(error)
    return None
