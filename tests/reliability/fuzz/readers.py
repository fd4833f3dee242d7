"""The registry: every reader of files that others may have made, with a good file, its mutations and how it is read.

A new reader is one entry: `make` writes a good input below a folder and returns the file to be mutated; `read` reads
the whole of it, as the product does, and may raise UserError only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint import layout
from protomamba.config import ModelConfig, TrainConfig
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.trainer import Trainer
from tests.reliability.fuzz import mutate
from tests.reliability.fuzz.inputs import INPUTS
from tests.reliability.fuzz.reader import Reader, file_of


def _model() -> SequenceModel:
    return SequenceModel(ModelConfig(vocab_size=11, d_model=8, d_state=4, n_layer=1), seed=0)


# Checkpoints


def _checkpoint(folder: Path) -> Path:
    Trainer(_model(), TrainConfig()).save_checkpoint(folder / "c.safetensors")
    return folder / "c.safetensors"


def signed(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint with a hostile header whose checksum is right, as whoever wants to harm would make it."""
    length = int.from_bytes(data[:8], "little")
    text = mutate.any_json(data[8 : 8 + length], rng)
    head = len(text).to_bytes(8, "little") + text
    start = 8 + len(layout._PREFIX)
    text = text.replace(b'{"__metadata__": {"protomamba.checksum": ', b'{"__metadata__":{"protomamba.checksum":', 1)
    head = len(text).to_bytes(8, "little") + text
    if head[8:start] != layout._PREFIX:
        return head + data[8 + length :]
    head = head[:start] + layout._digest(head).encode() + head[start + 64 :]
    return head + data[8 + length :]


def _load_checkpoint(path: Path) -> None:
    checkpoint.verify(path)
    loaded = checkpoint.load(path)
    checkpoint.describe_checkpoint(path)
    Trainer.from_checkpoint(loaded)


def _transformers(folder: Path) -> Path:
    from protomamba.checkpoint.transformers_folder import write_transformers_folder

    model = _model()
    write_transformers_folder(folder / "hf", model.config, model.state_dict())
    return folder / "hf" / "model.safetensors"


def _read_transformers(path: Path) -> None:
    from protomamba.checkpoint.transformers_folder import read_transformers_folder

    read_transformers_folder(path.parent)


def _transformers_config(folder: Path) -> Path:
    return _transformers(folder).with_name("config.json")


def _run_folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tests.runs import token_file, train

        assert train(folder / "run", token_file(folder), "--steps", 4) == 0
        return folder / "run" / name

    return make


def _resume(path: Path) -> None:
    from protomamba.checkpoint.folder import find_resumable

    find_resumable(path.parent)


def _report(path: Path) -> None:
    from protomamba.report.page import page
    from protomamba.report.record import read_run

    page([read_run(path.parent)])


# Token files


def _read_tokens(path: Path) -> None:
    from protomamba.data import open_token_file

    shards = open_token_file(path)
    for number, shard in enumerate(shards.shards):
        shards.read(number, 0, shard.tokens)


def _bin(folder: Path) -> Path:
    from protomamba.data.formats import TokenWriter

    with open(folder / "t.bin", "wb") as file:
        writer = TokenWriter(file, "uint16")
        writer.write((np.arange(90) % 11).astype(np.uint32))
        writer.finish()
    return folder / "t.bin"


