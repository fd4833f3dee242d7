"""`protomamba prepare [events|fasta|labels] FILES`: a user's own files to a folder that `train` takes as it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from protomamba.cli.flags import Parser
from protomamba.errors import ConfigError, UserError
from protomamba.schema import nearest
from protomamba.words import counted

if TYPE_CHECKING:
    from protomamba.data.prepared_manifest import PreparedManifest
    from protomamba.data.vocabulary import Vocabulary

NEXT = "protomamba train {folder} --out-dir runs/mine"


def _configure_common(parser: Parser, inputs: str) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE", help=inputs)
    parser.add_argument(
        "--out-dir", type=Path, required=True, metavar="DIR", help="folder to write, which train then takes"
    )


def configure_text(parser: Parser) -> None:
    parser.epilog = (
        "prepare events, fasta and labels are for tables and sequences; to read a folder of that name as text: ./events"
    )
    _configure_common(parser, "files and folders, also .gz and .zst, and folders of the `datasets` library")
    formats = ("auto", "text", "bytes", "jsonl", "parquet", "arrow")
    parser.add_argument(
        "--format", choices=formats, default="auto", help="format of the inputs [%(default)s: by their names]"
    )
    parser.add_argument(
        "--field",
        default="text",
        metavar="NAME",
        help="field of JSON lines, or column of parquet, that holds the text [%(default)s]",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help="bytes, or a tokenizer.json file [%(default)s]"
    )
    source.add_argument(
        "--train-bpe", type=int, metavar="V", help="train a tokenizer of V tokens on the inputs instead"
    )
    parser.add_argument(
        "--eos", default="auto", metavar="NAME", help="token that ends a document: auto, none or a token [%(default)s]"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 24, metavar="N", help="tokens per shard [%(default)s]")
    jobs = "number of threads; the output does not depend on it [%(default)s]"
    parser.add_argument("--threads", "--jobs", dest="jobs", type=int, default=1, metavar="N", help=jobs)


def prepare_text(arguments: argparse.Namespace) -> int:
    """Make token shards, with a bar on a terminal; print where they are and how to train on them."""
    from protomamba.data.prepare import prepare
    from protomamba.train.callbacks.console import Console

    first = arguments.inputs[0]
    kind = nearest(str(first), ("events", "fasta", "labels"))
    if kind and not first.exists():
        raise ConfigError(f"prepare {first}: there is no such kind, and no such file{kind}")
    console = Console()
    with console.bar("preparing") as progress:
        manifest = prepare(
            arguments.inputs,
            arguments.out_dir,
            format=arguments.format,
            field=arguments.field,
            tokenizer=arguments.tokenizer,
            train_bpe=arguments.train_bpe,
            shard_tokens=arguments.shard_tokens,
            jobs=arguments.jobs,
            eos=arguments.eos,
            progress=progress,
        )
    kind = manifest.tokenizer["kind"]
    if arguments.train_bpe and manifest.vocab_size < arguments.train_bpe:
        console.line(
            f"note: the inputs have no more pairs to merge: {manifest.vocab_size:,} tokens, not {arguments.train_bpe:,}"
        )
    console.header(
        {
            "tokens": f"{manifest.tokens:,} in {counted(len(manifest.shards), 'shard')} in {manifest.folder}",
            "vocabulary": f"{manifest.vocab_size:,} ({kind}), end of document {manifest.eos_token}",
            "train": NEXT.format(folder=manifest.folder),
        }
    )
    return 0


def configure_events(parser: Parser) -> None:
    _configure_common(parser, "tables: .csv, .tsv, .jsonl (also .gz, .zst) or .parquet")
    parser.add_argument(
        "--group", required=True, metavar="COLUMN", help="column that identifies the sequence, such as the user"
    )
    parser.add_argument("--item", required=True, metavar="COLUMN", help="column to predict; may hold lists")
    parser.add_argument(
        "--order", metavar="COLUMN", help="column, numbers or dates, that orders a sequence [order of the rows]"
    )
    parser.add_argument(
        "--min-count",
        type=int,
        default=1,
        metavar="N",
        help="items that occur less often than this become unknown [%(default)s]",
    )
    splits = (
        "last: each sequence's last event is for the test, the one before it for validation; time: the latest events; "
        "user: whole groups"
    )
    parser.add_argument("--split", choices=("last", "time", "user"), default="last", help=f"{splits} [%(default)s]")
    for part in ("valid", "test"):
        parser.add_argument(
            f"--{part}-share",
            type=float,
            default=0.1,
            metavar="F",
            help=f"fraction of the events or groups in the {part} part [%(default)s]",
        )
    earlier = "prepared folder or checkpoint whose items keep their tokens; new items are appended"
    parser.add_argument("--vocab-from", type=Path, metavar="PATH", help=f"{earlier} [none]")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed for drawing the groups to hold out [%(default)s]"
    )


def prepare_events(arguments: argparse.Namespace) -> int:
    """Make item sequences; print what came out and how to train on them."""
    from protomamba.data.events import EventOptions, prepare_events
    from protomamba.train.callbacks.console import Console

    options = EventOptions(
        arguments.group,
        arguments.item,
        arguments.order,
        arguments.min_count,
        arguments.split,
        arguments.valid_share,
        arguments.test_share,
    )
    vocabulary = vocabulary_from(arguments.vocab_from) if arguments.vocab_from else None
    with Console().bar("preparing") as progress:
        manifest = prepare_events(
            arguments.inputs, arguments.out_dir, options, vocabulary=vocabulary, seed=arguments.seed, progress=progress
        )
    _show(
        manifest,
        {
            "events": f"{manifest.about['events']:,}",
            "vocabulary": f"{manifest.about['vocab_size']:,} (items, with 2 reserved)",
        },
    )
    return 0


def configure_fasta(parser: Parser) -> None:
    _configure_common(parser, "FASTA files, also .gz and .zst")
    parser.add_argument(
        "--kmer", type=int, default=1, metavar="K", help="bases per token, not overlapping [%(default)s]"
    )
    cases = "fold: soft-masked (lower-case) bases are treated as the others; keep: they get tokens of their own"
    parser.add_argument("--case", choices=("fold", "keep"), default="fold", help=f"{cases} [%(default)s]")
    strands = "both: training reads a random half of the records reverse-complemented, a new half each epoch"
    parser.add_argument("--strands", choices=("both", "one"), default="both", help=f"{strands} [%(default)s]")


def prepare_fasta(arguments: argparse.Namespace) -> int:
    """Make sequences of bases; print what came out and how to train on them."""
    from protomamba.data.fasta import prepare_fasta
    from protomamba.train.callbacks.console import Console

    with Console().bar("preparing") as progress:
        manifest = prepare_fasta(
            arguments.inputs,
            arguments.out_dir,
            kmer=arguments.kmer,
            keep_case=arguments.case == "keep",
            both_strands=arguments.strands == "both",
            progress=progress,
        )
    _show(
        manifest,
        {"bases": f"{manifest.about['bases']:,}", "vocabulary": f"{manifest.about['vocab_size']:,} (with 2 reserved)"},
    )
    return 0


def configure_labels(parser: Parser) -> None:
    _configure_common(parser, "tables (.csv, .tsv, .jsonl, .parquet), .ts or .npz files; .gz and .zst too")
    parser.add_argument("--label", metavar="COLUMN", help="column of the class; in a .npz file, the array [y]")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--text", metavar="COLUMN", help="column of text, read as a sequence of bytes, or of tokens of --tokenizer"
    )
    steps.add_argument(
        "--tokens", metavar="COLUMN", help="column of words, read as a sequence; with --group, one word per row"
    )
    values = "real numbers (* and ? allowed): a row's steps, with --group a step's channels; in a .npz file, the array"
    steps.add_argument("--values", metavar="COLUMN,...", help=f"{values} [X]")
    parser.add_argument(
        "--group", metavar="COLUMN", help="column that identifies the sequence, if each row is one step [none]"
    )
    parser.add_argument(
        "--order", metavar="COLUMN", help="column, numbers or dates, that orders a group [order of the rows]"
    )
    by = parser.add_mutually_exclusive_group()
    by.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help="for --text: bytes, or a tokenizer.json file [%(default)s]"
    )
    by.add_argument("--train-bpe", type=int, metavar="V", help="train a tokenizer of V tokens on the training part")
    for part in ("valid", "test"):
        parser.add_argument(
            f"--{part}",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help=f"input file of the {part} part; repeatable",
        )


def prepare_labels(arguments: argparse.Namespace) -> int:
    """Make labelled sequences; print what came out and how to train on them."""
    from protomamba.data.labelled_tables import LabelColumns
    from protomamba.data.prepare_labels import prepare_labels

    values = tuple(arguments.values.split(",")) if arguments.values else ()
    columns = LabelColumns(arguments.label, arguments.text, arguments.tokens, values, arguments.group, arguments.order)
    manifest = prepare_labels(
        arguments.inputs,
        arguments.out_dir,
        columns,
        valid=arguments.valid,
        test=arguments.test,
        tokenizer=arguments.tokenizer,
        train_bpe=arguments.train_bpe,
    )
    classes = manifest.about["classes"]
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    _show(manifest, {"classes": f"{len(classes):,}: {shown}"})
    return 0


def vocabulary_from(path: Path) -> Vocabulary:
    """The items of a prepared folder, or of a checkpoint or its run folder. UserError if it has none."""
    from protomamba.checkpoint import file as checkpoint
    from protomamba.data.prepared import read_vocabulary
    from protomamba.data.prepared_manifest import read_prepared_manifest
    from protomamba.data.vocabulary import Vocabulary

    if not path.exists():
        raise ConfigError(f"--vocab-from {path}: there is no such folder or checkpoint")
    manifest = read_prepared_manifest(path) if path.is_dir() else None
    if manifest is not None and manifest.kind == "events":
        return read_vocabulary(manifest)
    file = path / "latest.safetensors" if path.is_dir() else path
    loaded = checkpoint.load(file) if file.is_file() else None
    if loaded is None or "vocabulary" not in loaded.parts:
        raise UserError(f"--vocab-from {path}: has no items: expected a folder of `prepare events`, or a run on one")
    return Vocabulary.from_state(loaded.part("vocabulary"), str(path))


def _show(manifest: PreparedManifest, figures: dict[str, str]) -> None:
    from protomamba.train.callbacks.console import Console

    console = Console()
    for note in manifest.notes:
        console.line(f"note: {note}")
    parts = {
        f"{name} part": f"{counted(part['sequences'], 'sequence')}, {counted(part['targets'], 'target')}"
        for name, part in manifest.about["parts"].items()
    }
    console.header({**figures, **parts, "train": NEXT.format(folder=manifest.folder)})
