"""Heads side by side on the standard library's sources: the table and the picture of docs/prototypes.md.

    python studies/prototypes.py                                  # everything; hours
    python studies/prototypes.py --vocabularies 257 --steps 1500  # a part of it

Trains each head through `protomamba train`, one run a variant and vocabulary: bytes (257 with the end of file), and
byte pairs learned on the training part (4096, 16384). A run that is finished is not trained again, one that was
interrupted goes on. What a step costs is measured before, with the heads taking turns on one thread, and a run's clock
is its steps times that; the last variant gives learned prototypes the time that the softmax head takes.
Needs the extras `tokenizers` and `plots`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PLAIN, UPDATES, Session, costs, new_figure, write_between_marks

from protomamba.config import RunConfig
from protomamba.data.corpus import stdlib_sources

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed": {"head": "hpn", "prototypes": "fixed"},
    "learned": {"head": "hpn", "prototypes": "learned"},
    "learned, no separation": {"head": "hpn", "prototypes": "learned", "separation": 0.0},
    "softmax": {"head": "softmax"},
}
EQUAL_TIME = "learned, softmax's time"
# Mamba layers of width 128 on 8 x 256 tokens a step.
SHAPE = {"d_model": 128, "base_layers": 2, "target_layers": 2, "freeze": "none", "batch_size": 8, "seq_len": 256}
CADENCE = {"log_every": 50, "eval_batches": 64, "progress": False}
COST_STEPS, COST_TURNS = 5, 9
VALIDATIONS = 8


@dataclass(frozen=True)
class Result:
    """One run: held-out figures at its end, milliseconds a step, peak resident memory, the validations."""

    vocabulary: int
    variant: str
    steps: int
    accuracy: float
    perplexity: float
    majority: float
    step_ms: float
    train_s: float
    peak_mib: float
    curve: list[tuple[float, float]]  # (seconds of training, accuracy)


def token_files(vocabulary: int, folder: Path) -> tuple[Path, Path]:
    """Training and held-out tokens (every 20th file) as .npy, made once."""
    train, held_out = folder / f"train-{vocabulary}.npy", folder / f"held-out-{vocabulary}.npy"
    if train.is_file() and held_out.is_file():
        return train, held_out
    root = Path(sysconfig.get_path("stdlib"))
    texts = [(root / source).read_text(encoding="utf-8", errors="replace") for source in stdlib_sources(root)]
    parts = {held_out: texts[::20], train: [text for index, text in enumerate(texts) if index % 20]}
    encode = byte_encoder() if vocabulary == 257 else pair_encoder(vocabulary, parts[train])
    folder.mkdir(parents=True, exist_ok=True)
    for path, documents in parts.items():
        tokens = [token for text in documents for token in [*encode(text), vocabulary - 1]]
        np.save(path, np.asarray(tokens, dtype=np.uint16))
    return train, held_out


def byte_encoder() -> Callable[[str], Sequence[int]]:
    return lambda text: text.encode()


def pair_encoder(vocabulary: int, texts: Sequence[str]) -> Callable[[str], Sequence[int]]:
    """Byte-pair tokens 0 to vocabulary - 2, learned on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    level = pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return lambda text: tokenizer.encode(text).ids


def settings(vocabulary: int, variant: str, out: Path) -> dict[str, Any]:
    """The fields of one variant's run that do not depend on its length."""
    train, held_out = token_files(vocabulary, out / "tokens")
    fields = {**SHAPE, **UPDATES, **PLAIN, **VARIANTS[variant], "packed_sequences": False, "vocab_size": vocabulary}
    return {**fields, "token_file": train, "val_token_file": held_out}


