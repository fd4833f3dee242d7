"""Faults that users of other projects reported in public, tried on ours; docs/reliability.md lists where all 32 are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protomamba import kernels
from protomamba.config import ModelConfig, TrainConfig
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.trainer import Trainer


def model(**more: object) -> SequenceModel:
    return SequenceModel(ModelConfig(**{"vocab_size": 13, "d_model": 16, "n_layer": 2, **more}), seed=3)  # type: ignore[arg-type]


def test_the_time_steps_and_decays_start_as_published() -> None:
    """fla-org/flash-linear-attention#739: softplus(dt_bias) log-uniform in [0.001, 0.1], A = -1 .. -N."""
    wide = SequenceModel(ModelConfig(vocab_size=13, d_model=512, n_layer=1), seed=3)
    named = dict(wide.named_parameters())
    (bias,) = (p for name, p in named.items() if name.endswith("dt_proj.bias"))
    steps = nn.functional.softplus(bias.detach().double())
    assert 0.0009 < steps.min() < 0.002 and 0.06 < steps.max() < 0.11
    assert abs(steps.log10().mean() + 2) < 0.1, "the middle of [-3, -1]"
    (A_log,) = (p for name, p in named.items() if name.endswith("A_log"))
    assert torch.allclose(A_log.detach().exp(), torch.arange(1.0, 17).expand_as(A_log))


def test_the_projection_of_the_time_step_keeps_its_own_start() -> None:
    """athms/mad-lab#3: the model's own initialisation went over dt_proj's, which is uniform within rank^-1/2."""
    weight = dict(model(d_model=256).named_parameters())["layers.1.mixer.dt_proj.weight"].detach()
    bound = weight.shape[1] ** -0.5
    assert 0.99 * bound < weight.abs().max() <= bound, "no other start fills this range"
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_without_a_gradient_matrices_decay_and_nothing_else_moves() -> None:
    """athms/mad-lab#5: weight decay on A_log and D. The table of groups is in tests/train/test_optim.py."""
    trainer = Trainer(model(), TrainConfig(lr=0.1, weight_decay=0.5, schedule="constant"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step(0.1)
    kept = ("A_log", ".D", "bias", "norm.weight", "norm_f.weight", "prototypes", "log_scale")
    for name, parameter in trainer.model.named_parameters():
        factor = 1.0 if name.endswith(kept) else 1 - 0.1 * 0.5
        assert torch.allclose(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 255, 256, 257, 300])
def test_gradients_are_finite_and_the_twins_at_every_length(length: int) -> None:
    """state-spaces/mamba#352: NaN gradients where the length was no multiple of 256."""
    torch.manual_seed(length)
    shapes = {"u": (1, length, 8), "delta": (1, length, 8), "A": (8, 4), "B": (1, length, 4), "C": (1, length, 4)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given["A"] = -given["A"].abs() - 0.1
    ours = [x.clone().requires_grad_() for x in given.values()]
    twins = [x.double().requires_grad_() for x in given.values()]
    kernels.selective_scan(*ours, delta_softplus=True).square().sum().backward()
    kernels.reference.selective_scan(*twins, delta_softplus=True).square().sum().backward()
    for mine, twin in zip(ours, twins, strict=True):
        assert mine.grad is not None and twin.grad is not None and mine.grad.isfinite().all()
        assert (mine.grad - twin.grad).abs().max() <= 1e-4 * (1 + twin.grad.abs().max())


def test_a_batch_without_a_target_changes_no_weight_to_nan() -> None:
    """karpathy/nanochat#603: the mean over no target is NaN, and went into every weight."""
    trainer = Trainer(model(), TrainConfig(lr=1e-2, bp_cadence_steps=1))
    tokens = torch.randint(0, 13, (2, 9))
    trainer.train_step(tokens, tokens)
    trainer.train_step(tokens, torch.full_like(tokens, -100))
    stats = trainer.train_step(tokens, tokens)
    assert torch.isfinite(torch.tensor(stats.loss))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_loaded_bits_are_the_saved_ones(tmp_path: pytest.TempPathFactory) -> None:
    """fla-org/flash-linear-attention#754: a constructor's initialisation ran after the weights were loaded."""
    from pathlib import Path

    trainer = Trainer(model(), TrainConfig(lr=1e-2, bp_cadence_steps=1))
    tokens = torch.randint(0, 13, (2, 9))
    for _ in range(3):
        trainer.train_step(tokens, tokens)
    path = Path(str(tmp_path), "c.safetensors")
    trainer.save_checkpoint(path)
    again = Trainer.load_checkpoint(path)
    for (name, one), (other, two) in zip(
        trainer.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(one, two), name


def test_a_short_row_does_not_pay_for_whole_chunks() -> None:
    """state-spaces/mamba#439: what a scan keeps for its backward grows with the length, to within one chunk of 64.

    The time itself is measured by `bench`; an assertion of it would say more of the machine.
    """
    library = kernels.native.load("baseline")
    kept = {length: library.scan_chunk_floats(1, length, 64, 16) for length in (1, 64, 128, 640, 6_400)}
    assert kept[64] == kept[1] and kept[128] == 2 * kept[1] and kept[640] == 10 * kept[1] == kept[6_400] // 10


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [
            each for each in (made if isinstance(made, list | tuple) else [made]) if isinstance(each, torch.Tensor)
        ]
        self.numbers = max([self.numbers, *(each.numel() for each in tensors)])
        return made


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_many_classes_never_meet_all_tokens_at_once(head: str) -> None:
    """state-spaces/mamba#657: 108,192 classes and short rows took the memory of tokens x classes, several times."""
    classes, rows, length = 108_192, 32, 8
    trainer = Trainer(SequenceModel(ModelConfig(vocab_size=classes, d_model=8, n_layer=1, head=head)), TrainConfig())
    tokens = torch.randint(0, classes, (rows, length), generator=torch.Generator().manual_seed(1))
    with Largest() as training:
        trainer.train_step(tokens, tokens)
    with Largest() as predicting, torch.no_grad():
        trainer.model.eval().predict(tokens)
    most = {"hpn": classes * 8, "softmax": classes * 128}[head]  # a table, or a block of 128 rows of scores
    assert 0 < training.numbers <= most and 0 < predicting.numbers <= 1 << 22


def test_our_own_bpe_gives_the_same_ids_in_another_program() -> None:
    """ggml-org/llama.cpp#27277, #9927: an own BPE could not be converted. There is no GGUF here; an export's
    tokenizer.json is what `tokenizers`, and all that read its format, load."""
    library = pytest.importorskip("tokenizers")
    from protomamba.data.tokenizer import HuggingFaceTokenizer, train_bpe_tokenizer
    from protomamba.export import tokenizer_files

    ours = HuggingFaceTokenizer(train_bpe_tokenizer(["to be or not to be, that is the question"] * 20, 300), 256)
    theirs = library.Tokenizer.from_str(tokenizer_files(ours.to_json())["tokenizer.json"])
    for text in ("to be", "  question\n\nthat", "é ☃ \U0001f600 \x00\r\n\t", "notquestion" * 50, ""):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == list(ours.encode(text)) and theirs.decode(ids) == text
