"""Growing and freezing on the standard library's bytes: the tables and the picture of docs/growing.md.

    python studies/growing.py                     # about four minutes of one core

Trains 2 layers, then gives the same processor time to three ways of going on: the 2 layers as they are, grown to 4 with
the old ones frozen, grown to 4 with all of them training. Then measures what a frozen layer costs. A part that is
finished is not measured again. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Session, corpus_config, costs, new_figure, write_between_marks

from protomamba.train.build import fresh_trainer
from protomamba.train.trainer import Trainer

COMMAND = "python studies/growing.py"
STAY, FROZEN, ALL = "2 layers, trained on", "grown to 4, old ones frozen", "grown to 4, all trained"
# name -> placement, freeze policy, whether the embedding is frozen; None: not grown
WAYS: dict[str, tuple[str, str, bool] | None] = {
    STAY: None,
    FROZEN: ("append", "first:2", True),
    ALL: ("append", "none", False),
}
FREEZES = {"none": ("none", False), "first:2": ("first:2", False), "first:2 and the embedding": ("first:2", True)}
FREEZE_SHAPE = {"d_model": 128, "batch_size": 8, "seq_len": 256}
POINTS = 8


def grown(trainer: Trainer, way: tuple[str, str, bool] | None) -> Trainer:
    if way is not None:
        trainer.expand(4, way[0], seed=1)
        trainer.freeze(way[1], way[2])
    return trainer


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returned when it was last run to its end."""
    if not path.is_file():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def growth(out: Path, seconds: float) -> tuple[dict[str, float], dict[str, list[dict[str, float]]]]:
    """Milliseconds a step, and the curves: the base model's and, from its end on, each way's."""
    config = corpus_config(out)

    def session(way: tuple[str, str, bool] | None) -> Session:
        start = Session.start(config)
        return Session.start(config, grown(start.trainer, way))

    def measured() -> dict[str, float]:
        return costs({name: session(way) for name, way in WAYS.items()}, 16, turns=7)

    ms = kept(out / "growth-costs.json", measured)
    base = out / f"base-{seconds:g}s.safetensors"

    def trained() -> list[dict[str, float]]:
        start = Session.start(config)
        start.run(round(1e3 * seconds / ms[STAY]), ms[STAY], POINTS)
        start.trainer.save_checkpoint(base)
        return start.curve

    def gone_on(name: str) -> list[dict[str, float]]:
        further = Session.start(config, grown(Trainer.load_checkpoint(base), WAYS[name]))
        further.run(round(1e3 * seconds / ms[name]), ms[name], POINTS)
        return further.curve

    curves = {"base": kept(out / f"base-{seconds:g}s.json", trained)}
    for number, name in enumerate(WAYS):
        curves[name] = kept(out / f"way-{number}-{seconds:g}s.json", lambda name=name: gone_on(name))
        print(f"{name}: loss {curves[name][0]['loss']:.6f} -> {curves[name][-1]['loss']:.4f}", flush=True)
    return ms, curves