def step_costs(vocabulary: int, out: Path) -> dict[str, float]:
    """Milliseconds of one thread a step of each head, the heads taking turns; kept beside the runs."""
    torch.set_num_threads(1)
    kept = out / f"costs-{vocabulary}.json"
    if not kept.is_file():
        sessions = {name: Session.start(RunConfig(**settings(vocabulary, name, out))) for name in VARIANTS}
        kept.write_text(json.dumps(costs(sessions, COST_STEPS, COST_TURNS)))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def run(vocabulary: int, name: str, variant: str, steps: int, step_ms: float, out: Path) -> Result:
    """Train `variant` to the end under that name, or go on with it, or read what it left."""
    folder = out / re.sub("[^a-z0-9]+", "-", f"{vocabulary}-{name}")
    kept = folder / "result.json"
    if kept.is_file():
        return Result(**json.loads(kept.read_text()))
    every = max(1, steps // VALIDATIONS)
    fields = {**settings(vocabulary, variant, out), **CADENCE, "val_every": every, "save_every": every}
    if (folder / "latest.safetensors").is_file():
        # Its own target stands in the checkpoint: --steps would ask for that many more.
        fields["resume"] = "auto"
    else:
        fields["steps"] = steps
    flags = [part for key, value in fields.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "protomamba", "train", *flags, "--threads", "1", "--out-dir", str(folder)]
    print("+", " ".join(command), flush=True)
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(
            f"{folder}: the run ended with status {os.waitstatus_to_exitcode(status)}; start again to go on"
        )
    result = read_result(folder / "metrics.jsonl", vocabulary, name, step_ms, usage.ru_maxrss / 1024)
    kept.write_text(json.dumps(asdict(result)))
    return result


def read_result(metrics: Path, vocabulary: int, variant: str, step_ms: float, peak_mib: float) -> Result:
    """The figures of a finished run. A resumed run's memory is that of its last process."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    validations = [line for line in lines if line["event"] == "validation"]
    last = validations[-1]
    return Result(
        vocabulary=vocabulary,
        variant=variant,
        steps=last["step"],
        accuracy=last["val_accuracy"],
        perplexity=last["val_perplexity"],
        majority=last["majority_accuracy"],
        step_ms=step_ms,
        train_s=step_ms * last["step"] / 1000,
        peak_mib=peak_mib,
        curve=[(line["step"] * step_ms / 1000, line["val_accuracy"]) for line in validations],
    )


def study(vocabulary: int, steps: int, out: Path) -> list[Result]:
    """All variants at one vocabulary."""
    # In a process of its own: the peak memory of a run includes that of the process that starts it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ms = pool.apply(step_costs, (vocabulary, out))
    results = [run(vocabulary, name, name, steps, ms[name], out) for name in VARIANTS]
    longer = round(steps * ms["softmax"] / ms["learned"])
    if longer > 1.02 * steps:
        results.append(run(vocabulary, EQUAL_TIME, "learned", longer, ms["learned"], out))
    return results


def table(results: Sequence[Result]) -> str:
    rows = ["| classes | head | steps | accuracy | perplexity | ms a step | training s | peak MiB |", "|---" * 8 + "|"]
    for r in results:
        rows.append(
            f"| {r.vocabulary} | {r.variant} | {r.steps:,} | {r.accuracy:.4f} | {r.perplexity:.2f} | {r.step_ms:.0f} "
            f"| {r.train_s:.0f} | {r.peak_mib:.0f} |"
        )
    return "\n".join(rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """Held-out accuracy over seconds of training, one panel a vocabulary."""
    vocabularies = sorted({r.vocabulary for r in results})
    figure, axes = new_figure("prototypes", len(vocabularies))
    colours = {name: f"C{index}" for index, name in enumerate([*VARIANTS, EQUAL_TIME])}
    for axis, vocabulary in zip(axes[0], vocabularies, strict=True):
        for r in (r for r in results if r.vocabulary == vocabulary):
            axis.plot(*zip(*r.curve, strict=True), label=r.variant, color=colours[r.variant], marker=".")
        axis.axhline(r.majority, color="grey", linestyle=":", label="always the commonest")
        axis.set(title=f"{vocabulary:,} classes", xlabel="seconds of training")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][-1].legend(fontsize="small", loc="lower right")  # the panel that has every line
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/prototypes"), help="runs, tokens and results")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="where prototypes.md and .svg are written")
    parser.add_argument("--vocabularies", default="257,4096,16384", help="classes, comma-separated")
    parser.add_argument("--steps", type=int, default=3_000)
    given = parser.parse_args()
    vocabularies = [int(v) for v in given.vocabularies.split(",")]
    results = [r for v in vocabularies for r in study(v, given.steps, given.out_dir)]
    given.docs_dir.mkdir(parents=True, exist_ok=True)
    write_between_marks(given.docs_dir / "prototypes.md", "python studies/prototypes.py", table(results))
    draw(results, given.docs_dir / "prototypes.svg")
    print(table(results))


if __name__ == "__main__":
    main()
