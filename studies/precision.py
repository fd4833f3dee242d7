"""bfloat16 beside float32 at equal steps: the table of docs/precision.md.

    python studies/precision.py

The demo's model and corpus, both heads; the same weights, batches and held-out windows in both precisions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Session, corpus_config, write_between_marks

HEADS, PRECISIONS = ("hpn", "softmax"), ("fp32", "bf16")
SHAPE = {"d_model": 128, "seq_len": 256}
POINTS = 4


def curve(folder: Path, head: str, precision: str, steps: int) -> list[dict[str, float]]:
    """Held-out figures at POINTS steps, evenly spread."""
    session = Session.start(corpus_config(folder, head=head, precision=precision, **SHAPE))
    session.run(steps, 0.0, POINTS)
    return session.curve[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/precision"), help="where the corpus is built")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="where precision.md is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    curves = {(h, p): curve(given.out_dir, h, p, given.steps) for h in HEADS for p in PRECISIONS}
    names = [f"{head} {precision}" for head, precision in curves]
    lines = ["| step | " + " | ".join([*names, *(f"{h}: bf16 / fp32" for h in HEADS)]) + " |"]
    lines.append("|---" + "|---:" * (len(names) + len(HEADS)) + "|")
    for point in range(POINTS):
        losses = {key: points[point]["loss"] for key, points in curves.items()}
        ratios = [losses[head, "bf16"] / losses[head, "fp32"] for head in HEADS]
        cells = [f"{given.steps * (point + 1) // POINTS:,}", *(f"{x:.4f}" for x in losses.values())]
        lines.append("| " + " | ".join([*cells, *(f"{ratio:.4f}" for ratio in ratios)]) + " |")
    given.docs_dir.mkdir(parents=True, exist_ok=True)
    write_between_marks(given.docs_dir / "precision.md", "python studies/precision.py", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
