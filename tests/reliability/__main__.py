"""`python -m tests.reliability [pytest arguments]`: every promise at full figures, tests elsewhere that count too."""

from __future__ import annotations

import sys

import pytest

from tests.reliability.elsewhere import ELSEWHERE

if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [each for each in arguments if each.startswith("tests/")] or ["tests/reliability", *ELSEWHERE]
    rest = [each for each in arguments if not each.startswith("tests/")]
    # Both: the slow tests hold the full figures, and what is not slow has no larger figure.
    sys.exit(pytest.main(["-m", "slow or not slow", *rest, *chosen]))
