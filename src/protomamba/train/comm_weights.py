"""Updated weights from the rank that owns a piece to all others, in place: an all-gather, and only movement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protomamba.train.comm_mesh import Mesh
from protomamba.train.comm_messages import Work, wait_for
from protomamba.train.comm_reduce import Plan, Slot


@dataclass(frozen=True)
class Arriving:
    """Weights under way to this rank: the messages, and by owner the small pieces that come in one."""

    works: list[Work]
    packs: dict[int, Tensor]


@torch.no_grad()
def expect_weights(plan: Plan, mesh: Mesh) -> Arriving:
    """Begin to receive what the others will update, in place."""
    works, packs = [], {}
    for number, slot in enumerate(plan.large):
        if slot.owner != mesh.rank:
            works.append(mesh.receive(_weights(plan, slot), slot.owner, plan.weights_tag + 1 + number))
    for owner in range(mesh.world):
        size = sum(slot.piece.numel for slot in plan.packed(owner))
        if owner != mesh.rank and size:
            packs[owner] = torch.empty(size, dtype=plan.pack_dtype)
            works.append(mesh.receive(packs[owner], owner, plan.weights_tag))
    return Arriving(works, packs)


def all_gather_weights(plan: Plan, mesh: Mesh, arriving: Arriving) -> None:
    """Every rank gets the weights that the others have updated."""
    if mesh.world > 1:
        mesh.run(lambda: _all_gather(plan, mesh, arriving))


@torch.no_grad()
def _all_gather(plan: Plan, mesh: Mesh, arriving: Arriving) -> None:
    others = [rank for rank in range(mesh.world) if rank != mesh.rank]
    works = [
        mesh.send(_weights(plan, slot), peer, plan.weights_tag + 1 + number)
        for number, slot in enumerate(plan.large)
        if slot.owner == mesh.rank
        for peer in others
    ]
    if plan.packed(mesh.rank):
        pack_N = _pack(plan, mesh.rank)
        works += [mesh.send(pack_N, peer, plan.weights_tag) for peer in others]
    wait_for([*works, *arriving.works])
    for owner, pack_N in arriving.packs.items():
        _unpack(plan, owner, pack_N)


def _weights(plan: Plan, slot: Slot) -> Tensor:
    return slot.piece.of(plan.named[slot.piece.name].detach())


def _pack(plan: Plan, owner: int) -> Tensor:
    return torch.cat([_weights(plan, slot).to(plan.pack_dtype) for slot in plan.packed(owner)])


def _unpack(plan: Plan, owner: int, pack_N: Tensor) -> None:
    slots = plan.packed(owner)
    for slot, part in zip(slots, torch.split(pack_N, [slot.piece.numel for slot in slots]), strict=True):
        _weights(plan, slot).copy_(part)
