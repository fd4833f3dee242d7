"""Handwritten digits read as 64 steps: five-fold accuracy of a small model with the hyperspherical-prototype head.

    python examples/digits.py                # one to two minutes on two cores; needs the extra `examples`
    python examples/digits.py --write DIR    # the same sequences and labels as files for --label-file

scikit-learn's digits (1,797 images of 8 x 8 pixels, values 0 to 16; Alpaydin & Kaynak 1998) are read pixel by pixel in
the order of the rows; a token is a pixel's value, so where it stands is for the model to count. Two compact layers of
width 96; ten prototypes that start as the corners of a simplex and are learned. Training images are shown with noise:
dark pixels up to NOISE lighter or darker, a share DROPPED of the pixels white, a share SHIFTED of the images moved by a
pixel; their label stands at each of the last LABELLED steps. A held-out image is shown as it is and judged at its last
step alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer

FOLDS, EPOCHS, BATCH = 5, 75, 64
SIDE, STEPS, VALUES = 8, 64, 17
NOISE, DROPPED, SHIFTED, LABELLED = 3, 0.1, 0.2, 16
SHAPE = {
    "vocab_size": VALUES,
    "n_class": 10,
    "d_model": 96,
    "n_layer": 2,
    "layer": "compact",
    "prototypes": "fixed",
}
UPDATES = {"lr": 8e-3, "lr_warmup_steps": 50, "lr_min_scale": 0.01, "weight_decay": 0.05, "grad_clip_norm": 1.0}


def read_digits() -> tuple[Tensor, Tensor]:
    """Pixel values (N, 64) and labels (N,), int64."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).long(), torch.from_numpy(labels).long()


def folds(labels_N: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Training and held-out indices of each fold, with the classes in proportion."""
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in splitter.split(labels_N, labels_N)]


def noisy(values_BL: Tensor, generator: torch.Generator) -> Tensor:
    """Training images as they might also have been written."""
    count = len(values_BL)
    moved_B1 = torch.rand(count, 1, generator=generator) < SHIFTED
    values_BL = torch.where(moved_B1, shifted(values_BL, generator), values_BL)
    noise_BL = torch.randint(-NOISE, NOISE + 1, values_BL.shape, generator=generator)
    kept_BL = torch.rand(values_BL.shape, generator=generator) >= DROPPED
    return (values_BL + noise_BL * (values_BL > 0)).clamp(0, VALUES - 1) * kept_BL


def shifted(values_BL: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel down and across, white coming in from outside."""
    count = len(values_BL)
    framed_BHW = F.pad(values_BL.view(count, SIDE, SIDE), (1, 1, 1, 1))
    down_B1, across_B1 = torch.randint(3, (2, count, 1), generator=generator)
    rows_BH, columns_BW = down_B1 + torch.arange(SIDE), across_B1 + torch.arange(SIDE)
    return framed_BHW[torch.arange(count)[:, None, None], rows_BH[:, :, None], columns_BW[:, None]].view(count, STEPS)


def targets(labels_B: Tensor, labelled: int) -> Tensor:
    """(B, 64): the label at the last `labelled` steps, -100 (ignored) before."""
    targets_BL = torch.full((len(labels_B), STEPS), -100)
    targets_BL[:, -labelled:] = labels_B[:, None]
    return targets_BL


def train_fold(fold: int, seed: int, epochs: int = EPOCHS) -> float:
    """Train on four fifths; the accuracy on the last."""
    torch.set_num_threads(1)
    values_NL, labels_N = read_digits()
    training, held_out = folds(labels_N, seed)[fold]
    per_epoch = len(training) // BATCH
    model = SequenceModel(ModelConfig(**SHAPE), seed=seed + fold)
    config = TrainConfig(**UPDATES, steps=epochs * per_epoch, ff_lr=0.0, bp_cadence_steps=1)
    trainer = Trainer(model, config)
    generator = torch.Generator().manual_seed(seed + fold)
    for _ in range(epochs):
        order = training[torch.randperm(len(training), generator=generator)]
        for chosen in order[: per_epoch * BATCH].split(BATCH):
            trainer.train_step(noisy(values_NL[chosen], generator), targets(labels_N[chosen], LABELLED))
    return trainer.evaluate([(values_NL[held_out], targets(labels_N[held_out], 1), None)]).accuracy


def write_files(folder: Path) -> None:
    """tokens.txt, a line an image, and labels.txt, a label or -100 for each of its tokens."""
    values_NL, labels_N = read_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("tokens.txt", values_NL), ("labels.txt", targets(labels_N, LABELLED))):
        (folder / name).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write the files")
    parser.add_argument("--seed", type=int, default=1, help="of the folds, the weights and the noise [%(default)s]")
    parser.add_argument("--processes", type=int, default=2, help="folds trained at once [%(default)s]")
    given = parser.parse_args()
    if given.write:
        write_files(given.write)
        return
    started = time.perf_counter()
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        accuracies = list(pool.map(train_fold, range(FOLDS), [given.seed] * FOLDS))
    shown = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
    print(f"accuracy of each fold  {shown}")
    print(f"mean                   {statistics.mean(accuracies):.4f}")
    print(f"seconds                {time.perf_counter() - started:.0f}, on {given.processes} cores")


if __name__ == "__main__":
    main()
