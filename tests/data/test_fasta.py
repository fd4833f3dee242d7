"""DNA: records read as they are written, words and strands by their definition, each defect's place."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protomamba.data import compressed, tokenizer_from_json
from protomamba.data.dna import DnaTokenizer
from protomamba.data.fasta import parts_of, prepare_fasta
from protomamba.data.prepared import Prepared, open_prepared
from protomamba.data.sequences import SequenceSet
from protomamba.data.source import StreamSpec
from protomamba.data.vocabulary import UNKNOWN
from protomamba.errors import ConfigError, UserError

OTHER = str.maketrans("ACGTacgt", "TGCAtgca")


def other_strand(text: str) -> str:
    return text[::-1].translate(OTHER)


def bases(prepared: Prepared, tokenizer: DnaTokenizer) -> list[str]:
    """The records, read back."""
    source = prepared.training
    assert isinstance(source, SequenceSet)
    return [tokenizer.decode(source.store.read(0, start, stop).tolist()) for start, _, stop in source.spans.tolist()]


records_ = st.lists(st.text("ACGTNacgtRU", min_size=1, max_size=50), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    records=records_,
    width=st.integers(1, 60),
    block=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_records_come_back_wherever_lines_and_blocks_end(
    records: list[str], width: int, block: int, end: str, last: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(any(set(record.upper()) & set("ACGTU") for record in records))
    folder = tmp_path_factory.mktemp("fasta")
    lines = []
    for number, record in enumerate(records):
        lines += [f">r{number} of a test", *(record[i : i + width] for i in range(0, len(record), width))]
    (folder / "a.fa").write_bytes((end.join(lines) + (end if last else "")).encode())
    before, compressed.CHUNK_BYTES = compressed.CHUNK_BYTES, block
    try:
        found: dict[int, tuple[str, bytes]] = {}
        for part in parts_of(folder / "a.fa"):
            name, data = found.get(part.record, (part.name, b""))
            found[part.record] = (name, data + part.data)
        prepare_fasta([folder / "a.fa"], folder / "out")
    finally:
        compressed.CHUNK_BYTES = before
    assert [name for name, _ in found.values()] == [f"r{i}" for i in range(len(records))]
    read = [b"".join(data.split()).decode() for _, data in found.values()]
    assert read == records
    folded = [r.upper().replace("U", "T").replace("R", "N") for r in records]
    assert bases(open_prepared(folder / "out"), DnaTokenizer()) == folded


@pytest.mark.parametrize(("k", "case"), [(1, False), (1, True), (3, False), (2, True)])
def test_words_and_the_other_strand(k: int, case: bool) -> None:
    tokenizer = DnaTokenizer(k, case)
    text = "GATTACAgattaca" if case else "GATTACAGATTACA"
    text = text[: len(text) - len(text) % k]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and len(set(tokens)) > 2
    assert tokenizer.vocab_size == 2 + (8 if case else 4) ** k and max(tokens) < tokenizer.vocab_size
    turned = tokenizer.complement()[tokens[::-1]]
    assert tokenizer.decode(turned.tolist()) == other_strand(text)
    every = np.arange(tokenizer.vocab_size)
    assert (tokenizer.complement()[tokenizer.complement()] == every).all()
    again = tokenizer_from_json(tokenizer.to_json())
    assert again == tokenizer and again.encode_batch([text, ""]) == [tokens, []]


def test_what_is_unknown_and_what_is_left_over() -> None:
    tokenizer = DnaTokenizer(3)
    assert tokenizer.encode("ACG TNN\nAAuA") == [8, UNKNOWN, 2 + 3]  # ACG, TNN, AAT; one A left
    assert tokenizer.decode([0, UNKNOWN, 2]) == "NNNAAA"
    with pytest.raises(UserError, match=r"expected bases .*found 'X'"):
        tokenizer.encode("ACGX")
    for k, case, most in ((0, False, 12), (13, False, 12), (9, True, 8)):
        with pytest.raises(ConfigError, match=f"--kmer {k}: expected 1 to {most}"):
            DnaTokenizer(k, case)


def test_a_folder_of_dna_is_ready_to_train(tmp_path: Path) -> None:
    (tmp_path / "a.fa.gz").write_bytes(gzip.compress(b">one\nACGTNACGTA\nAC\n>two\nGG\n>three\nACGTACG\n"))
    manifest = prepare_fasta([tmp_path / "a.fa.gz"], tmp_path / "out", kmer=3)
    assert manifest.about["bases"] == 21 and manifest.about["parts"]["train"] == {"sequences": 2, "targets": 6}
    assert any("3 bases after the last whole 3-mer" in note for note in manifest.notes)
    assert any("1 of 21 bases are N" in note for note in manifest.notes)
    source = open_prepared(tmp_path / "out").training
    info = source.info
    assert (info.vocab_size, info.eos_token, info.reset, info.preset) == (66, 0, True, "dna")
    assert info.bytes_per_token == 3 and info.reserved == (0, 1) and info.tokenizer
    assert "other" not in str(info.recipe) and info.recipe == {"kind": "fasta", "kmer": 3, "keep_case": False}
    assert source.stream(StreamSpec(1, 8)).cursor(0)["both_strands"] == 1
    prepare_fasta([tmp_path / "a.fa.gz"], tmp_path / "one", both_strands=False)
    assert open_prepared(tmp_path / "one").training.stream(StreamSpec(1, 8)).cursor(0)["both_strands"] == 0
    with pytest.raises(UserError, match="made from other inputs or with other options"):
        prepare_fasta([tmp_path / "a.fa.gz"], tmp_path / "out", kmer=2)


BAD = {
    "no record": (b"ACGT\n", r"a\.fa, line 1: expected FASTA, a record that begins with '>', found 'ACGT"),
    "nothing": (b"\n\n", "expected records of DNA, found none"),
    "a letter": (b">one\nACGT\nAC!GT\n", r"a\.fa, line 3, column 3: expected a base .*record 'one', found '!'"),
    "a protein": (b">p\nMKVLE\n", r"a\.fa, line 2, column 4: expected a base .*found 'L'"),
    "an empty record": (b">one\n>two\nAC\n", r"a\.fa, line 1: expected bases in record 'one', found none"),
    "an empty last record": (b">one\nAC\n>two\n", r"a\.fa, line 3: expected bases in record 'two', found none"),
    "a mark inside a line": (b">one\nAC>GT\n", r"a\.fa, line 2, column 3: expected a base .*found '>'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    data, says = BAD[name]
    (tmp_path / "a.fa").write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        prepare_fasta([tmp_path / "a.fa"], tmp_path / "out")
    assert "\n" not in str(error.value)
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(b">one\n" + b"ACGT\n" * 99)[:-9])
    with pytest.raises(UserError, match=r"b\.fa\.gz: broken gzip"):
        prepare_fasta([tmp_path / "b.fa.gz"], tmp_path / "out")
