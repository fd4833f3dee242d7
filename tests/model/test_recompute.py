"""--recompute: what a training step keeps changes its memory, never a bit of what it does."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.bits import differences

block = importlib.import_module("protomamba.kernels.mamba_block")  # whose name the op hides


def trained(recompute: str, **fields: object) -> dict[str, Tensor]:
    config = ModelConfig(vocab_size=11, d_model=8, n_layer=2, **fields)  # type: ignore[arg-type]
    trainer = Trainer(SequenceModel(config, seed=1), TrainConfig(steps=5, lr=1e-2, recompute=recompute))
    torch.manual_seed(3)  # of the dropout
    for step in range(3):
        ids = torch.randint(0, 11, (3, 131), generator=torch.Generator().manual_seed(step))
        trainer.train_step(ids[:, :-1], ids[:, 1:], torch.zeros(3, 130, dtype=torch.bool))
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "fields",
    [{}, {"layer": "compact"}, {"layers": "mamba,attention"}, {"dropout": 0.2}],
    ids=["mamba", "compact", "with attention", "with dropout"],
)
def test_the_same_weights_whatever_is_kept(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "LARGE", 2 * 2 * 64 * 8)  # all but the smallest pieces are large
    expected = trained("none", **fields)
    for recompute in ("cheap", "blocks"):
        assert not list(differences(trained(recompute, **fields), expected))


def test_a_hooked_block_is_recomputed_too() -> None:
    """Module by module, by torch's checkpoint: the hook sees the forward pass twice."""
    seen: dict[str, int] = {}
    for recompute in ("none", "blocks"):
        model = SequenceModel(ModelConfig(vocab_size=11, d_model=8, n_layer=1), seed=1)
        model.recompute = recompute
        calls: list[int] = []
        model.layers[0].mixer.x_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        ids = torch.arange(10).view(1, 10)
        model(ids, ids).backward()
        seen[recompute] = len(calls)
    assert seen == {"none": 1, "blocks": 2}
