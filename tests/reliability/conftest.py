"""Fixtures of the reliability tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.reliability.forked import ForkServer
from tests.reliability.promises import Trials, rows


@pytest.fixture
def trials() -> Callable[[int], Trials]:
    """`trials(promise)`: where a test records its trials."""
    return lambda promise: Trials(promise, rows)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The fork server, shared by all tests of the session."""
    with ForkServer(tmp_path_factory.mktemp("server")) as running:
        yield running
