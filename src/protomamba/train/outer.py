"""Slow links: workers that train alone for some steps and then meet (DiLoCo, Douillard et al. 2023, arXiv 2311.08105).

Each worker, a group of gradient shards, has weights and moments of its own and takes `sync_every` steps on its rows
alone. Then the mean of (weights at the last meeting - the worker's weights) is the gradient of one Nesterov step, rate
0.7 and momentum 0.9, from the weights of the last meeting; all workers go on from the result and keep their moments.

    g = mean over workers of (w - w_k)      m <- 0.9 m + g      w <- w - 0.7 (g + 0.9 m)      w_k <- w

What comes out depends on the number of workers and of shards, and never on the number of ranks that share them out. A
worker's rows are shared out to its shards as a batch is; where several ranks have some of them, those ranks add their
gradients at each step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.config import TrainConfig, TrainFields
from protomamba.errors import ConfigError, UserError
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm
from protomamba.train.comm_workers import led, members, outer_workers
from protomamba.train.optim import Optimizer, OptimizerBase, decays
from protomamba.train.passes import MicroBatch, key, require_rows, rows_of
from protomamba.train.row_sparse import RowTables
from protomamba.train.trainer import StepStats, Trainer

OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9
_COPIED = ("schedule_start", "schedule_steps")


class Nesterov(OptimizerBase):
    """The outer optimizer: SGD with Nesterov's momentum on what the workers have moved."""

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise = True

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        for name, parameter in self.named.items():
            if parameter.grad is None:
                continue
            moved = parameter.grad * scale
            slots = self._state.setdefault(name, {"momentum": torch.zeros_like(parameter)})
            slots["momentum"].mul_(OUTER_MOMENTUM).add_(moved)
            parameter.sub_(moved.add_(slots["momentum"], alpha=OUTER_MOMENTUM), alpha=lr)


