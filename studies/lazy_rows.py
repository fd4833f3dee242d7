"""How far the row-sparse AdamW, which moves the rows that a step reads only, is from AdamW: the same run with both.

    python studies/lazy_rows.py [--vocabulary 4096] [--steps 1000] [--seeds 0]

Byte pairs of the standard library (as studies/prototypes.py makes them), one Mamba layer of width 64, 8 x 128 tokens a
step. Prints held-out cross entropy and accuracy of each, and how many of the rows a step reads. Needs `tokenizers`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from prototypes import judged, session

SMALL = {"d_model": 64, "base_layers": 1, "target_layers": 1, "seq_len": 128}
WAYS = {
    "AdamW": {"sparse_rows": False},
    "row-sparse": {"sparse_rows": True},
    "row-sparse, momentum by touch": {"sparse_rows": True, "optimizer_option": ("momentum_by_touch=1",)},
}


def run(vocabulary: int, way: str, seed: int, steps: int, out: Path) -> str:
    """A row of the table: trained in that way under the whole schedule."""
    trained = session(vocabulary, "learned", seed, out, **WAYS[way], **SMALL)
    trainer, read = trained.trainer, 0
    trainer.schedule_steps = steps
    for _ in range(steps):
        trained.train(1)
        read += sum(len(rows_R) for rows_R, _ in trainer.rows.gradients().values())
    accuracy, bits = judged(trained)
    share = f"{read / steps / (2 * vocabulary):.1%}" if trainer.rows.tables else "all"
    return f"| {way} | {seed} | {bits:.4f} | {accuracy:.4f} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=4_096)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/prototypes"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| update | seed | bits a token | accuracy | rows read a step |\n" + "|---" * 5 + "|")
    for seed in (int(each) for each in given.seeds.split(",")):
        for way in given.ways.split(";"):
            print(run(given.vocabulary, way, seed, given.steps, given.out_dir), flush=True)


if __name__ == "__main__":
    main()
