"""Small pieces of HTML. Whatever comes from a run is escaped here: a model may have written it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

LONGEST_CELL = 300
_NUMERIC = re.compile(r"[\d.,]+|-|")
_SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def text(value: object, longest: int = LONGEST_CELL) -> str:
    """Escaped, and cut where it would fill the page."""
    shown = str(value)
    return escape(shown if len(shown) <= longest else shown[:longest] + "…", quote=True)


def tag(name: str, content: str, **attributes: str) -> str:
    """An element around markup; `class_` is written class."""
    inside = "".join(f' {key.rstrip("_")}="{value}"' for key, value in attributes.items())
    return f"<{name}{inside}>{content}</{name}>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide; numbers to the right."""
    body = [list(row) for row in rows]
    numeric = [bool(body) and all(_looks_numeric(row[i]) for row in body) for i in range(len(columns))]
    head = "".join(tag("th", text(name), **_side(right)) for name, right in zip(columns, numeric, strict=True))
    lines = [
        "".join(tag("td", text(number(cell)), **_side(right)) for cell, right in zip(row, numeric, strict=True))
        for row in body
    ]
    inner = tag("thead", tag("tr", head)) + tag("tbody", "".join(tag("tr", line) for line in lines))
    return tag("div", tag("table", inner), class_="scroll")


def _looks_numeric(cell: object) -> bool:
    return is_number(cell) or bool(_NUMERIC.fullmatch(str(cell)))


def _side(right: bool) -> dict[str, str]:
    return {"class_": "n"} if right else {}


def is_number(value: object) -> bool:
    """Whether a cell is a figure, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    rows = "".join(tag("tr", tag("th", text(name)) + tag("td", text(setting(value)))) for name, value in values.items())
    return tag("table", rows, class_="pairs")


def setting(value: Any) -> str:
    """A configuration's value."""
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: object) -> str:
    """Four digits of a fraction, thousands apart; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """The two largest units: 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    unit, name = next(((unit, name) for unit, name in _SIZES if count >= unit), (1, "bytes"))
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count} bytes"


def labelled(label: str, value: object) -> str:
    """A figure for people, by the unit that its label ends with."""
    if is_number(value) and label.endswith((", s", ", bytes")):
        shown = duration if label.endswith(", s") else size
        return shown(value)  # type: ignore[arg-type]
    return number(value)
