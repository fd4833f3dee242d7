"""`protomamba track`: a run that is over, in a tracker."""

from __future__ import annotations

import argparse
from pathlib import Path

from protomamba.cli.flags import Parser
from protomamba.words import counted


def configure(parser: Parser) -> None:
    from protomamba.train.callbacks.trackers import TRACKERS

    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (--out-dir of train)")
    parser.add_argument(
        "--to", required=True, choices=tuple(TRACKERS), help="tracker; each needs the optional extra of the same name"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the run in the tracker [the folder's]")


def work(arguments: argparse.Namespace) -> int:
    from protomamba.metrics_file import read_metrics
    from protomamba.report.record import read_run
    from protomamba.train.callbacks.trackers import Tracked, make_tracker, new_identity, replay

    record = read_run(arguments.run)
    settings = {**record.config, **record.environment}
    plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    tracked = Tracked(arguments.name or record.name, arguments.run, new_identity(), plain)
    folder = arguments.run / "tensorboard"
    where = f": {folder}; tensorboard --logdir {arguments.run}" if arguments.to == "tensorboard" else ""
    count = replay(read_metrics(arguments.run / "metrics.jsonl"), make_tracker(arguments.to, tracked))
    print(f"{counted(count, 'line')} of {arguments.run} {'is' if count == 1 else 'are'} in {arguments.to}{where}")
    return 0
