"""Promise 8: workers that die at random moments are replaced; the order of batches, and the training, are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protomamba.data import prefetch
from tests.marks import slow
from tests.reliability.judge import difference
from tests.reliability.promises import Trials
from tests.runs import token_file, train


def mortal(rng: random.Random, work: Callable[[Any], None], deaths: list[int | None]) -> Callable[[Any], None]:
    """A worker's life that ends, with a batch taken on and never delivered, after a random number of batches."""

    def live(shared: Any) -> None:
        left = rng.choice([0, 1, 2, 3])
        claim = shared.claim

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(shared, name)

            def claim(self) -> int | None:
                nonlocal left
                index = claim()
                if left == 0 and index is not None:
                    deaths.append(index)
                    return None  # the thread ends here, and tells nobody
                left -= 1
                return index  # type: ignore[no-any-return]

        work(Watched())

    return live


@pytest.mark.parametrize("runs", [3, slow(100)])
def test_dying_workers_change_nothing(
    runs: int, tmp_path: Path, trials: Callable[[int], Trials], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, rng, tokens = trials(8), random.Random(runs), token_file(tmp_path)
    monkeypatch.setattr(prefetch, "CHECK_SECONDS", 0.005)
    assert train(tmp_path / "uncut", tokens, "--steps", 20) == 0
    work = prefetch._work
    for number in range(runs):
        deaths: list[int | None] = []
        monkeypatch.setattr(prefetch, "_work", mortal(rng, work, deaths))
        workers = rng.choice([1, 2, 4])
        more = ["--prefetch-workers", workers, "--prefetch-buffer", rng.choice([1, 2, 16])]
        code = train(tmp_path / str(number), tokens, "--steps", 20, *more)
        problem = None if code == 0 and deaths else f"exit {code}, {len(deaths)} deaths"
        counted.add(problem or difference(tmp_path / "uncut", tmp_path / str(number)))
    counted.finish()
