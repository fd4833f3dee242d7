"""The example of a user's own head: found by name, and it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from protomamba.config import ModelConfig
from protomamba.model.heads import Head
from protomamba.model.heads import head as registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.manual_seed(0)
    return registry.find("contrastive_head:ContrastiveHead")(ModelConfig(vocab_size=12, d_model=16))


def test_it_learns_classes_and_how_common_they_are(head: Head) -> None:
    """A noisy label with skewed classes: the best guess needs both the input and the prior."""
    prior = torch.arange(1.0, 13.0) / 78
    features = nn.Linear(6, 16)
    centres = torch.randn(12, 6)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        targets = torch.multinomial(prior, count, replacement=True)
        x = centres[targets] + 1.2 * torch.randn(count, 6)
        posterior = -(torch.cdist(x, centres) ** 2) / (2 * 1.2**2) + prior.log()
        return x, targets, posterior

    optimizer = torch.optim.AdamW([*features.parameters(), *head.parameters()], lr=0.02)
    for _ in range(200):
        x, targets, _ = draw(256)
        optimizer.zero_grad()
        head(features(x), targets).backward()
        optimizer.step()
    x, targets, posterior = draw(4_000)
    found = head.evaluate(features(x), targets)
    best = float((posterior.argmax(-1) == targets).float().mean())
    assert found.accuracy > best - 0.05, f"{found.accuracy} against {best}, which is all that can be known"
    assert found.accuracy > float(prior.max()) + 0.2
    best_likelihood = float(posterior.log_softmax(-1).gather(1, targets[:, None]).mean())
    assert found.log_likelihood_sum is not None
    assert found.log_likelihood_sum / found.count > best_likelihood - 0.25, "its scores are log-probabilities"


def test_ignored_targets_and_none_at_all(head: Head) -> None:
    z, targets = torch.randn(4, 5, 16), torch.randint(12, (4, 5))
    targets[0] = -100
    head.eval()
    assert torch.allclose(head(z, targets), head(z[1:], targets[1:]))
    assert float(head(z, torch.full_like(targets, -100))) == 0.0
