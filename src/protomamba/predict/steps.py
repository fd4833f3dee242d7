"""A table with a row a step as rows of `predict`: one for each group, its steps in order, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.data.blocks import BadRowError, Block, each_good
from protomamba.data.columns import OrderKeys, PromotedError, floats_of, names_of
from protomamba.data.event_buckets import Sinks, bucket_paths, buckets_of, read_bucket
from protomamba.data.tables import expand_columns, read_blocks
from protomamba.errors import UserError
from protomamba.predict.rows import LINE, Row
from protomamba.predict.series import scaled


@dataclass(frozen=True)
class StepColumns:
    """The columns of such a table: `tokens`, one of names, or `values`, one for each channel (* and ? allowed)."""

    group: str
    order: str | None = None
    tokens: str | None = None
    values: Sequence[str] = ()


def step_rows(
    path: Path, columns: StepColumns, recipe: Mapping[str, Any], scratch: Path, skip_bad: bool = False
) -> Iterator[Row]:
    """{group: its name, LINE: float32 (L, C), scaled as in training} or {group: ..., tokens: names} of each group.

    In memory of a part of the table; the parts lie in `scratch` meanwhile. skip_bad: a group with a row that cannot be
    read is left out, and each such row comes first, with its error. UserError naming file, row and column else.
    """
    keys = OrderKeys()
    try:
        spread = _Spread.read(path, columns, scratch, keys, skip_bad)
    except PromotedError:  # its kind is remembered: once more, from the start
        spread = _Spread.read(path, columns, scratch, keys, skip_bad)
    yield from (Row(error.row, error=f"{error.reason}{spread.left_out(error)}") for error in spread.bad)
    number = 0
    for bucket in filter(Path.exists, spread.buckets):
        for name, steps in _groups(read_bucket(bucket), spread):
            number += 1
            key = {columns.group: name}
            yield Row(
                number, {**key, columns.tokens: steps} if columns.tokens else {**key, LINE: scaled(steps, recipe)}
            )
        bucket.unlink()


@dataclass
class _Spread:
    """The rows over files by group. `spoiled`: the groups that have a row that could not be read."""

    buckets: list[Path]
    names: list[str]  # of the channels, or the one of the tokens
    bad: list[BadRowError] = field(default_factory=list)
    spoiled: dict[int, str] = field(default_factory=dict)  # row -> group

    @classmethod
    def read(cls, path: Path, columns: StepColumns, scratch: Path, keys: OrderKeys, skip_bad: bool) -> _Spread:
        names = [columns.tokens] if columns.tokens else expand_columns(path, columns.values, "--values")
        spread = cls(bucket_paths([path], scratch), names)
        wanted = dict.fromkeys([columns.group, *([columns.order] if columns.order else []), *names])
        on_bad = spread.bad.append if skip_bad else None
        with ExitStack() as stack:
            work = spread._worker(columns, keys, Sinks(spread.buckets, stack))
            for block in read_blocks(path, list(wanted), on_bad):
                each_good(block, work, on_bad)
        return spread

    def _worker(self, columns: StepColumns, keys: OrderKeys, sinks: Sinks) -> Callable[[Block], None]:
        def spread(block: Block) -> None:
            import pyarrow as pa

            groups, _ = names_of(block, columns.group)
            try:
                order = keys.of(block, columns.order) if columns.order else np.zeros(len(block), dtype="<i8")
                steps = [_step(block, name, columns) for name in self.names]
            except BadRowError as error:
                if len(block) == 1:
                    self.spoiled[error.row] = groups[0].as_py()
                raise
            batch = pa.record_batch(
                [groups, pa.array(order), *steps], names=["group", "order", *map(str, range(len(steps)))]
            )
            sinks.write_all(buckets_of(groups, len(self.buckets)), batch)

        return spread

    def left_out(self, error: BadRowError) -> str:
        """What else is missing in the output because of it."""
        return f"; all of {self.spoiled[error.row]!r} is left out" if error.row in self.spoiled else ""


def _step(block: Block, name: str, columns: StepColumns) -> Any:
    import pyarrow as pa

    return names_of(block, name)[0] if columns.tokens else pa.array(floats_of(block, name))


def _groups(table: Any, spread: _Spread) -> Iterator[tuple[str, Any]]:
    """(name, its steps in order) of each group of a bucket, in the order in which they first come."""
    groups = table["group"].combine_chunks().dictionary_encode()
    codes, names = np.asarray(groups.indices), groups.dictionary.to_pylist()
    order = np.lexsort((table["order"].to_numpy(), codes))
    stops = np.cumsum(np.bincount(codes, minlength=len(names)))
    steps = _steps(table, len(spread.names))
    spoiled = set(spread.spoiled.values())
    for name, rows in zip(names, np.split(order, stops[:-1]), strict=True):
        if name not in spoiled:
            yield name, steps[rows] if steps.ndim == 2 else steps[rows].tolist()


def _steps(table: Any, count: int) -> Any:
    columns = [table[str(place)].to_numpy() for place in range(count)]
    return columns[0] if columns[0].dtype == object else np.stack(columns, axis=1)


@dataclass(frozen=True)
class StepFlags:
    """What the user named; None is left to the recipe in the checkpoint."""

    group: str | None = None
    order: str | None = None
    tokens: str | None = None
    values: Sequence[str] = ()


def step_columns(first: Row | None, flags: StepFlags, recipe: Mapping[str, Any]) -> StepColumns | None:
    """The columns of a table with a row a step; None where a row is a whole sequence. UserError for one unnamed."""
    if recipe.get("kind") != "labels" or recipe.get("text"):
        return None
    if not (recipe.get("group") or flags.order or (flags.group and flags.values)):
        return None
    tokens, values = flags.tokens or recipe.get("tokens"), tuple(flags.values or recipe.get("values") or ())
    if first is not None and isinstance(first.fields.get(tokens or ""), list):
        return None
    group = flags.group or recipe.get("group")
    if group is None or not (tokens or values):
        raise UserError(
            "a table with a row a step needs --group COLUMN and --values COLUMN,...: the model was trained on files "
            "of another form"
        )
    return StepColumns(group, flags.order or recipe.get("order"), tokens, () if tokens else values)
