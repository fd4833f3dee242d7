"""The page: small, whole, self-contained, safe from what a model wrote."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from protomamba.cli.main import main
from protomamba.report.classes import accuracy, class_figures, macro_f1
from protomamba.report.judged import classification
from protomamba.report.page import MAX_BYTES, page
from protomamba.report.panels import panels
from protomamba.report.record import Series, read_run, read_runs
from protomamba.report.svg import Axis, linear_ticks, short
from protomamba.report.thin import smoothed, thin
from tests.report.synthetic import CONFUSION, RANKING, SAMPLE, start_line, train_line, whole_run, write_run

VOID = {"meta", "input", "path", "circle", "!doctype"}


class Checked(HTMLParser):
    """Fails on a tag that closes another; collects tags, the addresses of their attributes and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(html: str) -> Checked:
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def data_of(html: str) -> dict[str, list[dict[str, list[dict[str, list[float]]]]]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_one_run_has_all_its_parts(tmp_path: Path) -> None:
    resumed = start_line(20.0, step=100, resumed_from="latest.safetensors")
    html = page([read_run(whole_run(tmp_path / "mine", 100, None, CONFUSION, RANKING, SAMPLE, resumed))])
    parser = checked(html)
    text = " ".join(parser.words)
    for part in (
        "mine",
        "Loss",
        "Accuracy",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "nearest cosine",
    ):
        assert part in text, part
    for part in (
        "resumed from",
        "Classes, test",
        "Ranking over all items",
        "Samples",
        "Checkpoints",
        "3.0 MiB",
        "2.13.0",
    ):
        assert part in text, part
    assert "<b>eel</b>" in text and "throw 1" in text
    assert parser.tags.count("script") == 2
    assert parser.addresses == [] and "http" not in re.sub(r"http://www\.w3\.org/2000/svg|http-equiv", "", html)


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    name = '"><img src=x onerror=alert(1)>'
    run = whole_run(
        tmp_path / "x" / "run", 20, {"token_file": name}, SAMPLE, {**CONFUSION, "classes": [name, "b", "c"]}
    )
    warned = {"event": "warning", "step": 3, "text": name}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(warned) + "\n" + json.dumps(train_line(21, 2.1, **{"</script><img>": 1.5})) + "\n")
    parser = checked(page([read_run(run, name)]))
    assert "img" not in parser.tags and parser.tags.count("script") == 2


def test_many_long_runs_stay_below_the_limit(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / f"run{i}", 6_000, {"lr": i}, CONFUSION, SAMPLE) for i in range(5)]
    html = page(read_runs(runs))
    assert len(html.encode()) <= MAX_BYTES
    charts = data_of(html)["charts"]
    assert len(charts[0]["lines"]) == 15 and all(25 <= len(line["x"]) <= 2_000 for line in charts[0]["lines"][:5])
    checked(html)


def test_the_numbers_beside_the_drawing_are_the_run_s(tmp_path: Path) -> None:
    record = read_run(whole_run(tmp_path, 100))
    line = data_of(page([record]))["charts"][0]["lines"][0]
    steps = [int(sum(line["x"][: i + 1])) for i in range(len(line["x"]))]
    assert steps == record.series["train.loss"].steps
    assert line["y"] == pytest.approx(record.series["train.loss"].values, rel=1e-4)
    assert "mean" not in line


def test_a_run_without_steps_and_one_of_a_single_step(tmp_path: Path) -> None:
    assert "No step has been logged yet" in page([read_run(write_run(tmp_path / "a", [start_line()]))])
    html = page([read_run(write_run(tmp_path / "b", [start_line(), train_line(1, 1.0, loss=0.0, lr=0.0)]))])
    assert "NaN" not in html and "inf" not in html.split("<script")[0].replace("font", "")
    checked(html)


def test_a_new_figure_gets_a_panel_and_unused_ones_none(tmp_path: Path) -> None:
    lines = [start_line(), *(train_line(step, step, surprise=step * 0.5) for step in range(1, 4))]
    titles = [panel.title for panel in panels([read_run(write_run(tmp_path, lines))])]
    assert "surprise" in titles and "ff_loss" not in titles and "step_ms" not in titles


