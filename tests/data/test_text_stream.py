"""Text that streams token by token is the text of all tokens, without a broken character on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.dna import DnaTokenizer
from protomamba.data.tokenizer import (
    REPLACEMENT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    TextStream,
    Tokenizer,
    train_bpe_tokenizer,
)

TEXTS = ["größer ≥ 1 € 🙂 naïve", "日本語のテキスト", "plain words and spaces  again"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return HuggingFaceTokenizer(train_bpe_tokenizer(TEXTS * 3, 300), 0)


def streamed(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[list[str], str]:
    stream = TextStream(tokenizer)
    return [stream.add(token) for token in tokens], stream.finish()


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40), st.booleans())
def test_the_pieces_are_the_whole_and_never_half_a_character(bpe: Tokenizer, text: str, bytewise: bool) -> None:
    tokenizer = ByteTokenizer() if bytewise else bpe
    pieces, rest = streamed(tokenizer, tokenizer.encode(text * 4))
    assert "".join(pieces) + rest == text * 4
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces) and not rest


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=150))
def test_bytes_that_are_no_text_come_out_as_decode_has_them(tokens: list[int]) -> None:
    pieces, rest = streamed(ByteTokenizer(), tokens)
    assert "".join(pieces) + rest == ByteTokenizer().decode(tokens)


def test_a_character_waits_for_its_last_byte() -> None:
    euro = ByteTokenizer().encode("€")
    assert streamed(ByteTokenizer(), [*euro, 33]) == (["", "", "€", "!"], "")
    assert streamed(ByteTokenizer(), euro[:2]) == (["", ""], REPLACEMENT)


def test_long_texts_and_dna(bpe: Tokenizer) -> None:
    text = "größer als 🙂 " * 300
    pieces, rest = streamed(bpe, bpe.encode(text))
    assert "".join(pieces) + rest == text
    assert streamed(DnaTokenizer(), [2, 1, 5, 0]) == (["A", "N", "T", ""], "")
