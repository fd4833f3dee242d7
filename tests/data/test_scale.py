"""100 million tokens in 100 shards: memory and random access (measure_loader.py also prints the time to start)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.measure_loader import scale


@pytest.mark.slow
def test_a_hundred_million_tokens(tmp_path: Path) -> None:
    figures = scale(tmp_path)
    assert figures["lookups_equal"] == 1000
    assert figures["resident_mib"] < 200
