"""The page in a real browser: nothing in the console, nothing fetched, and it does what its controls say.

PROTOMAMBA_PICTURES=FOLDER keeps the screenshots for looking at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protomamba.report.page import write_report
from protomamba.report.record import read_run
from tests.report import browser
from tests.report.browser import Page
from tests.report.synthetic import CONFUSION, RANKING, SAMPLE, start_line, train_line, whole_run, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.executable() is None, reason="no Chromium on this machine"),
]

# Where the first panel's drawing is, and the pixel of a step in it.
BOX = (
    "(() => { const b = document.querySelector('.chart svg').getBoundingClientRect(); return [b.x, b.y, b.width]; })()"
)
TIP = "document.querySelector('.tip')?.innerText"
FIRST_CURVE = "document.querySelector('.chart svg .line.noisy:not(.faint)').getAttribute('d')"
LEFT, RIGHT, WIDTH = 54, 12, 440


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a whole run, of three runs, of one with hostile text, and of one that has just begun."""
    place = tmp_path_factory.mktemp("pages")
    runs = [whole_run(place / f"run{i}", 3_000, {"lr": 0.1 / (i + 1)}, CONFUSION, RANKING, SAMPLE) for i in range(3)]
    write_report(runs[:1], place / "one.html")
    write_report(runs, place / "three.html")
    text = {"event": "warning", "step": 3, "text": '<img src=x onerror="alert(1)"><script>throw 1</script>'}
    hostile = whole_run(place / "</script><svg onload=alert(1)>", 200, {"token_file": "<a href=x>"}, SAMPLE, text)
    write_report([hostile], place / "hostile.html")
    write_report([write_run(place / "new", [start_line(), train_line(1, 1.0)])], place / "new.html")
    write_report([write_run(place / "empty", [start_line()])], place / "empty.html")
    return place


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Page]:
    with browser.page(tmp_path / "profile") as page:
        page.size(1280, 900)
        yield page
        assert page.trouble == []
        assert [url for url in page.requests if not url.startswith("file://")] == []


def keep(page: Page, name: str, tmp_path: Path) -> None:
    place = Path(os.environ.get("PROTOMAMBA_PICTURES") or tmp_path)
    place.mkdir(parents=True, exist_ok=True)
    page.picture(place / f"{name}.png")
    assert (place / f"{name}.png").stat().st_size > 10_000


def point_at_step(page: Page, step: int, last: int) -> Any:
    x, y, width = page.value(BOX)
    pixel = LEFT + (WIDTH - LEFT - RIGHT) * step / last
    page.point(x + pixel * width / WIDTH, y + 60)
    return page.value(TIP)


@pytest.mark.parametrize("name", ["one", "three", "hostile", "new", "empty"])
def test_every_page_opens_without_trouble(tab: Page, folder: Path, tmp_path: Path, name: str) -> None:
    tab.open(folder / f"{name}.html")
    assert tab.requests == [(folder / f"{name}.html").as_uri()]
    assert tab.value("document.querySelectorAll('script').length") == 2
    assert tab.value("document.querySelectorAll('img, a').length") == 0
    keep(tab, name, tmp_path)


def test_the_pointer_tells_the_values_of_the_run(tab: Page, folder: Path) -> None:
    tab.open(folder / "one.html")
    told = point_at_step(tab, 1_500, 3_000).splitlines()
    step = int(told[0].removeprefix("step ").replace(",", ""))
    assert abs(step - 1_500) <= 10
    series = read_run(folder / "run0").series["train.loss"]
    (train,) = [line for line in told if line.startswith("train ")]
    assert float(train.split()[1].rstrip(",")) == pytest.approx(series.values[step - 1], rel=1e-4)
    assert "smoothed" in train and any(line.startswith("validation NLL") for line in told)
    over = "((t, s) => t.top >= s.top && t.top < s.bottom && t.left >= 0 && t.right <= innerWidth)"
    boxes = "...['.tip', '.chart svg'].map((name) => document.querySelector(name).getBoundingClientRect())"
    assert tab.value(f"{over}({boxes})"), "the values stand beside the curve"
    tab.point(5, 5)
    assert tab.value(TIP) is None


