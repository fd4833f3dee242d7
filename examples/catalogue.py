"""Which item comes next, of a catalogue of a million: a small model beside popularity, a bigram table and softmax.

    python examples/catalogue.py                # 1,000,000 items; needs about 3 GB
    python examples/catalogue.py --items 2000 --steps 100

Items are as common as 1 / rank. What nobody is told: each belongs to a theme; a session stays with a theme for ten
items or so, takes items of it as often as they are common, and one time in four the partner of the item before. A
bigram table knows what followed each item, so of rare ones it knows little; the model sees the session. Both heads look
at 1,024 classes a step, drawn and corrected for alike, and their tables are row-sparse.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.data.baselines import Baselines
from protomamba.data.vocabulary import RESERVED
from protomamba.model.heads.ranking import ranking_figures, ranks_of_targets

ROWS, LENGTH, JUDGED = 64, 32, 500
ANOTHER, PARTNER = 0.1, 0.25  # how often a session turns to another theme, or takes the partner of the last item
HEADS = {"softmax, sampled": {"head": "softmax"}, "prototypes": {"head": "hpn"}}
SHOWN = ("hit@1", "hit@10", "ndcg@10", "mrr")
Integers = npt.NDArray[np.int64]


def sessions(items: int, rows: int, seed: int) -> Integers:
    """(rows, LENGTH + 1) tokens, RESERVED and more. Themes are the residues of an item's rank."""
    rng, themes = np.random.default_rng(seed), math.isqrt(items)
    chain = [zipf(rng, rows, np.ones(rows), items)]
    for _ in range(LENGTH):
        place, theme = np.divmod(chain[-1], themes)
        within = theme + themes * ((zipf(rng, rows, theme + 1, items) - theme) // themes)
        partner = theme + themes * (place ^ 1)
        lot = rng.random(rows)
        stays = np.where((lot < ANOTHER + PARTNER) & (partner < items), partner, within)
        chain.append(np.where(lot < ANOTHER, zipf(rng, rows, np.ones(rows), items), stays))
    return np.stack(chain, 1) + RESERVED


def zipf(rng: np.random.Generator, rows: int, first: npt.NDArray[np.generic], items: int) -> Integers:
    """(rows,): ranks from `first` - 1 on, the one of rank k with weight 1 / k."""
    drawn = first * (items / first) ** rng.random(rows)
    return np.minimum(drawn.astype(np.int64), items) - 1


def batches(items: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(steps):
        ids_BL = torch.from_numpy(sessions(items, ROWS, seed=step + 1))
        yield ids_BL[:, :-1].contiguous(), ids_BL[:, 1:].contiguous()


def train(items: int, steps: int, width: int, **head: str) -> SequenceModel:
    shape = {"vocab_size": items + RESERVED, "d_model": width, "n_layer": 1}
    model = SequenceModel(ModelConfig(**shape, **head, head_options={"sample": 1_024}), seed=0)
    rows = {"sparse_rows": True, "optimizer_option": ("row_wise_moment=1", "momentum_by_touch=1")}
    trainer = Trainer(model, TrainConfig(steps=steps, lr=5e-3, bp_cadence_steps=1, **rows))
    for inputs_BL, targets_BL in batches(items, steps):
        stats = trainer.train_step(inputs_BL, targets_BL)
        if stats.step % 100 == 0:
            print(f"  {head['head']}: step {stats.step:,}, loss {stats.loss:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def judge(model: SequenceModel, held_out: Integers) -> dict[str, float]:
    """Figures over the last item of each session, ranked among all."""
    ids_BL = torch.from_numpy(held_out)
    z_BLD, _ = model.features(ids_BL[:, :-1])
    return ranking_figures(ranks_of_targets(model.head, z_BLD[:, -1:], ids_BL[:, -1:], range(RESERVED)))


def baselines(items: int, steps: int, held_out: Integers) -> dict[str, dict[str, float]]:
    """Popularity and the bigram table, counted on what the models are trained on."""
    size = items + RESERVED
    seen = [(inputs.flatten().numpy(), targets.flatten().numpy()) for inputs, targets in batches(items, steps)]
    previous, targets = (np.concatenate(part) for part in zip(*seen, strict=True))
    counted = Baselines(np.bincount(targets, minlength=size), *np.unique(previous * size + targets, return_counts=True))
    ranks = counted.ranks(held_out[:, -2], held_out[:, -1])
    names = {"popularity": "popularity", "last_item": "bigram table"}
    return {names[name]: ranking_figures(torch.from_numpy(each)) for name, each in ranks.items()}


def compare(items: int, steps: int, width: int = 64, judged: int = JUDGED) -> dict[str, dict[str, float]]:
    """Ranking figures by name, and the processor seconds of training."""
    held_out = sessions(items, judged, seed=0)
    found = baselines(items, steps, held_out)
    for name, head in HEADS.items():
        started = time.process_time()
        model = train(items, steps, width, **head)
        seconds = time.process_time() - started
        found[name] = {**judge(model, held_out), "seconds": seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=2_500, help=f"of {ROWS} sessions of {LENGTH} items")
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    print("| | " + " | ".join(SHOWN) + " | training, s |\n" + "|---" * (len(SHOWN) + 2) + "|")
    for name, figures in compare(given.items, given.steps, given.width).items():
        seconds = f"{figures['seconds']:.0f}" if "seconds" in figures else ""
        print(f"| {name} | " + " | ".join(f"{figures[key]:.3f}" for key in SHOWN) + f" | {seconds} |")


if __name__ == "__main__":
    main()