def test_a_spike_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    lines = [start_line(), *(train_line(step, step, grad_norm=500.0 if step == 1 else 1.5) for step in range(1, 40))]
    found = {panel.title: panel.log for panel in panels([read_run(write_run(tmp_path, lines))])}
    assert found["Gradient norm"] and not found["Loss"] and not found["Tokens per second"]


def test_thinning_keeps_ends_peaks_and_means() -> None:
    values = [math.sin(i / 50) for i in range(10_000)]
    values[4_321], values[7_777] = 9.0, -9.0
    thinned = thin(Series(list(range(10_000)), values), 200)
    assert len(thinned.steps) <= 200 and thinned.steps == sorted(set(thinned.steps))
    assert {0, 4_321, 7_777, 9_999} <= set(thinned.steps)
    assert all(values[step] == value for step, value in zip(thinned.steps, thinned.values, strict=True))
    assert max(map(abs, thinned.means)) < 1.2
    skewed = [math.exp(math.sin(i * i)) for i in range(10_000)]
    kept = thin(Series(list(range(10_000)), skewed), 200)
    assert sum(kept.means) / len(kept.means) == pytest.approx(sum(skewed) / len(skewed), rel=0.01)
    short_one = Series([1, 2], [3.0, 4.0])
    assert thin(short_one, 200).values is short_one.values


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([2.0] * 50, 0.1) == pytest.approx([2.0] * 50)
    assert smoothed([5.0, 0.0], 0.5)[0] == pytest.approx(5.0)
    assert 0.0 < smoothed([5.0, 0.0], 0.5)[1] < 2.5


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [0, 5, 10]), (0, 20_000, [0, 5_000, 10_000, 15_000, 20_000])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(ticks)


def test_a_logarithmic_axis() -> None:
    axis = Axis(0.5, 5_000, 200, 0, log=True)
    assert axis.ticks() == pytest.approx([1, 10, 100, 1_000]) and axis.place(50) == pytest.approx(100)
    assert [short(tick) for tick in (1_500, 0.00025, 2e6, 0)] == ["1.5k", "0.00025", "2M", "0"]


def test_class_figures_and_many_classes() -> None:
    cat, dog, eel = class_figures(CONFUSION)
    assert (cat.precision, cat.recall, cat.count) == (8 / 9, 0.8, 10) and cat.f1 == pytest.approx(16 / 19)
    assert (dog.precision, dog.recall) == (0.75, 0.6) and (eel.precision, eel.recall, eel.f1, eel.count) == (0, 0, 0, 0)
    count = 60
    counts = [[90 if i == j else 7 if j == (i + 1) % count else 0 for j in range(count)] for i in range(count)]
    html = classification({"classes": [f"k{i}" for i in range(count)], "confusion": counts})
    assert "matrix" not in html and "Commonest mistakes of 60 classes" in html and "lowest F1" in html


def test_macro_f1_counts_the_classes_that_occur_at_all() -> None:
    # b has no sequence but is predicted, d is neither: scikit-learn's f1_score(average="macro") leaves out d alone.
    # Page and trackers told two other figures before: of the classes with a sequence, and of all.
    event = {"classes": ["a", "b", "c", "d"], "confusion": [[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]}
    found = class_figures(event)
    assert [one.f1 for one in found] == pytest.approx([6 / 7, 0, 1, 0]) and accuracy(event) == 7 / 8
    assert macro_f1(found) == pytest.approx((6 / 7 + 0 + 1) / 3)
    assert f"macro F1 {macro_f1(found):.4f}" in classification(event)
    assert macro_f1([]) == 0


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = whole_run(tmp_path / "a", 10), tmp_path / "r.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path), "--out", str(out)]) == 1
    assert main(["report", str(run), "--out", str(tmp_path / "none" / "r.html")]) == 1
    assert f"there is no folder {tmp_path / 'none'}: make it" in capsys.readouterr().err
