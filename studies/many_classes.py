"""What a training step costs at a million classes beside 8,192: the two take turns in one process, one thread.

    python studies/many_classes.py [--classes 8192,1000000] [--width 512 --layers 6] [--turns 9] [--row-wise 1]

Body M (8 x 64 tokens), tokens by Zipf's law over all classes, hpn head. Prints milliseconds a step, their median ratio
with the smallest and largest, and what of a checkpoint the model and its moments take.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer

STEPS = 5  # of one turn


def zipf(classes: int, rows: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    """Tokens (rows, length) whose k-th commonest comes with weight 1 / k."""
    drawn = np.exp(generator.random((rows, length)) * np.log(classes)).astype(np.int64) - 1
    return torch.from_numpy(np.clip(drawn, 0, classes - 1))


def trainer(classes: int, width: int, layers: int, row_wise: int) -> Trainer:
    model = SequenceModel(ModelConfig(vocab_size=classes, d_model=width, n_layer=layers), seed=0)
    return Trainer(model, TrainConfig(steps=10**6, lr=1e-3, optimizer_option=(f"row_wise_moment={row_wise}",)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="8192,1000000")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--row-wise", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in options.classes.split(",")]
    trainers = {size: trainer(size, options.width, options.layers, options.row_wise) for size in sizes}
    generators = {size: np.random.default_rng(0) for size in sizes}
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(options.turns + 1):
        for size in sizes:
            ids = [zipf(size, 8, 65, generators[size]) for _ in range(STEPS)]
            started = time.process_time()
            for each in ids:
                trainers[size].train_step(each[:, :-1].contiguous(), each[:, 1:].contiguous())
            if turn:  # the first warms up
                taken[size].append(1e3 * (time.process_time() - started) / STEPS)
    for size in sizes:
        each = trainers[size]
        slots = sum(
            x.numel() * x.element_size() for s in each.parts()["optimizer"]["moments"].values() for x in s.values()
        )
        weights = sum(x.numel() * x.element_size() for x in each.model.state_dict().values())
        sparse = ", ".join(each.rows.tables) or "none"
        print(
            f"{size:>9,} classes: {statistics.median(taken[size]):7.1f} ms a step of processor time; weights "
            f"{weights / 2**20:,.0f} MiB, moments {slots / 2**20:,.0f} MiB; row-sparse: {sparse}"
        )
    ratios = [b / a for a, b in zip(taken[sizes[0]], taken[sizes[-1]], strict=True)]
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
