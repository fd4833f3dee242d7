"""`make demo`: from nothing to a model that has learned the standard library's bytes, with what that is worth."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from protomamba.checkpoint import file as checkpoint
from protomamba.config import Sampling
from protomamba.data.corpus import SHARD, default_corpus
from protomamba.data.tokenizer import ByteTokenizer
from protomamba.decode import generate
from protomamba.errors import UserError
from protomamba.metrics_file import read_metrics
from protomamba.run_config import DataFields, RunConfig
from protomamba.train.build import train
from protomamba.train.callbacks.console import Console
from protomamba.train.inputs import Held, open_inputs, stream_spec
from protomamba.train.trainer import Trainer

HEADS = ("hpn", "softmax")
EVALUATION_BATCHES = 256
PROMPT = "def __init__(self, "
SAMPLING = Sampling(max_tokens=300, temperature=0.7, top_p=0.9)
SHAPE = {"d_model": 128, "base_layers": 2, "target_layers": 2, "freeze": "none"}
STEPS = {"steps": 4_000, "lr": 4e-3, "lr_warmup_steps": 100, "lr_min_scale": 0.02}
BATCHES = {"batch_size": 8, "seq_len": 256, "packed_sequences": False}
UPDATES = {"bp_cadence_steps": 1, "ff_lr": 0.0, "grad_clip_norm": 1.0}
CADENCE = {"log_every": 100, "val_every": 500, "save_every": 500, "eval_batches": 32}


def demo_config(head: str, folder: Path) -> RunConfig:
    """The demo's run with a head: 2 Mamba layers of width 128 on 8 x 256 bytes a step."""
    token_file = folder / "corpus" / SHARD
    return RunConfig(
        **SHAPE,
        **BATCHES,
        **STEPS,
        **UPDATES,
        **CADENCE,
        head=head,
        token_file=token_file,
        out_dir=folder / head,
        resume="auto",
    )


def show(heads: Sequence[str], folder: Path, console: Console) -> None:
    """What each run learned, on held-out windows, beside always guessing the most common byte; and a sample."""
    rows = []
    for head in heads:
        config = demo_config(head, folder)
        trainer = Trainer.from_checkpoint(checkpoint.load(config.out_dir / "latest.safetensors"))
        data = config.project(DataFields)
        inputs = open_inputs(data, seed=config.seed, corpus=folder / "corpus")
        assert inputs.validation is not None
        found = trainer.evaluate(Held(inputs.validation, stream_spec(data, config.seed), EVALUATION_BATCHES))
        seconds = training_seconds(config.out_dir / "metrics.jsonl")
        perplexity = "-" if found.perplexity is None else f"{found.perplexity:.3f}"
        figures = f"{seconds:.0f} {found.loss:.4f} {perplexity} {found.accuracy:.4f} {found.majority:.4f}"
        rows.append((head, trainer.global_step, *figures.split()))
        console.line(f"\nA sample of the {head} model after {PROMPT!r} (temperature 0.7, top-p 0.9):\n")
        console.line(sample(trainer))
    console.line("")
    console.table(
        ("head", "step", "training s", "loss", "perplexity", "accuracy", "most common byte"),
        rows,
        title=f"Held-out next-byte prediction, {found.targets:,} bytes",
    )
    console.line(
        f"The runs are in {folder}/; continue a text with: {_program()} generate {folder / heads[0]}/latest.safetensors"
    )


def _program() -> str:
    """How this shell calls protomamba: where the environment is not active, by its Python."""
    return "protomamba" if shutil.which("protomamba") else f"{os.path.relpath(sys.executable)} -m protomamba"


def sample(trainer: Trainer) -> str:
    """What the model writes after PROMPT."""
    tokenizer = ByteTokenizer()
    (tokens,) = generate(trainer.model.eval(), [tokenizer.encode(PROMPT)], SAMPLING)
    return PROMPT + tokenizer.decode(tokens)


def training_seconds(metrics: Path) -> float:
    """Wall time of the training steps of a run, resumed parts included."""
    lines = [line for line in read_metrics(metrics) if line["event"] == "train"]
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *lines], lines, strict=False)]
    return float(sum(line["step_ms"] * count for line, count in zip(lines, steps, strict=True)) / 1e3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, then show the result; the exit code of the last run."""
    parser = argparse.ArgumentParser(prog="python -m protomamba.demo", description=__doc__)
    parser.add_argument("--heads", default="hpn", help="hpn, softmax or hpn,softmax side by side [%(default)s]")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/demo"), help="[%(default)s]")
    options = parser.parse_args(arguments)
    heads = options.heads.split(",")
    if unknown := set(heads) - set(HEADS):
        parser.error(f"--heads {','.join(unknown)}: expected {' or '.join(HEADS)}")
    console = Console()
    console.line("protomamba demo: learn to predict the next byte of Python's standard library on this machine's CPU.")
    default_corpus(options.out_dir / "corpus")
    for head in heads:
        console.line(f"\nTraining with the {head} head; Ctrl-C stops and saves; the same command continues.")
        if code := train(demo_config(head, options.out_dir)):
            return code
    show(heads, options.out_dir, console)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"protomamba demo: {error}")
