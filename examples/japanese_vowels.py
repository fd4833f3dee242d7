"""JapaneseVowels: nine speakers told apart by 12 channels of 7 to 29 steps (Kudo, Toyama and Shimbo 1999).

    pip download --no-deps aeon && unzip aeon-*.whl 'aeon/datasets/data/JapaneseVowels/*'
    python examples/japanese_vowels.py aeon/datasets/data/JapaneseVowels    # a minute and a half on one core

The package aeon carries the set as .ts files, 270 utterances to train on and 370 to judge by; neither aeon nor
anything it needs is installed for it. The files go the way of a user's own, `prepare labels`. Two mamba layers of width
64, fixed prototypes, dropout; of a few settings tried with seed 0 dropout alone helped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.data.labelled_tables import LabelColumns
from protomamba.data.prepare_labels import prepare_labels
from protomamba.data.prepared import Prepared, open_prepared
from protomamba.data.source import StreamSpec

DROPOUT, SEEDS = 0.2, (0, 1, 2)


def open_series(folder: Path, name: str) -> Prepared:
    """Both .ts files of a set of aeon's through `prepare labels`."""
    files = [folder / f"{name}_{part}.ts" for part in ("TRAIN", "TEST")]
    with tempfile.TemporaryDirectory() as out:
        prepare_labels(files[:1], Path(out, "data"), LabelColumns(), test=files[1:])
        return open_prepared(Path(out, "data"))


def train(data: Prepared, seed: int, steps: int) -> Trainer:
    """A model of the training part."""
    info = data.training.info
    model = SequenceModel(
        ModelConfig(
            vocab_size=1,
            n_class=info.n_class,
            input="vector",
            input_options={"channels": info.channels},
            d_model=64,
            n_layer=2,
            prototypes="fixed",
            dropout=DROPOUT,
        ),
        seed=seed,
    )
    updates = {"lr": 4e-3, "lr_warmup_steps": 20, "lr_min_scale": 0.02, "weight_decay": 0.05, "grad_clip_norm": 1.0}
    trainer = Trainer(model, TrainConfig(**updates, steps=steps, ff_lr=0.0, bp_cadence_steps=1))
    stream = data.training.stream(StreamSpec(batch_size=32, seq_len=info.longest or 1, seed=seed))
    for index in range(steps):
        batch = stream[index]
        trainer.train_step(batch.tokens_BL, batch.targets_BL)
    return trainer


def confusion(trainer: Trainer, data: Prepared) -> np.ndarray:
    """How often each class (row) of the test part was taken for each (column)."""
    model, info = trainer.model.eval(), data.training.info
    table = np.zeros((info.n_class or 0, info.n_class or 0), dtype=int)
    for batch in data.part("test").eval_batches(StreamSpec(batch_size=64, seq_len=info.longest or 1)):
        judged = batch.targets_BL >= 0
        np.add.at(table, (batch.targets_BL[judged].numpy(), model.predict(batch.tokens_BL)[judged].numpy()), 1)
    return table


def show(table: np.ndarray, names: tuple[str, ...]) -> None:
    """The confusion matrix with the precision and recall of each class."""
    print("class  precision  recall   taken for " + " ".join(f"{name:>4}" for name in names))
    for row, name in enumerate(names):
        precision = table[row, row] / max(1, table[:, row].sum())
        recall = table[row, row] / max(1, table[row].sum())
        print(f"{name:>5}  {precision:9.3f}  {recall:6.3f}             " + " ".join(f"{n:>4}" for n in table[row]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with NAME_TRAIN.ts and NAME_TEST.ts")
    parser.add_argument("--name", default="JapaneseVowels", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=400, help="updates [%(default)s]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data, accuracies = open_series(given.folder, given.name), []
    for seed in SEEDS:
        table = confusion(train(data, seed, given.steps), data)
        accuracies.append(float(np.trace(table) / table.sum()))
    show(table, data.training.info.class_names)
    print("test accuracy of each seed  " + " ".join(f"{each:.4f}" for each in accuracies))
    print(f"mean                        {statistics.mean(accuracies):.4f}")


if __name__ == "__main__":
    main()
