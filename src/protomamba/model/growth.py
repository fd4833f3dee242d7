"""Where new layers go when a model grows, and which layers a freeze policy keeps: grammar and meaning of both."""

from __future__ import annotations

from collections.abc import Sequence

from protomamba.config import stack_kinds
from protomamba.errors import ConfigError

PLACEMENTS = "append, prepend, insert:N or specific:i,j,..."
FREEZES = "none, first:N or indices:i,j,..."


def new_positions(placement: str, base: int, target: int) -> list[int]:
    """The final indices of the `target - base` new layers, ascending.

    `append`, `prepend`, `insert:N` (all of them from index N on) or `specific:i,j,...` (final indices).
    Raises ConfigError for a placement that is not one of these or does not fit.
    """
    count = target - base
    if count < 0:
        raise ConfigError(f"--target-layers {target}: a model of {base} layers cannot shrink")
    kind, _, rest = placement.partition(":")
    if kind in ("append", "prepend") and not rest:
        start = base if kind == "append" else 0
        return list(range(start, start + count))
    if kind == "insert":
        numbers = _indices(placement, rest, PLACEMENTS, "--placement")
        if len(numbers) != 1 or numbers[0] > base:
            raise ConfigError(
                f"--placement {placement}: expected one index from 0 to {base} (the number of existing layers)"
            )
        return list(range(numbers[0], numbers[0] + count))
    if kind == "specific":
        return _specific(placement, _indices(placement, rest, PLACEMENTS, "--placement"), count, target)
    raise ConfigError(f"--placement {placement}: expected {PLACEMENTS}")


def origins_of(placement: str, base: int, target: int) -> list[int | None]:
    """For each layer of the grown model the index it had before, None for a new one. ConfigError as `new_positions`."""
    new = set(new_positions(placement, base, target))
    old = iter(range(base))
    return [None if final in new else next(old) for final in range(target)]


def check_kinds(before: Sequence[str], after: Sequence[str], origins: Sequence[int | None]) -> None:
    """ConfigError for an old layer whose kind is not that of its place in the grown model."""
    for final, origin in enumerate(origins):
        if origin is not None and before[origin] != after[final]:
            raise ConfigError(
                f"layer {origin} is {before[origin]} and would come to place {final}, where --layers has "
                f"{after[final]}: choose another --placement, or another --layers"
            )


def base_pattern(layers: str, placement: str, base: int, target: int) -> str:
    """The --layers of a stack of `base` layers that is to grow to `target` by `placement`: `layers` counts final
    places, so each layer has the kind of the place that it comes to. ConfigError as `new_positions`."""
    kinds = stack_kinds(layers, target)
    old = [kinds[final] for final, origin in enumerate(origins_of(placement, base, target)) if origin is not None]
    return ",".join(old) or layers


def frozen_layers(policy: str, n_layer: int) -> set[int]:
    """The indices of the layers that `policy` (`none`, `first:N`, `indices:i,j,...`) keeps as they are.

    Raises ConfigError for a policy that is not one of these or names a layer that is not there.
    """
    kind, _, rest = policy.partition(":")
    if policy == "none":
        return set()
    if kind not in ("first", "indices"):
        raise ConfigError(f"--freeze {policy}: expected {FREEZES}")
    numbers = _indices(policy, rest, FREEZES, "--freeze")
    if kind == "first":
        if len(numbers) != 1 or numbers[0] > n_layer:
            raise ConfigError(
                f"--freeze {policy}: expected a count from 0 to {n_layer} (the number of existing layers)"
            )
        return set(range(numbers[0]))
    if max(numbers) >= n_layer:
        raise ConfigError(f"--freeze {policy}: there is no layer {max(numbers)} among {n_layer} (counted from 0)")
    return set(numbers)


def moved_freeze(policy: str, origins: Sequence[int | None]) -> str:
    """The policy that freezes the same layers after a growth whose layer i was layer origins[i] (None = new) before."""
    frozen = frozen_layers(policy, 1 + max((old for old in origins if old is not None), default=-1))
    kept = [str(index) for index, old in enumerate(origins) if old in frozen]
    return f"indices:{','.join(kept)}" if kept else "none"


def _specific(placement: str, positions: list[int], count: int, target: int) -> list[int]:
    if count == 0:
        return []  # nothing grows, so there is nothing to place: the default placement may stand
    if len(set(positions)) != len(positions) or max(positions) >= target:
        raise ConfigError(f"--placement {placement}: expected different final indices from 0 to {target - 1}")
    if len(positions) != count:
        raise ConfigError(
            f"--placement {placement}: names {len(positions)} positions, but {count} layers are new "
            f"({target - count} -> {target})"
        )
    return sorted(positions)


def _indices(text: str, rest: str, grammar: str, flag: str) -> list[int]:
    parts = rest.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{flag} {text}: expected {grammar}, found {rest or 'nothing'} where numbers belong")
    return [int(part) for part in parts]
