"""The grammar of placements and freeze policies, and what each means."""

from __future__ import annotations

import pytest

from protomamba.errors import ConfigError
from protomamba.model.growth import frozen_layers, new_positions


@pytest.mark.parametrize(
    ("placement", "base", "target", "positions"),
    [
        ("append", 2, 5, [2, 3, 4]),
        ("prepend", 2, 5, [0, 1, 2]),
        ("insert:1", 2, 5, [1, 2, 3]),
        ("insert:2", 2, 4, [2, 3]),
        ("specific:1,3,4,5", 2, 6, [1, 3, 4, 5]),
        ("specific:5, 1", 4, 6, [1, 5]),
        ("specific:1,3,4,5", 6, 6, []),  # nothing grows: the default placement may stand
        ("append", 0, 1, [0]),
    ],
)
def test_new_positions(placement: str, base: int, target: int, positions: list[int]) -> None:
    assert new_positions(placement, base, target) == positions


@pytest.mark.parametrize(
    ("placement", "base", "target", "says"),
    [
        ("middle", 2, 3, "expected append, prepend"),
        ("append:1", 2, 3, "expected append, prepend"),
        ("insert:3", 2, 4, "one index from 0 to 2"),
        ("insert:", 2, 4, "found nothing"),
        ("insert:-1", 2, 4, "found -1"),
        ("specific:1,3", 2, 6, "names 2 positions, but 4 layers are new"),
        ("specific:1,1", 2, 4, "different final indices"),
        ("specific:1,4", 2, 4, "different final indices from 0 to 3"),
        ("append", 4, 2, "cannot shrink"),
    ],
)
def test_a_placement_that_does_not_fit_says_why(placement: str, base: int, target: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        new_positions(placement, base, target)


@pytest.mark.parametrize(
    ("policy", "frozen"),
    [("none", set()), ("first:0", set()), ("first:2", {0, 1}), ("first:4", {0, 1, 2, 3}), ("indices:3,0", {0, 3})],
)
def test_frozen_layers(policy: str, frozen: set[int]) -> None:
    assert frozen_layers(policy, 4) == frozen


@pytest.mark.parametrize("policy", ["first:5", "indices:4", "first", "last:2", "first:a", "indices:", "none:1", ""])
def test_a_policy_that_does_not_fit_is_an_error(policy: str) -> None:
    with pytest.raises(ConfigError, match="--freeze"):
        frozen_layers(policy, 4)
