"""One step's gradients, from the shards' own to their sum at the rank that owns a piece.

A shard's gradient of a parameter is added to those of the same rank as far as the tree allows, and sent, piece by
piece, to the rank that owns it, which adds up the rest of the tree. Of a tall matrix (an embedding, prototypes) only
the rows that are not zero in every bit are sent: exactly what a dense message would have brought.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protomamba.errors import UserError
from protomamba.train.comm_layout import Layout, Piece
from protomamba.train.comm_mesh import FREE, Mesh
from protomamba.train.comm_messages import Work, wait_for
from protomamba.train.comm_tree import Node, Partials, fold, nodes

# Pieces below this many elements travel together.
SMALL = 16_384
# A matrix with more than this many times as many rows as columns may have few rows with a gradient.
TALL = 4
# Nodes that one rank may send: two a level of the tree at most.
NODES = 128
DENSE = -1
# The place of a sum to which this rank adds nothing of its own.
NOWHERE = (-1, -1)


@dataclass(frozen=True)
class Slot:
    """A piece, who owns it, and the tags its messages have."""

    piece: Piece
    owner: int
    tall: bool
    tag: int

    def tags(self, node: int) -> range:
        """Of the header, the rows and the values from a rank's node with this number."""
        return range(self.tag + 3 * node, self.tag + 3 * node + 3)


class Plan:
    """What is sent where, for one set of parameters."""

    def __init__(self, named: Mapping[str, Tensor], world: int, whole: bool = False) -> None:
        self.named = dict(named)
        self.layout = Layout({name: tuple(p.shape) for name, p in named.items()}, world, whole)
        slots = list(self._slots())
        self.large = [slot for slot in slots if slot.piece.numel > SMALL]
        self.small = [slot for slot in slots if slot.piece.numel <= SMALL]
        self.of_name = {name: [s for s in self.large if s.piece.name == name] for name in named}
        self.pack_tag = FREE + 3 * NODES * len(slots)
        self.weights_tag = self.pack_tag + NODES

    def _slots(self) -> Iterator[Slot]:
        number = 0
        for owner, pieces in enumerate(self.layout.pieces):
            for piece in pieces:
                shape = self.named[piece.name].shape
                tall = len(shape) == 2 and shape[0] > TALL * shape[1]
                yield Slot(piece, owner, tall, FREE + 3 * NODES * number)
                number += 1

    @property
    def pack_dtype(self) -> torch.dtype:
        """Wide enough for every small parameter: nothing is lost on the way."""
        wide = torch.float32
        for slot in self.small:
            wide = torch.promote_types(wide, self.named[slot.piece.name].dtype)
        return wide

    def packed(self, owner: int) -> list[Slot]:
        """The small pieces of a rank, which travel as one message."""
        return [slot for slot in self.small if slot.owner == owner]


