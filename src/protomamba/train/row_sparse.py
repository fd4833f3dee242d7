"""AdamW over the touched rows of large tables: an untouched row costs nothing and does not move.

    touched at update t, last touched at update u:   m <- beta1^(t-u-1) m      v <- beta2^(t-u-1) v
                                                     w <- prod over the updates between of (1 - lr wd) w
    then one AdamW update of the row at update t.

So moments and decay of the updates between are caught up in closed form, never by replay. It is not AdamW: there,
moments that are not yet 0 keep moving a row without a gradient. A row that is rarely touched has forgotten its first
moment by then, and of each gradient gets the share 1 - beta1 only. With `momentum_by_touch` the first moment decays by
beta1 at each touch instead, whatever lies between. What both are worth: docs/many-classes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.kernels.rows import row_gradient


class RowAdamW:
    """The slots of one table (V, D), and its update. `row_wise`: one second moment a row, the mean over it.

    Slots: exp_avg (V, D), exp_avg_sq (V, D) or (V, 1), touched int32 (V,) (the update that last touched the row, 0
    never), shrunk float64 (V,) (log of the decay up to there); step (updates so far) and log_decay, float64 scalars.
    """

    def __init__(self, table: nn.Parameter, config: Any, decay: bool, row_wise: bool) -> None:
        rows, width = table.shape
        self.table, self.config = table, config
        self.weight_decay = config.weight_decay if decay else 0.0
        self.by_touch = bool(getattr(config, "momentum_by_touch", False))
        self.slots = {
            "exp_avg": torch.zeros_like(table),
            "exp_avg_sq": table.new_zeros(rows, 1 if row_wise else width),
            "touched": torch.zeros(rows, dtype=torch.int32),
            "shrunk": torch.zeros(rows, dtype=torch.float64),
            "step": torch.zeros((), dtype=torch.float64),
            "log_decay": torch.zeros((), dtype=torch.float64),
        }

    @torch.no_grad()
    def update(self, lr: float, scale: float = 1.0) -> None:
        """One update at rate `lr`; the gradient is multiplied by `scale`.

        Without a gradient only the step count advances.
        """
        slots = self.slots
        slots["step"].add_(1)
        slots["log_decay"].add_(math.log1p(-lr * self.weight_decay))
        if self.table.grad is None:
            return
        rows_R, gradient_RD = row_gradient(self.table.grad)
        first_RD, second_RX = self._moments(rows_R, gradient_RD * scale)
        weight_RD = self.table.index_select(0, rows_R)
        if self.weight_decay:
            behind_R = slots["log_decay"] - slots["shrunk"].index_select(0, rows_R)
            weight_RD *= behind_R.exp()[:, None].to(weight_RD.dtype)
        step, config = float(slots["step"]), self.config
        denominator_RX = (second_RX / (1 - config.beta2**step)).sqrt_().add_(config.adam_eps)
        weight_RD -= (lr / (1 - config.beta1**step)) * first_RD / denominator_RX
        self.table.index_copy_(0, rows_R, weight_RD)
        for slot, value in (("exp_avg", first_RD), ("exp_avg_sq", second_RX)):
            slots[slot].index_copy_(0, rows_R, value)
        slots["touched"].index_fill_(0, rows_R, int(step))
        slots["shrunk"].index_copy_(0, rows_R, slots["log_decay"].expand(len(rows_R)).contiguous())

    def _moments(self, rows_R: Tensor, gradient_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of the touched rows, caught up and with this update's gradient in them."""
        slots, beta1, beta2 = self.slots, self.config.beta1, self.config.beta2
        elapsed_R1 = (slots["step"] - slots["touched"].index_select(0, rows_R))[:, None]
        first_RD, second_RX = (slots[slot].index_select(0, rows_R) for slot in ("exp_avg", "exp_avg_sq"))
        first_RD *= beta1 if self.by_touch else torch.pow(beta1, elapsed_R1).to(first_RD.dtype)
        second_RX *= torch.pow(beta2, elapsed_R1).to(second_RX.dtype)
        square_RX = gradient_RD.square()
        if second_RX.shape[1] != square_RX.shape[1]:
            square_RX = square_RX.mean(1, keepdim=True)
        return first_RD.add_(gradient_RD, alpha=1 - beta1), second_RX.add_(square_RX, alpha=1 - beta2)

    def load(self, given: Mapping[str, Tensor], name: str) -> None:
        """Take over the slots of a checkpoint, in place; those of a dense AdamW count as touched at its last update.

        ValueError where it has others, or of other shapes.
        """
        if set(given) == {"step", "exp_avg", "exp_avg_sq"}:
            step = torch.as_tensor(given["step"]).double()
            touched = torch.full_like(self.slots["touched"], int(step))
            given = {**given, "step": step, "touched": touched, "shrunk": torch.zeros_like(self.slots["shrunk"])}
            given["log_decay"] = torch.zeros_like(self.slots["log_decay"])
        if self.slots.keys() != given.keys():
            raise ValueError(f"{name}: a state of {', '.join(given)}, expected {', '.join(self.slots)}")
        for slot, tensor in self.slots.items():
            if tensor.shape != given[slot].shape:
                raise ValueError(f"{name}: {slot} of shape {tuple(given[slot].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(given[slot])


class RowTables:
    """The row-sparse tables of a model, by parameter name, beside the optimizer of all else."""

    def __init__(self, tables: Mapping[str, nn.Parameter], config: Any, decays: Callable[[str, Tensor], bool]) -> None:
        row_wise = bool(getattr(config, "row_wise_moment", False))
        self.tables = {name: RowAdamW(p, config, decays(name, p), row_wise) for name, p in tables.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The tables by name."""
        return {name: each.table for name, each in self.tables.items()}

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows and their gradients of each table that the last step read, views of its `.grad`."""
        found = {name: each.table.grad for name, each in self.tables.items()}
        return {name: row_gradient(gradient) for name, gradient in found.items() if gradient is not None}

    def square_sums(self) -> list[float]:
        """The squared norm of each table's gradient."""
        return kernels.square_sums([values for _, values in self.gradients().values()])

    @torch.no_grad()
    def suspects(self) -> dict[str, Tensor]:
        """What the step read and would change, by name: the rows, their slots and gradients."""
        found: dict[str, Tensor] = {}
        for name, (rows_R, values) in self.gradients().items():
            each = self.tables[name]
            found[name] = each.table.index_select(0, rows_R)
            for slot in ("exp_avg", "exp_avg_sq"):
                found[f"{name} (optimizer {slot})"] = each.slots[slot].index_select(0, rows_R)
            found[f"{name} (gradient)"] = values
        return found

    @torch.no_grad()
    def everything(self) -> dict[str, Tensor]:
        """The whole tables and moments, by name: what is looked at before each save."""
        found: dict[str, Tensor] = {name: each.table.detach() for name, each in self.tables.items()}
        for name, each in self.tables.items():
            found |= {f"{name} (optimizer {slot})": each.slots[slot] for slot in ("exp_avg", "exp_avg_sq")}
        return found

    def step(self, lr: float, scale: float) -> dict[str, Tensor]:
        """One update of each table; which rows it moved."""
        moved = {name: rows_R for name, (rows_R, _) in self.gradients().items()}
        for each in self.tables.values():
            each.update(lr, scale)
        return moved

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Each table's slots, in place."""
        return {name: each.slots for name, each in self.tables.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over slots by name; a table without any keeps its own. ValueError for others than its own."""
        for name, each in self.tables.items():
            if name in state:
                each.load(state[name], name)
