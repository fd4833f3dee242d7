"""Attention against its plain definition in float64; chunks, steps, rows and documents give what the whole gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from protomamba import ConfigError, ForwardContext, ModelConfig, Sampling, SequenceModel, generate
from protomamba.model.mixers import Attention
from protomamba.model.mixers.attention import Cache, default_heads

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make(width: int = 12, **options: float) -> Attention:
    torch.manual_seed(1)
    return Attention(ModelConfig(vocab_size=5, d_model=width, layer="attention", layer_options=options)).double()


def inputs(rows: int = 2, length: int = 9, width: int = 12) -> Tensor:
    return torch.randn(rows, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def resets(*starts: tuple[int, int], rows: int = 2, length: int = 9) -> Tensor:
    reset_BL = torch.zeros(rows, length, dtype=torch.bool)
    for row, position in starts:
        reset_BL[row, position] = True
    return reset_BL


def definition(mixer: Attention, x_LD: Tensor) -> Tensor:
    """One document, position by position and head by head: softmax over all before of q . k / sqrt(W), both turned."""
    width, count = mixer.head_width, mixer.n_head
    q_LD, k_LD, v_LD = (x_LD @ mixer.in_proj.weight.t()).chunk(3, dim=-1)

    def turned(vector_W: Tensor, position: int) -> Tensor:
        out, half = vector_W.clone(), width // 2
        for pair in range(half):
            angle = position * mixer.options.rope_theta ** (-2 * pair / width)
            a, b = vector_W[pair], vector_W[pair + half]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + half] = a * math.sin(angle) + b * math.cos(angle)
        return out

    rows = []
    for t in range(len(x_LD)):
        parts = []
        for head in range(count):
            of = slice(head * width, (head + 1) * width)
            scores = torch.stack([turned(q_LD[t, of], t) @ turned(k_LD[s, of], s) for s in range(t + 1)])
            parts.append((scores / math.sqrt(width)).softmax(0) @ v_LD[: t + 1, of])
        rows.append(torch.cat(parts) @ mixer.out_proj.weight.t())
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (12, 3), (10, 2)])  # the last has heads of odd width
def test_it_is_its_definition(width: int, heads: int) -> None:
    mixer, x_BLD = make(width, n_head=heads, rope_theta=50.0), inputs(width=width)
    expected = torch.stack([definition(mixer, x_LD) for x_LD in x_BLD])
    torch.testing.assert_close(mixer(x_BLD).y_BLD, expected, **CLOSE)


def test_gradients_are_those_of_the_definition() -> None:
    mixer, x_BLD = make(n_head=2), inputs(rows=1, length=4)
    assert torch.autograd.gradcheck(lambda x: mixer(x).y_BLD, (x_BLD.requires_grad_(),))
    reset_BL = resets((0, 2), rows=1, length=4)
    assert torch.autograd.gradcheck(lambda x: mixer(x, ForwardContext(reset_BL=reset_BL)).y_BLD, (x_BLD,))


def test_documents_see_nothing_of_each_other_and_count_from_their_own_start() -> None:
    mixer, x_BLD = make(n_head=3), inputs()
    y_BLD = mixer(x_BLD, ForwardContext(reset_BL=resets((0, 4), (1, 0), (1, 2), (1, 3)))).y_BLD
    for row, start, end in [(0, 0, 4), (0, 4, 9), (1, 0, 2), (1, 2, 3), (1, 3, 9)]:
        torch.testing.assert_close(y_BLD[row, start:end], definition(mixer, x_BLD[row, start:end]), **CLOSE)


@pytest.mark.parametrize("cuts", [(1,), (4, 5), (2, 3, 8), tuple(range(1, 9))])
@pytest.mark.parametrize("starts", [(), ((0, 4), (1, 2), (1, 7)), ((0, 0), (1, 8))])
def test_chunks_with_the_carried_state_are_the_whole(
    cuts: tuple[int, ...], starts: tuple[tuple[int, int], ...]
) -> None:
    mixer, x_BLD, reset_BL = make(n_head=2), inputs(), resets(*starts)
    whole = mixer(x_BLD, ForwardContext(reset_BL=reset_BL)).y_BLD
    state, parts = None, []
    for start, end in zip((0, *cuts), (*cuts, 9), strict=True):
        out = mixer(x_BLD[:, start:end], ForwardContext(state, reset_BL[:, start:end], return_state=True))
        state = out.state
        parts.append(out.y_BLD)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_a_state_holds_the_document_and_no_more() -> None:
    mixer, x_BLD = make(n_head=2), inputs()
    out = mixer(x_BLD, ForwardContext(reset_BL=resets((0, 6), (1, 4)), return_state=True))
    held = Cache(*out.state)
    assert held.position_BS.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]] and held.keys.shape == (2, 2, 5, 6)


def test_states_of_unequal_length_go_on_together_as_they_would_alone() -> None:
    mixer, x_BLD = make(n_head=2), inputs(rows=3, length=9)
    lengths = (2, 7, 5)
    states = [
        mixer(x_BLD[row : row + 1, :end], ForwardContext(return_state=True)).state for row, end in enumerate(lengths)
    ]
    stacked = mixer.stack_states(states)
    following = torch.stack([x_BLD[row, end : end + 2] for row, end in enumerate(lengths)])
    together = mixer(following, ForwardContext(stacked)).y_BLD
    for row, end in enumerate(lengths):
        torch.testing.assert_close(together[row], definition(mixer, x_BLD[row, : end + 2])[end:], **CLOSE)


def test_heads_divide_the_width() -> None:
    assert [default_heads(width) for width in (1, 64, 100, 128, 200, 512)] == [1, 1, 1, 2, 2, 8]
    with pytest.raises(ConfigError, match="n_head=5: expected a divisor of --d-model 12"):
        make(n_head=5)


def test_a_stack_of_both_kinds_decodes_a_batch_of_prompts_as_each_alone() -> None:
    model = SequenceModel(
        ModelConfig(vocab_size=19, d_model=12, d_state=4, n_layer=3, layers="mamba,attention"), seed=2
    )
    greedy, prompts = Sampling(max_tokens=6, temperature=0), [[5], [1, 2, 3, 4, 5, 6, 7], [0, 18]]
    together = generate(model, prompts, greedy)
    assert together == [generate(model, [prompt], greedy)[0] for prompt in prompts]
    for prompt, found in zip(prompts, together, strict=True):
        assert found[-1] == int(model.predict(torch.tensor([prompt + found[:-1]]))[0, -1])
