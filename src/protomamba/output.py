"""Standard output and error that may break under a run: a closed pipe, a full disk, a terminal that is gone.

Nothing here raises into the work whose progress it shows: what cannot be written is dropped, and the stream remembers
why, so that whoever has another place to write to can say so there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

# How long a stream that was set not to block may stay full before its text is dropped.
PATIENCE_S = 1.0


class SafeStream:
    """A text stream whose `write` and `flush` never raise; all else is the wrapped stream's.

    `lost` is the first error that cost text, or None. A character that the encoding lacks is written as its escape.
    A full disk is tried again with each write, so that output goes on when there is room.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        self._tell: Callable[[OSError], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def when_lost(self, tell: Callable[[OSError], None] | None) -> None:
        """Call `tell` once, with the error, as soon as text is lost, from whatever thread; at once if some is already.

        None: tell nobody any more.
        """
        self._tell = tell
        if self.lost is not None and tell is not None:
            tell(self.lost)

    def write(self, text: str) -> int:
        self._guarded(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BlockingIOError as error:
            self._when_ready(error)
        except OSError as error:
            self._note(error)
        except ValueError:  # the stream was closed by someone
            self._note(OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def _when_ready(self, error: BlockingIOError) -> None:
        """A pipe that was set not to block is full: what is in the buffer goes on once the reader has read."""
        try:
            while select.select([], [self._stream], [], PATIENCE_S)[1]:
                with contextlib.suppress(BlockingIOError):
                    return self._stream.flush()
        except (OSError, ValueError) as other:
            return self._note(other if isinstance(other, OSError) else error)
        self._note(error)

    def _note(self, error: OSError) -> None:
        if self.lost is None:
            self.lost = error
            if self._tell is not None:
                self._tell(error)


def safe(stream: TextIO) -> SafeStream:
    """`stream` as a SafeStream; one that is one already is returned as it is."""
    return stream if isinstance(stream, SafeStream) else SafeStream(stream)


def claim_standard_descriptors() -> None:
    """Put the null device where 0, 1 or 2 are closed, so that no file opened later gets their numbers.

    A handler, a library or a child that writes to descriptor 2 would otherwise write into a file of the run.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is given: the one that was found closed.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)


@contextlib.contextmanager
def safe_standard_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """While it lasts sys.stdout and sys.stderr are SafeStreams, also where the process has none; yields the two."""
    former = sys.stdout, sys.stderr
    out, err = (safe(stream or _stream_of(number)) for number, stream in enumerate(former, 1))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out, err
    finally:
        for stream in (out, err):
            stream.flush()
            if stream.lost is not None:
                _discard_buffer(stream)
        sys.stdout, sys.stderr = former


def _stream_of(descriptor: int) -> TextIO:
    """A stream where Python made none, because the descriptor was closed when it started; see above."""
    return os.fdopen(descriptor, "w", closefd=False)


def _discard_buffer(stream: SafeStream) -> None:
    """Let what a broken stream still holds go nowhere: the interpreter would fail on it at exit, and say so by 120."""
    with contextlib.suppress(OSError, ValueError):
        broken, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, broken)
        os.close(null)
        stream.flush()
