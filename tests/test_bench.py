"""protomamba bench: what it counts, that wrong results get no speed, and what it prints and writes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from protomamba import kernels
from protomamba.bench import checks, floor, memory, ops, report, shapes, step, sweeps, timing
from protomamba.bench.shapes import Shape, parse_shapes
from protomamba.cli import main as cli
from protomamba.errors import ConfigError, UserError
from protomamba.kernels import blas, native
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.callbacks.console import rich_console

TINY = Shape("tiny", 2, 16, 32, 2)
COMPACT = Shape("tiny compact", 2, 16, 32, 2, "compact")

MEASURED_MEMORY = memory.peak_rss_mib
needs_native = pytest.mark.skipif(not native.available()[0], reason="no native kernels here")


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shapes, "VOCABULARY", 300)
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(memory, "peak_rss_mib", lambda *_: 1.0)
    monkeypatch.setattr(step, "peak_rss_mib", lambda *_: 1.0)
    monkeypatch.setattr(sweeps, "peak_rss_mib", lambda *_: 1.0)
    before = kernels.get_kernels()
    yield
    kernels.set_kernels(before)


@pytest.mark.parametrize("shape", [TINY, COMPACT], ids=lambda s: s.layer)
def test_the_floor_has_the_matrices_of_the_model(shape: Shape) -> None:
    """Each weight of a floor is one of the model's, in its order, and none is missing."""
    model = SequenceModel(shape.config())
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    expected = [
        tuple(getattr(block.mixer, name).weight.shape)
        for block in model.blocks()
        for name in names
        if hasattr(block.mixer, name)
    ]
    found = floor.products(shape)
    assert [tuple(p.w_OI.shape) for p in found] == expected
    for product in found:
        assert product.x_TI.shape == (32, product.w_OI.shape[1])
        assert product.dy_TO.shape == (32, product.w_OI.shape[0])


def test_the_floor_is_three_products_a_layer() -> None:
    layers = floor.products(TINY)
    with FlopCounterMode(display=False) as counter:
        floor.torch_floor(layers)()
    assert counter.get_total_flops() == sum(3 * 2 * p.x_TI.shape[0] * p.w_OI.numel() for p in layers)


def test_the_own_floor_is_the_same_products_by_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, called = floor.products(TINY), []
    for name in ("linear", "grad_input", "grad_weight"):
        monkeypatch.setattr(blas.Blas, name, lambda self, a, b, name=name: called.append((name, a.shape, b.shape)))
    floor.own_floor(layers)()
    expected = [("linear", p.x_TI.shape, p.w_OI.shape) for p in layers]
    expected += [("grad_input", p.dy_TO.shape, p.w_OI.shape) for p in layers]
    expected += [("grad_weight", p.dy_TO.shape, p.x_TI.shape) for p in layers]
    assert sorted(called) == sorted(expected)


def test_the_own_floor_holds_the_heads_products_over_its_sample() -> None:
    product = floor.head_product(TINY, sampled=50)
    assert [tuple(x.shape) for x in product] == [(32, 32), (50, 32), (32, 50)]
    assert floor.head_product(replace(TINY, classes=9_000), sampled=5_000).w_OI.shape[0] == floor.MOST_CLASSES
    assert floor.head_product(replace(TINY, classes=7), sampled=50).w_OI.shape[0] == 7


@pytest.mark.parametrize(
    ("flags", "vendor", "row"),
    [
        ("fma amx_bf16", "GenuineIntel", "AMX"),
        ("avx512f", "AuthenticAMD", "Zen 4 and 5"),
        ("avx2", "AuthenticAMD", "none"),
    ],
)
def test_the_targets_that_apply_go_by_the_cpu(
    flags: str, vendor: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_cpuinfo", {"flags": flags, "vendor_id": vendor}.__getitem__)
    assert report.target_row().startswith(row)


def test_turns_are_taken_in_rotation_and_ratios_formed_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def work(name: str, seconds: list[float]) -> object:
        def run() -> None:
            order.append(name)
            clock[0] += seconds.pop(0)

        return run

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: clock[0])
    runs = {"a": work("a", [9, 1, 2, 6]), "b": work("b", [9, 1, 1, 2])}
    samples = timing.interleave(runs, rounds=3)  # type: ignore[arg-type]
    assert order == ["a", "b"] * 4
    assert samples.seconds == {"a": [1, 2, 6], "b": [1, 1, 2]}
    assert samples.median("a") == 2 and samples.ratio("a", "b") == timing.Ratio(2, 1, 3)


