"""From the model's answers to the fields of an output line, for each thing that can be asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from protomamba.errors import ConfigError
from protomamba.predict.batching import Array
from protomamba.predict.examples import Example
from protomamba.predict.predictor import Likelihood, Predictor

WHATS = ("items", "class", "likelihood", "embedding")


@dataclass(frozen=True)
class Question:
    """What is asked of each sequence. top_k: of items, and of a class's probabilities (None: 10 items, all classes)."""

    what: str
    top_k: int | None = None
    exclude_seen: bool = False
    per_token: bool = False


@dataclass(frozen=True)
class Names:
    """What tokens, classes and the bytes (bases) of a text are called outside; a token or class without a name is its
    number."""

    item: Callable[[int], Any] = field(default=lambda token: token)
    classes: Sequence[str] = ()
    raw_unit: str = "byte"


def answers(
    predictor: Predictor, window: Sequence[Example], question: Question, names: Names
) -> Iterator[dict[str, Any]]:
    """The fields of each example's line, in order."""
    sequences = [example.sequence for example in window]
    if question.what == "items":
        yield from _items(predictor, sequences, question, names)
    elif question.what == "class":
        yield from _classes(predictor, sequences, question, names)
    elif question.what == "likelihood":
        found = predictor.log_likelihoods(sequences, question.per_token)
        yield from (_likelihood(one, example, names.raw_unit) for one, example in zip(found, window, strict=True))
    else:
        yield from ({"embedding": _floats(vector, 9)} for vector in predictor.embeddings(sequences))


def _items(
    predictor: Predictor, sequences: Sequence[Array], question: Question, names: Names
) -> Iterator[dict[str, Any]]:
    for best in predictor.next_items(sequences, question.top_k or 10, question.exclude_seen):
        yield {"items": [names.item(token) for token in best.tokens], "scores": _floats(best.scores)}


def _classes(
    predictor: Predictor, sequences: Sequence[Array], question: Question, names: Names
) -> Iterator[dict[str, Any]]:
    for chances in predictor.class_probabilities(sequences):
        order = (-chances).argsort(kind="stable")[: question.top_k].tolist()
        called = {k: names.classes[k] if names.classes else k for k in order}
        shown = sorted(order) if question.top_k is None else order
        probabilities = {str(called[k]): _floats([chances[k]])[0] for k in shown}
        yield {
            "class": called[order[0]],
            "probability": _floats([chances[order[0]]])[0],
            "probabilities": probabilities,
        }


def _likelihood(found: Likelihood, example: Example, raw_unit: str) -> dict[str, Any]:
    bits = 0.0 - found.log_likelihood / math.log(2)  # of nothing 0, not -0
    line: dict[str, Any] = {"log_likelihood": _floats([found.log_likelihood], 9)[0], "bits": _floats([bits], 9)[0]}
    line["tokens"] = found.count
    if example.raw_bytes:
        line[f"bits_per_{raw_unit}"] = _floats([bits / example.raw_bytes])[0]
    if found.tokens is not None:
        line["token_log_likelihoods"] = [None if value is None else _floats([value])[0] for value in found.tokens]
    return line


def _floats(values: Any, digits: int = 6) -> list[float | None]:
    """So many digits of each; None for NaN and infinity, which are no JSON."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def default_question(predictor: Predictor, has_text: bool) -> str:
    """What a checkpoint is usually asked: its class, the likelihood of a text, or the next items."""
    if predictor.model.config.n_class is not None:
        return "class"
    return "likelihood" if has_text else "items"


def check_question(predictor: Predictor, question: Question) -> None:
    """ConfigError where the model cannot answer, or an option says nothing about what is asked."""
    labelled = predictor.model.config.n_class is not None
    if labelled and question.what in ("items", "likelihood"):
        raise ConfigError(f"--what {question.what}: this is a classification model; expected class or embedding")
    if not labelled and question.what == "class":
        raise ConfigError("--what class: the model predicts the next token; expected items, likelihood or embedding")
    idle = {
        "--exclude-seen": question.exclude_seen and question.what != "items",
        "--per-token": question.per_token and question.what != "likelihood",
        "--top-k": question.top_k is not None and question.what not in ("items", "class"),
    }
    for flag, given in idle.items():
        if given:
            raise ConfigError(f"{flag}: does not apply to --what {question.what}")
    if question.top_k is not None and question.top_k < 1:
        raise ConfigError(f"--top-k {question.top_k}: expected an integer >= 1")
