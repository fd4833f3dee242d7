"""A whole prediction: checkpoint and input to output, in constant memory, continued where it was interrupted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import Checkpoint
from protomamba.config import ModelConfig
from protomamba.data.tokenizer import Tokenizer, tokenizer_from_json
from protomamba.data.vocabulary import BOUNDARY, Vocabulary
from protomamba.errors import ConfigError, UserError
from protomamba.model.pretrained import build_model
from protomamba.model.registry import refuse_other_parts
from protomamba.predict.answers import Names, Question, answers, check_question, default_question
from protomamba.predict.batching import windows
from protomamba.predict.events import EventFlags, event_columns, event_rows
from protomamba.predict.examples import Columns, Example, ExampleReader, Skipped
from protomamba.predict.output import Encode, Lines, csv_header, encode_csv, encode_json, lines_path, write_parquet
from protomamba.predict.predictor import Predictor
from protomamba.predict.rows import LINE, Row, read_rows
from protomamba.predict.series import is_series, series_rows, wide_rows
from protomamba.predict.steps import StepFlags, step_columns, step_rows
from protomamba.storage import commit


@dataclass(frozen=True)
class Job:
    """What is to be predicted. question.what "auto": by the checkpoint; columns None: found in the first row.

    code: the layer, head and input that the user named, which must be the checkpoint's.
    """

    source: Path
    out: Path
    question: Question
    sequence_column: str | None = None
    key_column: str | None = None
    order_column: str | None = None
    value_columns: Sequence[str] = ()
    skip_bad: bool = False
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def skipped_path(self) -> Path:
        """Where the rows that were skipped are listed, if there are any."""
        return self.out.with_name(self.out.name + ".skipped.jsonl")


@dataclass
class Summary:
    """rows: lines in the output; found: those that were there already; skipped: rows that could not be read;
    unknown: items that the model has no
    token for; seconds: without the loading of the model."""

    what: str = ""
    rows: int = 0
    found: int = 0
    seconds: float = 0.0
    skipped: list[Skipped] = field(default_factory=list)
    unknown: int = 0


@dataclass(frozen=True)
class Known:
    """What a checkpoint says about the data it was trained on."""

    tokenizer: Tokenizer | None
    vocabulary: Vocabulary | None
    recipe: Mapping[str, Any]
    reserved: Sequence[int]
    names: Names

    @property
    def start(self) -> int | None:
        """What a sequence begins behind, as in training: the boundary, or the end of a document."""
        if self.vocabulary is not None:
            return BOUNDARY
        return self.tokenizer.eos_token if self.tokenizer else None


def known(loaded: Checkpoint) -> Known:
    """As `train` wrote it: the tokenizer, the names of items, and what `prepare` noted of its inputs."""
    description, about = loaded.config.get("tokenizer"), loaded.config.get("data") or {}
    state = loaded.parts.get("vocabulary")
    vocabulary = Vocabulary.from_state(state) if state else None
    classes = tuple(about.get("class_names") or ())
    tokenizer = tokenizer_from_json(description) if description else None
    unit = tokenizer.raw_unit if tokenizer else "byte"
    return Known(
        tokenizer,
        vocabulary,
        about.get("recipe") or {},
        about.get("reserved") or (),
        Names(vocabulary.name, classes) if vocabulary else Names(classes=classes, raw_unit=unit),
    )


def predict_file(path: Path, job: Job) -> Summary:
    """Answer every row of job.source in job.out. Raises UserError and ConfigError."""
    gathered = lines_path(job.out)
    loaded = checkpoint.load(path)
    refuse_other_parts(ModelConfig(**loaded.section("model")), job.code)
    facts = known(loaded)
    predictor = Predictor(build_model(loaded), facts.reserved)
    del loaded  # the optimizer's moments are twice the model
    question = job.question
    if question.what == "auto":
        question = replace(question, what=default_question(predictor, facts.tokenizer is not None))
    check_question(predictor, question)
    reader = _reader(job, predictor, facts)

    def lines_of(window: Sequence[Example]) -> list[dict[str, Any]]:
        return list(_keyed(reader, window, answers(predictor, window, question, facts.names)))

    started = time.perf_counter()
    encode = encode_csv if job.out.suffix == ".csv" else encode_json
    with Lines(gathered) as lines, TemporaryDirectory(prefix=".predict-", dir=job.out.parent) as scratch:
        examples = reader.examples(_rows(job, facts, reader, Path(scratch)))
        summary = _fill(lines, windows(examples, lambda example: len(example.sequence)), lines_of, encode)
    if gathered != job.out:
        write_parquet(gathered, job.out)
    _list_skipped(job.skipped_path, reader.skipped)
    summary.what, summary.skipped, summary.unknown = question.what, reader.skipped, reader.unknown
    summary.seconds = time.perf_counter() - started
    return summary


def _rows(job: Job, facts: Known, reader: ExampleReader, scratch: Path) -> Iterator[Row]:
    """The rows of the input; of a table of events one for each group, under the columns that it was trained on."""
    rows = iter(()) if is_series(job.source) else read_rows(job.source)
    first = next(rows, None)
    flags = EventFlags(job.key_column, job.sequence_column, job.order_column)
    columns = event_columns(first, flags, facts.recipe)
    if columns is not None:
        reader.columns = Columns(columns.item, columns.group)
        return event_rows(job.source, columns, facts.vocabulary, scratch, job.skip_bad)
    if facts.recipe.get("kind") == "events" and job.sequence_column is None and first is not None:
        _require_items(job, first, facts.recipe)
    if facts.recipe.get("kind") == "labels" and is_series(job.source):
        return series_rows(job.source, facts.recipe)
    step_flags = StepFlags(job.key_column, job.order_column, job.sequence_column, job.value_columns)
    steps = step_columns(first, step_flags, facts.recipe)
    if steps is not None:
        reader.columns = Columns(steps.tokens or LINE, steps.group)
        return step_rows(job.source, steps, facts.recipe, scratch, job.skip_bad)
    if job.order_column is not None:
        raise ConfigError(
            f"--order {job.order_column}: orders a table of events or steps, a row each, and needs --group: here a row "
            "is a whole sequence"
        )
    trained_on = facts.recipe.get("text") or facts.recipe.get("tokens")
    if reader.sequence_column is None and first is not None and trained_on in first.fields:
        reader.sequence_column = trained_on
    rows = itertools.chain([first] if first else [], rows)
    if facts.recipe.get("kind") == "labels" and facts.recipe.get("mean"):
        reader.sequence_column = LINE
        return wide_rows(rows, job.source, _step_columns(job, facts.recipe), facts.recipe)
    return rows


def _require_items(job: Job, first: Row, recipe: Mapping[str, Any]) -> None:
    """UserError for a table without the items: any other column would be read as items that nobody knows."""
    item, names = str(recipe.get("item")), list(first.fields)
    lists = any(isinstance(value, list) for value in first.fields.values())
    if names and not lists and not {item, "items", "tokens", "sequence", LINE} & set(names):
        raise UserError(
            f"{job.source}: no column {item!r}, the items of the table the model was trained on: its columns are "
            f"{', '.join(names)}; name others with --group and --item"
        )


def _step_columns(job: Job, recipe: Mapping[str, Any]) -> Sequence[str]:
    """The columns that are a step each. UserError where nobody has named them."""
    found = list(job.value_columns or recipe.get("values") or ())
    if not found:
        raise UserError(
            f"{job.source}: the model was trained on .ts or .npz files; of a table name the columns: --values "
            "COLUMN,... (a column a step), or with --group COLUMN too (a row a step, a column a channel)"
        )
    return found


def _list_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        content = b"".join(encode_json(asdict(each)) for each in skipped)
        commit(path, len(content), [memoryview(content)])


def _reader(job: Job, predictor: Predictor, facts: Known) -> ExampleReader:
    config = predictor.model.config
    return ExampleReader(
        str(job.source),
        config.vocab_size,
        facts.tokenizer,
        facts.start if config.n_class is None else None,
        job.sequence_column,
        job.key_column,
        job.skip_bad,
        facts.vocabulary,
        predictor.channels,
        facts.recipe.get("label"),
    )


def _keyed(
    reader: ExampleReader, window: Sequence[Example], found: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    assert reader.columns is not None
    name = reader.columns.key_name
    for example, fields in zip(window, found, strict=True):
        if name in fields:
            raise UserError(f"--key-column {name}: is also what an answer is called; choose or rename another column")
        yield {name: example.key, **fields}


def _fill(
    lines: Lines,
    cut: Iterator[list[Example]],
    lines_of: Callable[[Sequence[Example]], list[dict[str, Any]]],
    encode: Encode,
) -> Summary:
    """Work on each window whose lines are not all there, and once more on the last that is: to see that it agrees."""
    with_header = encode is encode_csv
    header = lines.next() if with_header else None
    there = lines.count - (header is not None)
    rows = 0
    for window in cut:
        if rows + len(window) < there:
            for _ in window:
                lines.next()
        else:
            fields = lines_of(window)
            made = [encode(each) for each in fields]
            if with_header:
                header = _agreed_header(lines, header, csv_header(fields[0]))
            _agree_and_append(lines, made, rows, there)
        rows += len(window)
    if rows < there:
        raise UserError(
            f"--out {lines.path}: holds {there:,} lines, the input {rows:,} rows: it was made from another input"
        )
    return Summary(rows=rows, found=there)


def _agreed_header(lines: Lines, there: bytes | None, made: bytes) -> bytes:
    if there is None:
        lines.append([made])
    elif there != made:
        raise UserError(f"--out {lines.path}: has other columns; remove it, or choose another name")
    return made


def _agree_and_append(lines: Lines, made: Sequence[bytes], first: int, there: int) -> None:
    overlap = min(max(0, there - first), len(made))
    for place in range(overlap):
        if lines.next() != made[place]:
            raise UserError(
                f"--out {lines.path}: answer {first + place + 1:,} is not what this command writes there: it was "
                "made with another checkpoint, input or option; remove it, or choose another name"
            )
    lines.append(made[overlap:])
