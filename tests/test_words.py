"""Numbers in messages: one is one."""

from __future__ import annotations

import re
from pathlib import Path

import protomamba
from protomamba.words import counted, ranged

PACKAGE = Path(protomamba.__file__).parent


def test_one_is_singular_and_all_else_plural() -> None:
    assert [counted(n, "shard") for n in (0, 1, 1_000)] == ["0 shards", "1 shard", "1,000 shards"]
    assert counted(2, "class", "classes") == "2 classes"
    assert ranged(2, 17, "token") == "2 to 17 tokens" and ranged(57_000, 57_000, "token") == "57,000 tokens"
    assert ranged(1, 1, "token") == "1 token"


def test_no_message_leaves_the_plural_to_the_reader() -> None:
    """ "1 shard(s)": `words.counted` knows."""
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"[a-z]\((s|es)\)[^)=]*\"", line) and "import" not in line and "cat(s)" not in line
    ]
    assert not found, found
