"""Tables of many rows: gradients of the touched rows, and an AdamW that catches the others up when they are touched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.bits import same
from protomamba.errors import ConfigError
from protomamba.kernels.rows import gather_rows, row_gradient, unique_rows
from protomamba.train.comm_rows import merged
from protomamba.train.outer import OuterTrainer
from protomamba.train.row_sparse import RowAdamW
from protomamba.train.trainer import NonFiniteError

CONFIG = SimpleNamespace(beta1=0.9, beta2=0.99, adam_eps=1e-8, weight_decay=0.1)


def touch(table: nn.Parameter, rows: list[int], generator: torch.Generator) -> Tensor:
    """A sparse gradient of some rows, and the same dense."""
    gradient = torch.randn(len(rows), table.shape[1], generator=generator, dtype=table.dtype)
    table.grad = None
    (gather_rows(table, torch.tensor(rows)) * gradient).sum().backward()
    dense = torch.zeros_like(table)
    dense[rows] = gradient
    return dense


def test_the_gradient_is_the_rows_and_nothing_else() -> None:
    table = nn.Parameter(torch.randn(50, 4))
    ids = torch.tensor([[7, 3, 7], [49, 3, 3]])
    rows, places = unique_rows(ids)
    assert rows.tolist() == [3, 7, 49] and torch.equal(gather_rows(table, rows)[places], table[ids])
    weight = torch.randn(2, 3, 4)
    (nn.functional.embedding(places, gather_rows(table, rows)) * weight).sum().backward()
    assert table.grad is not None and table.grad.is_sparse
    dense = nn.Parameter(table.detach().clone())
    (nn.functional.embedding(ids, dense) * weight).sum().backward()
    torch.testing.assert_close(table.grad.to_dense(), dense.grad)
    found, values = row_gradient(table.grad)
    assert found.tolist() == [3, 7, 49] and values.shape == (3, 4)


def test_gradients_of_two_passes_are_added_by_row_in_order() -> None:
    table = nn.Parameter(torch.zeros(9, 2))
    for rows, value in (([1, 4], 1.0), ([4, 8], 10.0)):
        (gather_rows(table, torch.tensor(rows)) * value).sum().backward()
    assert table.grad is not None
    rows_R, values_RD = row_gradient(table.grad)
    assert rows_R.tolist() == [1, 4, 8] and values_RD[:, 0].tolist() == [1.0, 11.0, 10.0]


def test_rows_of_two_shards_are_merged_row_by_row() -> None:
    one = torch.tensor([1, 4]), torch.tensor([[1.0], [-0.0]])
    other = torch.tensor([0, 1, 7]), torch.tensor([[5.0], [2.0], [3.0]])
    rows_R, values_RD = merged(one, other)
    assert rows_R.tolist() == [0, 1, 4, 7] and values_RD[:, 0].tolist() == [5.0, 3.0, -0.0, 3.0]
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 1)
    assert same(merged(nothing, other), other) and same(merged(one, nothing), one)


@pytest.mark.parametrize("decay", [True, False])
def test_a_table_touched_whole_at_each_update_moves_as_adamw_moves_it(decay: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    dense = nn.Parameter(table.detach().clone())
    adamw = torch.optim.AdamW([dense], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1 if decay else 0.0)
    rows = RowAdamW(table, CONFIG, decay, row_wise=False)
    for lr in (1e-2, 2e-2, 5e-3):
        dense.grad = touch(table, list(range(6)), generator)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        rows.update(lr)
    torch.testing.assert_close(table.detach(), dense.detach(), rtol=1e-12, atol=1e-12)


def test_an_untouched_row_does_not_move_and_is_caught_up_in_closed_form() -> None:
    """Against a replay: between two touches moments decay by b^k, and the weight by each update's 1 - lr wd."""
    generator = torch.Generator().manual_seed(1)
    table = nn.Parameter(torch.randn(8, 2, generator=generator, dtype=torch.float64))
    rows = RowAdamW(table, CONFIG, decay=True, row_wise=False)
    weight, first, second = table.detach().clone(), torch.zeros(8, 2).double(), torch.zeros(8, 2).double()
    owed = torch.ones(8, 1).double()
    for step in range(1, 30):
        lr = 0.01 + 0.001 * step
        touched = sorted({step % 8, (step * step) % 5, 7} - ({7} if step % 9 else set()))
        before = table.detach().clone()
        dense = touch(table, touched, generator)
        rows.update(lr)
        # The replay: every row's moments and debt at every update.
        first, second = 0.9 * first + 0.1 * dense, 0.99 * second + 0.01 * dense.square()
        owed = owed * (1 - lr * 0.1)
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        weight[touched] = weight[touched] * owed[touched] - lr * update[touched]
        owed[touched] = 1.0
        untouched = [row for row in range(8) if row not in touched]
        assert same(table.detach()[untouched], before[untouched])
        torch.testing.assert_close(table.detach(), weight, rtol=1e-9, atol=1e-9)


