"""Text of tokens that come one by one, and where it is to end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from protomamba.data.tokenizer import BYTES_EOS, ByteTokenizer, Tokenizer
from protomamba.errors import ConfigError

REPLACEMENT = "\ufffd"
# A text that streams is decoded again from so many tokens back: enough for any character and any joining of words.
KEPT_TOKENS = 64


class TextStream:
    """Text of tokens that come one by one: what is certain now; half a character waits for its other half.

    Together the pieces are what `decode` makes of all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if isinstance(tokenizer, ByteTokenizer) else None
        self._waiting: list[int] = []  # tokens since the last place where the text was whole
        self._shown = ""  # of the text of those

    def add(self, token: int) -> str:
        """The text that this token completes; empty where more is needed."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([token]) if token < BYTES_EOS else b"")
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        if text.endswith(REPLACEMENT) or not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._waiting) > KEPT_TOKENS:
            self._forget()
        return new

    def _forget(self) -> None:
        """Keep the tokens behind which the text is the same without those before: decoding stays short."""
        kept = self._waiting[-KEPT_TOKENS // 2 :]
        text = self._tokenizer.decode(kept)
        if self._shown.endswith(text) and not text.startswith(REPLACEMENT):
            self._waiting, self._shown = kept, text

    def finish(self) -> str:
        """What is left at the end, broken characters as replacement characters."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        return self._tokenizer.decode(self._waiting)[len(self._shown) :]


class TextUntil:
    """The text of a TextStream up to the first of some stop strings, which may straddle tokens and is never shown.

    `text` is what was given out so far. A beginning of a stop string waits until it is certain to be none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ConfigError("--stop '': expected a string of at least one character")
        self._tokenizer, self._stream, self._stops = tokenizer, TextStream(tokenizer), tuple(stops)
        self._tokens: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped: str | None = None

    def add(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is the stop string it completes, if any."""
        self._tokens.append(token)
        return self._certain(self._stream.add(token))

    def finish(self) -> str:
        """What is left at the end: nothing behind a stop string."""
        if self.stopped is not None:
            return ""
        piece = self._certain(self._stream.finish())
        rest = "" if self.stopped is not None else self._held
        self._held = ""
        self.text += rest
        return piece + rest

    def tokens(self) -> list[int]:
        """The tokens whose text lies in front of the stop string."""
        kept = list(self._tokens)
        while self.stopped is not None and kept and len(self._tokenizer.decode(kept)) > len(self.text):
            kept.pop()
        return kept

    def _certain(self, piece: str) -> str:
        held = self._held + piece
        found = [(held.find(stop), stop) for stop in self._stops if stop in held]
        if found:
            place, self.stopped = min(found)
            self._held, piece = "", held[:place]
        else:
            waiting = max((_overlap(held, stop) for stop in self._stops), default=0)
            piece, self._held = held[: len(held) - waiting], held[len(held) - waiting :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
