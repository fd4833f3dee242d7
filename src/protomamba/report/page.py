"""Run folders -> one page of HTML: no network, below 300 KB, whole without JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from protomamba import __version__
from protomamba.errors import UserError
from protomamba.report.figures import at_equal, changed, differences, figures
from protomamba.report.judged import classification, ranking, samples
from protomamba.report.markup import labelled, pairs, setting, size, table, tag, text
from protomamba.report.panels import Line, Panel, panels
from protomamba.report.record import RunRecord, read_runs
from protomamba.report.svg import drawing, numbers
from protomamba.report.thin import MAX_POINTS, thin
from protomamba.storage import commit

MAX_BYTES = 300_000
LISTED = 30
SHOWN = 5
FEWEST_POINTS = 25
CLOCK_POINTS = 200
# Nothing is fetched, whatever a run's own text says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of these runs to `out`, atomically. UserError for a folder without metrics, or none for `out`."""
    if not Path(out).parent.is_dir():
        raise UserError(f"{out}: there is no folder {Path(out).parent}: make it, or name another file")
    content = _utf8(page(read_runs(folders)))
    commit(Path(out), len(content), [memoryview(content)])
    return Path(out)


def _utf8(html: str) -> bytes:
    # A path that is no UTF-8 has halves of surrogate pairs in its text.
    return html.encode("utf-8", "backslashreplace")


def page(records: Sequence[RunRecord]) -> str:
    """The page, with as many points of each curve as fit."""
    points = MAX_POINTS
    html = _page(records, points)
    while len(_utf8(html)) > MAX_BYTES and points > FEWEST_POINTS:
        points //= 2
        html = _page(records, points)
    return html


def _page(records: Sequence[RunRecord], points: int) -> str:
    shown = panels(records)
    title = " · ".join(text(record.name) for record in records)
    body = "".join(_body(records, shown, title))
    data = json.dumps(_data(records, shown, points), separators=(",", ":"), allow_nan=False)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{_asset('page.css')}</style></head><body><main>{body}</main>"
        # "<" is escaped: no text of a run can end the script.
        f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>'
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("protomamba.report").joinpath(name).read_text(encoding="utf-8")


def _body(records: Sequence[RunRecord], shown: Sequence[Panel], title: str) -> Iterator[str]:
    yield tag("h1", title)
    yield tag("p", f"protomamba {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", class_="soft")
    yield _summary(records)
    yield _warnings(records)
    yield _controls() if shown else tag("p", "No step has been logged yet.")
    yield tag("div", "".join(_figure(panel) for panel in shown), class_="charts")
    for record in records:
        yield from _judged(record, many=len(records) > 1)
    for record in records:
        yield from _facts(record, many=len(records) > 1)


def _summary(records: Sequence[RunRecord]) -> str:
    if len(records) > 1:
        return tag("div", comparison(records) + "".join(_differences(records)), class_="side")
    found = figures(records[0])
    return tag("div", "".join(_tile(label, value) for label, value in found.items()), class_="tiles")


def _tile(label: str, value: Any) -> str:
    wide = " wide" if label == "status" else ""
    name = label.removesuffix(", s").removesuffix(", bytes")
    return tag("div", tag("b", text(labelled(label, value))) + tag("span", text(name)), class_=f"card tile{wide}")


def comparison(records: Sequence[RunRecord]) -> str:
    """The figures of several runs, a column each, as a table of HTML."""
    found = [figures(record) for record in records]
    labels = dict.fromkeys(label for one in found for label in one)
    rows = [(label, *(labelled(label, one.get(label)) for one in found)) for label in labels]
    rows += [(label, *(labelled(label, value) for value in values)) for label, values in at_equal(records).items()]
    return tag("div", table(("", *(record.name for record in records)), rows), class_="card")


def _warnings(records: Sequence[RunRecord]) -> str:
    lines = [(record, step, words) for record in records for step, words in record.warnings]
    if not lines:
        return ""
    many = len(records) > 1
    items = "".join(
        tag("li", (f"{text(record.name)}, " if many else "") + f"step {step:,}: {text(words)}")
        for record, step, words in lines[-LISTED:]
    )
    hidden = tag("p", f"{len(lines) - LISTED:,} earlier ones are in metrics.jsonl", class_="soft")
    inner = tag("summary", f"{len(lines):,} warning{'s' * (len(lines) > 1)}", class_="warn") + tag("ul", items)
    return f"<details{' open' if len(lines) <= 5 else ''}>{inner}{hidden if len(lines) > LISTED else ''}</details>"