def test_what_is_quick_is_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], [0]

    def run() -> None:
        calls[0] += 1
        clock[0] += 0.25

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: clock[0])
    monkeypatch.setattr(timing, "TURN_SECONDS", 1.0)
    samples = timing.interleave({"a": run}, rounds=2)
    assert samples.seconds == {"a": [0.25, 0.25]} and calls[0] == 1 + 2 * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S", [shapes.NAMED["S"]]),
        ("M, L", [shapes.NAMED["M"], shapes.NAMED["L"]]),
        ("2x3x4x5", [Shape("2x3x4x5", 2, 3, 4, 5)]),
        ("2x3x4x5:compact", [Shape("2x3x4x5:compact", 2, 3, 4, 5, "compact")]),
    ],
)
def test_shapes_are_names_or_sizes(text: str, expected: list[Shape]) -> None:
    assert parse_shapes(text) == expected


@pytest.mark.parametrize("text", ["", "Q", "1x2x3", "0x2x3x4", "1x2x3x4:lstm", "1x2x3x-4"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--shapes .*expected S, M, L"):
        parse_shapes(text)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [TINY, COMPACT], ids=lambda s: s.layer)
def test_a_step_that_agrees_passes(shape: Shape, precision: str) -> None:
    checks.assert_step_agrees(shape, precision)


@needs_native
def test_no_speed_for_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x_BLD: torch.Tensor, *rest: object, **named: object) -> object:
        output = block(x_BLD, *rest, **named)  # type: ignore[arg-type]
        return output._replace(x_BLD=output.x_BLD + (0.01 if kernels.get_kernels() == "native" else 0.0))

    block = kernels.mamba_block
    monkeypatch.setattr(kernels, "mamba_block", wrong)
    with pytest.raises(UserError, match=r"no speed for step tiny \(fp32\): .* differ .* by") as caught:
        step.measure_step(TINY, "fp32", 1, "wall")
    assert caught.value.exit_code == 1


@needs_native
@pytest.mark.parametrize("name", list(ops.OPS))
def test_every_op_is_measured_where_it_is_right(name: str) -> None:
    row = ops.measure_op(name, TINY, rounds=1, clock="wall")
    assert row["op"] == name and row["forward_ms"] > 0 and row["gb_per_s"] > 0 and row["reference / native"] > 0


@needs_native
@pytest.mark.parametrize("name", list(ops.OPS))
@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_speed_for_a_wrong_op(name: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.OPS[name]

    def call(ops: object, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        factor = wrong if kernels.get_kernels() == "native" else 1.0
        return tuple(x * factor for x in right.call(ops, given))

    monkeypatch.setitem(ops.OPS, name, replace(right, call=call))
    with pytest.raises(UserError, match=f"no speed for {name} .*result 0 by"):
        ops.measure_op(name, TINY, rounds=1, clock="wall")


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ConfigError, match="--op 'fft': expected one of selective_scan"):
        ops.measure_op("fft", TINY, 1, "wall")


@needs_native
def test_the_parts_of_a_step_are_all_of_it() -> None:
    shares = step.part_shares(TINY, "fp32")
    assert tuple(shares) == step.PARTS
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())


class Event:
    def __init__(self, name: str, parent: Event | None = None) -> None:
        self.name, self.cpu_parent = name, parent


def test_products_belong_to_the_blocks_or_to_the_head() -> None:
    block = Event("BlockNodeBackward", Event("step"))
    assert step.part_of(Event("aten::mm", block)) == "matrix products"
    assert step.part_of(Event("aten::mm", Event("step"))) == "head"
    assert step.part_of(Event("aten::empty", Event("native scan_forward", block))) == "scan"
    assert step.part_of(Event("aten::empty", block)) == "other"


