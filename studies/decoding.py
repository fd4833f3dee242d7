"""Tokens a second at batch 1 beside transformers' own CPU decoding of the same weights, in one run, taking turns.

    python studies/decoding.py        # the M shape: width 512, 6 layers, 8,192 tokens; needs the extra `transformers`

Prints the median over rounds of each side's time a token, their ratio formed within a round, and the time that reading
every weight a token needs (all but the embedding, of which one row) takes by summing them. Then ours alone, by what the
matrices are read in and by the number of prompts, and a long prompt beside the forward pass of training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from protomamba import ModelConfig, Sampling, SequenceModel, generate
from protomamba.bench.timing import interleave
from protomamba.checkpoint.transformers_folder import read_transformers_folder
from protomamba.decode import prefill
from protomamba.kernels.packed import WEIGHTS

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 8_192,
    "state_size": 16,
    "tie_word_embeddings": False,
}
PROMPT = [1, 2, 3, 4]
BATCHES = (1, 8, 32)
# Tokens in one turn, and readings: tokens follow one another, so that what fits the caches stays there, for both.
TURN = 16


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def both(folder: str) -> tuple[SequenceModel, MambaForCausalLM]:
    """One random set of weights in both programs."""
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(**SHAPE)).eval()
    theirs.save_pretrained(folder)
    fields, state = read_transformers_folder(Path(folder))
    ours = SequenceModel(ModelConfig(**{**fields, "head": "softmax"}))
    ours.load_state_dict(state)
    return ours.eval(), theirs


def decoding(model: SequenceModel, weights: str, batch: int) -> Callable[[], object]:
    """TURN positions of `batch` prompts, one after another."""
    _, state = prefill(model, [PROMPT] * batch)
    advance, tokens_B = model.make_decode_fn(state, weights), torch.full((batch,), 5)
    return repeated(lambda: advance(tokens_B))


def repeated(work: Callable[[], object]) -> Callable[[], object]:
    """TURN calls of it."""

    def turn() -> None:
        for _ in range(TURN):
            work()

    return turn


def by_weights(model: SequenceModel, read: Tensor, rounds: int) -> None:
    """A line for each kind of weights: time, against float32, against reading as many bytes; and what batches gain."""
    model.requires_grad_(False)
    runs = {f"{w}@{b}": decoding(model, w, b) for w in WEIGHTS for b in BATCHES}
    parts = {w: read[: read.numel() // part].clone() for w, part in zip(WEIGHTS, (1, 2, 4), strict=True)}
    runs |= {f"read {w}": repeated(part.sum) for w, part in parts.items()}
    samples = interleave(runs, rounds)
    for w in WEIGHTS:
        gains = ", ".join(
            f"{b} prompts {b * samples.ratio(f'{w}@1', f'{w}@{b}').median:.1f} x "
            f"({b * samples.ratio('fp32@1', f'{w}@{b}').median:.1f} x of fp32's one)"
            for b in BATCHES[1:]
        )
        print(
            f"{w:13} {1e3 * samples.median(f'{w}@1') / TURN:.2f} ms a token, "
            f"{samples.ratio('fp32@1', f'{w}@1').median:.2f} x fp32, "
            f"{samples.ratio(f'read {w}', f'{w}@1').median:.0%} of reading its bytes; {gains}"
        )


def long_prompt(model: SequenceModel, rounds: int) -> None:
    """Tokens a second of a prompt of 4,096 tokens, beside the forward pass of a training step of as many."""
    tokens_BL = torch.randint(SHAPE["vocab_size"], (4, 1_024))
    model.requires_grad_(True)
    runs = {
        "prefill": lambda: prefill(model, [tokens_BL.flatten().tolist()]),
        "training": lambda: model.features(tokens_BL),
    }
    samples = interleave(runs, rounds)
    speed = tokens_BL.numel() / samples.median("prefill")
    share = samples.ratio("training", "prefill").median
    print(f"long prompt   {speed:,.0f} tokens/s, {share:.2f} of training's forward pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = both(folder)
    greedy = Sampling(max_tokens=options.tokens, temperature=0)
    prompt_1L = torch.tensor([PROMPT])
    read = torch.cat([p.detach().flatten() for n, p in ours.named_parameters() if n != "embedding.weight"])

    def their_tokens() -> list[int]:
        length = options.tokens
        with torch.no_grad():
            out = theirs.generate(prompt_1L, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        return out[0, len(PROMPT) :].tolist()

    def our_tokens() -> list[int]:
        return generate(ours, [PROMPT], greedy)[0]

    assert our_tokens() == their_tokens(), "the two programs decode different tokens"
    rounds = [(seconds(our_tokens), seconds(their_tokens), seconds(read.sum)) for _ in range(options.rounds)]
    mine, others, reading = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b, _ in rounds)
    print(f"protomamba    {1e3 * mine / options.tokens:.2f} ms a token, {options.tokens / mine:,.0f} tokens/s")
    print(f"transformers  {1e3 * others / options.tokens:.2f} ms a token, {options.tokens / others:,.0f} tokens/s")
    print(f"ratio         {ratio:.1f} (median of {options.rounds} rounds, {options.threads} thread(s), same tokens)")
    print(f"weights once  {1e3 * reading:.2f} ms ({read.numel():,} float32)")
    by_weights(ours, read, options.rounds)
    long_prompt(ours, options.rounds)


if __name__ == "__main__":
    main()
