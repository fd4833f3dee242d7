"""The JAX parity check passes on our model, and fails on a model that is subtly wrong."""

import json
import sys

import numpy as np
import pytest
import torch

from protomamba.errors import UserError
from protomamba.model.sequence_model import SequenceModel
from protomamba.parity import jax_check
from protomamba.train.trainer import Trainer


def test_without_jax_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(UserError, match=r"parity jax needs jax.*pip install protomamba\[jax\]"):
        jax_check.run_jax(tmp_path / "in.npz", tmp_path / "out.npz")


def make_trainer(layer="mamba", head="hpn"):
    config = jax_check.ModelConfig(**jax_check.SHAPE, **jax_check.HEADS[head], layer=layer)
    return Trainer(SequenceModel(config, seed=0), jax_check.TRAINING)


def test_the_shared_file_is_a_function_of_the_seed():
    one, two, other = (jax_check.make_inputs(make_trainer(), seed) for seed in (3, 3, 4))
    assert set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["ids"], other["ids"])
    assert (one["targets"] < 0).any() and (one["targets"] >= 0).mean() > 0.8


@pytest.mark.parametrize("layer", ["mamba", "compact"])
def test_the_decay_set_written_to_the_file(layer):
    """No decay on A_log, D, biases, norms and prototypes; on every other matrix."""
    inputs = jax_check.make_inputs(make_trainer(layer), 0)
    decaying = {name.split("/")[1].split(".mixer.")[-1] for name in inputs if "decay/" in name and inputs[name]}
    expected = {"embedding.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    assert decaying == expected | ({"in_proj.weight"} if layer == "mamba" else set())


@pytest.mark.parametrize(
    ("dtype", "layer", "head"),
    [("float32", "mamba", "hpn"), ("float64", "compact", "hpn"), ("float64", "compact", "softmax")],
)
def test_ours_and_jax_agree(tmp_path, dtype, layer, head):
    pytest.importorskip("jax")
    report = jax_check.run(1, dtype, layer, head, tmp_path)
    assert report.ok, report.to_json()
    assert {row.name for row in report.rows} == {"scores", "loss", "gradients", "gradient norm", "AdamW updates"}
    assert len(list(tmp_path.glob("*.npz"))) == 3
    json.dumps(report.to_json())


@pytest.mark.slow
def test_every_case_agrees():
    pytest.importorskip("jax")
    report = jax_check.run_all(0)
    assert report.ok, report.to_json()
    assert len(report.rows) == 2 * 2 * 4 * 5


SABOTAGE = {
    "scores": lambda out: out["scores"].__iadd__(1e-4),
    "loss": lambda out: out["loss"].__setitem__(2, out["loss"][2] + 1e-4),
    "gradients": lambda out: out["grad/layers.0.mixer.D"].__imul__(1.001),
    "gradient norm": lambda out: out["grad_norm"].__imul__(1.001),
    "AdamW updates": lambda out: out["updated/norm_f.weight"].__iadd__(1e-4),
}


@pytest.mark.parametrize("row", SABOTAGE)
def test_a_deviation_fails_its_row_and_no_other(row):
    trainer = make_trainer()
    inputs = jax_check.make_inputs(trainer, 0)
    ours = jax_check.run_ours(trainer, inputs)
    theirs = {name: value.copy() for name, value in ours.items()}
    SABOTAGE[row](theirs)
    report = jax_check.Report("sabotage")
    jax_check.compare(report, inputs, ours, theirs, jax_check.TOLERANCES["float32"])
    assert [r.name for r in report.rows if not r.ok] == [row]


def test_a_missing_gradient_is_not_overlooked():
    trainer = make_trainer()
    inputs = jax_check.make_inputs(trainer, 0)
    trainer.model.layers[0].mixer.D.requires_grad_(False)
    ours = jax_check.run_ours(trainer, inputs)
    with pytest.raises(KeyError, match=r"grad/layers\.0\.mixer\.D"):
        jax_check.compare(jax_check.Report("r"), inputs, ours, ours, jax_check.TOLERANCES["float32"])


def test_our_side_trains_on_the_file_s_parameters():
    """Whatever the model held before: the outputs depend on the file alone."""
    inputs = jax_check.make_inputs(make_trainer(), 0)
    one, two = make_trainer(), make_trainer()
    with torch.no_grad():
        for parameter in two.model.parameters():
            parameter.add_(1.0)
    first, second = jax_check.run_ours(one, inputs), jax_check.run_ours(two, inputs)
    assert all(np.array_equal(first[name], second[name]) for name in first)
