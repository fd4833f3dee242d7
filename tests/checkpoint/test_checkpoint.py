"""What goes into a checkpoint comes out of it, and nothing but a checkpoint goes in."""

from __future__ import annotations

import json
import math
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import CheckpointError
from protomamba.checkpoint.layout import _DTYPES, build_header
from protomamba.errors import UserError

DTYPES = list(_DTYPES.values())


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure, order of keys and every bit."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    if dtype == torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).reshape(shape)
    else:
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensor = flat.reshape(shape)
    if tensor.dim() >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor


KEYS = st.one_of(st.text(max_size=6), st.sampled_from(["$tensor", "$", "a.b", "a", "b", "\ud800"]), st.integers())
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), -(2**64)]),
    st.floats(),
    st.text(max_size=8),
)
NODES = st.recursive(
    st.one_of(PLAIN, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)
STATES = st.dictionaries(st.text(max_size=5), st.dictionaries(KEYS, NODES, max_size=4), max_size=3)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=STATES, config=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_any_state_comes_back_the_same(tmp_path: Path, parts: dict[str, Any], config: dict[str, Any]) -> None:
    path = tmp_path / "c.safetensors"
    report = checkpoint.save(path, parts, config=config, info=config)
    loaded = checkpoint.load(path)
    assert same(loaded.parts, parts) and same(loaded.config, config) and same(loaded.info, config)
    assert report.bytes == path.stat().st_size
    assert report.bytes >= checkpoint.estimate_bytes(parts, config=config)
    assert checkpoint.verify(path) == []
    stored = safetensors.torch.load_file(path)
    listed = {tensor["name"]: tensor for tensor in checkpoint.describe_checkpoint(path)["tensors"]}
    assert set(stored) == set(listed)


def test_an_integer_beyond_the_bound_of_decimal_digits(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.safetensors", {"m": {"n": 10**5000}}, config={})
    assert checkpoint.load(tmp_path / "c.safetensors").parts["m"]["n"] == 10**5000


def test_stock_safetensors_reads_every_tensor(tmp_path: Path) -> None:
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype).t() for dtype in DTYPES}
    state |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    checkpoint.save(tmp_path / "c.safetensors", {"model": state}, config={})
    stored = safetensors.torch.load_file(tmp_path / "c.safetensors")
    assert same({name: stored[f"model.{name}"] for name in state}, state)


def test_a_model_its_optimizer_and_the_generator_continue_to_the_bit(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.95))

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()

    step()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": {"torch": torch.get_rng_state()}}
    checkpoint.save(tmp_path / "c.safetensors", parts, config={})
    step()
    straight = [p.detach().clone() for p in model.parameters()]
    loaded = checkpoint.load(tmp_path / "c.safetensors").parts
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"]["torch"])
    step()
    assert all(map(torch.equal, straight, model.parameters()))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    parts = {"a": {"w": weight, "again": weight, "t": weight.t(), "row": weight[0]}, "b": {"w": weight.detach()}}
    checkpoint.save(tmp_path / "c.safetensors", parts, config={})
    loaded = checkpoint.load(tmp_path / "c.safetensors").parts
    assert loaded["a"]["w"] is loaded["a"]["again"] and loaded["a"]["w"] is loaded["b"]["w"]
    assert torch.equal(loaded["a"]["t"], weight.t()) and torch.equal(loaded["a"]["row"], weight[0])
    assert loaded["a"]["row"].data_ptr() != loaded["a"]["w"].data_ptr()
    assert sorted(safetensors.torch.load_file(tmp_path / "c.safetensors")) == ["a.row", "a.t", "a.w"]
    assert checkpoint.describe_checkpoint(tmp_path / "c.safetensors")["parts"]["b"] == {"tensors": 1, "bytes": 24}


