"""Decoding: a batch of prompts is continued token by token through the recurrent kernels.

In memory that does not grow with the text, but for attention layers, which keep keys and values of the document so far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protomamba.config import Sampling
from protomamba.errors import ConfigError
from protomamba.kernels.packed import check_weights
from protomamba.model.sequence_model import ModelState, SequenceModel

PREFILL_CHUNK = 1_024
TINY_TEMPERATURE = 1e-30
OnToken = Callable[[list[int]], Collection[int] | None]


@torch.no_grad()
def generate(
    model: SequenceModel,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    sampling: Sampling | None = None,
    stop_token: int | None = None,
    on_token: OnToken | None = None,
    weights: str = "fp32",
) -> list[list[int]]:
    """The tokens that follow each prompt, at most `sampling.max_tokens`, without `stop_token`, which ends a sequence.

    prompts: lists or tensors of tokens, of any lengths, or one int64 tensor (B, L). Dropout is off meanwhile.
    on_token: called after each position with the new token of every prompt (-1 where a sequence has ended); it may
    return the numbers of prompts that are to end behind this token.
    weights: "fp32", "bf16" or "int8": what the matrices are read in after the prompts (`SequenceModel.make_decode_fn`);
    `weights_loss` tells what that costs in accuracy.
    Raises ConfigError for an empty prompt, a token the model does not know, or other weights.
    """
    check_weights(weights)
    sampling, prompts = sampling or Sampling(), as_lists(prompts)
    check_prompts(model, prompts)
    if not prompts:
        return []
    with evaluating(model):
        z_BD, state = prefill(model, prompts)
        logits_BV, advance = model.head.next_logits(z_BD), model.make_decode_fn(state, weights)
        return _continue(logits_BV, advance, sampling, stop_token, on_token)


def _continue(
    logits_BV: Tensor,
    advance: Callable[[Tensor], Tensor],
    sampling: Sampling,
    stop_token: int | None,
    on_token: OnToken | None,
) -> list[list[int]]:
    """The tokens drawn from `logits_BV` on; `advance` gives the logits after each."""
    generator = torch.Generator().manual_seed(sampling.seed)
    outputs: list[list[int]] = [[] for _ in logits_BV]
    alive = [True] * len(outputs)
    for position in range(sampling.max_tokens):
        next_B = choose(logits_BV, sampling, generator)
        tokens = next_B.tolist()
        for row, token in enumerate(tokens):
            alive[row] = alive[row] and token != stop_token
            if alive[row]:
                outputs[row].append(token)
        if on_token:
            for row in on_token([token if alive[row] else -1 for row, token in enumerate(tokens)]) or ():
                alive[row] = False
        if not any(alive) or position == sampling.max_tokens - 1:
            break
        logits_BV = advance(next_B)
    return outputs


@dataclass(frozen=True)
class WeightsLoss:
    """What rounded weights cost on one text: `tokens` scored, bits a token with float32 weights and with the rounded
    ones, and the largest difference between their log-probabilities of any next token (nats)."""

    weights: str
    tokens: int
    bits_fp32: float
    bits: float
    largest: float

    def __str__(self) -> str:
        return (
            f"weights {self.weights}: {self.bits:.3f} bits per token instead of {self.bits_fp32:.3f} "
            f"on {self.tokens} tokens, log-probabilities off by at most {self.largest:.2g}"
        )


@torch.no_grad()
def weights_loss(model: SequenceModel, prompt: Sequence[int], weights: str, tokens: int = 64) -> WeightsLoss:
    """Decodes the end of the prompt, at most `tokens` of it, with float32 and with rounded weights side by side.

    A shorter prompt is continued greedily by the float32 weights, so that there is something to score.
    """
    check_prompts(model, [prompt])
    text = [
        *prompt,
        *generate(model, [prompt], Sampling(max_tokens=max(1, tokens + 2 - len(prompt)), temperature=0))[0],
    ]
    start = len(text) - tokens - 1
    _, state = prefill(model, [text[:start]])
    exact = model.make_decode_fn([layer and tuple(x.clone() for x in layer) for layer in state])
    rounded = model.make_decode_fn(state, weights)
    bits, largest = torch.zeros(2), 0.0
    for token, target in itertools.pairwise(text[start:]):
        scores_2V = torch.cat([decode(torch.tensor([token])) for decode in (exact, rounded)]).log_softmax(-1)
        bits -= scores_2V[:, target] / math.log(2)
        largest = max(largest, float((scores_2V[0] - scores_2V[1]).abs().max()))
    scored = len(text) - start - 1
    bits_fp32, bits_rounded = (bits / scored).tolist()
    return WeightsLoss(weights, scored, bits_fp32, bits_rounded, largest)


def as_lists(prompts: Sequence[Sequence[int] | Tensor] | Tensor) -> list[list[int]]:
    """Prompts, in any form that `generate` accepts, as lists of tokens."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ConfigError(f"prompts: expected a tensor (B, L) or a list of prompts, got shape {tuple(prompts.shape)}")
    return [prompt.tolist() if isinstance(prompt, Tensor) else list(map(int, prompt)) for prompt in prompts]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards each module has its previous mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_prompts(model: SequenceModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError for a prompt that is empty or has a token outside the vocabulary, and for labels."""
    vocab_size = model.config.vocab_size
    if model.config.classes != vocab_size:
        raise ConfigError(f"generate: this is a {model.config.classes}-class model, it does not predict tokens")
    for number, prompt in enumerate(prompts):
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if not prompt or wrong:
            found = f"token {wrong[0]}" if wrong else "nothing"
            raise ConfigError(f"prompt {number}: expected tokens from 0 to {vocab_size - 1}, found {found}")


def prefill(model: SequenceModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, ModelState]:
    """z (B, D) after the last token of each prompt and the states there, stacked; long prompts run in chunks.

    In float32 like the steps after it, also where the model was trained with products in bf16.
    """
    ends, states = [], []
    for prompt in prompts:
        state: ModelState | None = None
        for start in range(0, len(prompt), PREFILL_CHUNK):
            tokens_1L = torch.tensor([list(prompt[start : start + PREFILL_CHUNK])])
            z_1LD, state = model.features(tokens_1L, state=state, return_state=True, precision="fp32")
        ends.append(z_1LD[:, -1])
        assert state is not None
        states.append(state)
    return torch.cat(ends), model.stack_states(states)


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """int64 (B,): the next token of each row, by temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # Where float32 would take the temperature, or a logit over it, for 0 or infinity.
    logits_BV = logits_BV.double() if sampling.temperature < TINY_TEMPERATURE else logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        probabilities_BV = _nucleus(probabilities_BV, sampling.top_p)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def _nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that reaches `top_p`; the others get 0."""
    ordered_BV, index_BV = probabilities_BV.sort(-1, descending=True)
    before_BV = ordered_BV.cumsum(-1) - ordered_BV
    return torch.zeros_like(probabilities_BV).scatter(-1, index_BV, ordered_BV.masked_fill(before_BV >= top_p, 0.0))