def test_a_row_wise_second_moment_is_the_mean_over_the_row() -> None:
    table = nn.Parameter(torch.ones(3, 4))
    rows = RowAdamW(table, CONFIG, decay=False, row_wise=True)
    generator = torch.Generator().manual_seed(2)
    dense = touch(table, [1], generator)
    rows.update(0.1)
    assert rows.slots["exp_avg_sq"].shape == (3, 1)
    torch.testing.assert_close(rows.slots["exp_avg_sq"][1, 0], 0.01 * dense[1].square().mean())


def test_a_first_moment_may_decay_by_touch() -> None:
    """Rows read at updates 1 and 5: the second moment decays by all of them either way."""
    for by_touch, share in ((False, 0.9**4), (True, 0.9)):
        table, generator = nn.Parameter(torch.ones(3, 4).double()), torch.Generator().manual_seed(2)
        rows = RowAdamW(table, SimpleNamespace(**vars(CONFIG), momentum_by_touch=by_touch), False, row_wise=False)
        first = touch(table, [1], generator)
        rows.update(0.1)
        for _ in range(3):
            table.grad = None
            rows.update(0.1)
        second = touch(table, [1], generator)
        rows.update(0.1)
        torch.testing.assert_close(rows.slots["exp_avg"][1], (share * 0.1 * first + 0.1 * second)[1])
        squares = 0.99**4 * 0.01 * first.square() + 0.01 * second.square()
        torch.testing.assert_close(rows.slots["exp_avg_sq"][1], squares[1])


def test_the_slots_come_back_to_the_bit_and_others_are_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    table = nn.Parameter(torch.randn(5, 3, generator=generator))
    rows = RowAdamW(table, CONFIG, decay=True, row_wise=False)
    for step in range(4):
        touch(table, [step, 4], generator)
        rows.update(0.1)
    saved = {slot: tensor.clone() for slot, tensor in rows.slots.items()}
    again = RowAdamW(nn.Parameter(table.detach().clone()), CONFIG, decay=True, row_wise=False)
    again.load(saved, "table")
    for one in (rows, again):
        touch(one.table, [0, 2], torch.Generator().manual_seed(9))
        one.update(0.2, scale=0.5)
    assert same(again.table.detach(), table.detach()) and same(again.slots, rows.slots)
    with pytest.raises(ValueError, match="table: a state of exp_avg, expected"):
        again.load({"exp_avg": saved["exp_avg"]}, "table")


def make(sparse: bool | None, **more: Any) -> Trainer:
    options = {"head": more.pop("head", "hpn"), "head_options": {"sample": 16}}
    model = SequenceModel(ModelConfig(vocab_size=200, d_model=8, n_layer=1, d_state=4, **options), seed=0)
    return Trainer(model, TrainConfig(**{"lr": 1e-2, "steps": 40, "sparse_rows": sparse, **more}))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def test_a_trainers_untouched_rows_do_not_move_and_cost_no_dense_gradient() -> None:
    trainer = make(True)
    assert set(trainer.rows.tables) == {"embedding.weight", "head.prototypes"}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    inputs, targets = batch(0)
    trainer.train_step(inputs, targets)
    moved = (trainer.model.embedding.weight != before["embedding.weight"]).any(-1)
    assert sorted(moved.nonzero()[:, 0].tolist()) == sorted(set(inputs.flatten().tolist()))
    prototypes = trainer.model.head.prototypes
    turned = (prototypes != before["head.prototypes"]).any(-1)
    assert 0 < int(turned.sum()) < 60
    length_V, head = torch.linalg.vector_norm(prototypes.detach(), dim=-1), cast(Any, trainer.model.head)
    torch.testing.assert_close(length_V, torch.where(turned, head.length(), 1.0))


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_the_first_step_is_that_of_dense_tables(head: str) -> None:
    """Nothing is owed yet: the touched rows move as they do in AdamW, and so does all else."""
    sparse, dense = (make(rows, weight_decay=0.0, head=head) for rows in (True, False))
    assert f"head.{sparse.model.head.row_table}" in sparse.rows.tables
    one, other = sparse.train_step(*batch(0)), dense.train_step(*batch(0))
    assert one.loss == other.loss
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    for (name, a), b in zip(sparse.model.named_parameters(), dense.model.parameters(), strict=True):
        if name == "head.prototypes":  # of which only the directions count
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_it_learns(head: str) -> None:
    trainer = make(True, steps=120, head=head)
    losses = [trainer.train_step(*batch(step % 3)).loss for step in range(120)]
    assert losses[-1] < 0.3 * losses[0]