def _differences(records: Sequence[RunRecord]) -> Iterator[str]:
    names = [record.name for record in records]
    for what, title in (("config", "Settings that differ"), ("environment", "Machine and versions that differ")):
        rows = differences(records, what)
        content = table(("", *names), [(name, *map(setting, values)) for name, values in rows.items()])
        if rows or what == "config":
            yield tag("div", tag("h3", title) + (content if rows else tag("p", "None.")), class_="card")


def _controls() -> str:
    return (
        '<div class="controls"><label>smoothing <input id="smooth" type="range" min="0" max="100" value="40"></label>'
        '<label>against <select id="against"><option value="step">steps</option><option value="time">working time'
        "</option></select></label></div>"
    )


def _figure(panel: Panel) -> str:
    button = f'<button type="button" aria-pressed="{str(panel.log).lower()}">log</button>'
    head = tag("header", tag("h3", text(panel.title)) + button)
    legend = "".join(tag("li", _key(line) + text(line.label)) for line in panel.lines)
    return tag("section", head + drawing(panel) + tag("ul", legend, class_="legend"), class_="card chart")


def _key(line: Line) -> str:
    classes = f"line {line.stroke} c{line.colour}"
    return f'<svg viewBox="0 0 20 8" aria-hidden="true"><path class="{classes}" d="M0 4H20"/></svg>'


def _data(records: Sequence[RunRecord], shown: Sequence[Panel], points: int) -> dict[str, Any]:
    charts = [{"log": panel.log, "lines": [_line(line, points) for line in panel.lines]} for panel in shown]
    return {"clocks": [numbers(thin(record.clock, CLOCK_POINTS)) for record in records], "charts": charts}


def _line(line: Line, points: int) -> dict[str, Any]:
    look = {"label": line.label, "stroke": line.stroke, "colour": line.colour, "run": line.run}
    return {**look, **numbers(thin(line.series, points))}


def _judged(record: RunRecord, many: bool) -> Iterator[str]:
    of = f": {text(record.name)}" if many else ""
    for split, event in record.classification.items():
        yield tag("h2", f"Classes, {text(split)}{of}") + classification(event)
    for split, event in record.ranking.items():
        yield tag("h2", f"Ranking over all items, {text(split)}{of}") + ranking(event)
    if record.samples:
        yield tag("h2", f"Samples{of}") + samples(record)


def _facts(record: RunRecord, many: bool) -> Iterator[str]:
    """Checkpoints, environment and configuration of one run."""
    sets = changed(record.config)
    cards = [
        tag("h3", "Settings that are not the default") + pairs(sets) + _all_settings(record),
        tag("h3", "Machine, versions, model") + pairs(record.environment),
        tag("h3", "Checkpoints") + _checkpoints(record),
    ]
    side = tag("div", "".join(tag("div", card, class_="card") for card in cards), class_="side")
    if many:  # what differs stands above: the rest is for looking up
        yield tag("details", tag("summary", f"{text(record.name)}: settings, machine, checkpoints") + side)
    else:
        yield tag("h2", "The run") + side


def _all_settings(record: RunRecord) -> str:
    return tag("details", tag("summary", f"all {len(record.config)} settings") + pairs(record.config))


def _checkpoints(record: RunRecord) -> str:
    if not record.checkpoints:
        return tag("p", "None yet.")
    newest, older = record.checkpoints[-SHOWN:], record.checkpoints[-LISTED:-SHOWN]
    shown = _checkpoint_table(newest)
    if older:
        shown += tag("details", tag("summary", f"{len(older)} before them") + _checkpoint_table(older))
    return shown


def _checkpoint_table(events: Sequence[Mapping[str, Any]]) -> str:
    return table(("step", "file", "size", "saved in", ""), map(_checkpoint, reversed(events)))


def _checkpoint(event: Mapping[str, Any]) -> tuple[object, ...]:
    took, best = f"{event.get('save_ms', 0):.0f} ms", "best" if event.get("best") else ""
    return event.get("step", 0), event.get("path", ""), size(event.get("bytes", 0)), took, best
