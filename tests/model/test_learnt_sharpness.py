"""The learnt sharpness through training, growth and resume; and, slowly, the plateau that 0.1 collapsed on."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.bits import same
from protomamba.model.heads.hypersphere import LEAST_SHARPNESS

CLASSES = 1_200  # more than a sample holds


def trainer(classes: int = CLASSES, width: int = 8, lr: float = 2e-3) -> Trainer:
    model = SequenceModel(ModelConfig(vocab_size=classes, d_model=width, n_layer=2), seed=0)
    constant = {"lr": lr, "lr_warmup_steps": 0, "lr_min_scale": 1.0, "bp_cadence_steps": 1}
    return Trainer(model, TrainConfig(**constant, steps=10**6))


def batch(generator: torch.Generator, classes: int = CLASSES, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and targets without any rule."""
    return tuple(torch.randint(classes, (rows, 64), generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_a_resumed_trainer_draws_the_samples_of_the_uncut_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [batch(generator) for _ in range(6)]
    uncut, cut = trainer(), trainer()
    for step in batches:
        uncut.train_step(*step)
    for step in batches[:3]:
        cut.train_step(*step)
    cut.save_checkpoint(tmp_path / "half.safetensors")
    resumed = Trainer.load_checkpoint(tmp_path / "half.safetensors")
    for step in batches[3:]:
        resumed.train_step(*step)
    expected = uncut.model.state_dict()
    assert int(expected["head.draws"]) == 6 and int(expected["head.counted"]) == 6 * 8 * 64
    assert all(same(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_growing_keeps_the_sharpness_and_its_moments() -> None:
    grown, generator = trainer(), torch.Generator().manual_seed(0)
    for _ in range(3):
        grown.train_step(*batch(generator))
    before = grown.model.state_dict()["head.log_scale"].clone()
    moment = grown.optimizer.state()["head.log_scale"]["exp_avg"].clone()
    grown.expand(3)
    assert same(grown.model.state_dict()["head.log_scale"], before)
    assert same(grown.optimizer.state()["head.log_scale"]["exp_avg"], moment)


def test_one_step_moves_the_sharpness_and_only_the_prototypes_it_saw() -> None:
    fresh, (ids_BL, targets_BL) = trainer(), batch(torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    fresh.train_step(ids_BL, targets_BL)
    after = fresh.model.state_dict()
    assert not same(after["head.log_scale"], before["head.log_scale"])
    directions = [F.normalize(state["head.prototypes"], dim=-1) for state in (before, after)]
    turned = ((directions[1] - directions[0]).norm(dim=-1) > 1e-5).sum()
    assert 400 < int(turned) <= 1_024


def test_prototypes_turn_less_where_the_sharpness_has_fallen() -> None:
    turns = []
    for fallen in (1.0, 4.0):
        made, step = trainer(), batch(torch.Generator().manual_seed(0))
        head = made.model.head
        with torch.no_grad():
            head.get_parameter("log_scale").sub_(math.log(fallen))
        head.post_step()
        before = F.normalize(head.get_parameter("prototypes").detach().clone(), dim=-1)
        made.train_step(*step)
        turns.append(float((F.normalize(head.get_parameter("prototypes").detach(), dim=-1) - before).norm()))
    assert turns[1] == pytest.approx(turns[0] / 4, rel=0.1)


def test_the_sharpness_stays_above_the_least() -> None:
    made = trainer(16)
    with torch.no_grad():
        made.model.head.get_parameter("log_scale").fill_(-3.0)
    made.train_step(*batch(torch.Generator().manual_seed(0), 16))
    assert float(made.model.head.get_parameter("log_scale").detach().exp()) == pytest.approx(LEAST_SHARPNESS)


@pytest.mark.slow
def test_nothing_to_learn_leaves_prototypes_apart_and_then_a_source_is_learnt() -> None:
    """16 classes, even targets for 3,000 steps, then a token that its predecessor tells four times in five."""
    classes, plateau = 16, trainer(16, 64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3_000):
        plateau.train_step(*batch(generator, classes))
    figures = plateau.model.head.diagnostics()
    assert figures["nearest_cosine"] < figures["random_cosine"] + 0.1
    judged = torch.Generator().manual_seed(2)
    found = plateau.evaluate([batch(judged, classes, 256) for _ in range(8)])
    assert found.nll is not None and found.nll < math.log(classes) + 0.02
    follower = torch.randperm(classes, generator=generator)

    def told(rows: int) -> tuple[Tensor, Tensor]:
        ids_BL, lot_BL = batch(generator, classes, rows)
        return ids_BL, torch.where(torch.rand(ids_BL.shape, generator=generator) < 0.8, follower[ids_BL], lot_BL)

    for _ in range(300):
        plateau.train_step(*told(8))
    assert plateau.evaluate([told(64)]).accuracy > 0.75


NOT_LEARNT = pytest.mark.xfail(strict=True, reason="not within 16,000 steps, 3 by rounding alone: docs/prototypes.md")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, pytest.param(3, marks=NOT_LEARNT), pytest.param(4, marks=NOT_LEARNT)])
def test_the_recall_task_is_learnt(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 never learnt it: one target a row, and nothing to go by for thousands of steps."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "studies"))
    plateaus = importlib.import_module("plateaus")
    found = plateaus.run_recall("learned", seed, plateaus.RECALL_LIMIT)
    assert found["reached"] is not None and found["reached"] <= 16_000, found
