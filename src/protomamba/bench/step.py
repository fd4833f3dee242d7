"""Times whole training steps: against the floor, part by part, and against the reference path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from protomamba.bench.checks import assert_step_agrees, kernels_set
from protomamba.bench.floor import head_product, own_floor, products, torch_floor
from protomamba.bench.memory import peak_rss_mib
from protomamba.bench.shapes import Shape, build
from protomamba.bench.timing import Samples, interleave
from protomamba.kernels import native, whole_block
from protomamba.kernels.arguments import OPS
from protomamba.train.trainer import Trainer

PARTS = ("matrix products", "scan", "conv", "norm", "head", "optimizer", "other")
PROFILED_STEPS = 3
# A reference step walks the sequence in Python: it is timed on this many tokens a row and on one layer.
REFERENCE_LENGTH, REFERENCE_ROUNDS = 64, 3

Row = dict[str, Any]


def measure_step(shape: Shape, precision: str, rounds: int, clock: str) -> Row:
    """One row of the table: times, ratios, parts, tokens a second, memory. UserError if the kernels are wrong."""
    assert_step_agrees(shape, precision)
    samples = time_step(shape, precision, rounds, clock)
    whole = samples.median("whole step")
    row: Row = {
        "shape": shape.text,
        "precision": precision,
        "forward + backward / floor": samples.ratio("forward + backward", "floor"),
        "whole step / floor": samples.ratio("whole step", "floor"),
        "forward + backward / own floor": samples.ratio("forward + backward", "own floor"),
        "whole step / own floor": samples.ratio("whole step", "own floor"),
        "forward + backward / own floor of the blocks": samples.ratio("forward + backward", "own floor of the blocks"),
        "whole step / own floor of the blocks": samples.ratio("whole step", "own floor of the blocks"),
        "forward-only / whole step": samples.ratio("forward-only step", "whole step"),
        "floor_ms": 1e3 * samples.median("floor"),
        "own_floor_ms": 1e3 * samples.median("own floor"),
        "own_floor_of_the_blocks_ms": 1e3 * samples.median("own floor of the blocks"),
        "step_ms": 1e3 * whole,
        "tokens_per_s": shape.tokens / whole,
        "peak_rss_mib": peak_rss_mib(shape, precision),
    }
    shares = part_shares(shape, precision)
    row |= {f"{part}_ms": 1e3 * whole * shares[part] for part in PARTS}
    row["reference / native"] = against_reference(shape, precision)
    return row


def time_step(shape: Shape, precision: str, rounds: int, clock: str) -> Samples:
    """The floors, forward + backward, whole step and forward-only step, in rotation."""
    full, local = build(shape, precision)
    tokens_BL, targets_BL = shape.batches()
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    blocks = products(shape, narrow)
    head = head_product(shape, getattr(full.model.head, "sample", shape.vocab_size), narrow)
    return interleave(
        {
            "floor": torch_floor(products(shape)),
            "own floor": own_floor([*blocks, head]),
            "own floor of the blocks": own_floor(blocks),
            "forward + backward": forward_backward(full, tokens_BL, targets_BL),
            "whole step": lambda: full.train_step(tokens_BL, targets_BL),
            "forward-only step": lambda: local.train_step(tokens_BL, targets_BL),
        },
        rounds,
        clock,
    )


def forward_backward(trainer: Trainer, tokens_BL: Tensor, targets_BL: Tensor) -> Callable[[], None]:
    """Loss and gradients of the whole model, embedding and head included, without the optimizer."""

    def run() -> None:
        trainer.zero_grad()
        trainer.model(tokens_BL, targets_BL).backward()

    return run


def against_reference(shape: Shape, precision: str) -> float:
    """How many times as long a step takes on the reference path: of one layer and short rows, or it takes minutes."""
    small = replace(shape, length=min(shape.length, REFERENCE_LENGTH), layers=1)
    trainer, _ = build(small, precision)
    tokens_BL, targets_BL = small.batches()

    def on(mode: str) -> Callable[[], None]:
        def run() -> None:
            with kernels_set(mode):
                trainer.train_step(tokens_BL, targets_BL)

        return run

    runs = {"reference": on("reference"), "native": on("native")}
    return interleave(runs, REFERENCE_ROUNDS).ratio("reference", "native").median


def part_shares(shape: Shape, precision: str) -> dict[str, float]:
    """The share of each part in a whole step, by torch's profiler, blocks op by op even where they are one call.

    Each native call is recorded as an event of its own. What an event spends outside of the events inside it belongs to
    the part that its name tells, or else the name of the nearest event around it; Python between them is "other". The
    profiler costs a few microseconds an event, so the shares of a small step lean to "other".
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else some builds of the profiler report on stderr that they start
    trainer, _ = build(shape, precision)
    tokens_BL, targets_BL = shape.batches()
    for _ in range(2):
        trainer.train_step(tokens_BL, targets_BL)
    with whole_block.op_by_op(), named_events(), profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED_STEPS):
            with record_function("step"):
                trainer.train_step(tokens_BL, targets_BL)
    spent = dict.fromkeys(PARTS, 0.0)
    for event in found.events():
        spent[part_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {part: microseconds / total for part, microseconds in spent.items()}


@contextmanager
def named_events() -> Iterator[None]:
    """Native calls appear in a profile under the names of their ops."""
    library = native.select("bench", native.floats(0))
    plain = {op: getattr(library, op) for op in OPS} if library else {}
    for op, function in plain.items():
        setattr(library, op, _recorded(op, function))
    try:
        yield
    finally:
        for op, function in plain.items():
            setattr(library, op, function)


def _recorded(op: str, function: Callable[..., None]) -> Callable[..., None]:
    def call(**fields: Any) -> None:
        with record_function(f"native {op}"):
            function(**fields)

    return call


# The first that the start of a name matches decides; None asks the event around it.
_NAMES = (
    ("native scan", "scan"),
    ("native conv", "conv"),
    ("native norm", "norm"),
    ("native prototype_loss", "head"),
    ("native sphere", "head"),
    ("native transpose", "matrix products"),
    ("native matmul", "matrix products"),
    ("native square_sums", "optimizer"),
    ("native adamw", "optimizer"),
    ("native ", "other"),
    ("mkldnn::_linear", "matrix products"),
    ("aten::mm", "matrix products"),
    ("aten::addmm", "matrix products"),
    ("aten::_foreach", "optimizer"),
    ("_PrototypeLoss", "head"),
    ("_SoftmaxLoss", "head"),
)


def part_of(event: Any) -> str:
    """The part of the step that a profiler's event belongs to. Products outside of a block are the head's."""
    while event is not None:
        for start, part in _NAMES:
            if event.name.startswith(start):
                return "head" if part == "matrix products" and not _in_block(event) else part
        event = event.cpu_parent
    return "other"


def _in_block(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("BlockNode"):
            return True
        event = event.cpu_parent
    return False
