"""The comparison with transformers: passes on what we have, fails on what is not the same, and needs no network."""

import socket
import sys

import pytest
import torch

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.transformers_folder import read_transformers_folder, transformers_names
from protomamba.config import ModelConfig, Sampling, TrainConfig
from protomamba.data.tokenizer import ByteTokenizer
from protomamba.decode import generate
from protomamba.errors import UserError
from protomamba.export import export_transformers
from protomamba.model.sequence_model import SequenceModel
from protomamba.parity import transformers_check
from protomamba.parity.report import Report
from protomamba.train.trainer import Trainer


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save(path, head="hpn", tokenizer=None):
    """A checkpoint of a small byte model as a run writes it: configurations and tokenizer inside."""
    torch.manual_seed(0)
    model = transformers_check.scattered(SequenceModel(ModelConfig(vocab_size=257, d_model=24, n_layer=2, head=head)))
    if head == "hpn":
        model.head.scale.fill_(9.0)
    trainer = Trainer(model, TrainConfig())
    described = tokenizer.to_json() if tokenizer else None
    checkpoint.save(path, trainer.parts(), config={**trainer.configs(), "tokenizer": described})
    return model


def test_an_exported_checkpoint_reads_back_as_the_same_model(tmp_path):
    model = save(tmp_path / "c.safetensors", "softmax")
    written = export_transformers(tmp_path / "c.safetensors", tmp_path / "out")
    assert [path.name for path in written] == ["model.safetensors", "config.json"]
    values, state = read_transformers_folder(tmp_path / "out")
    again = SequenceModel(ModelConfig(**values))
    again.load_state_dict(state)
    ids_BL = torch.randint(257, (2, 9))
    assert torch.equal(again.scores(ids_BL), model.scores(ids_BL))


def test_an_exported_hpn_head_chooses_the_same_tokens(tmp_path):
    model = save(tmp_path / "c.safetensors", "hpn", ByteTokenizer())
    written = export_transformers(tmp_path / "c.safetensors", tmp_path / "out")
    assert [path.name for path in written] == [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
    ]
    values, state = read_transformers_folder(tmp_path / "out")
    assert values["head"] == "softmax"
    torch.testing.assert_close(state["head.weight"].norm(dim=1), torch.full((257,), 9.0))
    again = SequenceModel(ModelConfig(**values))
    again.load_state_dict(state)
    greedy = Sampling(max_tokens=100, temperature=0)
    assert generate(again, [[1, 2, 3]], greedy) == generate(model, [[1, 2, 3]], greedy)


def test_an_exported_hpn_head_keeps_its_probabilities(tmp_path):
    """The softmax of the exported logits is close to that of scale * cosine, though the layout cannot normalise z."""
    model = save(tmp_path / "c.safetensors")
    export_transformers(tmp_path / "c.safetensors", tmp_path / "out")
    values, state = read_transformers_folder(tmp_path / "out")
    again = SequenceModel(ModelConfig(**values))
    again.load_state_dict(state)
    ids_BL = torch.randint(257, (2, 30))
    ours_BLV = model.head.logits(model.features(ids_BL)[0]).log_softmax(-1)
    divergence_BL = (ours_BLV.exp() * (ours_BLV - again.scores(ids_BL).log_softmax(-1))).sum(-1)
    assert divergence_BL.mean() < 0.01  # nats; with z at its own length it is several


@pytest.mark.parametrize("layer", ["compact", "examples.lstm_layer:LSTMLayer"])
def test_another_layer_is_refused_and_none_of_its_code_asked_for(layer, tmp_path, monkeypatch):
    trainer = Trainer(SequenceModel(ModelConfig(vocab_size=5, d_model=8, layer=layer)))
    trainer.save_checkpoint(tmp_path / "c.safetensors")
    monkeypatch.delitem(sys.modules, "examples.lstm_layer", raising=False)
    with pytest.raises(UserError, match=f"mamba layers, and this model's are {layer}"):
        export_transformers(tmp_path / "c.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["softmax", "tied"])
def test_every_parameter_has_a_name_on_the_other_side(head):
    model = SequenceModel(ModelConfig(vocab_size=5, d_model=8, head="softmax", tie_embedding=head == "tied"))
    assert set(transformers_names(model.config)) == set(model.state_dict())


def test_without_transformers_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"parity transformers needs transformers.*pip install protomamba\[transformers"
    ):
        transformers_check.run()


def test_both_directions_agree_without_network(no_network):
    pytest.importorskip("transformers")
    report = transformers_check.run(0)
    assert report.ok, report.to_json()
    assert len(report.rows) == 11


def test_greedy_decoding_that_differs_is_counted():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers_check.scattered(
        transformers.MambaForCausalLM(transformers_check.their_config(transformers, False))
    )
    ours = SequenceModel(ModelConfig(**transformers_check.SHAPE, head="softmax"), seed=0)
    report = Report("r")
    transformers_check.check_greedy(report, "other weights", ours, theirs.eval())
    assert not report.ok and report.rows[0].worst > 100


def test_the_tokenizer_files_load_as_a_tokenizer(tmp_path, no_network):
    transformers = pytest.importorskip("transformers")
    save(tmp_path / "c.safetensors", "hpn", ByteTokenizer())
    export_transformers(tmp_path / "c.safetensors", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def fällt(x):\n\treturn  x  # 🙂"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 256
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.bos_token_id) == (256, None)
