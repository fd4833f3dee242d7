"""How messages count: 1 shard, 2 shards; 7 to 29 steps."""

from __future__ import annotations


def counted(count: int, thing: str, things: str = "") -> str:
    """1 thread, 2 threads, 3,000 classes; `things`: a plural that is not made by an s."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def ranged(least: int, most: int, thing: str) -> str:
    """7 to 29 steps; 40 steps where all are alike."""
    return counted(most, thing) if least == most else f"{least:,} to {counted(most, thing)}"
