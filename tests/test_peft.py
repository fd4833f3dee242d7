"""peft's LoRA on our projections: it changes outputs, trains alone, decodes, and is merged back into our model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protomamba import ModelConfig, Sampling, SequenceModel, TrainConfig, Trainer, generate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_lora_trains_alone_decodes_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = SequenceModel(ModelConfig(vocab_size=32, d_model=16, layers="mamba,attention", head="softmax"), seed=0)
    tokens_BL = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model.scores(tokens_BL)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj", "out_proj"]))
    torch.testing.assert_close(model.scores(tokens_BL), before, rtol=1e-4, atol=1e-5)  # LoRA starts at nothing
    assert "mixer.x_proj is peft" in model.unfused_reasons()["layers.0"]
    trainer = Trainer(model, TrainConfig(lr=5e-2, bp_cadence_steps=1, ff_lr=0.0))
    losses = [trainer.train_step(tokens_BL, tokens_BL.roll(-1, 1)).loss for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    greedy = Sampling(max_tokens=5, temperature=0)
    expected = model.eval().scores(tokens_BL)
    (found,) = generate(model, tokens_BL[:1], greedy)
    seen = torch.cat([tokens_BL[:1], torch.tensor([found[:-1]])], 1)
    assert found[-1] == int(model.predict(seen)[0, -1])
    merged = wrapped.merge_and_unload()
    assert merged is model and model.unfused_reasons() == {}
    torch.testing.assert_close(model.scores(tokens_BL), expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(SequenceModel.from_pretrained(tmp_path / "merged").predict(tokens_BL), model.predict(tokens_BL))