def test_tables_are_dense_below_the_bound_and_where_something_else_reads_them() -> None:
    assert not make(None).rows.tables
    tied = ModelConfig(vocab_size=200, d_model=8, n_layer=1, head="softmax", tie_embedding=True)
    assert not Trainer(SequenceModel(tied), TrainConfig(sparse_rows=True)).rows.tables
    with pytest.raises(ConfigError, match="--sparse-rows 1: row-sparse tables are for adamw and muon"):
        make(True, optimizer="examples.sgd:SGD")
    with pytest.raises(ConfigError, match="--sync-every"):
        OuterTrainer(SequenceModel(tied), TrainConfig(sparse_rows=True, sync_every=2, grad_shards=2))


@pytest.mark.parametrize(("cut", "row_wise", "head"), [(1, False, "hpn"), (4, True, "hpn"), (4, False, "softmax")])
def test_resume_is_exact_at_any_cut(tmp_path: Path, cut: int, row_wise: bool, head: str) -> None:
    more: dict[str, Any] = {"grad_clip_norm": 0.5, "optimizer_option": (f"row_wise_moment={int(row_wise)}",)}
    more["head"] = head
    straight, trainer = make(True, **more), make(True, **more)
    stats = [straight.train_step(*batch(step)) for step in range(8)]
    found = [trainer.train_step(*batch(step)) for step in range(cut)]
    trainer.save_checkpoint(tmp_path / "c.safetensors")
    trainer = Trainer.load_checkpoint(tmp_path / "c.safetensors")
    found += [trainer.train_step(*batch(step)) for step in range(cut, 8)]
    assert found == stats
    assert same(trainer.parts(), straight.parts())


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_the_bits_do_not_depend_on_threads(head: str) -> None:
    ends = []
    for count in (1, 4):
        torch.set_num_threads(count)
        trainer = make(True, head=head)
        for step in range(4):
            trainer.train_step(*batch(step))
        ends.append(trainer.rows.state())
    assert same(*ends)


@pytest.mark.parametrize("where", ["row", "exp_avg", "unread row"])
def test_nan_in_the_rows_read_is_met_at_that_step_and_elsewhere_before_a_save(tmp_path: Path, where: str) -> None:
    trainer = make(True)
    inputs, targets = batch(0)
    trainer.train_step(inputs, targets)
    row = int(inputs[0, 0]) if where != "unread row" else 199
    spoilt = trainer.rows.tables["embedding.weight"]
    with torch.no_grad():
        (spoilt.slots["exp_avg"] if where == "exp_avg" else spoilt.table)[row] = float("nan")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    stats = trainer.train_step(inputs, targets)
    assert stats.skipped_update == (where != "unread row")
    if where == "unread row":
        with pytest.raises(NonFiniteError, match="in rows that no step has read"):
            trainer.require_finite_tables()
    else:
        assert same(before, dict(trainer.model.named_parameters()))


def test_a_dense_checkpoint_goes_on_with_rows(tmp_path: Path) -> None:
    dense = make(False)
    for step in range(3):
        dense.train_step(*batch(step))
    trainer = make(True)
    trainer.model.load_state_dict(dense.model.state_dict())
    trainer.load_slots(dense.optimizer.state())
    slots = trainer.rows.tables["head.prototypes"].slots
    assert same(slots["exp_avg"], dense.optimizer.state()["head.prototypes"]["exp_avg"])
    assert slots["touched"].tolist() == [3] * 200 and float(slots["step"]) == 3