class GradientSum:
    """The sum over all shards, of which this rank hands in its own with `start`; `finish` leaves it in `.grad`.

    leaves: by rank, the shards that it hands in; a rank may have none.
    """

    def __init__(self, plan: Plan, mesh: Mesh, leaves: Sequence[range]) -> None:
        self.plan, self.mesh, self.all_leaves = plan, mesh, leaves
        self.leaves, self.count = leaves[mesh.rank], sum(map(len, leaves))
        self.others = [rank for rank in range(mesh.world) if rank != mesh.rank]
        self.nodes = nodes(self.leaves, self.count)
        self._partials = {name: Partials[Tensor](self.leaves, self.count, Tensor.add_) for name in plan.named}
        self._reached: set[str] = set()
        self._sending: list[Work] = []
        self._kept: list[Tensor] = []  # what is being sent must not be freed
        self._incoming = dict(self._expect())

    def start(self, leaf: int, named: Mapping[str, Tensor]) -> None:
        """The gradients of shard `leaf` that are ready, each parameter once; they are taken over and changed."""
        if unknown := named.keys() - self._partials.keys():
            raise UserError(
                f"{min(unknown)} is trainable, but was not when this Trainer was made: grow and freeze with "
                "Trainer.grow and Trainer.freeze, or make a new Trainer"
            )
        self._reached |= named.keys()
        for name, gradient in named.items():
            self._fill(name, leaf)
            self._push(name, gradient.contiguous())

    def _fill(self, name: str, leaf: int) -> None:
        """Zeros for the shards before `leaf` that did not reach a parameter."""
        while self._partials[name].next < leaf:
            self._push(name, torch.zeros_like(self.plan.named[name], memory_format=torch.contiguous_format))

    def _push(self, name: str, gradient: Tensor) -> None:
        for node, value in self._partials[name].push(gradient).items():
            slots = [slot for slot in self.plan.of_name[name] if slot.owner != self.mesh.rank]
            if slots:
                self._send(slots, self.nodes.index(node), value)

    def _send(self, slots: list[Slot], node: int, value: Tensor) -> None:
        for slot in slots:
            header, rows, values = slot.tags(node)
            piece = slot.piece.of(value)
            if not slot.tall:
                self._post(piece, slot.owner, values)
                continue
            piece = piece.view(-1, value.shape[1])
            rows_K = _filled_rows(piece)
            self._post(torch.tensor([DENSE if rows_K is None else len(rows_K)]), slot.owner, header)
            if rows_K is None:
                self._post(piece, slot.owner, values)
            elif len(rows_K):
                self._post(rows_K, slot.owner, rows)
                self._post(piece.index_select(0, rows_K), slot.owner, values)

    def _post(self, tensor: Tensor, peer: int, tag: int) -> None:
        self._kept.append(tensor)
        self._sending.append(self.mesh.send(tensor, peer, tag))

    def _expect(self) -> Iterator[tuple[tuple[int, int, Slot | None], tuple[Tensor, list[Work]]]]:
        """Messages of known size that will come, by peer, number of its node, and slot (None: the small ones)."""
        plan, mine = self.plan, self.mesh.rank
        pack = sum(slot.piece.numel for slot in plan.packed(mine))
        for peer, node, _ in self._far_nodes():
            for slot in (slot for slot in plan.large if slot.owner == mine):
                header, _, values = slot.tags(node)
                like = plan.named[slot.piece.name]
                buffer = torch.empty(1, dtype=torch.int64) if slot.tall else like.new_empty(slot.piece.numel)
                yield (peer, node, slot), (buffer, [self.mesh.receive(buffer, peer, header if slot.tall else values)])
            if pack:
                buffer = torch.empty(pack, dtype=self.plan.pack_dtype)
                yield (peer, node, None), (buffer, [self.mesh.receive(buffer, peer, plan.pack_tag + node)])

    def _far_nodes(self) -> list[tuple[int, int, Node]]:
        """The nodes that the other ranks send: by whom, with which number."""
        return [
            (peer, number, node)
            for peer in self.others
            for number, node in enumerate(nodes(self.all_leaves[peer], self.count))
        ]

    def finish(self) -> None:
        """Wait for the others. `.grad` of a parameter of which this rank owns a piece then holds the sum in that piece;
        it is None where no shard reached the parameter, and for those that others own."""
        for name in self.plan.named if self.others else self._reached:
            self._fill(name, self.leaves.stop)
        own: dict[str, dict[Node, Tensor]] = {name: partials.done for name, partials in self._partials.items()}
        self._send_packs(own)
        if not self.nodes:
            own = self._room()
        reached = self._reached_anywhere()
        if self.others:
            self.mesh.run(lambda: self._collect(own))
        owned = {piece.name for piece in self.plan.layout.pieces[self.mesh.rank]} & reached
        for name, parameter in self.plan.named.items():
            parameter.grad = next(iter(own[name].values())).view_as(parameter) if name in owned else None

    def _room(self) -> dict[str, dict[Node, Tensor]]:
        """Where a rank that hands in nothing adds up what it owns."""
        owned = {piece.name for piece in self.plan.layout.pieces[self.mesh.rank]}
        like = {name: p for name, p in self.plan.named.items() if name in owned}
        return {name: {NOWHERE: torch.empty_like(p, memory_format=torch.contiguous_format)} for name, p in like.items()}

    def _send_packs(self, own: Mapping[str, Mapping[Node, Tensor]]) -> None:
        for owner in self.others:
            slots = self.plan.packed(owner)
            for number, node in enumerate(self.nodes if slots else ()):
                parts = [slot.piece.of(own[slot.piece.name][node]).to(self.plan.pack_dtype) for slot in slots]
                self._post(torch.cat(parts), owner, self.plan.pack_tag + number)

    def _reached_anywhere(self) -> set[str]:
        flags = torch.tensor([name in self._reached for name in self.plan.named])
        everyone = torch.stack(self.mesh.all_gather(flags)).any(0).tolist()
        return {name for name, reached in zip(self.plan.named, everyone, strict=True) if reached}

    def _collect(self, own: Mapping[str, Mapping[Node, Tensor]]) -> None:
        """Add up the rest of the tree for each owned piece, in place of this rank's first node."""
        far = self._far_nodes()
        for slot in reversed([slot for slot in self.plan.large if slot.owner == self.mesh.rank]):
            taken = {node: self._take(peer, number, slot) for peer, number, node in far}
            self._add_up(own[slot.piece.name], slot.piece, taken)
        offset = 0
        for slot in self.plan.packed(self.mesh.rank):
            cut = slice(offset, offset := offset + slot.piece.numel)
            taken = {node: self._wait(peer, number, None)[cut] for peer, number, node in far}
            self._add_up(own[slot.piece.name], slot.piece, taken)
        wait_for(self._sending)

    def _add_up(self, own: Mapping[Node, Tensor], piece: Piece, taken: Mapping[Node, Tensor]) -> None:
        mine = {node: piece.of(value) for node, value in own.items()}
        target = next(iter(mine.values()))
        far = {node: value.to(target.dtype) for node, value in taken.items()}
        # a + b is b + a to the bit, so the sum can grow where it is wanted.
        total = fold(mine | far, self.count, lambda a, b: b.add_(a) if b is target else a.add_(b))
        if total is not target:
            target.copy_(total)

    def _wait(self, peer: int, node: int, slot: Slot | None) -> Tensor:
        buffer, works = self._incoming[peer, node, slot]
        while works:
            wait_for([works.pop()])
        return buffer

    def _take(self, peer: int, node: int, slot: Slot) -> Tensor:
        """What a peer's node holds of a large piece, flat."""
        buffer = self._wait(peer, node, slot)
        if not slot.tall:
            return buffer
        count, (_, rows_tag, values_tag) = int(buffer), slot.tags(node)
        like = self.plan.named[slot.piece.name]
        if count == DENSE:
            dense = like.new_empty(slot.piece.numel)
            wait_for([self.mesh.receive(dense, peer, values_tag)])
            return dense
        dense = like.new_zeros(slot.piece.stop - slot.piece.start, like.shape[1])
        if count:
            rows_K, values_KD = torch.empty(count, dtype=torch.int64), like.new_empty(count, like.shape[1])
            wait_for([self.mesh.receive(rows_K, peer, rows_tag), self.mesh.receive(values_KD, peer, values_tag)])
            dense[rows_K] = values_KD
        return dense.view(-1)


def _filled_rows(value: Tensor) -> Tensor | None:
    """The rows with any bit set, rising; None where they are more than half of all, which are then sent whole."""
    words = value.view(torch.int16 if value.element_size() == 2 else torch.int32)
    # Both are zero where every bit is; torch's `any` takes several times as long.
    rows_K = (words.amax(1) | words.amin(1)).nonzero()[:, 0]
    return rows_K if 2 * len(rows_K) <= len(value) else None
