"""Text that streams token by token is the text of all tokens, without a broken character on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.dna import DnaTokenizer
from protomamba.data.text_stream import REPLACEMENT, TextStream, TextUntil
from protomamba.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    train_bpe_tokenizer,
)
from protomamba.errors import ConfigError

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


@settings(max_examples=150, deadline=None)
@given(st.text("ab€ ", max_size=30), st.lists(st.text("ab€ ", min_size=1, max_size=4), max_size=3), st.booleans())
def test_a_text_ends_in_front_of_the_first_stop_string(
    bpe: Tokenizer, text: str, stops: list[str], bytewise: bool
) -> None:
    tokenizer = ByteTokenizer() if bytewise else bpe
    until, shown = TextUntil(tokenizer, stops), ""
    for token in tokenizer.encode(text):
        shown += until.add(token)
        if until.stopped is not None:
            break
    shown += until.finish()
    assert shown == until.text and not any(stop in shown for stop in stops)
    assert (until.stopped is None) == (not any(stop in text for stop in stops))
    if until.stopped is None:
        assert shown == text and until.tokens() == tokenizer.encode(text)
    else:
        assert text.startswith(shown + until.stopped)
        assert shown.startswith(tokenizer.decode(until.tokens()))


def test_a_beginning_of_a_stop_string_waits_and_is_shown_if_it_was_none() -> None:
    until = TextUntil(ByteTokenizer(), ["END"])
    assert [until.add(token) for token in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert until.finish() == "EN"
    with pytest.raises(ConfigError, match="--stop ''"):
        TextUntil(ByteTokenizer(), [""])