def _prepared(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from protomamba.data.prepare import prepare

        (folder / "text.txt").write_text("some text to prepare\n" * 20)
        prepare([folder / "text.txt"], folder / "out", shard_tokens=100)
        return folder / "out" / name

    return make


def _read_prepared(path: Path) -> None:
    from protomamba.data import open_token_dir

    shards = open_token_dir(path.parent, "bin")
    for number, shard in enumerate(shards.shards):
        shards.read(number, 0, shard.tokens)


def _labels(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "seq.txt").write_text("".join(f"{n} {n + 1} {n + 2}\n" for n in range(8)))
        (folder / "labels.txt").write_text("".join(f"{n % 3}\n" for n in range(8)))
        return folder / name

    return make


def _read_labels(path: Path) -> None:
    from protomamba.data.labels import open_labelled

    open_labelled(path.parent / "seq.txt", path.parent / "labels.txt")


def _sidecar(folder: Path) -> Path:
    _bin(folder).write_bytes(np.arange(90, dtype=np.uint16).tobytes())
    (folder / "t.bin.json").write_text('{"dtype": "uint16"}')
    return folder / "t.bin.json"


def _text_index(folder: Path) -> Path:
    (folder / "t.txt").write_bytes(_TEXT)
    _read_tokens(folder / "t.txt")
    return next(folder.glob("*/t.txt.json"))


def _progress(folder: Path) -> Path:
    """What a `prepare` that was stopped behind its shards leaves."""
    from protomamba.data import prepare
    from protomamba.data.manifest import read_manifest

    out = _prepared("manifest.json")(folder).parent
    manifest = read_manifest(out)
    assert manifest is not None
    state = prepare._State("plan", [*manifest.shards], [(0, 100 * n) for n, _ in enumerate(manifest.shards)])
    (out / "manifest.json").unlink()
    state.write(out)
    return out / prepare.PROGRESS_FILE


def _go_on(path: Path) -> None:
    from protomamba.data import prepare

    prepare._open_folder(path.parent, "plan")


def _datasets(name: str, content: dict[str, Any]) -> Callable[[Path], Path]:
    return file_of(name, json.dumps(content).encode())


def _documents(path: Path) -> None:
    from protomamba.data import documents

    documents._files_in(path.parent)


# Weights


def _weights(folder: Path) -> Path:
    from protomamba.model.pretrained import save_pretrained

    save_pretrained(_model(), folder / "weights")
    return folder / "weights" / "config.json"


def _load_weights(path: Path) -> None:
    from protomamba.model.pretrained import load_pretrained

    load_pretrained(path.parent)


# The rest


def _tokenizer(folder: Path) -> Path:
    from protomamba.data.tokenizer import train_bpe_tokenizer

    (folder / "tokenizer.json").write_text(train_bpe_tokenizer(["a text of words and a few more words"] * 9, 280))
    return folder / "tokenizer.json"


def _read_tokenizer(path: Path) -> None:
    from protomamba.data import load_tokenizer

    tokenizer = load_tokenizer(str(path))
    tokenizer.decode(tokenizer.encode("a text of words é ☃"))


def _config(path: Path) -> None:
    from protomamba.config_file import read_config_file
    from protomamba.run_config import RunConfig

    RunConfig(**read_config_file(path))


def _metrics(path: Path) -> None:
    from protomamba.metrics_file import read_metrics

    list(read_metrics(path))


_SETTINGS: dict[str, Any] = {"d-model": 96, "lr": 1e-3, "freeze": "none", "bp_cadence_steps": 4, "token-file": "x.txt"}
_YAML = b"d-model: 96\nlr: 1e-3\nfreeze: none\nbp_cadence_steps: 4\ntoken-file: x.txt\n"
_TOML = b'd-model = 96\nlr = 1e-3\nfreeze = "none"\nbp-cadence-steps = 4\n'
_EVENTS = b"".join(
    json.dumps({"event": "train", "step": n, "loss": 1.5, "time": 1.0, "non_finite": {}}).encode() + b"\n"
    for n in range(1, 6)
)
_TEXT = " ".join(str(n % 11) for n in range(90)).encode()
BYTES, JSON = mutate.any_bytes, mutate.any_json

READERS: dict[str, Reader] = {
    "checkpoint": Reader(_checkpoint, _load_checkpoint, mutate.either(BYTES, signed, signed, signed)),
    "transformers": Reader(_transformers, _read_transformers, mutate.either(BYTES, mutate.safetensors_header), True),
    "transformers config": Reader(_transformers_config, _read_transformers, mutate.either(BYTES, JSON, JSON)),
    "run_state": Reader(_run_folder("run_state.json"), _resume, mutate.either(BYTES, JSON, JSON)),
    "report of metrics": Reader(_run_folder("metrics.jsonl"), _report, mutate.either(BYTES, mutate.json_lines)),
    "report of config": Reader(_run_folder("config.json"), _report, mutate.either(BYTES, JSON, JSON)),
    "metrics": Reader(file_of("metrics.jsonl", _EVENTS), _metrics, mutate.either(BYTES, mutate.json_lines)),
    "config json": Reader(file_of("c.json", json.dumps(_SETTINGS).encode()), _config, mutate.either(BYTES, JSON, JSON)),
    "config yaml": Reader(file_of("c.yaml", _YAML), _config, BYTES),
    "config toml": Reader(file_of("c.toml", _TOML), _config, BYTES),
    "npy": Reader(file_of("t.npy", mutate.npy((90,))), _read_tokens, mutate.either(BYTES, mutate.npy_header)),
    "bin": Reader(_bin, _read_tokens, BYTES),
    "txt": Reader(file_of("t.txt", _TEXT), _read_tokens, BYTES),
    "manifest": Reader(_prepared("manifest.json"), _read_prepared, mutate.either(BYTES, JSON, JSON)),
    "shard": Reader(_prepared("shard-00000.bin"), _read_prepared, BYTES),
    "sequences": Reader(_labels("seq.txt"), _read_labels, BYTES),
    "labels": Reader(_labels("labels.txt"), _read_labels, BYTES),
    "tokenizer": Reader(_tokenizer, _read_tokenizer, mutate.either(BYTES, JSON, JSON, JSON), True),
    "bin sidecar": Reader(_sidecar, lambda path: _read_tokens(path.with_suffix("")), mutate.either(BYTES, JSON, JSON)),
    "text index": Reader(
        _text_index, lambda path: _read_tokens(path.parents[1] / "t.txt"), mutate.either(BYTES, JSON, JSON)
    ),
    "prepare progress": Reader(_progress, _go_on, mutate.either(BYTES, JSON, JSON)),
    "datasets state": Reader(
        _datasets("state.json", {"_data_files": [{"filename": "a.arrow"}]}), _documents, mutate.either(BYTES, JSON)
    ),
    "weights config": Reader(_weights, _load_weights, mutate.either(BYTES, JSON, JSON)),
    **INPUTS,
}
