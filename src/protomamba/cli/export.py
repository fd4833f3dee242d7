"""`protomamba export`: a checkpoint for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from protomamba.cli.checkpoints import A_CHECKPOINT
from protomamba.cli.flags import Parser


def configure(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=A_CHECKPOINT)
    parser.add_argument(
        "--format",
        choices=("transformers", "weights"),
        default="transformers",
        help="transformers: for AutoModelForCausalLM; weights: the model alone, for from_pretrained and --init-from "
        "[%(default)s]",
    )
    parser.add_argument("--out", "--out-dir", type=Path, required=True, metavar="DIR", help="folder to write")


def work(arguments: argparse.Namespace) -> int:
    from protomamba.export import export_transformers, export_weights

    export = {"transformers": export_transformers, "weights": export_weights}[arguments.format]
    for path in export(arguments.checkpoint, arguments.out):
        print(path)
    return 0
