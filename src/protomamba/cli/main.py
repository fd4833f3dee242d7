"""The command line: parse, call, print. Every command's work is a function elsewhere, imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protomamba import __version__
from protomamba.cli import (
    compare,
    completion,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    predict,
    prepare,
    report,
    track,
)
from protomamba.cli.examples import epilog
from protomamba.cli.flags import Parser, add_fields, run_config
from protomamba.errors import ConfigError, UserError
from protomamba.machine import process_start
from protomamba.memory import out_of_memory
from protomamba.output import claim_standard_descriptors, safe_standard_streams
from protomamba.run_config import RunConfig
from protomamba.schema import nearest


def _configure_train(parser: Parser, hidden: bool = False) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML, YAML or JSON file with the same names; flags take precedence"
    )
    parser.add_argument(
        "field:data",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="prepared folder; instead of --token-dir or --token-file",
    )
    add_fields(parser, [name for name in RunConfig.model_fields if name != "data"], hidden=hidden)


def _train(arguments: argparse.Namespace) -> int:
    from protomamba.train.build import train

    return train(run_config(arguments), began=arguments.began)


def _configure_parity(parser: Parser) -> None:
    from protomamba.cli.parity import PROBES

    about = "; ".join(f"{name}: {line}" for name, (line, _) in PROBES.items())
    parser.add_argument("probe", choices=(*PROBES, "all"), metavar="|".join((*PROBES, "all")), help=about)
    parser.add_argument(
        "--probe-steps",
        type=int,
        metavar="N",
        help="resume: steps before and after the save [5, or --bp-cadence-steps if more]",
    )
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="kernels: also N random shapes [%(default)s]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; for all, a list of them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the same JSON to a file")
    parser.epilog = "The model and data of a probe are set by the flags of train: see protomamba train --help."
    _configure_train(parser, hidden=True)


def _parity(arguments: argparse.Namespace) -> int:
    from protomamba.cli.parity import Amount, parity

    steps = arguments.probe_steps
    if steps is not None and steps < 1:
        raise ConfigError(f"--probe-steps {steps}: expected an integer >= 1")
    config = run_config(arguments)
    amount = Amount(steps, arguments.random)
    return parity(arguments.probe, config, amount, as_json=arguments.json, report_file=arguments.report)


def _configure_bench(parser: Parser) -> None:
    shapes = "comma-separated: S, M, L, one-row, compact or BATCHxLENGTHxWIDTHxLAYERS[:KIND]"
    parser.add_argument("--shapes", default="S,M,L,compact", metavar="NAME,...", help=f"{shapes} [%(default)s]")
    parser.add_argument("--precision", default="fp32", metavar="fp32,bf16", help="one or both [%(default)s]")
    parser.add_argument("--threads", type=int, metavar="N", help="number of torch's threads [torch's choice]")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="number of measurements [%(default)s]")
    parser.add_argument(
        "--sections",
        default="steps",
        metavar="NAME,...",
        help="comma-separated: steps, threads (1 compared with all), lengths, ranks [%(default)s]",
    )
    parser.add_argument(
        "--op", metavar="NAME,...", help="time single ops instead, by their names in protomamba.kernels"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall time, or processor time for a busy machine [%(default)s]",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _bench(arguments: argparse.Namespace) -> int:
    from protomamba.cli.bench import bench

    return bench(arguments)


# name -> (one line, flags, work)
COMMANDS = {
    "train": ("train a model, or resume a run", _configure_train, _train),
    "eval": ("evaluate a checkpoint: loss, accuracy, measures of its task", evaluate.configure, evaluate.work),
    "generate": ("continue a prompt", generate.configure, generate.work),
    "predict": ("write predictions for every row of a file", predict.configure, predict.work),
    "prepare": (
        "make token shards from text, JSON lines or parquet files",
        prepare.configure_text,
        prepare.prepare_text,
    ),
    "prepare events": ("make item sequences from tables of events", prepare.configure_events, prepare.prepare_events),
    "prepare fasta": ("make token sequences from DNA in FASTA files", prepare.configure_fasta, prepare.prepare_fasta),
    "prepare labels": (
        "make labelled sequences from tables, .ts or .npz",
        prepare.configure_labels,
        prepare.prepare_labels,
    ),
    "inspect": ("show and verify a checkpoint", inspect.configure, inspect.work),
    "parity": (
        "check numerics against reference implementations",
        _configure_parity,
        _parity,
    ),
    "export": ("write a checkpoint for other programs", export.configure, export.work),
    "report": ("write a page about runs: curves, settings, tables", report.configure, report.work),
    "compare": ("compare runs: figures, and the settings that differ", compare.configure, compare.work),
    "doctor": ("show what is slow or missing on this machine", doctor.configure, doctor.work),
    "track": ("log a finished run to a tracker", track.configure, track.work),
    "completion": ("print a shell completion script", completion.configure, completion.work),
    "bench": ("time steps and ops against their matrix products", _configure_bench, _bench),
}


def parser_of(name: str) -> Parser:
    """The parser of one command."""
    about, configure, _ = COMMANDS[name]
    parser = Parser(prog=f"protomamba {name}", description=about)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    configure(parser)
    parser.epilog = epilog(name, parser.epilog)
    return parser


def _usage() -> str:
    lines = [f"  {name:<15} {about}" for name, (about, _, _) in COMMANDS.items()]
    return "usage: protomamba COMMAND [flags]   (protomamba COMMAND --help lists them)\n\n" + "\n".join(lines)


def run(arguments: Sequence[str], began: float | None = None) -> int:
    """Run one command. Raises UserError; --help and --version end by SystemExit(0).

    began: when, on the clock of time.perf_counter, if that was before now.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"protomamba {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"unknown command {arguments[0]}{nearest(arguments[0], COMMANDS)} (see protomamba --help)")
    two = " ".join(arguments[:2])
    name = two if two in COMMANDS else arguments[0]
    work = COMMANDS[name][2]
    parser = parser_of(name)
    parsed = parser.parse_checked(arguments[len(name.split()) :])
    parsed.began = began
    return work(parsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The `protomamba` command: the exit code, with one line on stderr for what a user can mend."""
    # As a command of the shell the process is the command: loading Python and torch is part of its time.
    began = process_start() if arguments is None else None
    arguments = sys.argv[1:] if arguments is None else arguments
    claim_standard_descriptors()
    with safe_standard_streams() as (out, _):
        code = _run_and_explain(arguments, began)
        out.flush()
        return code or _unheard(arguments, out.lost)


def _run_and_explain(arguments: Sequence[str], began: float | None) -> int:
    try:
        return run(arguments, began)
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"protomamba: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in arguments or (told := out_of_memory(error)) is None:
            raise
        print(f"protomamba: {told}", file=sys.stderr)
        return 1


# What they produce is files: lost console output does not make them fail.
MAKES_FILES = ("train", "prepare", "export")


def _unheard(arguments: Sequence[str], lost: OSError | None) -> int:
    """1 where what was printed is all there was to get, and could not be written; a reader that left had enough."""
    if lost is None or isinstance(lost, BrokenPipeError) or (arguments and arguments[0] in MAKES_FILES):
        return 0
    print(f"protomamba: standard output: not written: {lost.strerror}", file=sys.stderr)
    return 1
