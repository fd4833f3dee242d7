"""How speed and memory change with threads and with the length of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from protomamba.bench.checks import assert_step_agrees
from protomamba.bench.floor import own_floor, products, torch_floor
from protomamba.bench.memory import peak_rss_mib
from protomamba.bench.shapes import NAMED, Shape, build
from protomamba.bench.timing import interleave, spread

TOKENS = 65_536
LENGTHS = (64, 256, 1_024, 4_096, 16_384, 65_536)
CONSTANT = Shape("tokens", 1, TOKENS, 256, 4)


def threads_table(names: Sequence[str], precision: str, rounds: int, most: int) -> list[dict[str, Any]]:
    """How many times as fast the step, and the floor, run on `most` threads as on one; both in rotation."""
    return [_threads_row(NAMED[name], precision, rounds, most) for name in names]


def _threads_row(shape: Shape, precision: str, rounds: int, most: int) -> dict[str, Any]:
    assert_step_agrees(shape, precision)
    trainer, _ = build(shape, precision)
    tokens_BL, targets_BL = shape.batches()
    layers = products(shape)
    work: dict[str, Callable[[], object]] = {
        "floor": torch_floor(layers),
        "own floor": own_floor(layers),
        "step": lambda: trainer.train_step(tokens_BL, targets_BL),
    }
    runs = {f"{name} on {n}": _with_threads(n, run) for name, run in work.items() for n in (1, most)}
    before = torch.get_num_threads()
    samples = interleave(runs, rounds)
    torch.set_num_threads(before)
    gain = {
        name: [
            one / many
            for one, many in zip(samples.seconds[f"{name} on 1"], samples.seconds[f"{name} on {most}"], strict=True)
        ]
        for name in work
    }
    return {
        "shape": shape.text,
        "threads": f"1 -> {most}",
        **{f"{name} speed-up": spread(values) for name, values in gain.items()},
        "step / floor speed-up": spread([s / f for s, f in zip(gain["step"], gain["floor"], strict=True)]),
        "step / own floor speed-up": spread([s / f for s, f in zip(gain["step"], gain["own floor"], strict=True)]),
        "tokens_per_s": shape.tokens / samples.median(f"step on {most}"),
    }


def _with_threads(count: int, run: Callable[[], object]) -> Callable[[], object]:
    def there() -> None:
        torch.set_num_threads(count)
        run()

    return there


def lengths_table(precision: str, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Tokens a second and peak memory of steps of 65,536 tokens, from many short rows to one long one."""
    shapes = [replace(CONSTANT, batch=TOKENS // length, length=length) for length in LENGTHS]
    assert_step_agrees(CONSTANT, precision)
    trainer, _ = build(CONSTANT, precision)
    samples = interleave({s.text: _step(trainer.train_step, s) for s in shapes}, rounds, clock)
    return [
        {
            "shape": shape.text,
            "tokens_per_s": shape.tokens / samples.median(shape.text),
            "time / that of 64 tokens": samples.ratio(shape.text, shapes[0].text),
            "peak_rss_mib": peak_rss_mib(shape, precision),
        }
        for shape in shapes
    ]


def _step(train_step: Callable[..., object], shape: Shape) -> Callable[[], object]:
    tokens_BL, targets_BL = shape.batches()
    return lambda: train_step(tokens_BL, targets_BL)
