"""Many sequences, each on its own: the events of a user, a record of DNA. No state crosses from one to the next.

The tokens of all of them lie one after another in one file; a part (training, validation, test) is a list of spans in
it, so that a held-out event is judged with all that came before it, and nothing is stored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.order import derive_key, shuffled
from protomamba.data.packing import Packing, pack
from protomamba.data.sequence_stream import SequenceStream, sequence_eval_batches
from protomamba.data.shards import ShardSet
from protomamba.data.source import DataInfo, StreamSpec
from protomamba.data.stream import Identity
from protomamba.data.vocabulary import BOUNDARY, UNKNOWN, Vocabulary
from protomamba.data.windows import Batch
from protomamba.errors import ConfigError, UserError
from protomamba.words import counted

Integers = npt.NDArray[np.int64]
IGNORED = -100
# Keys of the draws of this file; they only have to differ from those of the other orders.
_HELD_OUT, _PACKING = 5, 6
BLOCK_TOKENS = 1 << 22
# With fewer sequences than this, a part is cut off the end of each instead of drawing whole ones.
FEW_SEQUENCES = 20


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """Sequences of tokens with their boundaries. `spans` N x 3: first token, first target, end of each in `store`.

    The tokens before the first target are read, not judged. `complement` is the token of the other strand for each
    token; with it, training reads half of the sequences backwards and complemented, drawn anew each epoch.
    """

    store: ShardSet
    spans: Integers
    about: DataInfo
    name: str = "train"
    vocabulary: Vocabulary | None = None
    complement: Integers | None = None
    split_by: str | None = None  # how `prepare` made the parts; None if it made none
    notes: tuple[str, ...] = ()
    _packings: dict[Any, Packing] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def lengths(self) -> Integers:
        """Tokens of each sequence."""
        return self.spans[:, 2] - self.spans[:, 0]

    @property
    def info(self) -> DataInfo:
        lengths = self.lengths
        return replace(
            self.about,
            longest=int(lengths.max(initial=0)),
            usual=int(np.quantile(lengths, 0.95, method="higher")) if len(lengths) else None,
            targets=int((self.spans[:, 2] - self.spans[:, 1]).sum()),
        )

    def identity(self) -> Identity:
        """The file of tokens, and which spans of it."""
        spans = hashlib.sha256(self.spans.astype("<i8").tobytes()).hexdigest()
        part: dict[str, int | str] = {"name": f"spans of {self.name}", "start": 0, "tokens": len(self), "sha256": spans}
        return [*self.store.identity(), part]

    def fingerprint(self) -> str:
        """One checksum over `identity()`."""
        return hashlib.sha256(repr([tuple(each.values()) for each in self.identity()]).encode()).hexdigest()

    def check(self, *, vocab_size: int, classes: int, seq_len: int) -> None:
        """UserError if a token is outside the vocabulary; any length will do."""
        self.store.check_vocab(vocab_size)

    def class_counts(self) -> Integers:
        """How often each token is a target; reads all of it, in blocks."""
        counts = np.zeros(self.about.vocab_size, dtype=np.int64)
        for _, targets in self.transitions():
            counts += np.bincount(targets, minlength=self.about.vocab_size)
        counts[UNKNOWN] = 0
        return counts

    def transitions(self, block: int = BLOCK_TOKENS) -> Iterator[tuple[Integers, Integers]]:
        """Every target with the token before it (BOUNDARY before the first), in blocks; unknown targets too."""
        starts, firsts, stops = self.spans.T
        parts = -(-(stops - firsts) // block)  # long sequences in several
        which = np.repeat(np.arange(len(self)), parts)
        number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
        low = firsts[which] + number * block
        high = np.minimum(low + block, stops[which])
        at = 0
        while at < len(low):
            upto = max(at + 1, int(np.searchsorted(high, low[at] + 2 * block, side="right")))
            yield self._transitions(low[at:upto], high[at:upto], low[at:upto] == starts[which[at:upto]])
            at = upto

    def _transitions(self, low: Integers, high: Integers, at_start: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
        base = max(int(low[0]) - 1, 0)
        tokens = self.store.read(0, base, int(high[-1]))
        before = np.concatenate(([BOUNDARY], tokens[:-1]))
        before[low[at_start] - base] = BOUNDARY
        edges = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(edges, low - base, 1)
        np.add.at(edges, high - base, -1)
        wanted = np.cumsum(edges[:-1]) > 0
        return before[wanted], tokens[wanted]

    def split(self, ratio: float, seed: int) -> tuple[SequenceSet, SequenceSet]:
        """Training and held-out part: whole sequences drawn by `seed`, or, of fewer than 20, the end of each.

        ConfigError where `prepare` has split already.
        """
        if self.split_by is not None:
            raise ConfigError(
                f"--val-ratio {ratio:g}: `prepare` has split the data already (--split {self.split_by}); leave it out"
            )
        if len(self) < FEW_SEQUENCES:
            return self._split_ends(ratio)
        order = shuffled(len(self), derive_key(seed, _HELD_OUT))
        share = np.cumsum(self.lengths[order]) / self.lengths.sum()
        held_out = min(max(1, int(np.searchsorted(share, ratio)) + 1), len(self) - 1)
        note = f"held out: {held_out:,} of the {counted(len(self), 'sequence')}, drawn by --seed"
        training, validation = np.sort(order[held_out:]), np.sort(order[:held_out])
        return self.part(self.spans[training], "train", (note,)), self.part(self.spans[validation], "valid")

    def _split_ends(self, ratio: float) -> tuple[SequenceSet, SequenceSet]:
        starts, firsts, stops = self.spans.T
        cuts = stops - np.round((stops - firsts) * ratio).astype(np.int64)
        training = np.stack((starts, firsts, cuts), axis=1)[cuts > firsts]
        validation = np.stack((starts, cuts, stops), axis=1)[stops > cuts]
        if not (len(training) and len(validation)):
            raise UserError(
                f"{self.store.shards[0].where}: {counted(len(self), 'sequence')} of "
                f"{counted(int(self.lengths.sum()), 'token')}, too few to hold out {ratio:g} of them; give more, "
                "or --val-ratio 0"
            )
        note = f"held out: the last {100 * ratio:.3g}% of each of the {counted(len(self), 'sequence')}"
        return self.part(training, "train", (note,)), self.part(validation, "valid")

    def part(self, spans: Integers, name: str, notes: tuple[str, ...] = ()) -> SequenceSet:
        """Other spans of the same tokens."""
        return replace(self, spans=spans, name=name, notes=(*self.notes, *notes), _packings={})

    def stream(self, spec: StreamSpec) -> SequenceStream:
        """Rows of packed sequences, in an order drawn anew each epoch."""
        return SequenceStream(self, batch_size=spec.batch_size, seq_len=spec.seq_len, seed=spec.seed)

    def eval_batches(self, spec: StreamSpec, count: int | None = None) -> Iterator[Batch]:
        """`count` batches of rows, None for all; each window has all the context that fits."""
        return sequence_eval_batches(self, spec.batch_size, spec.seq_len, count)

    def packing(self, row_size: int, seed: int | None) -> Packing:
        """The rows of training by `seed`, or those of an evaluation (None). Made once."""
        key = (row_size, seed)
        if key not in self._packings:
            judged = self.spans[:, 1] - self.spans[:, 0]
            drawn = derive_key(0 if seed is None else seed, _PACKING)
            self._packings[key] = pack(self.lengths, judged, row_size, drawn, full_context=seed is None)
        return self._packings[key]

    def read(
        self, packing: Packing, rows: Integers, flipped: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
        """Tokens, targets (IGNORED: none) and resets of some rows, B x (longest of them).

        `flipped` says for each piece of the rows, in order, whether its sequence is read from the other strand.
        """
        pieces = [np.arange(packing.rows[row], packing.rows[row + 1]) for row in rows]
        chosen = np.concatenate(pieces)
        sizes = packing.stop[chosen] - packing.first[chosen]
        row_of = np.repeat(np.arange(len(rows)), [len(each) for each in pieces])
        ends = np.cumsum(sizes)
        row_ends = ends[np.cumsum([len(each) for each in pieces]) - 1]
        offsets = ends - sizes - np.concatenate(([0], row_ends[:-1]))[row_of]
        tokens = np.full((len(rows), int(np.diff(row_ends, prepend=0).max())), BOUNDARY, dtype=np.int64)
        targets, reset = np.full_like(tokens, IGNORED), np.zeros(tokens.shape, dtype=bool)
        found = self._tokens_of(packing, chosen, flipped)
        for own, row, at, piece in zip(found, row_of.tolist(), offsets.tolist(), chosen.tolist(), strict=True):
            first, judged, stop = packing.first[piece], packing.judged[piece], packing.stop[piece]
            place = slice(at, at + stop - first)
            # A piece from the start of its sequence has the boundary before it, another one its own token.
            tokens[row, place] = own[:-1] if first else np.concatenate(([BOUNDARY], own[:-1]))
            targets[row, place.stop - (stop - judged) : place.stop] = own[len(own) - (stop - judged) :]
            reset[row, at] = at > 0
        targets[targets == UNKNOWN] = IGNORED
        return tokens, targets, reset

    def _tokens_of(self, packing: Packing, pieces: Integers, flipped: npt.NDArray[np.bool_] | None) -> list[Integers]:
        """For each piece its targets and the token before the first, if the sequence has one."""
        low, high = np.maximum(packing.first[pieces] - 1, 0), packing.stop[pieces]
        starts, _, stops = self.spans[packing.sequence[pieces]].T
        turned = np.zeros(len(pieces), dtype=bool) if flipped is None else flipped
        begin = np.where(turned, stops - high, starts + low)
        found = self.store.read_ranges(0, list(zip(begin.tolist(), (begin + high - low).tolist(), strict=True)))
        if self.complement is None or flipped is None:
            return found
        return [self.complement[own[::-1]] if turn else own for own, turn in zip(found, turned, strict=True)]
