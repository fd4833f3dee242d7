"""`protomamba inspect`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from protomamba.cli.checkpoints import A_CHECKPOINT
from protomamba.cli.flags import Parser


def configure(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=A_CHECKPOINT)
    parser.add_argument(
        "--verify", action="store_true", help="only verify the checksums; the exit code says whether they are right"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def work(arguments: argparse.Namespace) -> int:
    """Show what a checkpoint holds and whether it is whole: exit code 0, or 1 with each defect named."""
    from protomamba.checkpoint import file as checkpoint
    from protomamba.train.callbacks.console import Console

    problems = checkpoint.verify(arguments.checkpoint)
    if arguments.verify or problems:
        if arguments.json:
            print(json.dumps({"path": str(arguments.checkpoint), "ok": not problems, "problems": problems}))
        else:
            print("\n".join(problems) if problems else f"{arguments.checkpoint}: OK")
        return 1 if problems else 0
    found = checkpoint.describe_checkpoint(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(found))
        return 0
    console = Console()
    console.header({key: value for key, value in found.items() if not isinstance(value, list | dict)})
    console.header({f"info.{key}": value for key, value in found.get("info", {}).items()})
    tensors = found.get("tensors", [])
    console.table(
        ("part", "tensor", "shape", "dtype", "bytes"),
        [(t.get("part", ""), t["name"], "x".join(map(str, t["shape"])), t["dtype"], t["bytes"]) for t in tensors],
    )
    return 0
