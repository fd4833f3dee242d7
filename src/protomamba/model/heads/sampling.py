"""Which classes a training step looks at where there are too many for all of them, before it looks at any features.

The classes of the batch themselves, which are the likely ones, and even ones to keep the rest honest; and the groups
of tokens that share a sample. What is chosen of these candidates: `proposals`. How a class's chance to be among them
enters the loss: `kernels.reference.sampled_cross_entropy`. Only `steadiness` is of size V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protomamba.kernels.prototype_loss import places


class Run(NamedTuple):
    """Consecutive tokens that have a target: so many, of the rows `rows` of a batch."""

    rows: range
    tokens: int


def groups_of(tokens_B: Sequence[int], limit: int, most_runs: int) -> list[list[Run]]:
    """The tokens of all rows in groups of at most `limit`, a group in at most `most_runs` runs of whole rows.

    A row with more tokens than the limit is several groups, each of one run; without any token there is one group.
    """
    groups: list[list[Run]] = []
    room = 0
    for run in _runs(tokens_B, -(-min(limit, sum(tokens_B)) // most_runs)):
        pieces = -(-run.tokens // limit)
        if pieces > 1:
            size = -(-run.tokens // pieces)
            groups += [[Run(run.rows, min(size, run.tokens - at))] for at in range(0, run.tokens, size)]
            room = 0
        elif run.tokens <= room:
            groups[-1].append(run)
            room -= run.tokens
        else:
            groups.append([run])
            room = limit - run.tokens
    return groups or [[Run(range(0), 0)]]


def _runs(tokens_B: Sequence[int], least: int) -> Iterator[Run]:
    """Rows joined until they have so many tokens; the last may have fewer. Rows without tokens belong to any."""
    start = tokens = 0
    for row, more in enumerate(tokens_B):
        tokens += more
        if tokens and tokens >= least:
            yield Run(range(start, row + 1), tokens)
            start, tokens = row + 1, 0
    if tokens:
        yield Run(range(start, len(tokens_B)), tokens)


def even_draws(limit: int, common: int) -> int:
    """How many of at most `limit` classes are drawn evenly beside `common` ones: half, fewer where those need room."""
    return max(1, limit // 8, min(limit // 2, limit - common))


def distinct(classes_T: Tensor) -> Tensor:
    """(U,): the distinct classes, in rising order: torch.unique, whose sort takes 3 times as long as numpy's."""
    classes_U: Tensor = torch.unique_consecutive(torch.from_numpy(np.sort(classes_T.numpy(force=True))))
    return classes_U


class Drawn(NamedTuple):
    """A sample (S,), in rising order; which shares it kept of what it was to have for certain and of the batch's other
    classes; how many even draws there were."""

    classes_S: Tensor
    own: float
    others: float
    even: int


def draw(generator: torch.Generator, own_U: Tensor, common_U: Tensor, classes: int, limit: int) -> Drawn:
    """At most `limit` of the classes: those that a group is to have, the batch's others, and even ones from all V.

    own_U, common_U: distinct classes, int64, in rising order; where they are too many a part by lot, first of
    `common_U`.
    """
    others_U = common_U[places(own_U, common_U) < 0] if len(own_U) else common_U
    even = even_draws(limit, len(own_U) + len(others_U))
    room = max(1, limit - even)
    own_K = _lot(own_U, room, generator)
    others_K = _lot(others_U, room - len(own_K), generator)
    even_E = torch.randint(classes, (even,), generator=generator)
    own, others = len(own_K) / max(1, len(own_U)), len(others_K) / max(1, len(others_U))
    return Drawn(distinct(torch.cat([own_K, others_K, even_E])), own, others, even)


def _lot(classes_U: Tensor, room: int, generator: torch.Generator) -> Tensor:
    if len(classes_U) <= room:
        return classes_U
    return classes_U[torch.randperm(len(classes_U), generator=generator)[:room]]


