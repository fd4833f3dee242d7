"""Rows a second of `predict` in batches and row by row, for a model of each kind: `predict_speed.py FOLDER`.

Makes small data and models of text, labelled text, events and DNA in FOLDER (once), and answers the same rows of
unequal length (8 to 120 steps, events 6 to 34) by `predict_file` on one thread, in turns: row by row, each answered and
written before the next is taken, and in the batches of the command. Prints the medians, the median ratio of a turn, and
how far apart the numbers of both outputs are at most.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from browsing import write as write_events

from protomamba.cli.main import main
from protomamba.predict import batching
from protomamba.predict.answers import Question
from protomamba.predict.job import Job, predict_file

ROWS, ROUNDS = 4_096, 3
SIZES = ["--d-model", "64", "--steps", "20", "--threads", "1"]
QUESTIONS = {
    "text": Question("likelihood"),
    "labels": Question("class"),
    "events": Question("items", top_k=10),
    "DNA": Question("likelihood"),
}


def rows_of(letters: str, count: int = ROWS) -> list[str]:
    """Random letters, 8 to 120 a row."""
    drawn = np.random.default_rng(0)
    return ["".join(drawn.choice(list(letters), length)) for length in drawn.integers(8, 121, count)]


def write_inputs(folder: Path) -> dict[str, Path]:
    """A file of rows for each kind, which also serves to train on."""
    texts = rows_of("the quick brown fox jumps over a lazy dog")
    files = {kind: folder / name for kind, name in zip(QUESTIONS, ("a.txt", "b.csv", "c.csv", "d.fa"), strict=True)}
    files["text"].write_text("\n".join(texts) + "\n")
    labelled = [f"{'even' if len(text) % 2 == 0 else 'odd'},{text.replace(',', '')}" for text in texts]
    files["labels"].write_text("label,text\n" + "\n".join(labelled) + "\n")
    write_events(files["events"], 20 * ROWS)
    files["DNA"].write_text("".join(f">r{n}\n{bases}\n" for n, bases in enumerate(rows_of("ACGT"))))
    return files


def prepare_flags(kind: str, file: Path) -> list[str]:
    """What `prepare` needs to read the file of this kind."""
    flags = {
        "text": [str(file)],
        "labels": ["labels", str(file), "--label", "label", "--text", "text"],
        "events": ["events", str(file), "--group", "visitor", "--order", "time", "--item", "item"],
        "DNA": ["fasta", str(file)],
    }
    return flags[kind]


def model_of(kind: str, file: Path, folder: Path) -> Path:
    """The checkpoint of a short run, made once."""
    data, run = folder / f"data-{kind}", folder / f"run-{kind}"
    best = run / "best.safetensors"
    if not best.exists():
        for command in (
            ["prepare", *prepare_flags(kind, file), "--out-dir", str(data)],
            ["train", str(data), "--out-dir", str(run), *SIZES],
        ):
            if main(command):
                sys.exit(f"failed: {' '.join(command)}")
    return best


def seconds(checkpoint: Path, job: Job, window: int) -> float:
    """Of the whole job without loading the model, `window` rows at a time at most."""
    job.out.unlink(missing_ok=True)
    batching.WINDOW_ROWS = window
    return predict_file(checkpoint, job).seconds


def measure(kind: str, file: Path, folder: Path) -> str:
    """A line of the table."""
    checkpoint = model_of(kind, file, folder)
    jobs = [Job(file, folder / f"{kind}-{name}.jsonl", QUESTIONS[kind]) for name in ("single", "batched")]
    sizes = 1, batching.WINDOW_ROWS
    times = [[seconds(checkpoint, job, size) for job, size in zip(jobs, sizes, strict=True)] for _ in range(ROUNDS)]
    single, batched = (statistics.median(each) for each in zip(*times, strict=True))
    ratio = statistics.median(one / many for one, many in times)
    answers = [numbers_of(json.loads(f"[{','.join(job.out.read_text().splitlines())}]")) for job in jobs]
    apart = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(*answers, strict=True))
    return f"{kind:8s}{ROWS / single:12,.0f}{ROWS / batched:12,.0f}{ratio:8.1f}{apart:14.1e}"


def numbers_of(value: object) -> list[float]:
    """All numbers in what JSON holds, in order."""
    if isinstance(value, dict | list):
        return [n for each in (value.values() if isinstance(value, dict) else value) for n in numbers_of(each)]
    return [float(value)] if isinstance(value, int | float) else []


def run(folder: Path, kinds: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = write_inputs(folder)
    print(f"{'':8s}{'row by row':>12s}{'batches':>12s}{'ratio':>8s}{'furthest':>14s}   (rows/s)", flush=True)
    for kind in kinds:
        print(measure(kind, files[kind], folder), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:] or list(QUESTIONS))
