"""Decoding: the same tokens whatever the batch, truncation by top-k and top-p as defined, greedy as argmax."""

from __future__ import annotations

import pytest
import torch

from protomamba import ModelConfig, Sampling, SequenceModel, generate
from protomamba.decode import PREFILL_CHUNK, choose, prefill, weights_loss
from protomamba.errors import ConfigError

GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(params=["mamba", "compact", "attention", "examples.lstm_layer:LSTMLayer"])
def model(request: pytest.FixtureRequest) -> SequenceModel:
    return SequenceModel(ModelConfig(vocab_size=19, d_model=12, d_state=4, n_layer=2, layer=request.param), seed=2)


def test_greedy_takes_the_best_score_of_the_whole_sequence_so_far(model: SequenceModel) -> None:
    prompt = [3, 1, 4]
    (found,) = generate(model, [prompt], GREEDY)
    for position in range(len(found)):
        seen = torch.tensor([prompt + found[:position]])
        assert int(model.predict(seen)[0, -1]) == found[position]


def test_a_batch_of_prompts_of_any_lengths_gives_what_each_gives_alone(model: SequenceModel) -> None:
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [0, 18]]
    together = generate(model, prompts, GREEDY)
    assert together == [generate(model, [prompt], GREEDY)[0] for prompt in prompts]


def test_a_long_prompt_in_chunks_is_the_prompt() -> None:
    model = SequenceModel(ModelConfig(vocab_size=19, d_model=8, d_state=4, n_layer=1), seed=2)
    tokens = torch.randint(0, 19, (1, 2 * PREFILL_CHUNK + 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z_BD, _ = prefill(model, tokens.tolist())
        whole_BLD, _ = model.features(tokens)
    torch.testing.assert_close(z_BD, whole_BLD[:, -1], rtol=1e-4, atol=1e-4)


def test_the_stop_token_ends_a_sequence_and_is_left_out(model: SequenceModel) -> None:
    (free,) = generate(model, [[3, 1, 4]], GREEDY)
    stop = free[4]
    seen: list[list[int]] = []
    (stopped,) = generate(model, [[3, 1, 4]], GREEDY, stop_token=stop, on_token=seen.append)
    assert stopped == free[: free.index(stop)] and seen[-1] == [-1]


def test_the_seed_decides(model: SequenceModel) -> None:
    hot = Sampling(max_tokens=30, temperature=5.0, top_p=1.0)
    assert generate(model, [[1]], hot) == generate(model, [[1]], hot)
    assert generate(model, [[1]], hot) != generate(model, [[1]], hot.replace(seed=1))


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits_BV = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).repeat(400, 1)

    def drawn(**fields: float) -> set[int]:
        sampling = Sampling(temperature=1.0, **{"top_p": 1.0, **fields})
        return set(choose(logits_BV, sampling, torch.Generator().manual_seed(0)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1} and drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.5) == {0, 1} and drawn(top_p=0.7001) == {0, 1, 2} and drawn(top_p=0.01) == {0}


def test_frequencies_are_the_probabilities() -> None:
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(p_V.log().repeat(40_000, 1), Sampling(temperature=1.0, top_p=1.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(drawn) / 40_000, p_V, atol=0.01, rtol=0)


@pytest.mark.parametrize("prompt", [[], [19], [-1]])
def test_a_prompt_the_model_cannot_read_is_an_error(prompt: list[int], model: SequenceModel) -> None:
    with pytest.raises(ConfigError, match="expected tokens from 0 to 18"):
        generate(model, [prompt])


def test_no_prompt_gives_nothing(model: SequenceModel) -> None:
    assert generate(model, []) == []


def test_a_temperature_of_almost_nothing_is_greedy(model: SequenceModel) -> None:
    cold = Sampling(max_tokens=12, temperature=1e-40, top_p=1.0)
    assert generate(model, [[3, 1, 4]], cold) == generate(model, [[3, 1, 4]], GREEDY)


def test_a_model_of_labels_has_no_next_token() -> None:
    model = SequenceModel(ModelConfig(vocab_size=19, d_model=8, d_state=4, n_layer=1, n_class=3), seed=2)
    with pytest.raises(ConfigError, match="this is a 3-class model"):
        generate(model, [[1]])


def test_a_prompt_runs_in_the_precision_of_the_steps() -> None:
    model = SequenceModel(ModelConfig(vocab_size=19, d_model=16, d_state=4, n_layer=2), seed=2)
    expected, _ = prefill(model, [[1, 2, 3]])
    model.precision = "bf16"
    assert torch.equal(prefill(model, [[1, 2, 3]])[0], expected)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_what_rounded_weights_cost_is_told(weights: str) -> None:
    model = SequenceModel(ModelConfig(vocab_size=19, d_model=16, d_state=4, n_layer=2, head="softmax"), seed=2)
    assert len(generate(model, [[3, 1, 4], [1]], GREEDY, weights=weights)[1]) == 12
    loss = weights_loss(model, [3, 1, 4], weights, tokens=20)
    assert loss.tokens == 20 and 0 < loss.largest < 0.5
    assert abs(loss.bits - loss.bits_fp32) <= loss.largest / 0.69
    assert str(loss).startswith(f"weights {weights}: {loss.bits:.3f} bits per token instead of")


def test_unknown_weights_are_an_error(model: SequenceModel) -> None:
    with pytest.raises(ConfigError, match="weights: expected one of fp32, bf16, int8, got 'int4'"):
        generate(model, [[1]], weights="int4")


def test_float32_weights_cost_nothing(model: SequenceModel) -> None:
    loss = weights_loss(model, list(range(18)), "fp32", tokens=8)
    assert loss.largest == 0 and loss.bits == loss.bits_fp32 and loss.tokens == 8
