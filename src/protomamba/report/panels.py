"""Which curves stand in which panel of the page, in which colour and stroke."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protomamba.report.record import RunRecord, Series, all_of

COLOURS = 8
# A linear axis whose largest value is this many times the middle one shows a spike and a flat line.
SPIKE = 20.0


@dataclass(frozen=True)
class Curve:
    """A curve's name in a panel.

    stroke: noisy (can be smoothed), plain, bold (few points, marked), dotted (a second one of those), dashed (something
    to compare with).
    """

    source: str
    label: str
    stroke: str = "plain"


@dataclass(frozen=True)
class Line:
    """A curve of one run as it is drawn; colour: 0 to COLOURS-1."""

    label: str
    stroke: str
    colour: int
    run: int
    series: Series


@dataclass(frozen=True)
class Panel:
    """One chart. log: whether its value axis starts logarithmic; anything else is a reader's click away."""

    title: str
    lines: tuple[Line, ...]
    log: bool


PANELS = {
    "Loss": (
        Curve("train.loss", "train", "noisy"),
        Curve("validation.val_loss", "validation", "bold"),
        Curve("validation.val_nll", "validation NLL (nats)", "dotted"),
    ),
    "Accuracy": (
        Curve("train.accuracy", "train", "noisy"),
        Curve("validation.val_accuracy", "validation", "bold"),
        Curve("validation.majority_accuracy", "always the commonest", "dashed"),
    ),
    "Learning rate": (Curve("train.lr", "rate"),),
    "Gradient norm": (Curve("train.grad_norm", "norm", "noisy"),),
    "Tokens per second": (Curve("train.tokens_per_s", "tokens/s", "noisy"),),
    "Prototypes' nearest cosine": (
        Curve("validation.nearest_cosine", "mean", "bold"),
        Curve("train.nearest_cosine", "mean"),
    ),
}
PREFIXES = {"train": "", "validation": "Validation: "}


def panels(records: Sequence[RunRecord]) -> list[Panel]:
    """The panels that have anything to show: the known ones, then one for each further figure that was logged."""
    known = {curve.source for curves in PANELS.values() for curve in curves}
    found = [_panel(title, curves, records) for title, curves in PANELS.items()]
    found += [_panel(title, (curve,), records) for title, curve in _others(records, known)]
    return [panel for panel in found if panel.lines]


def _others(records: Sequence[RunRecord], known: set[str]) -> Iterator[tuple[str, Curve]]:
    names = dict.fromkeys(name for record in records for name in record.series if name not in known)
    for name in names:
        event, _, figure = name.partition(".")
        if any(any(series.values) for _, series in all_of(records, name)):  # never used: all zeros
            yield PREFIXES[event] + figure, Curve(name, figure, "bold" if event == "validation" else "noisy")


def _panel(title: str, curves: Sequence[Curve], records: Sequence[RunRecord]) -> Panel:
    lines = [
        _line(curve, number, place, series, records)
        for place, curve in enumerate(curves)
        for number, series in all_of(records, curve.source)
    ]
    return Panel(title, tuple(lines), _spikes(lines))


def _line(curve: Curve, number: int, place: int, series: Series, records: Sequence[RunRecord]) -> Line:
    if len(records) == 1:
        return Line(curve.label, curve.stroke, place % COLOURS, number, series)
    return Line(f"{records[number].name}: {curve.label}", curve.stroke, number % COLOURS, number, series)


def _spikes(lines: Sequence[Line]) -> bool:
    values = [value for line in lines for value in line.series.values]
    return bool(values) and min(values) > 0 and max(values) > SPIKE * statistics.median(values)
