"""What memory this process may have, and a line a user can act on where it was not enough."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path
from typing import NamedTuple

from protomamba.machine import group_limits, memory_info

# torch's and numpy's words, as of 2.11 and 2.4; both name what they asked for.
_ASKED = (re.compile(r"tried to allocate (\d+) bytes"), re.compile(r"Unable to allocate ([\d.]+ \w+) "))
_TORCH = ("can't allocate memory", "std::bad_alloc", "not enough memory")


class Limit(NamedTuple):
    """Bytes that a process may hold, what says so, and how many it holds of them."""

    allowed: int
    by: str
    held: int


def memory_limit() -> Limit | None:
    """The limit that leaves least: of the address space (ulimit -v) or of a control group; None without one."""
    size, resident = held_bytes()
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    group = group_limits().memory_bytes
    found = (
        [] if space == resource.RLIM_INFINITY else [Limit(space, "the limit of the address space (ulimit -v)", size)]
    )
    found += [] if group is None else [Limit(group, "the control group (memory.max)", resident)]
    return min(found, key=lambda limit: limit.allowed - limit.held, default=None)


def held_bytes() -> tuple[int, int]:
    """Address space and resident memory of this process; zeros where the system does not tell."""
    try:
        size, resident = Path("/proc/self/statm").read_text().split()[:2]
    except OSError:
        return 0, 0
    page = resource.getpagesize()
    return int(size) * page, int(resident) * page


def out_of_memory(error: BaseException) -> str | None:
    """What to say of an error that means too little memory: needed, held and allowed bytes; None for other errors."""
    text = str(error)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (isinstance(error, MemoryError) or by_system or any(words in text for words in _TORCH)):
        return None
    asked = next((found[1] for pattern in _ASKED if (found := pattern.search(text))), None)
    needed = f"{int(asked):,} bytes" if asked and asked.isdecimal() else asked or "an unknown number of bytes"
    return f"out of memory: {needed} more were needed; {_given()}; what was saved before is intact: " + (
        "go on with a smaller --batch-size or --seq-len, or with more memory"
    )


def _given() -> str:
    limit, free = memory_limit(), memory_info().get("MemAvailable")
    if limit is not None:
        return f"the process holds {limit.held:,} of {limit.allowed:,} bytes, which {limit.by} allows"
    found = "an unknown number of" if free is None else f"{free:,}"
    return f"the process holds {held_bytes()[1]:,} bytes and the machine has {found} bytes free"
