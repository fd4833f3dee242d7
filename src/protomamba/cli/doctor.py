"""`protomamba doctor`: what is slow or missing here, and what to do about it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from protomamba.cli.flags import Parser

MARKS = {"ok": "ok", "slow": "SLOW", "missing": "missing", "note": "note"}


def configure(parser: Parser) -> None:
    parser.add_argument("--measure", action="store_true", help="also time matrix products (takes a second)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def work(arguments: argparse.Namespace) -> int:
    """Print every finding; 0 whatever they are, because each command works on the slow path as well."""
    from protomamba.doctor.checks import findings, measured
    from protomamba.train.callbacks.console import Console

    found = [*findings(), *(measured() if arguments.measure else ())]
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}))
        return 0
    console = Console()
    width = max(len(finding.what) for finding in found)
    for finding in found:
        advice = f"  -> {finding.advice}" if finding.advice else ""
        console.line(f"{MARKS[finding.state]:<8}{finding.what:<{width}}  {finding.found}{advice}")
    slow = sum(finding.state == "slow" for finding in found)
    console.line(f"\n{slow} of these make training slower" if slow else "\nnothing here makes training slower")
    return 0
