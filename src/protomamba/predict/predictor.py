"""`Predictor`: predictions for many sequences, in order and in constant memory, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.errors import ConfigError
from protomamba.kernels import Judging, judge_block
from protomamba.model.heads.many import BLOCK_SCORES
from protomamba.model.inputs import VectorInput
from protomamba.model.pretrained import build_model
from protomamba.model.sequence_model import SequenceModel
from protomamba.predict.batching import Array, run, windows

Answer = TypeVar("Answer")
# Logits that are summed up while they are still in the processor's cache; of so many tokens at least, if memory allows.
CACHED_LOGITS, TOKENS_AT_LEAST = 1 << 19, 256
Sequences = Iterable[Sequence[int] | Array]


@dataclass(frozen=True)
class NextItems:
    """The most likely tokens after a sequence, best first, with their probabilities among all that may be offered.

    Where a head has no probabilities, `scores` are its own.
    """

    tokens: list[int]
    scores: list[float]


@dataclass(frozen=True)
class Likelihood:
    """Sum over the `count` tokens that have one before them; nats, base e.

    `tokens`: each one's, if asked for, None for a reserved one (an unknown base), which is never a target.
    """

    log_likelihood: float
    count: int
    tokens: list[float | None] | None = None


class Predictor:
    """Predictions of a trained model for many sequences.

    model: in evaluation mode from here on. reserved: tokens that are never offered. Sequences are lists of tokens, or
    arrays: int64 (L,), or float32 (L, C) for a model of measured values; of at least one step, or ConfigError names the
    first that is not. Answers come in the order of the sequences; about four thousand are worked on at once.
    """

    def __init__(self, model: SequenceModel, reserved: Collection[int] = ()) -> None:
        self.model = model.eval()
        self.reserved = sorted(reserved)

    @property
    def channels(self) -> int | None:
        """Values per step; None for a model of tokens."""
        part = self.model.embedding
        return part.options.channels if isinstance(part, VectorInput) else None

    @classmethod
    def from_checkpoint(cls, path: str | Path, reserved: Collection[int] = ()) -> Predictor:
        """The model of a checkpoint. UserError if it is damaged."""
        return cls(build_model(checkpoint.load(Path(path))), reserved)

    def next_items(self, sequences: Sequences, top_k: int = 10, exclude_seen: bool = False) -> Iterator[NextItems]:
        """The top_k most likely next tokens; exclude_seen: leave out those already in the sequence."""
        if top_k < 1:
            raise ConfigError(f"top_k {top_k}: expected an integer >= 1")

        def answers(window: Sequence[Array]) -> list[NextItems]:
            seen = window if exclude_seen else None
            return self._best(self._last(window), top_k, seen)

        return self._answers(sequences, answers)

    def class_probabilities(self, sequences: Sequences) -> Iterator[npt.NDArray[np.float32]]:
        """float32 (classes,): the probability of each class after the whole sequence."""
        return self._answers(sequences, lambda window: list(self._probabilities(self._last(window)).numpy()))

    def log_likelihoods(self, sequences: Sequences, per_token: bool = False) -> Iterator[Likelihood]:
        """The log-likelihood of each sequence: of every token given those before it, except the first."""
        return self._answers(sequences, lambda window: self._likelihoods(window, per_token))

    def embeddings(self, sequences: Sequences) -> Iterator[npt.NDArray[np.float32]]:
        """float32 (d_model,): what the head sees after the last step."""
        return self._answers(sequences, lambda window: list(self._last(window).numpy()))

    def _answers(self, sequences: Sequences, work: Callable[[Sequence[Array]], list[Answer]]) -> Iterator[Answer]:
        for window in windows(self._checked(sequences), len):
            yield from work(window)

    def _checked(self, sequences: Sequences) -> Iterator[Array]:
        for number, sequence in enumerate(sequences):
            array = sequence if isinstance(sequence, np.ndarray) else np.asarray(sequence, dtype=np.int64)
            wrong = wrong_step(array, self.model.config.vocab_size, self.channels)
            if wrong:
                raise ConfigError(f"sequence {number}: {wrong}")
            yield array

    @torch.no_grad()
    def _last(self, window: Sequence[Array]) -> Tensor:
        """z (rows, D) at the last step of each sequence."""
        found = torch.empty(len(window), self.model.config.d_model)
        for chunk in run(self.model, window):
            for row, z_D in chunk.last():
                found[row] = z_D
        return found

    @torch.no_grad()
    def _probabilities(self, z_TD: Tensor) -> Tensor:
        return torch.cat([self._logits(z_RD).softmax(-1) for z_RD in self.model.head.blocks(z_TD)])

    @torch.no_grad()
    def _best(self, z_TD: Tensor, top_k: int, seen: Sequence[Array] | None) -> list[NextItems]:
        found: list[NextItems] = []
        for z_RD in self.model.head.blocks(z_TD):
            scores_RV = self._offered(z_RD)
            for row, sequence in enumerate(seen[len(found) : len(found) + len(z_RD)] if seen else ()):
                scores_RV[row, torch.from_numpy(sequence)] = -torch.inf
            best = scores_RV.topk(min(top_k, scores_RV.shape[1]))
            for scores, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                kept = [(token, score) for token, score in zip(tokens, scores, strict=True) if score > -torch.inf]
                found.append(NextItems([token for token, _ in kept], [score for _, score in kept]))
        return found

    def _offered(self, z_RD: Tensor) -> Tensor:
        """Probabilities among the tokens that may be offered (or scores), -inf for the others."""
        logits_RV = self.model.head.logits(z_RD[:, None])
        scores_RV = (self.model.head.scores(z_RD[:, None]) if logits_RV is None else logits_RV)[:, 0].float()
        scores_RV[:, self.reserved] = -torch.inf
        if logits_RV is not None:
            scores_RV = scores_RV.softmax(-1)
            scores_RV[:, self.reserved] = -torch.inf
        return scores_RV

    @torch.no_grad()
    def _likelihoods(self, window: Sequence[Array], per_token: bool) -> list[Likelihood]:
        logs = [np.zeros(len(sequence) - 1) for sequence in window]
        judged = [np.zeros(len(sequence) - 1, dtype=bool) for sequence in window]
        reserved = torch.tensor(self.reserved, dtype=torch.int64)
        for chunk in run(self.model, window):
            judged_BL = chunk.has_next() & ~torch.isin(chunk.next_BL, reserved)
            # Of padding too: the number of rows of a product that is another each time would cost memory each time.
            found_T = self._log_likelihoods(chunk.z_BLD.flatten(0, 1), chunk.next_BL.flatten())
            found_BL = torch.where(judged_BL, found_T.view(judged_BL.shape), 0.0)
            for row, found_L, judged_L in zip(chunk.rows, found_BL.numpy(), judged_BL.numpy(), strict=True):
                steps = slice(chunk.start, chunk.start + len(found_L))
                count = len(logs[row][steps])  # what is behind is padding
                logs[row][steps], judged[row][steps] = found_L[:count], judged_L[:count]
        return [_likelihood(*one, per_token) for one in zip(logs, judged, strict=True)]

    def _log_likelihoods(self, z_TD: Tensor, targets_T: Tensor) -> Tensor:
        """float64 (T,), in nats."""
        found = [torch.empty(0, dtype=torch.float64)]
        classes = self.model.head.classes
        rows = max(1, min(BLOCK_SCORES // classes, max(TOKENS_AT_LEAST, CACHED_LOGITS // classes)))
        for z_RD, targets_R in zip(torch.split(z_TD, rows), torch.split(targets_T, rows), strict=True):
            logits_RV = self._logits(z_RD)
            own_R = logits_RV.gather(1, targets_R[:, None])[:, 0]
            log_sum_R = torch.empty(len(z_RD), dtype=torch.float64)
            judge_block(logits_RV, 0, Judging(log_sum_T=log_sum_R))
            found.append(own_R.double() - log_sum_R)
        return torch.cat(found)

    def _logits(self, z_RD: Tensor) -> Tensor:
        """float32 (R, classes). ConfigError where the head has no probabilities."""
        logits_RV = self.model.head.logits(z_RD[:, None])
        if logits_RV is None:
            raise ConfigError(f"predict: {type(self.model.head).__name__} has no probabilities, only scores")
        return logits_RV[:, 0].float()


def _likelihood(logs_L: npt.NDArray[np.float64], judged_L: npt.NDArray[np.bool_], per_token: bool) -> Likelihood:
    tokens = None
    if per_token:
        tokens = [log if judged else None for log, judged in zip(logs_L.tolist(), judged_L.tolist(), strict=True)]
    return Likelihood(float(logs_L.sum()), int(judged_L.sum()), tokens)


def wrong_step(sequence: Array, vocab_size: int, channels: int | None = None) -> str | None:
    """What is wrong with a sequence for a model with this vocabulary (or these channels of values), or None."""
    if not len(sequence):
        return "expected at least one step, found none"
    if channels is not None and sequence.shape[1:] != (channels,):
        found = f"{sequence.shape[1]} channels" if sequence.ndim == 2 else "tokens"
        return f"expected {channels} channels of values, found {found}"
    if channels is None and sequence.ndim != 1:
        return f"expected tokens, found {sequence.ndim} dimensions"
    if channels is None:
        if sequence.dtype.kind not in "iu":
            return f"expected integers, found {sequence.dtype}"
        if sequence.min() < 0 or sequence.max() >= vocab_size:
            place = int(((sequence < 0) | (sequence >= vocab_size)).argmax())
            return f"token {sequence[place]} at place {place + 1}: expected 0 to {vocab_size - 1}"
    return None