def test_loaded_tensors_are_writable_and_apart(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.safetensors", {"a": {"x": torch.zeros(2), "y": torch.zeros(2)}}, config={})
    loaded = checkpoint.load(tmp_path / "c.safetensors").parts["a"]
    loaded["x"].add_(1)
    assert loaded["y"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"x": object()}, "m.x: .* not object"),
        ({"x": [1, {2}]}, "m.x.1: .* not set"),
        ({"x": b"bytes"}, "not bytes"),
        ({(1, 2): 1}, "keys .* not tuple"),
        ({True: 1}, "keys .* not bool"),
        ({"x": torch.eye(2).to_sparse()}, "m.x: only dense"),
        ({"x": torch.empty(2, device="meta")}, "m.x: only dense"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "m.x: .*complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_is_not_plain_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[Any, Any], complaint: str
) -> None:
    with pytest.raises(TypeError, match=complaint):
        checkpoint.save(tmp_path / "c.safetensors", {"m": state}, config={})
    with pytest.raises(TypeError, match="plain values only"):
        checkpoint.save(tmp_path / "c.safetensors", {}, config={"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil-was-run"),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (_Evil(), {"weights": list(range(1000))}, 1):
        (tmp_path / "c.safetensors").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(CheckpointError, match=r"c\.safetensors: header: a pickle.*never read"):
            checkpoint.load("c.safetensors")
    assert not (tmp_path / "evil-was-run").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_refused_with_the_reason(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "c.safetensors"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"zip archive.*pickle" if zipped else "a pickle"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="Is a directory"):
        checkpoint.load(tmp_path)
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of protomamba"):
        checkpoint.load(path)
    for content in (
        b"",
        b"\0" * 7,
        b"\0" * 4096,
        b"\xff" * 4096,
        b'{"model": 1}',
        (2**40).to_bytes(8, "little") + b"{",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            checkpoint.load(path)


def write_with(path: Path, change: Any) -> None:
    """A file whose checksums are right and whose content was changed before they were made."""
    metadata = {"version": 1, "config": {}, "info": {}, "parts": {"m": {"w": {"$tensor": "m.w"}}}}
    change(metadata)
    tensor = torch.zeros(2)
    path.write_bytes(build_header(metadata, {"m.w": tensor}, {"m.w": zlib.crc32(bytes(8))}) + bytes(8))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["parts"]["m"].update(w={"$tensor": "m.other"}),
        lambda m: m["parts"]["m"].update(w={"$call": "os.system"}),
        lambda m: m["parts"]["m"].update(w={"$items": [[1]]}),
        lambda m: m["parts"]["m"].update(w={"$int": "zz"}),
        lambda m: m["parts"]["m"].update(w={"$items": [[[], 1]]}),
        lambda m: m.update(parts=[1]),
        lambda m: m.update(config=3),
        lambda m: m.update(version=None),
        lambda m: m.pop("info"),
    ],
)
def test_a_malformed_file_with_right_checksums_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "c.safetensors"
    write_with(path, lambda metadata: None)
    assert checkpoint.load(path).parts["m"]["w"].tolist() == [0, 0]
    write_with(path, change)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: header: malformed"):
        checkpoint.load(path)


def test_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    write_with(tmp_path / "c.safetensors", lambda metadata: metadata.update(version=7))
    with pytest.raises(
        CheckpointError, match=r"c\.safetensors: version: format 7, .* reads versions up to 2: use a newer"
    ):
        checkpoint.load(tmp_path / "c.safetensors")


def test_an_older_version_loads_through_each_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"model": {"w": torch.ones(2)}}, config={"rate": 0.5})

    def rename_rate(parts: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return parts, {"lr": config["rate"]}

    def add_counter(parts: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {**parts, "trainer": {"skipped": 0}}, config

    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 4)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {2: rename_rate, 3: add_counter})
    loaded = checkpoint.load(path)
    assert loaded.config == {"lr": 0.5} and loaded.parts["trainer"] == {"skipped": 0} and loaded.version == 4
    assert loaded.parts["model"]["w"].tolist() == [1, 1]
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {3: add_counter})
    with pytest.raises(CheckpointError, match="format 2, and there is no migration from 2"):
        checkpoint.load(path)


def test_the_plain_values_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protomamba.checkpoint.layout.MAX_HEADER_BYTES", 1000)
    with pytest.raises(UserError, match="1,000 is the bound"):
        checkpoint.save(tmp_path / "c.safetensors", {"m": {"text": "x" * 1000}}, config={})


def test_description(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    state = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "n": 4}
    report = checkpoint.save(path, {"model": state}, config={"lr": 0.1}, info={"step": 9, "val_loss": math.inf})
    described = checkpoint.describe_checkpoint(path)
    assert described["bytes"] == report.bytes and described["ok"]
    assert described["info"] == checkpoint.read_info(path) == {"step": 9, "val_loss": math.inf}
    assert described["config"] == {"lr": 0.1}
    assert described["parts"] == {"model": {"tensors": 1, "bytes": 12}}
    assert described["tensors"] == [
        {"name": "model.w", "part": "model", "shape": [2, 3], "dtype": "bfloat16", "bytes": 12, "ok": True}
    ]


def test_a_checkpoint_reads_in_a_fresh_process(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"m": {"w": torch.arange(5)}}, config={"x": 1e-300})
    code = (
        "import json, sys; from protomamba.checkpoint import file as checkpoint\n"
        "c = checkpoint.load(sys.argv[1]); print(json.dumps([c.parts['m']['w'].tolist(), c.config]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[0, 1, 2, 3, 4], {"x": 1e-300}]
