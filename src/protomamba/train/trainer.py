"""The Trainer: one update, one evaluation, and all that a checkpoint holds of it. `run.py` repeats it over a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.config import TrainConfig, TrainFields
from protomamba.errors import MALFORMED, ConfigError, UserError
from protomamba.kernels import keep_freed_memory
from protomamba.model.pretrained import build_model
from protomamba.model.registry import refuse_unnamed
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm, Local
from protomamba.train.comm_workers import gradient_shards
from protomamba.train.local import LocalSignals, combine
from protomamba.train.optim import (
    AdamW,
    Muon,
    Optimizer,
    decays,
    first_non_finite,
    make_optimizer,
    optimizer_class,
    total_norm,
)
from protomamba.train.passes import AnyBatch, MicroBatch, Passes, micro_batch
from protomamba.train.row_sparse import RowTables
from protomamba.train.schedule import learning_rate
from protomamba.train.validation import Validation, evaluate

MAX_SKIPPED_IN_A_ROW = 10
# Tables of at least this many rows are row-sparse unless the run says otherwise.
MANY_ROWS = 65_536


@dataclass(frozen=True)
class StepStats:
    """What one training step did. `loss` is the mean over the step's targets, before the update."""

    step: int
    loss: float
    lr: float
    tokens: int
    bp_applied: bool
    grad_norm: float | None = None  # before clipping; None on a step without backpropagation
    ff_loss: float | None = None  # mean local loss over the trainable layers
    conflict_layers: int = 0
    clipped: bool = False
    skipped_update: bool = False


class NonFiniteError(UserError):
    """Training produced NaN or Inf and stopped, because it was configured to or could not continue."""


