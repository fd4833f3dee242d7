"""`protomamba eval`: loss, accuracy and the measures of the task."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protomamba.cli.checkpoints import A_CHECKPOINT, CODE_FLAGS, MACHINE_FLAGS, THE_CHECKPOINTS, refuse_other_code
from protomamba.cli.flags import Parser, add_fields, given_fields
from protomamba.errors import ConfigError
from protomamba.run_config import RunConfig

if TYPE_CHECKING:
    from protomamba.train.judging import Judgement

DATA_FLAGS = ("token_file", "token_dir", "label_file", "shard_ext", "batch_size", "seq_len")
# A larger confusion matrix does not fit a terminal; --json has it whole.
SHOWN_CLASSES = 16


def configure(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=A_CHECKPOINT)
    parser.add_argument("field:data", nargs="?", type=Path, metavar="DATA", help="prepared folder [that of the run]")
    parser.add_argument(
        "--split",
        choices=("valid", "test", "train"),
        default="valid",
        help="part of the prepared folder [%(default)s: what the run held out]",
    )
    parser.add_argument(
        "--batches", type=int, metavar="N", help="number of batches, spread evenly over the tokens [all]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_fields(parser, (*DATA_FLAGS, *CODE_FLAGS), of_checkpoint=THE_CHECKPOINTS)
    add_fields(parser, MACHINE_FLAGS)


def work(arguments: argparse.Namespace) -> int:
    """Print loss, accuracy, perplexity and the measures of the task on the given data, or on what the run held out."""
    from protomamba.checkpoint import file as checkpoint
    from protomamba.train.evaluation import evaluate_checkpoint

    given, batches = given_fields(arguments), arguments.batches
    if batches is not None and batches < 1:
        raise ConfigError(f"--batches {batches}: expected an integer >= 1")
    loaded = checkpoint.load(arguments.checkpoint)
    refuse_other_code(loaded, RunConfig(**given))
    found = evaluate_checkpoint(arguments.checkpoint, loaded, given, split=arguments.split, batches=batches)
    if arguments.json:
        print(json.dumps({**found.figures, **found.judged.lines()}))
    else:
        _show(found.figures, found.judged)
    return 0


def _show(figures: Mapping[str, Any], judged: Judgement) -> None:
    from protomamba.report.classes import class_figures
    from protomamba.train.callbacks.console import Console

    console = Console()
    console.header({name: _shown(value) for name, value in figures.items() if value is not None})
    if judged.ranking:
        rows = {"model": judged.ranking["figures"], **judged.ranking.get("baselines", {})}
        names = list(judged.ranking["figures"])
        console.table(
            ("", *names), [(who, *(_shown(each.get(name, 0.0)) for name in names)) for who, each in rows.items()]
        )
    if judged.classification:
        found = [
            (one.name, *map(_shown, (one.precision, one.recall, one.f1, one.count)))
            for one in class_figures(judged.classification)
        ]
        console.table(("class", "precision", "recall", "F1", "sequences"), found)
        names = judged.classification["classes"]
        if len(names) <= SHOWN_CLASSES:
            rows_of = zip(names, judged.classification["confusion"], strict=True)
            console.table(("true \\ predicted", *names), [(name, *row) for name, row in rows_of])


def _shown(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
