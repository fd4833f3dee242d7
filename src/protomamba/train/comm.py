"""One process or many, seen from the training loop: who computes which shard, and sums in one fixed order.

A step is a function of (weights, moments, step, number of gradient shards), never of the number of ranks: the design
is in docs/scale-out.md. Without torch's launcher there is one rank, which does the same without sending anything.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.errors import ConfigError, UserError
from protomamba.train.comm_cores import Place, keep_to, may_bind, own_share, this_place
from protomamba.train.comm_layout import Piece
from protomamba.train.comm_mesh import Alone, Gloo, Mesh
from protomamba.train.comm_reduce import GradientSum, Plan
from protomamba.train.comm_state import State, collect, cut, gather_state, owned_parameters, rows
from protomamba.train.comm_tree import fold, share
from protomamba.train.comm_weights import Arriving, all_gather_weights, expect_weights
from protomamba.train.comm_workers import Group


def launched() -> bool:
    """Whether torch's launcher (torchrun) started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarted() -> bool:
    """Whether torch's launcher has started it again, after a failure."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Comm:
    """The ranks of a run. All of them call the same methods in the same order.

    `partition` says, at the start and whenever they change, which parameters there are. A step: `shards` says which of
    its gradient shards are this rank's; `open` begins the sum, `start` takes a shard's gradients as they become ready,
    `finish` leaves the sums in `.grad` of the pieces this rank owns; after their update `all_gather_weights` brings
    every rank the weights.

    leaves: which shards each rank computes, of how many there are in all, where they are not simply shared out.
    """

    def __init__(self, mesh: Mesh, leaves: Sequence[range] | None = None) -> None:
        self.mesh = mesh
        self._leaves = leaves
        self._plan = Plan({}, mesh.world)
        self._owned: dict[str, nn.Parameter] = {}
        self._sum: GradientSum | None = None
        self._arriving: Arriving | None = None
        self.cores: set[int] | None = None  # the processors it keeps to, where it does

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def world(self) -> int:
        return self.mesh.world

    @property
    def launch(self) -> str | None:
        """A name that torch's launcher and its restarts have in common, with no other launch; None without it."""
        return self.mesh.launch

    def shards(self, count: int) -> range:
        """The shards of `count` that this rank computes. ConfigError where there are more ranks than shards."""
        if self.world > count:
            raise ConfigError(
                f"{self.world} ranks for {count} gradient shards: each rank needs one; start at most {count} ranks "
                f"(torchrun --nproc-per-node), or a new run with --grad-shards {self.world} or more"
            )
        return self._shares(count)[self.rank]

    def _shares(self, count: int) -> Sequence[range]:
        return self._leaves or [share(count, self.world, rank) for rank in range(self.world)]

    def group(self, leaves: Mapping[int, range]) -> Comm:
        """Some of the ranks as a communicator of their own, with the shards that each of them computes."""
        return Comm(Group(self.mesh, list(leaves)), list(leaves.values())) if len(leaves) > 1 else Local()

    def partition(self, named: Mapping[str, nn.Parameter], whole: bool = False) -> dict[str, nn.Parameter]:
        """Take the parameters whose gradients are to be added, the same on every rank; what of them this rank updates.

        The result shares their memory: a parameter, or some rows of it. whole: no parameter is cut.
        """
        self._plan = Plan(named, self.world, whole)
        self._owned = owned_parameters(self._plan, self.rank)
        return self._owned

    def pieces(self) -> list[Piece]:
        """What of the parameters this rank adds up and updates."""
        return self._plan.layout.pieces[self.rank]

    def open(self, count: int, leaves: Sequence[range] | None = None) -> None:
        """Begin the sum over `count` shards; leaves: which of them each rank hands in, where not those of `shards`."""
        self._sum = GradientSum(self._plan, self.mesh, leaves or self._shares(count))

    def start(self, shard: int, named: Mapping[str, Tensor]) -> None:
        """Gradients of one of this rank's shards, each parameter once, shards rising; missing ones count as zeros."""
        assert self._sum is not None, "open() first"
        self._sum.start(shard, named)

    def finish(self) -> None:
        """Wait for the sums: see `GradientSum.finish`."""
        assert self._sum is not None, "open() first"
        self._sum.finish()
        self._sum = None

    def hand_over(self) -> None:
        """Give the owned parts of parameters, which `partition` returned, the gradients that are in the parameters."""
        for piece in self.pieces():
            owned, whole = self._owned[piece.name], self._plan.named[piece.name]
            owned.grad = None if whole.grad is None else rows(whole.grad, piece, whole)

    def square_sums(self, count: int = 0) -> tuple[list[float], int]:
        """The squares of the summed gradient, added up block by block, and the sum of every rank's `count`.

        The blocks are the same ones on any number of ranks, and so is the norm that is made from them.
        """
        layout, named = self._plan.layout, self._plan.named
        owned = zip(layout.pieces[self.rank], layout.sizes[self.rank], strict=True)
        found = [(piece.of(grad), sizes) for piece, sizes in owned if (grad := named[piece.name].grad) is not None]
        own = kernels.square_sums([gradient for gradient, _ in found], [sizes for _, sizes in found])
        parts = [part.tolist() for part in self.mesh.all_gather(torch.tensor([count, *own], dtype=torch.float64))]
        return [value for part in parts for value in part[1:]], int(sum(part[0] for part in parts))

    def expect_weights(self) -> None:
        """Begin to receive what the others are about to update; see `comm_messages` for why so early."""
        self._arriving = expect_weights(self._plan, self.mesh)

    def all_gather_weights(self) -> None:
        """Bring every rank the weights that the others have updated."""
        arriving, self._arriving = self._arriving or expect_weights(self._plan, self.mesh), None
        all_gather_weights(self._plan, self.mesh, arriving)

    def sums(self, shards_GN: Tensor) -> Tensor:
        """(N,): the sums over all shards, in the tree's order, of the rows (g, N) of this rank's, float64."""
        leaves_GN = torch.cat(self.all_gather(shards_GN.double()))
        leaves = {(i, i + 1): leaf_N for i, leaf_N in enumerate(leaves_GN.unbind())}
        return fold(leaves, len(leaves), lambda a, b: a + b)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks; they may differ in their first size only."""
        rows = tensor.shape[1:]
        parts = self.mesh.all_gather(tensor.contiguous().view(-1))
        return [part.view(-1, *rows) for part in parts]

    def collect(self, state: State, everywhere: bool = False) -> State:
        """The optimizer's state by whole parameters, from every rank's parts: on rank 0 alone, or everywhere."""
        return collect(self._plan, self.mesh, state, everywhere)

    def gather_state(self, state: State) -> State:
        """What every rank holds, each entry by a name of its own, together on rank 0."""
        return gather_state(self.mesh, state)

    def cut(self, state: Mapping[str, Mapping[str, Tensor]]) -> State:
        """What of the optimizer's state by whole parameters belongs to this rank's parts."""
        return cut(self._plan, self.rank, state)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's plain value (as JSON has them), in the order of the ranks."""
        if self.world == 1:
            return [value]
        packed = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.tolist())) for part in self.mesh.all_gather(packed)]

    def first(self, value: Any) -> Any:
        """What the first of the ranks that has something to say says, the same on every rank; None if none has."""
        return next((each for each in self.all_gather_object(value) if each is not None), None)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 runs the block, then the others do: what it writes, they find."""
        if self.rank > 0:
            self.first(None)
        yield
        if self.rank == 0:
            self.first(None)

    def agree(self, facts: Mapping[str, str]) -> None:
        """UserError, naming rank and both values, unless all ranks give the same facts."""
        different = self.differences(facts)
        if different:
            raise UserError("the ranks differ in something that changes the numbers:\n  " + "\n  ".join(different))

    def differences(self, facts: Mapping[str, str]) -> list[str]:
        """In words, each fact in which a rank differs from rank 0."""
        told = self.all_gather_object(dict(facts))
        return [
            f"{name}: rank {rank} has {found.get(name)}, rank 0 has {told[0].get(name)}"
            for rank, found in enumerate(told)
            for name in dict.fromkeys([*told[0], *found])
            if found.get(name) != told[0].get(name)
        ]

    def share_cores(self, threads: int) -> None:
        """Keep this rank, with so many threads, to its share of the machine's cores, where it has ranks beside it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mesh.close(error)


class Local(Comm):
    """One process: the default."""

    def __init__(self) -> None:
        super().__init__(Alone())


class Ranks(Comm):
    """The processes that torch's launcher started, over gloo. RankFailed where one of them does not start."""

    def __init__(self) -> None:
        super().__init__(Gloo())

    def share_cores(self, threads: int) -> None:
        places = [Place(*each) for each in self.all_gather_object(astuple(this_place(threads)))]
        share = own_share(places, self.rank) if may_bind() else None
        if share:
            keep_to(share)
        self.cores = share


def join() -> Comm:
    """The ranks of torch's launcher where it started this process; else this process alone, and no socket."""
    return Ranks() if launched() else Local()
