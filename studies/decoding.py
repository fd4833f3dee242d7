"""Tokens a second at batch 1 beside transformers' own CPU decoding of the same weights, in one run, taking turns.

    python studies/decoding.py        # the M shape: width 512, 6 layers, 8,192 tokens; needs the extra `transformers`

Prints the median over rounds of each side's time a token, their ratio formed within a round, and the time that reading
every weight a token needs (all but the embedding, of which one row) takes by summing them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from protomamba import ModelConfig, Sampling, SequenceModel, generate
from protomamba.checkpoint.transformers_folder import read_transformers_folder

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 8_192,
    "state_size": 16,
    "tie_word_embeddings": False,
}
PROMPT = [1, 2, 3, 4]


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


if __name__ == "__main__":
    main()
