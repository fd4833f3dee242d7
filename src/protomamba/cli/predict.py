"""`protomamba predict`: a checkpoint's answers for every row of a file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from protomamba.cli.checkpoints import A_CHECKPOINT, CODE_FLAGS, MACHINE_FLAGS, THE_CHECKPOINTS
from protomamba.cli.flags import Parser, add_fields, given_fields
from protomamba.run_config import RunConfig
from protomamba.words import counted

LISTED = 20


def configure(parser: Parser) -> None:
    from protomamba.predict.answers import WHATS

    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=A_CHECKPOINT)
    parser.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="file of rows: .txt, .jsonl, .csv, .tsv, .parquet, .npy, .npz, .ts, .fa; also .gz",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write; its name ends in .jsonl, .csv or .parquet",
    )
    about = "items (most likely next tokens), class, likelihood, embedding (vector after the last step)"
    parser.add_argument("--what", choices=("auto", *WHATS), default="auto", help=f"{about} [auto: by the checkpoint]")
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="number of items, or of classes with a probability [10 items, all classes]",
    )
    _add_switch(parser, "--exclude-seen", "items: leave out those already in the sequence")
    _add_switch(parser, "--per-token", "likelihood: also for each token")
    parser.add_argument(
        "--sequence-column", "--item", metavar="NAME", help="column that holds the sequence [found in the first row]"
    )
    key = "column with the key of each row [found, or the row's number]"
    parser.add_argument("--key-column", "--group", metavar="NAME", help=key)
    parser.add_argument("--order", metavar="NAME", help="column that orders events or steps, one per row [as trained]")
    parser.add_argument(
        "--values",
        metavar="COLUMN,...",
        help="real numbers: a row's steps, with --group a step's channels [as trained]",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="if a row cannot be read: stop, or skip it [%(default)s]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object about the job")
    add_fields(parser, CODE_FLAGS, of_checkpoint=THE_CHECKPOINTS)
    add_fields(parser, MACHINE_FLAGS)


def _add_switch(parser: Parser, flag: str, about: str) -> None:
    parser.add_argument(flag, nargs="?", const="1", default="0", choices=("0", "1"), metavar="0|1", help=f"{about} [0]")


def work(arguments: argparse.Namespace) -> int:
    """Answer every row; the rows that were skipped are listed in OUT.skipped.jsonl."""
    from protomamba.predict.answers import Question
    from protomamba.predict.job import Job, predict_file
    from protomamba.train.build import load_named_code, use_machine

    machine = RunConfig(**given_fields(arguments))
    load_named_code(machine)
    use_machine(machine.threads, machine.kernels)
    question = Question(arguments.what, arguments.top_k, arguments.exclude_seen == "1", arguments.per_token == "1")
    values = tuple(arguments.values.split(",")) if arguments.values else ()
    columns = arguments.sequence_column, arguments.key_column, arguments.order, values
    code = {part: getattr(machine, part) for part in CODE_FLAGS if part in machine.given}
    job = Job(arguments.input, arguments.out, question, *columns, skip_bad=arguments.on_bad_row == "skip", code=code)
    done = predict_file(arguments.checkpoint, job)
    if arguments.json:
        print(json.dumps({"out": str(job.out), **asdict(done)}))
        return 0
    for each in done.skipped[:LISTED]:
        print(f"skipped: {job.source}, row {each.row}: {each.reason}", file=sys.stderr)
    if done.skipped:
        print(f"{counted(len(done.skipped), 'row')} skipped, listed in {job.skipped_path}", file=sys.stderr)
    if done.unknown:
        print(f"read as unknown: {counted(done.unknown, 'item')} not in the model's vocabulary", file=sys.stderr)
    if not done.rows and not done.skipped:
        print(f"note: {job.source} has no rows", file=sys.stderr)
    made = done.rows - done.found
    before = f", {done.found:,} of them from before" if made else ", all from before"
    rate = f"; {made / done.seconds:,.0f} rows/s" if made else ""
    print(f"{counted(done.rows, 'row')} ({done.what}) in {job.out}{before if done.found else ''}{rate}")
    return 0