class Drawing(NamedTuple):
    """How a step's samples are drawn: beside how many targets, which share of their classes is kept, how many even
    draws from how many classes there are, and how many samples: each has the batch's classes and even ones of its own.
    """

    targets: int
    kept: float
    even: int
    classes: int
    groups: int = 1


class Chances(NamedTuple):
    """The chances of classes (S,), rising, that were drawn for a group to be so, given the rows of one of its runs.

    share_S: how often each class comes; tokens: of the group's rows. To be drawn a class is drawn evenly, or is in the
    group's other rows, or else in the batch's other rows, and kept.
    """

    classes_S: Tensor
    share_S: Tensor
    drawing: Drawing
    drawn: Drawn
    tokens: int

    def of_runs(self, tokens_R: Sequence[int], own_R: Sequence[Tensor]) -> Tensor:
        """(R, S) float64: the logs of the chances, by how many tokens the rows of a run have and which classes these
        have, in any order: they are certain, but for a lot."""
        rows = {tokens: self._of_others(tokens) for tokens in set(tokens_R)}
        log_chance_RS = torch.stack([rows[tokens] for tokens in tokens_R])
        certain = self._log_with_even(torch.tensor(self.drawn.own, dtype=torch.float64))
        for log_chance_S, own_T in zip(log_chance_RS, own_R, strict=True):
            place_T = places(self.classes_S, own_T)
            log_chance_S[place_T[place_T >= 0]] = certain
        return log_chance_RS

    def _of_others(self, tokens: int) -> Tensor:
        """(S,): of classes that a run's rows, with so many tokens, do not have."""
        beside_S = come(self.share_S, self.tokens - tokens)
        batch_S = come(self.share_S, self.drawing.targets - self.tokens)
        return self._log_with_even(self.drawn.own * beside_S + self.drawn.others * (1 - beside_S) * batch_S)

    def _log_with_even(self, chance: Tensor) -> Tensor:
        """Float64: the log of the chance to be in a sample, if not by an even draw then with `chance`."""
        missed = torch.log1p(-chance.clamp_max(1 - 1e-12)) + _log_missed_evenly(self.drawn.even, self.drawing.classes)
        return torch.log(-torch.expm1(missed))


def _log_missed_evenly(draws: int, classes: int) -> float:
    """The log of the chance that none of so many even draws is a given class."""
    return draws * math.log1p(-1 / classes)


def _in_batch(share_S: Tensor, drawing: Drawing) -> Tensor:
    """(S,) float64: r (1 - (1 - f)^T), the chance of a class to be in all samples of a step, below 1."""
    return (drawing.kept * come(share_S, drawing.targets)).clamp_max(1 - 1e-12)


def come(share_S: Tensor, targets: int) -> Tensor:
    """(S,) float64: 1 - (1 - f)^T, the chance of a class to be among so many targets."""
    return -torch.expm1(targets * torch.log1p(-share_S.double().clamp_max(1 - 1e-12)))


def steadiness(share_S: Tensor, drawing: Drawing) -> Tensor:
    """(S,) float64, at most 1: a class's mean gradient over its root mean square, from being sampled alone.

    As if nothing were known of a token's row or features, and classes were drawn as `draw` draws. It counts 1 / q in
    each of the G samples that have it: all with chance b, else each with chance e, so

        q = b + (1 - b) e        steadiness = q / sqrt(b + (1 - b) (e^2 + e (1 - e) / G))        (G = 1: sqrt(q))

    Adam divides by the root mean square: the steps of a class are that much shorter than if it were always seen.
    """
    b_S, e = _in_batch(share_S, drawing), -math.expm1(_log_missed_evenly(drawing.even, drawing.classes))
    seldom = e * e + e * (1 - e) / drawing.groups
    return (b_S + (1 - b_S) * e) / (b_S + (1 - b_S) * seldom).sqrt()


def key_of_group(key: int, group: int) -> int:
    """The key of a step's `group`-th sample, from 0 to 2^63 - 1: the step's own for the first."""
    return (key + group * 0x9E3779B97F4A7C15) & (2**63 - 1)
