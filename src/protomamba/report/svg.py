"""A panel as inline SVG: what a reader without JavaScript sees. page.js draws the same again when it is asked to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from protomamba.report.panels import Line, Panel
from protomamba.report.record import Series
from protomamba.report.thin import Thinned, smoothed, thin

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 28
# More points than the drawing has pixels show nothing; the data beside it keeps more, for a closer look.
DRAWN_POINTS = 400
MARKED_POINTS = 40
MARKED_STROKES = ("bold", "dotted")
# Fewer points are shown as they are. page.js smooths by the same rule, over the share that its slider says.
SMOOTHED_POINTS = 100
SMOOTHING = 0.0063
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values on the axis."""
        return _log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [10.0**power * factor for power in powers for factor in factors]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]


def short(value: float) -> str:
    """A number for an axis: 12k, 0.25, 3e-05."""
    for unit, letter in _UNITS:
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:.3g}"


def drawing(panel: Panel) -> str:
    """The <svg> of a panel."""
    x, y = _axes(panel)
    parts = [_grid(x, y), *(_curve(line, x, y) for line in panel.lines)]
    label = escape(f"{panel.title} by step", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(panel: Panel) -> tuple[Axis, Axis]:
    steps = [step for line in panel.lines for step in (line.series.steps[0], line.series.steps[-1])]
    low, high = _padded([value for line in panel.lines for value in line.series.values], panel.log)
    first, last = min(steps), max(steps)
    first = 0 if first < 0.1 * last else first
    x = Axis(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    return x, Axis(low, high, HEIGHT - BOTTOM, TOP, panel.log)


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The range of an axis with a little air; never empty."""
    low, high = min(values), max(values)
    if log:
        return (low / 1.1, high * 1.1)
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(low - air, 0.0) if low >= 0 else low - air, high + air)


def _grid(x: Axis, y: Axis) -> str:
    rows = "".join(
        f'<path d="M{LEFT} {y.place(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y.place(tick) + 4:.1f}" class="r">{short(tick)}</text>'
        for tick in y.ticks()
    )
    columns = "".join(
        f'<text x="{x.place(tick):.1f}" y="{HEIGHT - 8}" class="m">{short(tick)}</text>' for tick in x.ticks()
    )
    return f'<g class="grid">{rows}{columns}</g>'


def _curve(line: Line, x: Axis, y: Axis) -> str:
    series = thin(line.series, DRAWN_POINTS)
    pixels = [x.place(step) for step in series.steps]
    classes = f"line {line.stroke} c{line.colour}"
    if line.stroke != "noisy" or len(pixels) <= SMOOTHED_POINTS:
        return _path(classes, pixels, series.values, y) + _marks(line, series, x, y)
    average = smoothed(series.means, SMOOTHING)
    return _path(f"{classes} faint", pixels, series.values, y) + _path(classes, pixels, average, y)


def _path(classes: str, pixels: Sequence[float], values: Sequence[float], y: Axis) -> str:
    points = "L".join(f"{at:.1f} {y.place(value):.1f}" for at, value in zip(pixels, values, strict=True))
    return f'<path class="{classes}" d="M{points}"/>'


def _marks(line: Line, series: Series, x: Axis, y: Axis) -> str:
    """Dots where there are few points, so that a curve of a single one is seen."""
    if len(series.steps) > MARKED_POINTS or (line.stroke not in MARKED_STROKES and len(series.steps) > 1):
        return ""
    return "".join(
        f'<circle class="dot c{line.colour}" cx="{x.place(step):.1f}" cy="{y.place(value):.1f}" r="2.5"/>'
        for step, value in zip(series.steps, series.values, strict=True)
    )


def numbers(series: Thinned) -> dict[str, list[float]]:
    """The points for page.js: steps as differences, values of five digits, which is half the bytes."""
    steps = [step - before for before, step in itertools.pairwise([0, *series.steps])]
    thinned = {} if series.means is series.values else {"mean": _digits(series.means)}
    return {"x": list(steps), "y": _digits(series.values), **thinned}


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
