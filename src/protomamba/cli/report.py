"""`protomamba report`: run folders as one page of HTML."""

from __future__ import annotations

import argparse
from pathlib import Path

from protomamba.cli.flags import Parser


def configure(parser: Parser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders (--out-dir of train)")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="page to write [%(default)s]"
    )


def work(arguments: argparse.Namespace) -> int:
    from protomamba.report.page import write_report

    print(write_report(arguments.runs, arguments.out))
    return 0
