"""A model trained on a torch Dataset of one's own, with all that the command has: run it, kill it, run it again.

python examples/own_dataset.py [RUN_FOLDER]
"""

import sys

import torch
from torch.utils.data import Dataset

from protomamba import Callback, DatasetStream, ModelConfig, Progress, Run, SequenceModel, TrainConfig, Trainer


class Sums(Dataset):
    """Digits, and at each of them the sum of all so far modulo 10."""

    def __len__(self):
        return 4_000

    def __getitem__(self, index):
        digits = torch.randint(0, 10, (32,), generator=torch.Generator().manual_seed(index))
        return digits, digits.cumsum(0) % 10


class Count(Callback):
    """How often the run was validated; its state is in each checkpoint."""

    validations = 0

    def on_validation(self, run, result):
        self.validations += 1

    def state_dict(self):
        return {"validations": self.validations}

    def load_state_dict(self, state):
        self.validations = state["validations"]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(vocab_size=10, d_model=32, n_layer=2), seed=0)
    trainer = Trainer(model, TrainConfig(lr=4e-3, steps=400))
    held_out = [DatasetStream(Sums(), batch_size=64, seed=1).batch(i) for i in range(4)]
    stream, count = DatasetStream(Sums(), batch_size=16, seed=0), Count()
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/sums"
    run = Run(trainer, stream, held_out, [Progress(), count], folder, val_every=50, save_every=25, resume="auto")
    print(run.fit(), "after", count.validations, "validations")
