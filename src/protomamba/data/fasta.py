"""`prepare fasta`: the records of FASTA files as sequences of bases or k-mers, in one pass and constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.data.compressed import BOM, LONGEST_LINE, blocks_of, refuse_long_line
from protomamba.data.dna import INVALID, SPACE, DnaTokenizer
from protomamba.data.files import check_regular_file, sha256_of
from protomamba.data.filling import Filling, filling
from protomamba.data.formats import TokenWriter
from protomamba.data.prepared_manifest import TOKENS, PreparedManifest, save_arrays
from protomamba.errors import UserError
from protomamba.storage import atomic_file
from protomamba.words import counted

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """Some bytes of a record, whose name and first line stand in `name` and `line`; `line` of the bytes themselves."""

    record: int
    name: str
    line: int
    data: bytes


def prepare_fasta(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    kmer: int = 1,
    keep_case: bool = False,
    both_strands: bool = True,
    progress: Progress | None = None,
) -> PreparedManifest:
    """Make a folder of DNA sequences; returns the manifest that is also written.

    `both_strands`: training reads half of the records from the other strand, drawn anew each epoch. UserError naming
    file, line and column of what is no base.
    """
    tokenizer = DnaTokenizer(kmer, keep_case)
    paths, folder = [Path(each) for each in inputs], Path(out_dir)
    options = {"kmer": kmer, "keep_case": keep_case, "both_strands": both_strands}
    with filling(folder, paths, {"fasta": options}) as call:
        return call.done or _fill(call, tokenizer, options, progress)


def _fill(
    call: Filling, tokenizer: DnaTokenizer, options: Mapping[str, Any], progress: Progress | None
) -> PreparedManifest:
    folder = call.folder
    with atomic_file(folder / TOKENS) as file:
        records = _Records(TokenWriter(file, "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"), tokenizer)
        _read_all([file.path for file in call.inputs], records, progress)
        call.check_inputs()
        records.tokens.write(np.zeros(1, dtype=np.int64))  # a token file holds two at least
        records.tokens.finish()
    spans = records.spans()
    files = save_arrays(folder, {"spans-train": spans})
    manifest = PreparedManifest(
        folder,
        kind="fasta",
        preset="dna",
        plan=call.plan,
        recipe={"kind": "fasta", "kmer": options["kmer"], "keep_case": options["keep_case"]},
        about={
            "vocab_size": tokenizer.vocab_size,
            "both_strands": options["both_strands"],
            "bases": records.bases,
            "parts": {"train": {"sequences": len(spans), "targets": int((spans[:, 2] - spans[:, 1]).sum())}},
            "notes": records.notes(),
        },
        source={"inputs": call.listed, "options": options},
        files={**files, TOKENS: sha256_of(folder / TOKENS)},
    )
    manifest.write()
    return manifest


def _read_all(paths: Sequence[Path], records: _Records, progress: Progress | None) -> None:
    sizes = [check_regular_file(path).st_size for path in paths]
    for number, path in enumerate(paths):
        for part in parts_of(path):
            records.add(path, part)
        records.end()
        if progress:
            progress(sum(sizes[: number + 1]), sum(sizes))
    if records.bases == records.unknown:
        found = "only N and other ambiguity codes" if records.bases else "none"
        raise UserError(f"{paths[0] if paths else 'no input'}: expected records of DNA, found {found}")


@dataclass
class _Records:
    """Writes the tokens of one record after the other."""

    tokens: TokenWriter
    tokenizer: DnaTokenizer
    bases: int = 0
    unknown: int = 0
    dropped: int = 0  # bases after the last whole word of a record
    _current: Part | None = None
    _path: Path | None = None
    _length: int = 0
    _rest: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    _stops: list[int] = field(default_factory=list)

    def add(self, path: Path, part: Part) -> None:
        """Take the next bytes; UserError naming line and column of what is no base."""
        if self._current is None or part.record != self._current.record:
            self.end()
            self._current, self._path = part, path
        codes = self.tokenizer.codes(part.data)
        if codes.size and int(codes.max()) == INVALID:
            _refuse_letter(path, part, self.tokenizer)
        self.bases += len(codes)
        self._length += len(codes)
        self.unknown += int((codes == len(self.tokenizer.letters)).sum())
        codes = np.concatenate((self._rest, codes))
        whole = len(codes) - len(codes) % self.tokenizer.k
        self.tokens.write(self.tokenizer.tokens(codes[:whole]))
        self._rest = codes[whole:]

    def end(self) -> None:
        """The record ends here."""
        if self._current is not None:
            if not self._length:
                part = self._current
                raise UserError(
                    f"{self._path}, line {part.line - 1:,}: expected bases in record {part.name!r}, found none"
                )
            self.dropped += len(self._rest)
            self._stops.append(self.tokens.tokens)
        self._current, self._length, self._rest = None, 0, self._rest[:0]

    def spans(self) -> npt.NDArray[np.int64]:
        """First token, first target and end of each record; those too short for a word are left out."""
        stops = np.array(self._stops, dtype=np.int64)
        starts = np.concatenate(([0], stops[:-1]))
        return np.stack((starts, starts, stops), axis=1)[stops > starts]

    def notes(self) -> list[str]:
        found = []
        if self.unknown:
            found.append(
                f"{self.unknown:,} of {self.bases:,} bases are N or another ambiguity code, and are never targets"
            )
        if self.dropped:
            word = f"{self.tokenizer.k}-mer"
            found.append(f"left out: {counted(self.dropped, 'base')} after the last whole {word} of a record")
        return found


def _refuse_letter(path: Path, part: Part, tokenizer: DnaTokenizer) -> NoReturn:
    place = next(i for i, byte in enumerate(part.data) if byte not in SPACE and tokenizer.table[byte] == INVALID)
    before = part.data[:place]
    line, column = part.line + before.count(b"\n"), place - before.rfind(b"\n")
    raise UserError(
        f"{path}, line {line:,}, column {column:,}: expected a base (A, C, G, T, U; N or another IUPAC code for "
        f"several) in record {part.name!r}, found {chr(part.data[place])!r}"
    )


def parts_of(path: Path) -> Iterator[Part]:
    """The records of a FASTA file in pieces, at least one each. UserError where it begins without a record."""
    record, name, line, pending, in_header = -1, "", 1, b"", False
    for block in _ended(path):
        pending += block
        at = 0  # what of `pending` is done
        while True:
            if in_header:
                end = pending.find(b"\n", at)
                if end < 0:
                    break
                title = pending[at + 1 : end].decode("utf-8", "replace").split(None, 1)
                name, line, at, in_header = title[0] if title else "", line + 1, end + 1, False
                yield Part(record, name, line, b"")
            cut = at if pending.startswith(b">", at) else pending.find(b"\n>", at) + 1 or _kept(pending, at)
            yield from _sequence(path, record, name, line, pending[at:cut])
            line, at = line + pending.count(b"\n", at, cut), cut
            if not pending.startswith(b">", at):
                break
            record, in_header = record + 1, True
        pending = pending[at:]
        if len(pending) > LONGEST_LINE:
            refuse_long_line(f"{path}, line {line:,}")


def _kept(pending: bytes, at: int) -> int:
    """Where bytes without the start of a record end, but for a line end that one may follow."""
    return len(pending) - pending.endswith(b"\n", at)


def _ended(path: Path) -> Iterator[bytes]:
    """The blocks of a file without a byte order mark, with a line end behind the last."""
    blocks = blocks_of(path)
    yield next(blocks, b"").removeprefix(BOM)
    yield from blocks
    yield b"\n"


def _sequence(path: Path, record: int, name: str, line: int, data: bytes) -> Iterator[Part]:
    if record >= 0:
        yield Part(record, name, line, data)
    elif data.strip():
        found = data.lstrip()[:20].decode("latin-1").splitlines()[0]
        raise UserError(f"{path}, line {line:,}: expected FASTA, a record that begins with '>', found {found!r}")
