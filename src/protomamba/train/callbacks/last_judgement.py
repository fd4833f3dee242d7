"""What a run's best model is worth by the measures of its task, and what it writes: told once, at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from protomamba.checkpoint import file as checkpoint
from protomamba.config import Sampling
from protomamba.data.tokenizer import Tokenizer, tokenizer_from_json
from protomamba.data.windows import Batch
from protomamba.decode import generate
from protomamba.model.pretrained import build_model
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.callbacks.base import Callback
from protomamba.train.inputs import Held, Inputs
from protomamba.train.judging import judge

if TYPE_CHECKING:
    from protomamba.train.run import Run

# Ranks look at every class for every target: so many of both at most.
MOST_SCORES = 4_000_000_000
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 160
SAMPLED = 4  # batches that are timed beyond the first


class LastJudgement(Callback):
    """Logs `ranking` or `classification` of the validation batches, and for text a `sample`, of the best model."""

    name = "last_judgement"

    def __init__(self, inputs: Inputs, validation: Held) -> None:
        self.inputs, self.validation = inputs, validation
        self._trained = False

    def on_step(self, run: Run, stats: object) -> None:
        self._trained = True

    def on_finish(self, run: Run, reason: str) -> None:
        if not self._trained or reason == "signal":
            return  # judged before, or in a hurry
        try:
            self._judge(run)
        except Exception as error:  # the run itself is over and saved: its exit code must not depend on a table
            run.warn(f"the best model was not evaluated: {type(error).__name__}: {error}")

    def seconds(self, model: SequenceModel) -> float:
        """What the judgement of such a model takes, extrapolated from its first batches. Nothing is logged."""
        batches = list(self._batches(model))
        one, few = (self._timed(model, batches[:count]) for count in (1, 1 + SAMPLED))
        each = max(0.0, few - one) / max(1, min(SAMPLED, len(batches) - 1))
        return one + each * (len(batches) - 1)

    def _timed(self, model: SequenceModel, batches: Sequence[Batch]) -> float:
        started = time.perf_counter()
        for _ in self._lines(model, batches):
            pass
        return time.perf_counter() - started

    def _judge(self, run: Run) -> None:
        model = _best_model(run)
        for event, fields in self._lines(model, self._batches(model)):
            run.log(event, **fields)

    def _lines(self, model: SequenceModel, batches: Iterable[Batch]) -> Iterator[tuple[str, dict[str, Any]]]:
        info = self.validation.source.info
        tokenizer = tokenizer_from_json(self.inputs.tokenizer) if self.inputs.tokenizer else None
        writes = tokenizer is not None and info.n_class is None
        if info.n_class is None and info.preset != "events" and not writes:
            return
        found = judge(model, batches, info, self.inputs.training)
        yield from found.lines().items()
        if tokenizer is not None and writes:
            yield "sample", self._sample(model, tokenizer)

    def _batches(self, model: SequenceModel) -> Held:
        """Those of a validation, fewer where there are very many classes."""
        spec, count = self.validation.spec, self.validation.count
        most = max(1, MOST_SCORES // (model.config.classes * spec.batch_size * spec.seq_len))
        return Held(self.validation.source, spec, most if count is None else min(count, most))

    def _sample(self, model: SequenceModel, tokenizer: Tokenizer) -> dict[str, str]:
        """What follows the beginning of the first held-out batch."""
        prompt = next(iter(self.validation)).tokens_BL[0, :PROMPT_TOKENS].tolist()
        (tokens,) = generate(model, [prompt], Sampling(max_tokens=SAMPLE_TOKENS), tokenizer.eos_token)
        return {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(tokens)}


def _best_model(run: Run) -> SequenceModel:
    """The one in hand if it is the best; that of the file else."""
    best, folder = run.best.best_step, run.folder
    if folder is None or best in (None, run.trainer.global_step) or not folder.best.is_file():
        return run.trainer.model
    return build_model(checkpoint.load(folder.best))
