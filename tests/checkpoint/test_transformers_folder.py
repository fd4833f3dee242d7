"""Folders of transformers' Mamba, made by hand: what is read, what is refused and in which words, what is written."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from protomamba.checkpoint.transformers_folder import read_transformers_folder, write_transformers_folder
from protomamba.config import ModelConfig
from protomamba.errors import UserError

SETTINGS = {
    "model_type": "mamba",
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "state_size": 3,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 2,
    "tie_word_embeddings": False,
}
MIXER_SHAPES = {
    "in_proj.weight": (24, 6),
    "conv1d.weight": (12, 1, 4),
    "conv1d.bias": (12,),
    "x_proj.weight": (8, 12),
    "dt_proj.weight": (12, 2),
    "dt_proj.bias": (12,),
    "A_log": (12, 3),
    "D": (12,),
    "out_proj.weight": (6, 12),
}


def their_tensors():
    torch.manual_seed(0)
    shapes = {"backbone.embeddings.weight": (11, 6), "backbone.norm_f.weight": (6,), "lm_head.weight": (11, 6)}
    for i in range(2):
        shapes[f"backbone.layers.{i}.norm.weight"] = (6,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in MIXER_SHAPES.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def make_folder(path, tensors=None, **settings):
    """A folder of one safetensors file; a setting of ... is left out of config.json."""
    path.mkdir(exist_ok=True)
    kept = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))
    save_file(their_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


def make_sharded(path):
    folder = make_folder(path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 3)}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name].clone() for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def their_name(ours):
    if ours == "head.weight":
        return "lm_head.weight"
    return "backbone." + ours.replace("embedding.", "embeddings.")


@pytest.mark.parametrize("make", [make_folder, make_sharded], ids=["one-file", "sharded"])
def test_every_tensor_arrives_under_our_name(tmp_path, make):
    values, state = read_transformers_folder(make(tmp_path / "hf"))
    config = ModelConfig(**values)
    assert (config.vocab_size, config.d_model, config.n_layer, config.d_state) == (11, 6, 2, 3)
    assert (config.d_conv, config.expand, config.time_step_rank) == (4, 2, 2)
    assert (config.layer, config.head, config.tie_embedding) == ("mamba", "softmax", False)
    theirs = their_tensors()
    assert len(state) == len(theirs)
    for ours, value in state.items():
        assert torch.equal(value, theirs[their_name(ours)]), ours


def test_settings_left_out_have_transformers_defaults(tmp_path):
    """MambaConfig's: 32 layers, state 16 and so on; the first difference that shows is the embedding's shape."""
    tensors = their_tensors()
    del tensors["lm_head.weight"]
    folder = make_folder(tmp_path / "hf", tensors, **{key: ... for key in SETTINGS if key != "model_type"})
    with pytest.raises(UserError, match=r"backbone\.embeddings\.weight: expected shape \[50280, 768\]"):
        read_transformers_folder(folder)


def test_automatic_rank_and_float_expand(tmp_path):
    tensors = their_tensors()
    for i in range(2):
        tensors[f"backbone.layers.{i}.mixer.x_proj.weight"] = torch.randn(7, 12)
        tensors[f"backbone.layers.{i}.mixer.dt_proj.weight"] = torch.randn(12, 1)
    values, _ = read_transformers_folder(make_folder(tmp_path / "hf", tensors, time_step_rank="auto", expand=2.0))
    assert values["dt_rank"] == 1 and values["expand"] == 2


@pytest.mark.parametrize("stored", ["left out", "stored twice"])
def test_tied_embedding(tmp_path, stored):
    tensors = their_tensors()
    if stored == "left out":
        del tensors["lm_head.weight"]
    else:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    values, state = read_transformers_folder(make_folder(tmp_path / "hf", tensors, tie_word_embeddings=...))
    assert values["tie_embedding"] is True
    assert torch.equal(state["head.weight"], tensors["backbone.embeddings.weight"])


def test_other_spellings_and_precisions(tmp_path):
    """The first conversions say `embedding`; published weights are often bfloat16; a convolution may have no bias."""
    tensors = {name: tensor.bfloat16() for name, tensor in their_tensors().items() if "conv1d.bias" not in name}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    _, state = read_transformers_folder(make_folder(tmp_path / "hf", tensors, use_conv_bias=False))
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["embedding.weight"], tensors["backbone.embedding.weight"].float())
    assert torch.equal(state["layers.1.mixer.conv1d.bias"], torch.zeros(12))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "mamba2"}, "model_type: expected 'mamba', found 'mamba2'"),
        ({"model_type": "falcon_mamba"}, "model_type: expected 'mamba', found 'falcon_mamba'"),
        ({"model_type": ...}, "model_type: expected 'mamba', found None"),
        ({"use_bias": True}, "use_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu' or 'swish', found 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: expected 1e-05, found 1e-06"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"intermediate_size": 13}, "intermediate_size: expected expand * hidden_size = 12, found 13"),
        ({"expand": 1.5}, "expand: expected a whole number from 1, found 1.5"),
        ({"state_size": 0}, "state_size: expected a whole number from 1, found 0"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers: expected a whole number from 1, found 'many'"),
        ({"time_step_rank": True}, "time_step_rank: expected a whole number from 1, found True"),
        ({"num_hidden_layers": 10**9}, "n-layer 1000000000"),
        ({"vocab_size": 12}, r"backbone.embeddings.weight: expected shape [12, 6] by config.json, found [11, 6]"),
        ({"num_hidden_layers": 3}, "tensor backbone.layers.2.norm.weight [6] is missing"),
        ({"num_hidden_layers": 1}, "tensor backbone.layers.1.mixer.A_log is not part of"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from backbone.embeddings.weight"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_settings_that_are_refused_by_name(tmp_path, setting, message):
    with pytest.raises(UserError) as error:
        read_transformers_folder(make_folder(tmp_path / "hf", **setting))
    assert message in str(error.value)
    assert str(tmp_path / "hf") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), "tensor backbone.norm_f.weight [6] is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight [11, 6] is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of"),
        (lambda t: t["backbone.norm_f.weight"].fill_(float("nan")), "backbone.norm_f.weight holds NaN or infinite"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(11, 6, dtype=torch.int8)}), "expected floating point"),
    ],
    ids=["missing", "no-head", "unknown", "nan", "quantised"],
)
def test_tensors_that_are_refused_by_name(tmp_path, change, message):
    tensors = their_tensors()
    change(tensors)
    with pytest.raises(UserError) as error:
        read_transformers_folder(make_folder(tmp_path / "hf", tensors))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_a_pickle_is_refused_with_the_reason_and_never_opened(tmp_path, name):
    folder = make_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "opened"
    (folder / name).write_bytes(pickle.dumps(_Trap(str(trap))))
    with pytest.raises(UserError, match=rf"weights only as a pickle \({name}\), which can run code"):
        read_transformers_folder(folder)
    assert not trap.exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    folder = make_folder(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert read_transformers_folder(folder)


def damaged_config(folder):
    (folder / "config.json").write_text("{")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def escaping_index(folder):
    no_weights(folder)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder):
    no_weights(folder)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(folder):
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_config, "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object, found list"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (truncated, "model.safetensors: not a readable safetensors file"),
        (no_weights, "expected model.safetensors or model.safetensors.index.json, found neither"),
        (escaping_index, "expected files of this folder, found '../elsewhere.safetensors'"),
        (missing_shard, "model-00001-of-00001.safetensors: not a readable safetensors file"),
        (broken_index, "model.safetensors.index.json: expected a JSON object, found list"),
    ],
    ids=["config", "config-list", "no-config", "truncated", "no-weights", "escape", "missing-shard", "index"],
)
def test_damage_is_named(tmp_path, damage, message):
    folder = make_folder(tmp_path / "hf")
    damage(folder)
    with pytest.raises(UserError) as error:
        read_transformers_folder(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it is not a folder"):
        read_transformers_folder(tmp_path / "file")


@pytest.mark.parametrize("tied", [False, True])
def test_written_and_read_again_to_the_bit(tmp_path, tied):
    values, state = read_transformers_folder(make_folder(tmp_path / "hf"))
    if tied:
        values["tie_embedding"], state["head.weight"] = True, state["embedding.weight"]
    written = write_transformers_folder(tmp_path / "out", ModelConfig(**values), state, eos_token=7)
    assert [file.name for file in written] == ["model.safetensors", "config.json"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    again_values, again = read_transformers_folder(tmp_path / "out")
    assert again_values == values
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7


def test_prototypes_leave_as_unit_vectors_times_the_scale(tmp_path):
    values, state = read_transformers_folder(make_folder(tmp_path / "hf"))
    config = ModelConfig(**{**values, "head": "hpn"})
    prototypes_VD = state["head.prototypes"] = state.pop("head.weight") * 5
    write_transformers_folder(tmp_path / "out", config, {**state, "head.scale": torch.tensor(12.5)})
    _, again = read_transformers_folder(tmp_path / "out")
    torch.testing.assert_close(again["head.weight"].norm(dim=1), torch.full((11,), 12.5))
    cosines_VV = torch.nn.functional.cosine_similarity(again["head.weight"], prototypes_VD)
    torch.testing.assert_close(cosines_VV, torch.ones(11))
    # the same order of classes for any z, and logits of about s times the cosine
    x_LD = torch.randn(50, 6)
    z_LD, exported_LD = x_LD * state["norm_f.weight"], x_LD * again["norm_f.weight"]
    cosine_LV = torch.nn.functional.normalize(z_LD) @ torch.nn.functional.normalize(prototypes_VD).T
    logits_LV = exported_LD @ again["head.weight"].T
    assert torch.equal(logits_LV.argsort(dim=1), cosine_LV.argsort(dim=1))
    size_L = exported_LD.norm(dim=1)
    torch.testing.assert_close(logits_LV, 12.5 * size_L[:, None] * cosine_LV)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "compact"}, "mamba layers, and this model's are compact"),
        ({"layer": "mine:Layer"}, "mamba layers, and this model's are mine:Layer"),
        ({"head": "mine:Head"}, "head mine:Head is not a matrix of output weights"),
        ({"n_class": 5}, "predicts its own 11 tokens, and this head has 5 other classes"),
    ],
)
def test_models_that_have_no_place_in_the_layout(tmp_path, change, message):
    config = ModelConfig(vocab_size=11, d_model=6).replace(**{"head": "softmax", **change})
    with pytest.raises(UserError, match=message):
        write_transformers_folder(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(tmp_path):
    values, state = read_transformers_folder(make_folder(tmp_path / "hf"))
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"out: the folder cannot be created"):
        write_transformers_folder(tmp_path / "out", ModelConfig(**values), state)
