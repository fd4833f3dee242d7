"""What a confusion matrix says of each class and of all: one owner of these figures, for page, terminal, trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClassFigures:
    """One class: its share of right answers among those given it (precision) and among its own (recall).

    count: sequences of the class; given: sequences that were predicted to be of it.
    """

    name: str
    precision: float
    recall: float
    f1: float
    count: int
    given: int


def class_figures(event: Mapping[str, Any]) -> list[ClassFigures]:
    """Of each class of a `classification` line; 0 where nothing was predicted to be of it or nothing was."""
    counts = event["confusion"]
    given = [sum(column) for column in zip(*counts, strict=True)]
    return [_figures(str(name), counts[i][i], sum(counts[i]), given[i]) for i, name in enumerate(event["classes"])]


def _figures(name: str, right: int, count: int, given: int) -> ClassFigures:
    f1 = 2 * right / (given + count) if given + count else 0.0
    return ClassFigures(name, right / max(1, given), right / max(1, count), f1, count, given)


def macro_f1(found: Sequence[ClassFigures]) -> float:
    """The mean F1 of the classes that occur among the true or the predicted ones, as scikit-learn's macro average."""
    present = [one.f1 for one in found if one.count or one.given]
    return sum(present) / max(1, len(present))


def accuracy(event: Mapping[str, Any]) -> float:
    """Share of the sequences whose class was predicted."""
    counts: list[list[int]] = event["confusion"]
    return sum(row[i] for i, row in enumerate(counts)) / max(1, sum(map(sum, counts)))