def growth_table(ms: Mapping[str, float], curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    rows = ["| from the same 2 layers | ms a step | further steps | loss at the start | loss |"]
    rows[0] += " accuracy at the start | accuracy |"
    rows.append("|---" * 7 + "|")
    for name in WAYS:
        first, last = curves[name][0], curves[name][-1]
        rows.append(
            f"| {name} | {ms[name]:.1f} | {last['step'] - first['step']:,} | {first['loss']:.6f} | {last['loss']:.4f} "
            f"| {first['accuracy']:.4f} | {last['accuracy']:.4f} |"
        )
    return "\n".join(rows)


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    figure, axes = new_figure("growing", 2)
    end = curves["base"][-1]["seconds"]
    for axis, what in zip(axes[0], ("loss", "accuracy"), strict=True):
        for name, curve in curves.items():
            offset = 0.0 if name == "base" else end
            points = curve[1:] if name == "base" else curve
            label = "2 layers" if name == "base" else name
            axis.plot([p["seconds"] + offset for p in points], [p[what] for p in points], marker=".", label=label)
        axis.axvline(end, color="grey", linestyle=":")
        axis.set(xlabel="seconds of one core", ylabel=f"held-out {what}")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def frozen_session(out: Path, name: str) -> Session:
    session = Session.start(corpus_config(out, **FREEZE_SHAPE, base_layers=4, target_layers=4))
    session.trainer.freeze(*FREEZES[name])
    return session


def saved_bytes(session: Session) -> int:
    """Bytes that a forward pass keeps for backward, beside the parameters: each storage once."""
    tokens_BL, targets_BL, _ = session.batches(0)
    parameters = {p.untyped_storage().data_ptr() for p in session.trainer.model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = session.trainer.model(tokens_BL, targets_BL)
    del loss
    return sum(storage.nbytes() for pointer, storage in held.items() if pointer not in parameters)


def state_bytes(session: Session) -> int:
    moments = session.trainer.optimizer.state().values()
    return sum(tensor.nbytes for each in moments for tensor in each.values())


def freezing(out: Path) -> dict[str, dict[str, float]]:
    """What a step takes with some layers frozen: time, bytes kept for backward, optimizer state, memory of training."""
    sessions = {name: frozen_session(out, name) for name in FREEZES}
    ms = costs(sessions, 4, turns=9)
    figures = {}
    for name, session in sessions.items():
        command = [sys.executable, __file__, "--out-dir", str(out), "--training-memory-of", name]
        mib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        figures[name] = {
            "ms": ms[name],
            "saved_mib": saved_bytes(session) / 2**20,
            "state_mib": state_bytes(session) / 2**20,
            "training_mib": mib,
        }
    return figures


def training_memory(out: Path, name: str) -> float:
    """MiB by which this process's peak memory grows when it trains, on drawn tokens: reading a corpus peaks too."""
    config = corpus_config(out, **FREEZE_SHAPE, base_layers=4, target_layers=4)
    trainer, _ = fresh_trainer(config, 257, None)
    trainer.freeze(*FREEZES[name])
    tokens_BL = torch.randint(257, (config.batch_size, config.seq_len))
    before = peak_mib()
    for _ in range(6):
        trainer.train_step(tokens_BL, tokens_BL)
    return peak_mib() - before


def peak_mib() -> float:
    """This process's peak resident memory. On Linux getrusage starts from the parent's, the status file does not."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def freezing_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    rows = ["| frozen of 4 layers | ms a step | of none | kept for backward, MiB | optimizer state, MiB |"]
    rows[0] += " training's memory, MiB |"
    rows.append("|---" * 6 + "|")
    for name, found in figures.items():
        rows.append(
            f"| {name} | {found['ms']:.1f} | {found['ms'] / figures['none']['ms']:.2f} | {found['saved_mib']:.1f} "
            f"| {found['state_mib']:.1f} | {found['training_mib']:.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/growing"), help="[%(default)s]")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=40.0, help="of training before and after [%(default)s]")
    parser.add_argument("--training-memory-of", choices=FREEZES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    if given.training_memory_of:
        print(training_memory(given.out_dir, given.training_memory_of))
        return
    figures = kept(given.out_dir / "freezing.json", lambda: freezing(given.out_dir))
    ms, curves = growth(given.out_dir, given.seconds)
    given.docs_dir.mkdir(parents=True, exist_ok=True)
    page = given.docs_dir / "growing.md"
    write_between_marks(page, COMMAND, growth_table(ms, curves))
    write_between_marks(page, f"{COMMAND}, freezing", freezing_table(figures))
    draw(curves, given.docs_dir / "growing.svg")
    print(growth_table(ms, curves), freezing_table(figures), sep="\n\n")


if __name__ == "__main__":
    main()
