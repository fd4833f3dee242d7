"""How far the mean gradient of the sampled cross entropy is from that over all classes, for docs/prototypes.md.

    python studies/sample_bias.py

50 classes as common as 1/rank, 16 targets a batch; z at a cosine of about 0.7 to its prototype, prototypes at random,
s = 8. Every draw takes a new batch and a new sample, and the gradients of all classes and of the sample of that batch;
what is compared are their means over the draws. `noise` is the standard error of the distance, which the bias has to
exceed to be seen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protomamba.config import ModelConfig
from protomamba.kernels import Sample, grouped_prototype_loss, separated_prototype_loss
from protomamba.model.heads import HyperspherePrototypes

CLASSES, WIDTH, TARGETS, SHARPNESS = 50, 16, 16, 8.0


def gradients(head: HyperspherePrototypes, z_TD: Tensor, targets_T: Tensor, samples: Sequence[Sample] = ()) -> Tensor:
    """Of the prototypes and of log s, as one vector."""
    given = z_TD, head.prototypes, head.log_scale, targets_T
    loss = grouped_prototype_loss(*given, samples) if samples else separated_prototype_loss(*given)
    found = torch.autograd.grad(loss, [head.prototypes, head.log_scale])
    return torch.cat([gradient.flatten().double() for gradient in found])


def bias(sample: int, draws: int) -> tuple[float, float, float]:
    """|mean sampled - mean full| / |mean full| of the prototypes, its noise, and the same (signed) of log s."""
    torch.manual_seed(0)
    head = HyperspherePrototypes(ModelConfig(vocab_size=CLASSES, d_model=WIDTH, head_options={"sample": sample}))
    share_V = 1.0 / torch.arange(1, CLASSES + 1)
    head.set_frequencies((1e6 * share_V).long())
    with torch.no_grad():
        head.prototypes.copy_(torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH), dim=-1))
        head.log_scale.fill_(math.log(SHARPNESS))
    size = CLASSES * WIDTH + 1
    full, off, squares = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for key in range(draws):
        targets_T = torch.multinomial(share_V, TARGETS, replacement=True)
        z_TD = head.prototypes.detach()[targets_T] + torch.randn(TARGETS, WIDTH) / math.sqrt(WIDTH)
        exact = gradients(head, z_TD, targets_T)
        difference = gradients(head, z_TD, targets_T, head.draw(key, z_TD, targets_T)) - exact
        full, off, squares = full + exact / draws, off + difference / draws, squares + difference.square() / draws
    noise = float(((squares - off.square())[:-1].sum() / draws).sqrt())
    length = float(full[:-1].norm())
    return float(off[:-1].norm()) / length, noise / length, float(off[-1] / full[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="8,16,24,32,40")
    parser.add_argument("--draws", type=int, default=20_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| sample of 50 | off in the prototypes | noise of that | off in log s |", "|---|---|---|---|", sep="\n")
    for sample in (int(s) for s in given.samples.split(",")):
        prototypes, noise, scale = bias(sample, given.draws)
        print(f"| {sample} | {prototypes:.4f} | {noise:.4f} | {scale:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
