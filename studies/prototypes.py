"""Heads side by side on the standard library's sources: the table and the picture of docs/prototypes.md.

    python studies/prototypes.py                                  # everything; hours
    python studies/prototypes.py --vocabularies 257 --steps 1500  # a part of it

Trains each head through `protomamba train`, one run a variant and vocabulary: bytes (257 with the end of file), and
byte pairs learned on the training part (4096, 16384). A run that is finished is not trained again, one that was
interrupted goes on. The last variant gives learned prototypes the time that the softmax head took.
Needs the extras `tokenizers` and `plots`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from protomamba.data.corpus import stdlib_sources

VARIANTS = {
    "fixed": ["--head", "hpn", "--prototypes", "fixed"],
    "learned": ["--head", "hpn", "--prototypes", "learned"],
    "learned, no separation": ["--head", "hpn", "--prototypes", "learned", "--separation", "0"],
    "softmax": ["--head", "softmax"],
}
EQUAL_TIME = "learned, softmax's time"
# Mamba layers of width 128 on 8 x 256 tokens a step, backpropagation on each.
SHAPE = (
    "--d-model 128 --base-layers 2 --target-layers 2 --freeze none --batch-size 8 --seq-len 256 --packed-sequences 0"
)
UPDATES = "--lr 4e-3 --lr-warmup-steps 100 --lr-min-scale 0.02 --grad-clip-norm 1 --bp-cadence-steps 1 --ff-lr 0"
CADENCE = "--log-every 50 --eval-batches 64"
VALIDATIONS = 8
TABLE_MARKS = ("<!-- table: python studies/prototypes.py -->", "<!-- end of table -->")


@dataclass(frozen=True)
class Result:
    """One run: held-out figures at its end, median milliseconds a step, peak resident memory, the validations."""

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


def run(vocabulary: int, variant: str, arguments: Sequence[str], steps: int, out: Path, threads: int) -> Result:
    """Train one variant to the end, or go on with it, or read what it left."""
    folder = out / f"{vocabulary}-{variant.replace(', ', '-').replace(' ', '-').replace(chr(39), '')}"
    kept = folder / "result.json"
    if kept.is_file():
        return Result(**json.loads(kept.read_text()))
    train, held_out = token_files(vocabulary, out / "tokens")
    every = max(1, steps // VALIDATIONS)
    command = [
        sys.executable,
        "-m",
        "protomamba",
        "train",
        "--token-file",
        str(train),
        "--val-token-file",
        str(held_out),
    ]
    command += [*SHAPE.split(), *UPDATES.split(), *CADENCE.split(), *arguments, "--vocab-size", str(vocabulary)]
    command += ["--steps", str(steps), "--val-every", str(every), "--save-every", str(every), "--threads", str(threads)]
    command += ["--out-dir", str(folder), "--progress", "0"]
    if (folder / "latest.safetensors").is_file():
        # The run's own target stands in its checkpoint: --steps would ask for that many more.
        position = command.index("--steps")
        command[position : position + 2] = ["--resume", "auto"]
    print("+", " ".join(command), flush=True)
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(
            f"{folder}: the run ended with status {os.waitstatus_to_exitcode(status)}; start again to go on"
        )
    result = read_result(folder / "metrics.jsonl", vocabulary, variant, usage.ru_maxrss / 1024)
    kept.write_text(json.dumps(asdict(result)))
    return result


def read_result(metrics: Path, vocabulary: int, variant: str, peak_mib: float) -> Result:
    """The figures of a finished run. A resumed run's memory is that of its last process."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    validations = [line for line in lines if line["event"] == "validation"]
    step_ms = statistics.median(line["step_ms"] for line in steps)
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


def study(vocabulary: int, steps: int, out: Path, threads: int) -> list[Result]:
    """All variants at one vocabulary."""
    results = [run(vocabulary, name, arguments, steps, out, threads) for name, arguments in VARIANTS.items()]
    by_name = {result.variant: result for result in results}
    longer = round(steps * by_name["softmax"].step_ms / by_name["learned"].step_ms)
    if longer > 1.02 * steps:
        results.append(run(vocabulary, EQUAL_TIME, VARIANTS["learned"], longer, out, threads))
    return results


def table(results: Sequence[Result]) -> str:
    rows = ["| classes | head | steps | accuracy | perplexity | ms a step | training s | peak MiB |", "|---" * 8 + "|"]
    for r in results:
        rows.append(
            f"| {r.vocabulary} | {r.variant} | {r.steps:,} | {r.accuracy:.4f} | {r.perplexity:.2f} | {r.step_ms:.0f} "
            f"| {r.train_s:.0f} | {r.peak_mib:.0f} |"
        )
    return "\n".join(rows)


def write_table(page: Path, text: str) -> None:
    """Put the table between its marks, leaving the rest of the page as it is; a page without marks gets them."""
    begin, end = TABLE_MARKS
    old = page.read_text(encoding="utf-8") if page.is_file() else f"{begin}\n{end}\n"
    if begin not in old or end not in old:
        raise SystemExit(f"{page}: expected the lines {begin!r} and {end!r} around the table")
    head, tail = old.split(begin)[0], old.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def draw(results: Sequence[Result], path: Path) -> None:
    """Held-out accuracy over seconds of training, one panel a vocabulary."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prototypes"
    from matplotlib import pyplot

    vocabularies = sorted({r.vocabulary for r in results})
    figure, axes = pyplot.subplots(1, len(vocabularies), figsize=(4.6 * len(vocabularies), 3.8), squeeze=False)
    colours = {name: f"C{index}" for index, name in enumerate([*VARIANTS, EQUAL_TIME])}
    for axis, vocabulary in zip(axes[0], vocabularies, strict=True):
        for r in (r for r in results if r.vocabulary == vocabulary):
            axis.plot(*zip(*r.curve, strict=True), label=r.variant, color=colours[r.variant], marker=".")
        axis.axhline(r.majority, color="grey", linestyle=":", label="always the commonest")
        axis.set(title=f"{vocabulary:,} classes", xlabel="seconds of training")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/prototypes"), help="runs, tokens and results")
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="where prototypes.md and .svg are written")
    parser.add_argument("--vocabularies", default="257,4096,16384", help="classes, comma-separated")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    vocabularies = [int(v) for v in given.vocabularies.split(",")]
    results = [r for v in vocabularies for r in study(v, given.steps, given.out_dir, given.threads)]
    given.docs_dir.mkdir(parents=True, exist_ok=True)
    write_table(given.docs_dir / "prototypes.md", table(results))
    draw(results, given.docs_dir / "prototypes.svg")
    print(table(results))


if __name__ == "__main__":
    main()
