"""A model to files and back: weights alone, checkpoints, run folders; the same numbers, and errors by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, UserError
from protomamba.bits import same
from protomamba.cli.main import main
from protomamba.model.pretrained import freeze_as

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
TOKENS = torch.arange(24).reshape(2, 12) % 13

MODELS: dict[str, dict[str, Any]] = {
    "hpn": {},
    "fixed": {"prototypes": "fixed"},
    "tied": {"head": "softmax", "tie_embedding": True},
    "stack": {"layers": "mamba,attention", "layer_options": {"attention": {"n_head": 2}}, "dropout": 0.1},
    "own": {"layer": "examples.lstm_layer:LSTMLayer", "layer_options": {"hidden": 5}},
}


def make(**fields: Any) -> SequenceModel:
    return SequenceModel(ModelConfig(**{"vocab_size": 13, "d_model": 8, "n_layer": 2, **fields}), seed=4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_is_loaded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(**MODELS[name]).to(dtype).eval()
    files = model.save_pretrained(tmp_path / "model")
    again = SequenceModel.from_pretrained(tmp_path / "model")
    assert sorted(file.name for file in files) == sorted(p.name for p in (tmp_path / "model").iterdir())
    assert again.config == model.config and not again.training
    state = again.state_dict()
    assert all(same(state[key], value) for key, value in model.state_dict().items())
    if name == "tied":
        assert again.head.weight is again.embedding.weight
        assert "head.weight" not in load_file(files[0])
    assert same(again.predict(TOKENS), model.predict(TOKENS))


def test_a_checkpoint_and_a_run_folder_give_their_model(tmp_path: Path) -> None:
    trainer = Trainer(make(), TrainConfig(bp_cadence_steps=1))
    trainer.train_step(TOKENS, TOKENS)
    trainer.save_checkpoint(tmp_path / "latest.safetensors")
    expected = trainer.model.eval().scores(TOKENS)
    for path in (tmp_path / "latest.safetensors", tmp_path):
        assert same(SequenceModel.from_pretrained(path).scores(TOKENS), expected)
    assert SequenceModel.from_pretrained(FIXTURES / "softmax").config.head == "softmax"


def test_export_writes_the_weights_alone_and_a_run_starts_from_them(tmp_path: Path) -> None:
    source, out = FIXTURES / "hpn" / "latest.safetensors", tmp_path / "weights"
    assert main(["export", str(source), "--format", "weights", "--out", str(out)]) == 0
    assert (out / "model.safetensors").stat().st_size < 0.6 * source.stat().st_size
    vocabulary = SequenceModel.from_pretrained(out).config.vocab_size
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(" ".join(str(i % vocabulary) for i in range(400)))
    more = ["--token-file", str(tokens), "--steps", "2", "--seq-len", "8", "--batch-size", "2", "--freeze", "none"]
    assert main(["train", "--init-from", str(out), "--out-dir", str(tmp_path / "run"), *more]) == 0


def test_what_is_no_model_is_an_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such checkpoint or folder"):
        SequenceModel.from_pretrained(tmp_path / "nothing")
    make().save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["model"]["d_model"] = 16
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the weights do not fit their configuration"):
        SequenceModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        SequenceModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("field", ["layer", "layers", "head", "input", "layer_options"])
def test_code_that_only_the_file_names_is_not_imported(field: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    stranger = "never_imported_module:Part"
    value = {"layers": f"mamba,{stranger}", "layer_options": {stranger: {"d_state": 1}}}.get(field, stranger)
    settings["model"][field] = value
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="never_imported_module"):
        SequenceModel.from_pretrained(tmp_path / "model")
    assert "never_imported_module" not in sys.modules


@pytest.mark.parametrize(
    "frozen",
    [3, None, [], {}, {"layers": 1, "embedding": False}, {"layers": "none", "embedding": "yes"}]
    + [{"layers": "none", "embedding": False, "parameters": names} for names in (7, [7], ["no.such"])],
)
def test_a_checkpoint_whose_frozen_parts_are_none_is_one_line(frozen: object) -> None:
    with pytest.raises(UserError, match="damaged: frozen: expected layers, embedding and names of parameters"):
        freeze_as(SequenceModel(ModelConfig(vocab_size=5, d_model=4, n_layer=1)), frozen)
