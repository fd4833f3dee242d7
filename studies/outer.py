"""Workers that meet now and then beside a run that shares every step, at equal tokens: a table of docs/scale-out.md.

    python studies/outer.py                       # about five minutes of one core
    python studies/outer.py --steps 100           # a quick look

All in one process: what comes out does not depend on the number of ranks. Every run takes the same steps on the same
batches with the same schedule; figures are those of held-out windows at the end, which is a meeting. A run that is
finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import Session, corpus_config, write_between_marks

COMMAND = "python studies/outer.py"
ROWS = {"batch_size": 16, "seq_len": 64}
SHARED = "shared every step"
WORKERS, EVERY = (2, 4), (1, 50, 200)
Figures = dict[str, float]


def variants() -> dict[str, dict[str, Any]]:
    """Name -> fields of the run: one shard a worker."""
    met = {
        f"{workers} workers | {every}": {"grad_shards": workers, "sync_every": every}
        for workers in WORKERS
        for every in EVERY
    }
    return {f"{SHARED} | -": {}, **met}


def trained(out: Path, name: str, fields: dict[str, Any], steps: int, seed: int) -> Figures:
    """Held-out figures of one run, and the MiB that a meeting moves."""
    kept = out / f"{name.replace(' | ', '-').replace(' ', '-')}-{steps}-{seed}.json"
    if not kept.is_file():
        session = Session.start(corpus_config(out, **ROWS, **fields, steps=steps, seed=seed))
        session.train(steps)
        found = session.trainer.evaluate(session.held_out, calibrate=True)
        assert found.nll is not None
        size = sum(p.numel() * p.element_size() for p in session.trainer.model.parameters())
        kept.write_text(json.dumps({"nll": found.nll, "accuracy": found.accuracy, "mib": size / 2**20}))
    figures: Figures = json.loads(kept.read_text())
    return figures


def table(found: dict[str, list[Figures]], steps: int) -> str:
    """One row a variant: medians over the seeds, and what a rank sends in all, a rank a worker."""
    rows = ["| workers | steps between meetings | meetings | loss (nats a byte) | accuracy | sent by a rank in all |"]
    rows.append("|---" * 6 + "|")
    for name, runs in found.items():
        workers, every = name.split(" | ")
        meetings = 0 if every == "-" else -(-steps // int(every))
        share = 0.0 if every == "-" else 1 - 1 / int(workers.split()[0])
        nll, accuracy = (statistics.median(run[what] for run in runs) for what in ("nll", "accuracy"))
        sent = f"{2 * share * runs[0]['mib'] * meetings:,.1f} MiB" if meetings else "-"
        rows.append(f"| {workers} | {every} | {meetings or '-'} | {nll:.4f} | {accuracy:.4f} | {sent} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/outer"), help="[%(default)s]")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=1_000, help="of each run [%(default)s]")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each variant, whose median is shown [%(default)s]"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Figures]] = {}
    for seed in range(1, given.seeds + 1):
        for name, fields in variants().items():
            found.setdefault(name, []).append(trained(given.out_dir, name, fields, given.steps, seed))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    text = table(found, given.steps)
    write_between_marks(given.docs_dir / "scale-out.md", COMMAND, text)
    print(text)


if __name__ == "__main__":
    main()
