"""What a validation comes to."""

from __future__ import annotations

import math

import pytest
import torch

from protomamba import ModelConfig, SequenceModel, Trainer
from protomamba.model.heads import Evaluation
from protomamba.train.validation import Validation


@pytest.mark.parametrize(("log_likelihood", "nll"), [(0.0, 0.0), (1e-9, 0.0), (-4.0, 2.0)])
def test_a_cross_entropy_is_never_below_zero_nor_minus_zero(
    log_likelihood: float, nll: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SequenceModel(ModelConfig(vocab_size=5, d_model=4, n_layer=1))
    judged = Evaluation(loss_sum=0.0, correct=2, count=2, log_likelihood_sum=log_likelihood)
    monkeypatch.setattr(model.head, "evaluate", lambda *_: judged)
    found = Trainer(model).evaluate([(torch.zeros(1, 2, dtype=torch.int64),) * 2]).nll
    assert found is not None and found == nll and math.copysign(1.0, found) == 1.0


def test_bits_are_of_what_the_text_is_measured_in() -> None:
    found = Validation(1.0, 0.5, math.log(2), 4, 0.25, bytes_per_token=2.0, raw_unit="base")
    line = found.fields()
    assert line["val_bits_per_base"] == pytest.approx(0.5) and "val_bits_per_byte" not in line
