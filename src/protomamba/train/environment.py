"""What a run ran on, for its header and its first metrics line: nobody should have to ask."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from protomamba import __version__, kernels


def describe_environment() -> dict[str, Any]:
    """Versions, commit where the sources are a checkout; kernel path, CPU level, matrix products, threads."""
    path = kernels.describe()
    return {
        "protomamba": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **path,
        "threads": int(path["threads"]),
    }


def _commit() -> str | None:
    """The commit of the checkout this package is imported from, read from .git without running git."""
    git = Path(__file__).resolve().parents[3] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()[:12]
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0][:12] for line in packed if line.endswith(" " + name)), None)
    except OSError:
        return None