class OuterTrainer(Trainer):
    """A Trainer whose workers train alone between the meetings; `model` is the one of the last meeting.

    `workers`: those of which this rank computes a part, by number. ConfigError where they do not divide the shards.
    """

    def __init__(self, model: SequenceModel, config: TrainConfig | None = None, comm: Comm | None = None) -> None:
        super().__init__(model, config, comm)
        self.count = outer_workers(self.config, self.grad_shards) or self.grad_shards
        cut = (self.count, self.grad_shards, self.comm.world)
        self._led = led(*cut)
        homes = {worker: members(worker, *cut) for worker in range(self.count)}
        # In the order of their numbers: ranks that share a worker come to it without waiting for one another in a ring.
        self.workers = {
            worker: Trainer(copy.deepcopy(model), self._alone(worker), self.comm.group(home))
            for worker, home in homes.items()
            if self.comm.rank in home
        }

    def _alone(self, worker: int) -> TrainConfig:
        """A worker's configuration, with a seed of its own: a shard's random numbers go by its place in the worker."""
        alone: TrainConfig = self.config.project(
            TrainConfig,
            grad_shards=self.grad_shards // self.count,
            seed=key(self.config.seed, worker),
            sync_every=None,
            workers_outer=None,
            sparse_rows=False,
        )
        return alone

    def configs(self) -> dict[str, Any]:
        found = super().configs()
        return {**found, "train": {**found["train"], "workers_outer": self.count}}

    @property
    def _speaks_for(self) -> range:
        """The workers of which this rank has the first shard."""
        return self._led[self.comm.rank]

    def _new_optimizer(self) -> tuple[Optimizer, RowTables]:
        if self.config.sparse_rows:
            raise ConfigError(
                "--sparse-rows 1: the mean change of the workers is dense; leave out --sparse-rows or --sync-every"
            )
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return Nesterov(self.comm.partition(named), None), RowTables({}, None, decays)

    def _step(self, batches: Sequence[MicroBatch]) -> StepStats:
        self.comm.shards(self.grad_shards)
        require_rows(batches, self.grad_shards)
        told = {worker: self._work(worker, batches) for worker in self.workers}
        spoken = torch.tensor([told[worker] for worker in self._speaks_for], dtype=torch.float64).view(-1, 4)
        loss, targets, square, skipped = self.comm.sums(spoken).tolist()
        self.global_step += 1
        tokens = sum(targets_BL.numel() for _, targets_BL, _ in batches)
        self.tokens_seen += tokens
        self.skipped_total += int(skipped)
        if self._meets:
            self._meet()
        return StepStats(
            step=self.global_step,
            loss=loss / max(1.0, targets),
            lr=self._last.lr,
            tokens=tokens,
            bp_applied=self._last.bp_applied,
            grad_norm=math.sqrt(square / self.count) if self._last.bp_applied else None,
            skipped_update=bool(skipped),
        )

    @property
    def _meets(self) -> bool:
        """Whether the workers meet after the step that was the last."""
        return self.global_step % (self.config.sync_every or 1) == 0 or self.global_step == self.target_step

    def grow(self, target: int, placement: str = "append", seed: int | None = None) -> None:
        """As of any Trainer, after a meeting: old layers of a worker keep its moments, new ones are alike in all."""
        self._change(lambda trainer: Trainer.grow(trainer, target, placement, seed))

    expand = grow

    def freeze(self, policy: str = "none", embedding: bool = False) -> None:
        """As of any Trainer, after a meeting: what is frozen stays as the workers have it in common."""
        self._change(lambda trainer: Trainer.freeze(trainer, policy, embedding))

    def _change(self, change: Callable[[Trainer], None]) -> None:
        """Change this model's layers and those of the workers alike."""
        if self._apart():  # else they have met: a second meeting would move the weights by momentum alone
            self._meet()
        change(self)
        for trainer in self.workers.values():
            with torch.random.fork_rng(devices=[]):
                change(trainer)
        self._hand_out()

    def _apart(self) -> bool:
        """Whether any worker, on any rank, has moved since the last meeting."""
        weights = dict(self.model.named_parameters())
        named = [pair for trainer in self.workers.values() for pair in trainer.model.named_parameters()]
        return any(self.comm.all_gather_object(any(not torch.equal(p, weights[name]) for name, p in named)))

    def _work(self, worker: int, batches: Sequence[MicroBatch]) -> tuple[float, float, float, float]:
        """One step of a worker: its loss times its targets, its targets, its norm squared, whether it was skipped."""
        trainer = self.workers[worker]
        for name in _COPIED:
            setattr(trainer, name, getattr(self, name))
        part = [rows_of(batch, worker, self.count) for batch in batches]
        targets = sum(int((targets_BL >= 0).sum()) for _, targets_BL, _ in part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.config.seed, self.global_step, worker))
            self._last = trainer.train_step(*part)
        norm = self._last.grad_norm or 0.0
        return self._last.loss * targets, float(targets), norm * norm, float(self._last.skipped_update)

    @torch.no_grad()
    def _meet(self) -> None:
        self.comm.open(self.count, self._led)
        weights = dict(self.model.named_parameters())
        for worker in self._speaks_for:
            theirs = {name: p for name, p in self.workers[worker].model.named_parameters() if p.requires_grad}
            self.comm.start(worker, {name: (weights[name] - p) / self.count for name, p in theirs.items()})
        self.comm.finish()
        self.comm.hand_over()
        self.optimizer.step(OUTER_RATE)
        self.comm.all_gather_weights()
        self.model.head.post_step()
        self.zero_grad()
        self._hand_out()

    @torch.no_grad()
    def _hand_out(self) -> None:
        """All workers go on from this model's weights."""
        weights = dict(self.model.named_parameters())
        for trainer in self.workers.values():
            for name, p in trainer.model.named_parameters():
                p.copy_(weights[name])

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The last meeting's weights and the outer momentum, and every worker's own weights, slots and counts."""
        flat = {worker: _flat(trainer) for worker, trainer in self.workers.items()}
        return {
            **super().parts(),
            "workers": self.comm.gather_state({str(each): flat[each] for each in self._speaks_for}),
        }

    def restore(self, loaded: checkpoint.Checkpoint) -> None:
        super().restore(loaded)
        workers = loaded.parts.get("workers", {})
        if len(workers) != self.count:
            raise UserError(f"the checkpoint holds {len(workers)} workers, this run has {self.count}")
        for worker, trainer in self.workers.items():
            _load_flat(trainer, workers[str(worker)], self.global_step)


def trainer_class(config: TrainFields) -> type[Trainer]:
    """A Trainer, or one whose workers meet now and then, as --sync-every says."""
    return OuterTrainer if config.sync_every else Trainer


def _flat(trainer: Trainer) -> dict[str, Tensor]:
    """A worker's tensors and counts by one name each; whole on the first of its ranks."""
    found = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for name, slots in trainer.comm.collect(trainer.optimizer.state()).items():
        found |= {f"optimizer/{name}/{slot}": tensor for slot, tensor in slots.items()}
    return found | {f"trainer/{name}": torch.tensor(value) for name, value in trainer.state_dict().items()}


def _load_flat(trainer: Trainer, flat: Mapping[str, Tensor], step: int) -> None:
    named = {name.removeprefix("model/"): x for name, x in flat.items() if name.startswith("model/")}
    trainer.model.load_state_dict(named)
    slots: dict[str, dict[str, Tensor]] = {}
    for path, tensor in flat.items():
        if path.startswith("optimizer/"):
            _, name, slot = path.split("/")
            slots.setdefault(name, {})[slot] = tensor
    trainer.load_slots(slots)
    trainer.load_state_dict({name: int(flat[f"trainer/{name}"]) for name in trainer.state_dict()})