class Trainer:
    """Updates a SequenceModel: AdamW with schedule, clipping and accumulation, local updates between, non-finite guard.

    The schedule covers `config.steps` steps from `schedule_start` on. Making one lets the process keep the memory it
    frees (`kernels.keep_freed_memory`): a step allocates the same memory as the one before.
    """

    def __init__(self, model: SequenceModel, config: TrainConfig | None = None, comm: Comm | None = None) -> None:
        if not isinstance(model, SequenceModel):
            raise TypeError(
                f"Trainer takes a SequenceModel, not {type(model).__name__}: give it the model itself (`.module` of a "
                "DataParallel or DistributedDataParallel); several processes train it under torchrun"
            )
        keep_freed_memory()
        self.model = model
        self.comm = comm or Local()
        self.config: TrainFields = config or TrainConfig()
        self.grad_shards = gradient_shards(self.config, self.comm.world)
        self.model.precision = self.config.precision
        self.model.recompute = self.config.recompute
        self.model.activations = self.config.activations
        self.global_step = 0
        self.schedule_start = 0
        self.schedule_steps = self.config.steps
        self.skipped_in_row = 0
        self.skipped_total = 0
        self.tokens_seen = 0
        self.optimizer, self.rows = self._new_optimizer()

    @property
    def target_step(self) -> int:
        """The step at which the schedule ends."""
        return self.schedule_start + self.schedule_steps

    def further(self, steps: int) -> None:
        """Start a new schedule, including warm-up, over `steps` further steps."""
        self.schedule_start, self.schedule_steps = self.global_step, steps

    def train_step(self, *batches: Tensor | AnyBatch | None) -> StepStats:
        """One step, on one batch or on several micro-batches: the gradient is that of the mean loss over all targets.

            train_step(inputs, targets)    train_step(inputs, targets, reset)    train_step(batch, batch, ...)

        inputs: int64 (B, L); targets: int64 (B, L), ignored where negative; reset: bool (B, L), True where a document
        starts. A batch is a `Batch`, or a pair or triple of such tensors. On a step without backpropagation
        (bp_cadence_steps) only the layers' D move, by their local gradients. Raises NonFiniteError as
        `fail_on_non_finite` says, or after ten skipped updates in a row.
        """
        whole: Any = [batches] if isinstance(batches[0], Tensor) else batches
        return self._step([micro_batch(batch) for batch in whole])

    def _step(self, batches: Sequence[MicroBatch]) -> StepStats:
        if any(each.dtype == torch.float16 for each in self.model.norm_f.parameters()):
            raise ConfigError(
                "the model's parameters are float16, whose gradients underflow: train in float32 (model.float()); "
                "TrainConfig(precision='bf16') computes the matrix products in bfloat16"
            )
        backpropagate = (self.global_step + 1) % self.config.bp_cadence_steps == 0
        lr = learning_rate(self.global_step - self.schedule_start, self.schedule_steps, self.config)
        named = dict(self.model.named_parameters())
        self._drop_gradients(named.values())
        loss, targets, signals = self._passes(batches, backpropagate).run()
        ff_loss, conflicts, local = self._local_gradients(signals, backpropagate)
        grad_norm = None
        if backpropagate:
            self.comm.hand_over()
            squares, conflicts = self.comm.square_sums(conflicts)
            grad_norm = total_norm([*squares, *self.rows.square_sums()])
        culprit = self._non_finite(named, loss, grad_norm, local)
        clipped = bool(grad_norm and self.config.grad_clip_norm and grad_norm > self.config.grad_clip_norm)
        if culprit is None:
            scale = self.config.grad_clip_norm / grad_norm if grad_norm and clipped else 1.0
            # Without a target there is nothing to follow, not even the moments.
            self._apply(lr, local, scale, backpropagate and targets > 0)
        tokens = sum(targets_BL.numel() for _, targets_BL, _ in batches)
        self.tokens_seen += tokens
        self.global_step += 1
        self._guard(culprit)
        return StepStats(
            step=self.global_step,
            loss=loss,
            lr=lr,
            tokens=tokens,
            bp_applied=backpropagate,
            grad_norm=grad_norm,
            ff_loss=ff_loss,
            conflict_layers=conflicts,
            clipped=clipped and culprit is None,
            skipped_update=culprit is not None,
        )

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass by parameter name; parameters it did not reach are missing."""
        return {name: p.grad for name, p in self.optimizer.named.items() if p.grad is not None}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._drop_gradients(self.model.parameters())

    def _drop_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in (*self.optimizer.named.values(), *parameters):
            parameter.grad = None

    def _passes(self, batches: Sequence[MicroBatch], backpropagate: bool) -> Passes:
        return Passes(
            self.model,
            self.comm,
            batches,
            shards=self.grad_shards,
            seed=self.config.seed,
            step=self.global_step,
            local=self.config.ff_lr > 0,
            backpropagate=backpropagate,
            tables=self.rows.parameters(),
        )

    def _local_gradients(
        self, signals: LocalSignals, backpropagate: bool
    ) -> tuple[float | None, int, dict[Tensor, Tensor]]:
        """Mean local loss, layers in conflict, and the gradient of each D that moves without backpropagation.

        With backpropagation the local gradient is combined into the parameter's own instead.
        """
        if not signals.layers:
            return None, 0, {}
        losses: list[float] = []
        conflicts, alone = 0, dict[Tensor, Tensor]()
        for index, block in enumerate(self.model.blocks()):
            weight = block.mixer.local_weight()
            if weight is None or index not in signals.layers:
                continue
            gradient_E, loss = signals.gradient(index, weight)
            losses.append(loss)
            if not backpropagate:
                alone[weight] = gradient_E
            elif weight.grad is not None:
                weight.grad, conflict = combine(gradient_E, weight.grad, self.config)
                conflicts += conflict
        return sum(losses) / len(losses), conflicts, alone

    def _apply(self, lr: float, local: Mapping[Tensor, Tensor], scale: float, backpropagate: bool) -> None:
        if backpropagate:
            self.comm.expect_weights()
            self.optimizer.step(lr, scale)
            moved = self.rows.step(lr, scale)
            self.comm.all_gather_weights()
            self.model.head.post_step(moved.get(f"head.{self.model.head.row_table}"))
        with torch.no_grad():
            for weight, gradient_E in local.items():
                weight.sub_(gradient_E, alpha=self.config.ff_lr)

    def _non_finite(
        self, named: Mapping[str, Tensor], loss: float, grad_norm: float | None, local: Mapping[Tensor, Tensor]
    ) -> str | None:
        """The name of the first thing that is NaN or Inf before an update would spread it; None if all is well.

        A step without backpropagation touches no weight but D: its loss and local gradients tell enough. Each rank
        looks at what it owns, and all are told.
        """
        suspects = {f"the local gradient of D ({i})": gradient_E for i, gradient_E in enumerate(local.values())}
        if grad_norm is not None or not math.isfinite(loss):
            # The frozen parameters, and of the others what this rank updates.
            frozen = {name: p for name, p in named.items() if not p.requires_grad}
            suspects = {**frozen, **self.optimizer.named, **self.rows.suspects(), **suspects}
        if grad_norm is not None:
            for name, slots in self.optimizer.unverified().items():
                suspects |= {f"{name} (optimizer {slot})": x for slot, x in slots.items() if x.ndim or slot != "step"}
            if not math.isfinite(grad_norm):
                suspects |= {f"{name} (gradient)": g for name, g in self.gradients().items()}
        found = self.comm.first(first_non_finite(suspects)) or (None if math.isfinite(loss) else "the loss")
        # Finite gradients whose squares overflow would make the second moment infinite for good.
        overflow = grad_norm is not None and not math.isfinite(grad_norm)
        return found or ("the gradients' norm" if overflow else None)

    def require_finite_tables(self) -> None:
        """NonFiniteError, naming the first, for a NaN or Inf in a row-sparse table, of which a step sees a few rows."""
        culprit = first_non_finite(self.rows.everything())
        if culprit is not None:
            raise NonFiniteError(
                f"step {self.global_step}: NaN or Inf in {culprit}, in rows that no step has read: not saved; the "
                "earlier checkpoint is intact"
            )

    def _guard(self, culprit: str | None) -> None:
        """Count a skipped update; stop where that is asked for, or when nothing but skipping happens."""
        if culprit is None:
            self.skipped_in_row = 0
            return
        self.zero_grad()
        self.skipped_in_row += 1
        self.skipped_total += 1
        if self.config.fail_on_non_finite:
            raise NonFiniteError(
                f"step {self.global_step}: NaN or Inf in {culprit}; stopped because of --fail-on-non-finite"
            )
        if self.skipped_in_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {self.global_step}: NaN or Inf in {culprit}, {self.skipped_in_row} updates in a row skipped; "
                f"lower --lr (now {self.config.lr:g}) or set --grad-clip-norm in a new run, "
                "which --init-from starts from the last checkpoint's weights"
            )

    def evaluate(self, batches: Iterable[AnyBatch], calibrate: bool = False, exact: bool = True) -> Validation:
        """Loss, accuracy and cross entropy over `batches`, weighted by their targets; no weight changes.

        batches: of what `train_step` takes: Batch, (inputs, targets) or (inputs, targets, reset); a DataLoader will do.
        exact: False judges accuracy and cross entropy on a part of the targets where there are very many classes.
        calibrate: first fit the head's probabilities to these batches (all of their features are held at once).
        """
        return evaluate(self.model, batches, calibrate, exact)

    def grow(self, target: int, placement: str = "append", seed: int | None = None) -> None:
        """Grow the model to `target` layers (see SequenceModel.grow). Old layers keep their optimizer state; new ones
        start without any and count their own steps."""
        slots = {**self.comm.collect(self.optimizer.state(), everywhere=True), **self.rows.state()}
        origins = self.model.grow(target, placement, seed)
        self.optimizer, self.rows = self._new_optimizer()
        self.load_slots(renamed_layers(slots, origins))

    expand = grow  # its name in 0.1

    def freeze(self, policy: str = "none", embedding: bool = False) -> None:
        """Freeze by policy (see SequenceModel.freeze); what stays trainable keeps its optimizer state."""
        slots = {**self.comm.collect(self.optimizer.state(), everywhere=True), **self.rows.state()}
        self.model.freeze(policy, embedding)
        self.optimizer, self.rows = self._new_optimizer()
        self.load_slots(slots)

    def load_slots(self, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the optimizer's state of whole parameters by name; names that are not trained are ignored."""
        self.rows.load_state(slots)
        self.optimizer.load_state(self.comm.cut({n: s for n, s in slots.items() if n not in self.rows.tables}))

    def state_dict(self) -> dict[str, int]:
        return {stored: getattr(self, name) for stored, name in TRAINER_STATE.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over the counts. ValueError where one of them is no whole number."""
        for stored, name in TRAINER_STATE.items():
            if type(state[stored]) is not int or state[stored] < 0:
                raise ValueError(f"{stored}: expected a whole number, found {str(state[stored])[:40]}")
            setattr(self, name, state[stored])

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """What a checkpoint holds of the training itself, by name; on rank 0, but all ranks must ask for it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": {"moments": {**self.comm.collect(self.optimizer.state()), **self.rows.state()}},
            "trainer": self.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
        }

    def configs(self) -> dict[str, Any]:
        """What is needed to build this trainer again before its parts are loaded. UserError where that is no use: the
        model has been changed in a way that its configuration does not say."""
        self.model.refuse_unbuildable()
        policy, embedding = self.model.frozen
        return {
            "model": self.model.config.model_dump(mode="json"),
            "train": {**self._settings(), "grad_shards": self.grad_shards},
            "frozen": {"layers": policy, "embedding": embedding, "parameters": self._frozen_names()},
        }

    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", include=set(TrainFields.model_fields))

    def _frozen_names(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]

    def save_checkpoint(self, path: str | Path) -> checkpoint.SaveReport:
        """Write everything needed to continue bit-exactly to one file, atomically. Raises SaveError."""
        return checkpoint.save(Path(path), self.parts(), config=self.configs(), info={"step": self.global_step})

    @classmethod
    def load_checkpoint(cls, path: str | Path) -> Self:
        """The trainer that `save_checkpoint` or a run wrote; its next step is the one that trainer would have taken."""
        return cls.from_checkpoint(checkpoint.load(Path(path)))

    @classmethod
    def from_checkpoint(cls, loaded: checkpoint.Checkpoint, comm: Comm | None = None) -> Self:
        """A trainer from a checkpoint already read and verified."""
        config = TrainConfig.recorded(loaded.section("train"))
        refuse_unnamed(config.optimizer, "optimizer")
        trainer = cls(build_model(loaded), config, comm)
        trainer.restore(loaded)
        return trainer

    def restore(self, loaded: checkpoint.Checkpoint) -> None:
        """Take over the weights, slots, counts and random numbers of a checkpoint of a trainer like this one.

        UserError naming each setting in which this trainer is another; the number of steps may be.
        """
        mine = self.configs()
        wrong = [
            f"{key}: the checkpoint has {loaded.section(part).get(key)!r}, this trainer {value!r}"
            for part in ("model", "train")
            for key, value in mine[part].items()
            if key != "steps" and key in loaded.section(part) and loaded.section(part)[key] != value
        ]
        if wrong:
            raise UserError("the checkpoint was made by a different trainer:\n  " + "\n  ".join(wrong))
        try:
            self.model.load_state_dict(loaded.part("model"))
            self.load_slots(loaded.part("optimizer")["moments"])
            self.load_state_dict(loaded.part("trainer"))
            torch.set_rng_state(loaded.part("rng")["torch"])
        except (*MALFORMED, RuntimeError) as error:
            told = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint holds what no trainer writes ({type(error).__name__}: {told})") from error

    def _new_optimizer(self) -> tuple[Optimizer, RowTables]:
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        tables = self.model.use_row_tables(self._wants_rows)
        rest = {name: parameter for name, parameter in named.items() if name not in tables}
        whole = not optimizer_class(self.config).elementwise
        optimizer = make_optimizer(self.comm.partition(rest, whole), self.config)
        return optimizer, RowTables(tables, optimizer.config, decays)

    def _wants_rows(self, table: Tensor) -> bool:
        """Whether a table that can be row-sparse is to be. ConfigError where it is requested and not possible."""
        asked = self.config.sparse_rows
        possible = issubclass(optimizer_class(self.config), AdamW | Muon)
        if asked and not possible:
            raise ConfigError(
                f"--sparse-rows 1: row-sparse tables are for adamw and muon, not for {self.config.optimizer}; "
                "leave it out"
            )
        return possible and (len(table) >= MANY_ROWS if asked is None else asked)


# In a checkpoint -> here.
_SAME = ("schedule_start", "schedule_steps", "skipped_in_row", "skipped_total", "tokens_seen")
TRAINER_STATE = {"step": "global_step", **{name: name for name in _SAME}}


def renamed_layers(moments: Mapping[str, Any], origins: Sequence[int | None]) -> dict[str, Any]:
    """Moments by the parameter names after a growth whose layer i was layer origins[i] before."""
    renamed = {name: value for name, value in moments.items() if not name.startswith("layers.")}
    for new, old in enumerate(origins):
        prefix = f"layers.{old}."
        for name, value in moments.items():
            if old is not None and name.startswith(prefix):
                renamed[f"layers.{new}.{name.removeprefix(prefix)}"] = value
    return renamed
