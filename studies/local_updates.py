"""Cadence and gradient surgery side by side on the standard library: the table and picture of docs/local-updates.md.

    python studies/local_updates.py                     # about five minutes of one core
    python studies/local_updates.py --seconds 3         # a quick look

Every variant gets the same processor time for its train steps and a schedule laid over the steps that fit into it.
A variant that is finished is not trained again. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Session, corpus_config, costs, new_figure, write_between_marks

COMMAND = "python studies/local_updates.py"
CADENCES = (1, 4, 32)
OFF = "none (ff-lr 0)"
# cagradstep at its default strength of 1 is pcgrad to the bit, so it is shown at a half.
METHODS: dict[str, dict[str, Any]] = {
    OFF: {"ff_lr": 0.0},
    "pcgrad": {"gradient_surgery_method": "pcgrad"},
    "gradnorm": {"gradient_surgery_method": "gradnorm"},
    "cagradstep, lambda 0.5": {"gradient_surgery_method": "cagradstep", "cagrad_lambda": 0.5},
}
FF_LR = 1e-4  # the default
STRONG = "pcgrad, ff-lr = lr"
POINTS = 8
CYCLE = 32  # a whole number of cycles of every cadence


def variants() -> dict[str, dict[str, Any]]:
    """Name -> fields of the run."""
    found = {
        f"{cadence} | {method}": {"bp_cadence_steps": cadence, "ff_lr": FF_LR, **fields}
        for cadence in CADENCES
        for method, fields in METHODS.items()
    }
    strong = {"ff_lr": 4e-3, "gradient_surgery_method": "pcgrad"}
    return found | {f"{cadence} | {STRONG}": {"bp_cadence_steps": cadence, **strong} for cadence in (1, 32)}


def measure(out: Path, chosen: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a step takes on average over a cycle, by variant.

    Measured once, in turns, from the four kinds of step there are: with backpropagation or forward alone, with or
    without the local update. The surgery, a few operations on vectors of E, is too small to tell its methods apart.
    """
    kept = out / "costs.json"
    if not kept.is_file():
        never = {"bp_cadence_steps": 1_000_000}
        kinds = {"bp": {}, "bp ff": {"ff_lr": FF_LR}, "forward": never, "forward ff": {**never, "ff_lr": FF_LR}}
        sessions = {name: Session.start(corpus_config(out, **fields)) for name, fields in kinds.items()}
        kept.write_text(json.dumps(costs(sessions, 2, turns=60)))
    ms = json.loads(kept.read_text())

    def cost(cadence: int, ff: str) -> float:
        return float(ms[f"bp{ff}"] + (cadence - 1) * ms[f"forward{ff}"]) / cadence

    return {name: cost(fields["bp_cadence_steps"], " ff" if fields["ff_lr"] else "") for name, fields in chosen.items()}


def study(out: Path, seconds: float, ms: Mapping[str, float]) -> dict[str, list[dict[str, float]]]:
    """The curve of every variant over the same processor time."""
    curves = {}
    for number, (name, fields) in enumerate(variants().items()):
        kept = out / f"variant-{number}-{seconds:g}s.json"
        if not kept.is_file():
            session = Session.start(corpus_config(out, **fields))
            session.run(round(1e3 * seconds / ms[name] / CYCLE) * CYCLE, ms[name], POINTS, CYCLE)
            kept.write_text(json.dumps(session.curve))
        curves[name] = json.loads(kept.read_text())
        print(f"{name}: accuracy {curves[name][-1]['accuracy']:.4f}", flush=True)
    return curves


def table(curves: Mapping[str, Sequence[Mapping[str, float]]], ms: Mapping[str, float]) -> str:
    rows = ["| backpropagation every | local update | ms a step | steps | updates by backpropagation |"]
    rows[0] += " local loss above 0 | loss | accuracy |"
    rows.append("|---" * 8 + "|")
    for name, curve in curves.items():
        cadence, method = name.split(" | ")
        last = curve[-1]
        active = [point["local_active"] for point in curve[1:]]
        shown = "-" if method == OFF else f"{sum(active) / len(active):.0%} of steps"
        rows.append(
            f"| {cadence} | {method} | {ms[name]:.1f} | {last['step']:,} | {last['step'] // int(cadence):,} "
            f"| {shown} | {last['loss']:.4f} | {last['accuracy']:.4f} |"
        )
    return "\n".join(rows)


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Held-out loss and accuracy over seconds: a colour a cadence, a line style a method."""
    figure, axes = new_figure("local-updates", 2)
    styles = dict(zip([*METHODS, STRONG], ("-", "--", "-.", ":", (0, (1, 4))), strict=True))
    for name, curve in curves.items():
        cadence, method = name.split(" | ")
        for axis, what in zip(axes[0], ("loss", "accuracy"), strict=True):
            axis.plot(
                [point["seconds"] for point in curve[1:]],
                [point[what] for point in curve[1:]],
                color=f"C{CADENCES.index(int(cadence))}",
                linestyle=styles[method],
                label=f"every {cadence}: {method}",
            )
            axis.set(xlabel="seconds of one core", ylabel=f"held-out {what}")
    axes[0][1].legend(fontsize="xx-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/local-updates"), help="[%(default)s]")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=15.0, help="of training for each variant [%(default)s]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    ms = measure(given.out_dir, variants())
    curves = study(given.out_dir, given.seconds, ms)
    text = table(curves, ms)
    given.docs_dir.mkdir(parents=True, exist_ok=True)
    write_between_marks(given.docs_dir / "local-updates.md", COMMAND, text)
    draw(curves, given.docs_dir / "local-updates.svg")
    print(text)


if __name__ == "__main__":
    main()