@needs_native
def test_a_profile_leaves_the_kernels_as_they_were() -> None:
    library = native.select("test", torch.ones(1))
    plain = library.scan_forward
    with pytest.raises(ZeroDivisionError), step.named_events():
        assert library.scan_forward is not plain
        _ = 1 / 0
    assert library.scan_forward is plain


@needs_native
def test_threads_are_set_back_and_their_gains_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.NAMED, "tiny", TINY)
    (row,) = sweeps.threads_table(["tiny"], "fp32", rounds=2, most=2)
    assert torch.get_num_threads() == 1
    assert row["threads"] == "1 -> 2" and row["step / floor speed-up"].median > 0


@needs_native
def test_rows_of_every_length_hold_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "TOKENS", 32)
    monkeypatch.setattr(sweeps, "LENGTHS", (8, 32))
    monkeypatch.setattr(sweeps, "CONSTANT", Shape("tokens", 1, 32, 16, 1))
    rows = sweeps.lengths_table("fp32", 1, "wall")
    assert [row["shape"] for row in rows] == ["tokens: 4 x 8, 16, 1", "tokens: 1 x 32, 16, 1"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_memory_is_that_of_a_fresh_process() -> None:
    """What the parent process holds must not be counted."""
    held = torch.ones(2**28)  # 1 GiB
    mib = MEASURED_MEMORY(TINY, "fp32")
    assert 50 < mib < held.numel() * 4 / 2**20


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@needs_native
def test_the_command_prints_a_table_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--shapes", "2x16x32x1", "--rounds", "1", "--threads", "1")
    code, table, _ = run(capsys, *common, "--precision", "fp32,bf16", "--markdown", str(tmp_path / "docs" / "bench.md"))
    assert code == 0 and "whole step / floor" in table and "tokens_per_s" in table
    markdown = (tmp_path / "docs" / "bench.md").read_text()
    assert markdown.startswith("# Speed") and "| precision | fp32 | bf16 |" in markdown and "load average" in markdown
    code, out, _ = run(capsys, *common, "--json")
    (section,) = json.loads(out)["sections"]
    (row,) = section["rows"]
    assert code == 0 and row["precision"] == "fp32" and set(row["whole step / floor"]) == {"median", "low", "high"}
    assert {f"{part}_ms" for part in step.PARTS} <= row.keys()
    code, out, _ = run(capsys, *common, "--op", "rms_norm,causal_conv")
    assert code == 0 and "rms_norm" in out and "causal_conv" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp8"), "--precision 'fp8': expected some of fp32, bf16"),
        (("--sections", "all"), "--sections 'all': expected some of steps, threads, lengths"),
        (("--rounds", "0"), "--rounds 0: expected an integer >= 1"),
        (("--clock", "cpu"), "--clock cpu counts waiting threads as work: it needs --threads 1"),
        (("--op", "fft", "--threads", "1"), "--op 'fft'"),
    ],
)
@needs_native
def test_wrong_flags_are_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_without_native_kernels_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("protomamba.cli.bench.available", lambda: (False, "no compiler was found"))
    code, _, err = run(capsys)
    assert code == 1 and "nothing to measure: no compiler was found" in err


def test_cells_are_short() -> None:
    assert [report.shown(x) for x in (12345.6, 1.23456, 0.5, 1e-5, 0.0, "x", 3)] == [
        "12,346",
        "1.23",
        "0.5",
        "1.0e-05",
        "0",
        "x",
        "3",
    ]
    assert report.shown(timing.Ratio(1.234, 1.1, 2)) == "1.23 (1.10-2.00)"


def test_a_table_in_a_pipe_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    names = [f"a shape with a rather long name, number {number}" for number in range(9)]
    rows = [{"shape": name, "forward and backward of a whole block": 1234.5} for name in names]
    report.show([report.Section("Steps", rows)], {"machine": "m"}, rich_console(out))
    text = out.getvalue()
    assert all(name in text for name in names) and "forward and backward of a whole block" in text and "…" not in text
    assert max(map(len, text.splitlines())) < 500, "no wider than it needs"
