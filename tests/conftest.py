"""Strict tests: one thread unless a test says otherwise, and no network."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# The table of promises, which is printed where the results of all workers come together.
pytest_plugins = ["tests.reliability.promises"]


def no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Any look-up of a name and any connection but to a socket of this machine's file system is an error."""
    local = event == "socket.connect" and getattr(arguments[0], "family", None) == socket.AF_UNIX
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto") and not local:
        raise RuntimeError(f"a test reached for the network: {event} {arguments[1:]!r}")


sys.addaudithook(no_network)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
