"""Confusion and ranking tables and samples, as the page shows them. docs/report.md has the events they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protomamba.report.classes import ClassFigures, accuracy, class_figures, macro_f1
from protomamba.report.markup import number, table, tag, text
from protomamba.report.record import RunRecord

# A matrix of more classes is no picture: the classes that go wrong most are shown instead.
MATRIX_CLASSES = 24
WORST_CLASSES = 40
MIXED_UP = 12
SAMPLES = 4
SAMPLE_CHARACTERS = 1_500


def classification(event: Mapping[str, Any]) -> str:
    """Accuracy, macro F1, the matrix or the commonest mistakes, and a line for each class."""
    found = class_figures(event)
    total = sum(one.count for one in found)
    head = f"accuracy {accuracy(event):.4f} · macro F1 {macro_f1(found):.4f} · {total:,} sequences"
    where = f" · step {event['step']:,}" if "step" in event else ""
    picture = _matrix(event) if len(found) <= MATRIX_CLASSES else _mixed_up(event)
    return tag("p", head + where, class_="soft") + tag("div", _card(picture) + _card(_by_class(found)), class_="side")


def _card(content: str) -> str:
    return tag("div", content, class_="card")


def _matrix(event: Mapping[str, Any]) -> str:
    names = [text(name, 24) for name in event["classes"]]
    head = tag("th", "true \\ predicted") + "".join(tag("th", name) for name in names)
    rows = [tag("th", names[i]) + _matrix_row(row, i) for i, row in enumerate(event["confusion"])]
    body = "".join(tag("tr", row) for row in rows)
    inner = tag("thead", tag("tr", head)) + tag("tbody", body)
    return tag("div", tag("table", inner, class_="matrix"), class_="scroll")


def _matrix_row(row: Sequence[int], own: int) -> str:
    total = sum(row) or 1
    cells = []
    for i, count in enumerate(row):
        shade = {"style": f"--p:{80 * count / total:.0f}"}
        cells.append(tag("td", f"{count:,}" if count else "·", **shade, **({} if i == own else {"class_": "off"})))
    return "".join(cells)


def _mixed_up(event: Mapping[str, Any]) -> str:
    names, counts = event["classes"], event["confusion"]
    wrong = [(row[j], i, j) for i, row in enumerate(counts) for j in range(len(row)) if i != j and row[j]]
    worst = sorted(wrong, key=lambda one: -one[0])[:MIXED_UP]
    title = tag("p", f"Commonest mistakes of {len(names):,} classes")
    return title + table(("true", "predicted", "count"), [(names[i], names[j], count) for count, i, j in worst])


def _by_class(found: Sequence[ClassFigures]) -> str:
    shown = list(found)
    title = ""
    if len(shown) > WORST_CLASSES:
        shown = sorted((one for one in found if one.count), key=lambda one: one.f1)[:WORST_CLASSES]
        title = tag("p", f"The {len(shown)} classes of the lowest F1")
    rows = [(one.name, f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}", one.count) for one in shown]
    return title + table(("class", "precision", "recall", "F1", "sequences"), rows)


def ranking(event: Mapping[str, Any]) -> str:
    """hit@k, ndcg@k and mrr of the model beside its baselines."""
    baselines: Mapping[str, Mapping[str, float]] = event.get("baselines", {})
    columns = ("figure", "model", *baselines)
    rows = [
        (name, f"{value:.4f}", *(f"{one[name]:.4f}" if name in one else "-" for one in baselines.values()))
        for name, value in event["figures"].items()
    ]
    parts = [f"step {event['step']:,}"] if "step" in event else []
    counts = {"rows": "sequences", "items": "items"}
    parts += [f"{number(event[key])} {what}" for key, what in counts.items() if key in event]
    return tag("p", " · ".join(parts), class_="soft") + tag("div", _card(table(columns, rows)), class_="side")


def samples(record: RunRecord) -> str:
    """The newest samples, newest first; the prompt marked."""
    shown = []
    for event in reversed(record.samples[-SAMPLES:]):
        prompt = tag("mark", text(event["prompt"], SAMPLE_CHARACTERS)) if event.get("prompt") else ""
        body = tag("pre", prompt + text(event["text"], SAMPLE_CHARACTERS))
        shown.append(_card(tag("p", f"step {event.get('step', 0):,}", class_="soft") + body))
    return tag("div", "".join(shown), class_="side")