def test_logarithm_smoothing_and_names_change_the_drawing(tab: Page, folder: Path) -> None:
    tab.open(folder / "one.html")
    point_at_step(tab, 10, 3_000)
    drawn = [tab.value(FIRST_CURVE)]
    tab.value("document.querySelector('.chart button').click()")
    drawn.append(tab.value(FIRST_CURVE))
    assert tab.value("document.querySelector('.chart button').getAttribute('aria-pressed')") == "true"
    tab.value("(() => { const s = document.getElementById('smooth'); s.value = 90; s.oninput(); })()")
    drawn.append(tab.value(FIRST_CURVE))
    tab.value("(() => { const s = document.getElementById('smooth'); s.value = 0; s.oninput(); })()")
    drawn.append(tab.value(FIRST_CURVE))
    assert len(set(drawn)) == 4 and not any("NaN" in each or "Infinity" in each for each in drawn)
    count = "document.querySelectorAll('.chart svg')[0].querySelectorAll('.line').length"
    before = tab.value(count)
    tab.value("document.querySelector('.legend li').click()")
    assert tab.value(count) == before - 1
    tab.value(
        "document.querySelectorAll('.chart')[0].querySelectorAll('.legend li').forEach((li, i) => i && li.click())"
    )
    assert tab.value(count) == 0  # all hidden: an empty panel, no error
    assert point_at_step(tab, 1_500, 3_000) is None


def test_curves_can_be_seen_against_working_time(tab: Page, folder: Path) -> None:
    tab.open(folder / "three.html")
    tab.value("(() => { const s = document.getElementById('against'); s.value = 'time'; s.oninput(); })()")
    told = point_at_step(tab, 1_500, 3_000)
    assert told.splitlines()[0].startswith("after 2.5 min") and "run2: train" in told
    ticks = "[...document.querySelectorAll('.chart svg')[0].querySelectorAll('text.m')].map((t) => t.textContent)"
    assert tab.value(ticks)[-1] == "5 min"


@pytest.mark.parametrize("name", ["one", "three"])
def test_a_phone_needs_no_sideways_scrolling(tab: Page, folder: Path, tmp_path: Path, name: str) -> None:
    tab.size(390, 844, phone=True)
    tab.open(folder / f"{name}.html")
    assert tab.value("document.scrollingElement.scrollWidth") <= 390
    sizes = "[...document.querySelectorAll('p, td, th, li, span')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
    assert min(tab.value(sizes)) >= 11
    height = "document.querySelector('.grid text').getBoundingClientRect().height"
    assert tab.value(height) >= 10
    keep(tab, f"{name}-phone", tmp_path)


def test_dark_where_the_system_is_dark(tab: Page, folder: Path, tmp_path: Path) -> None:
    tab.open(folder / "three.html")
    seen = {}
    for scheme in ("light", "dark"):
        tab.scheme(scheme)
        style = "getComputedStyle(document.body)"
        seen[scheme] = [brightness(tab.value(f"{style}.{what}")) for what in ("backgroundColor", "color")]
    assert seen["light"][0] > 200 > 60 > seen["light"][1] and seen["dark"][0] < 60 < 200 < seen["dark"][1]
    keep(tab, "three-dark", tmp_path)


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3


def test_all_is_there_without_javascript(tab: Page, folder: Path, tmp_path: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(folder / "one.html")
    for selector in (".controls", ".chart button"):
        assert tab.value(f"getComputedStyle(document.querySelector('{selector}')).display") == "none"
    assert tab.value("[...document.querySelectorAll('.chart svg')].every((s) => s.querySelector('.line'))")
    assert "Classes, test" in tab.value("document.body.innerText")
    keep(tab, "one-plain", tmp_path)
