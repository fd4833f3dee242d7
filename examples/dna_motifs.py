"""A generated genome with planted motifs: bits per base of a small model beside Markov chains.

    python examples/dna_motifs.py            # some two minutes on one core
    python examples/dna_motifs.py --fasta F  # only write the genome

Bases are drawn at random; every 60 of them or so stands an opening motif, one of four, 20 bases of anything, and the
closing motif that belongs to it. A Markov chain learns the motifs, but not which one closes: the opening is too far
away. The genome goes the way of a user's own: FASTA, `prepare fasta`, sequences with boundaries, training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.data.fasta import prepare_fasta
from protomamba.data.prepared import open_prepared
from protomamba.data.source import Source, StreamSpec

OPENING = ("TTGACATA", "GGATCCGA", "CATATGCC", "AAGCTTGT")
CLOSING = ("CGTCTGAA", "TAGCAATC", "GTCCAGTA", "ACGGTTAC")
GAP, APART = 20, 60
SPEC = StreamSpec(batch_size=16, seq_len=256, seed=1)
ORDERS = range(9)


def genome(records: int, length: int, seed: int) -> list[str]:
    """Records of about `length` bases each."""
    rng = np.random.default_rng(seed)

    def anything(count: int) -> str:
        return "".join(np.array(list("ACGT"))[rng.integers(0, 4, count)])

    found = []
    for _ in range(records):
        parts: list[str] = []
        while sum(map(len, parts)) < length:
            kind = int(rng.integers(0, len(OPENING)))
            parts += [anything(int(rng.integers(0, 2 * APART))), OPENING[kind], anything(GAP), CLOSING[kind]]
        found.append("".join(parts))
    return found


def write_fasta(path: Path, records: list[str]) -> None:
    """Records in lines of 60 bases."""
    lines = []
    for number, record in enumerate(records):
        lines += [f">contig_{number} generated", *(record[i : i + 60] for i in range(0, len(record), 60))]
    path.write_text("\n".join(lines) + "\n")


def markov_bits(training: list[str], held_out: list[str], order: int) -> float:
    """Bits per base of a chain of this order with add-one counts, on the held-out records."""
    counts = np.ones((4**order, 4))
    for contexts, bases in (_contexts(record, order) for record in training):
        np.add.at(counts, (contexts, bases), 1)
    likelihood = np.log2(counts / counts.sum(axis=1, keepdims=True))
    found = [likelihood[_contexts(record, order)] for record in held_out]
    return -float(np.concatenate(found).mean())


def _contexts(record: str, order: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.array(["ACGT".index(base) for base in record])
    contexts = sum((codes[order - 1 - i : len(codes) - 1 - i] * 4**i for i in range(order)), np.zeros(1, dtype=int))
    return np.broadcast_to(contexts, (len(codes) - order,)), codes[order:]


def train(data: Source, steps: int) -> Trainer:
    """A model of two layers of width 64."""
    model = SequenceModel(ModelConfig(vocab_size=data.info.vocab_size, d_model=64, n_layer=2), seed=0)
    config = TrainConfig(steps=steps, lr=6e-3, lr_warmup_steps=20, lr_min_scale=0.02, ff_lr=0.0, bp_cadence_steps=1)
    trainer, stream = Trainer(model, config), data.stream(SPEC)
    for index in range(steps):
        batch = stream[index]
        trainer.train_step(batch.tokens_BL, batch.targets_BL, batch.reset_BL)
    return trainer


def model_bits(trainer: Trainer, data: Source) -> float:
    """Bits per base of the model on all of `data`."""
    batches = [(b.tokens_BL, b.targets_BL, b.reset_BL) for b in data.eval_batches(SPEC)]
    nll = trainer.evaluate(batches, calibrate=True).nll
    assert nll is not None
    return nll / float(np.log(2))


def compare(records: int, length: int, steps: int) -> dict[str, float]:
    """Bits per base of the best Markov chain and of the model, on the tenth of the records that is held out."""
    with tempfile.TemporaryDirectory() as folder:
        every = genome(records, length, seed=0)
        held_out, training = every[: records // 10], every[records // 10 :]
        parts = []
        for name, part in (("train", training), ("valid", held_out)):
            write_fasta(Path(folder, f"{name}.fa"), part)
            prepare_fasta([Path(folder, f"{name}.fa")], Path(folder, name), both_strands=False)
            parts.append(open_prepared(Path(folder, name)).training)
        chains = {f"markov {order}": markov_bits(training, held_out, order) for order in ORDERS}
        return {**chains, "model": model_bits(train(parts[0], steps), parts[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, metavar="FILE", help="only write the genome there")
    parser.add_argument("--records", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--length", type=int, default=5_000, help="bases of a record [%(default)s]")
    parser.add_argument("--steps", type=int, default=400, help="updates [%(default)s]")
    given = parser.parse_args()
    if given.fasta:
        write_fasta(given.fasta, genome(given.records, given.length, seed=0))
        return
    for name, bits in compare(given.records, given.length, given.steps).items():
        print(f"{name:<10} {bits:.4f} bits per base")


if __name__ == "__main__":
    main()
