"""Every CPU level beside the one below it: single ops, taking turns in one run.

    python studies/levels.py        # make levels

Prints seconds of the level below / seconds of the level, medians over rounds: none may be below 1 by more than what the
machine's noise explains. One thread, processor time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from protomamba import ModelConfig, SequenceModel, kernels
from protomamba.bench.timing import interleave
from protomamba.kernels import native
from protomamba.kernels.cases import CASES, Sizes
from protomamba.kernels.packed import WEIGHTS

SIZES = Sizes(B=4, L=128, D=256, E=512, N=16, R=16, V=1_024, S=512)
SHOWN = ("selective_scan", "causal_conv", "rms_norm", "prototype_loss")
Run = Callable[[], object]


def trained(name: str) -> Run:
    """Forward and backward of one op."""
    case = CASES[name]
    inputs = case.wanting(case.inputs(SIZES, without=case.carried))
    wanted = [x for x in inputs.values() if x.requires_grad]

    def run() -> object:
        outputs = case.call(kernels, inputs)
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

    return run


def decoded(weights: str) -> Run:
    """One token of a model whose weights stay in the second-level cache, so that arithmetic is what is timed."""
    model = SequenceModel(ModelConfig(vocab_size=64, d_model=256, n_layer=1), seed=0)
    with torch.no_grad():
        _, state = model.features(torch.tensor([[1, 2]]), return_state=True)
        advance, token = model.make_decode_fn(state, weights), torch.tensor([3])
    return lambda: advance(token)


def at(level: str, run: Run) -> Run:
    """`run` with every op at this level."""

    def there() -> None:
        native.set_level(level)
        run()

    return there


def runs(levels: list[str]) -> dict[str, Run]:
    """Every op at every level, by `op@level`."""
    found = {}
    for level in levels:
        native.set_level(level)  # a decoder keeps the library it was made with
        ops = {op: trained(op) for op in SHOWN}
        ops |= {f"decode {weights}": decoded(weights) for weights in WEIGHTS}
        found |= {f"{op}@{level}": at(level, run) for op, run in ops.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    levels = native.levels()
    samples = interleave(runs(levels), options.rounds, clock="cpu")
    for high, low in itertools.pairwise(levels):
        names = [name.partition("@")[0] for name in samples.seconds if name.endswith(f"@{high}")]
        ratios = [f"{name} {samples.ratio(f'{name}@{low}', f'{name}@{high}').median:.2f}" for name in names]
        print(f"{low} / {high}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
