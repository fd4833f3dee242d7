"""Updated weights from the rank that owns a piece to all others, in place: an all-gather, and only movement."""

from __future__ import annotations

import torch
from torch import Tensor

from protomamba.train.comm_mesh import Mesh, Work, wait_for
from protomamba.train.comm_reduce import Plan, Slot


def all_gather_weights(plan: Plan, mesh: Mesh) -> None:
    """Every rank gets the weights that the others have updated."""
    if mesh.world > 1:
        mesh.run(lambda: _all_gather(plan, mesh))


@torch.no_grad()
def _all_gather(plan: Plan, mesh: Mesh) -> None:
    works = [
        work
        for number, slot in enumerate(plan.large)
        for work in _exchange(mesh, _weights(plan, slot), slot.owner, plan.weights_tag + 1 + number)
    ]
    packs = {owner: _pack(plan, owner) for owner in range(mesh.world) if plan.packed(owner)}
    for owner, pack_N in packs.items():
        works += _exchange(mesh, pack_N, owner, plan.weights_tag)
    wait_for(works)
    for owner in packs.keys() - {mesh.rank}:
        _unpack(plan, owner, packs[owner])


def _exchange(mesh: Mesh, tensor: Tensor, owner: int, tag: int) -> list[Work]:
    """Begin to send what this rank owns to all others, or to receive what another owns."""
    if owner != mesh.rank:
        return [mesh.receive(tensor, owner, tag)]
    return [mesh.send(tensor, peer, tag) for peer in range(mesh.world) if peer != owner]


def _weights(plan: Plan, slot: Slot) -> Tensor:
    return slot.piece.of(plan.named[slot.piece.name].detach())


def _pack(plan: Plan, owner: int) -> Tensor:
    return torch.cat([_weights(plan, slot).to(plan.pack_dtype) for slot in plan.packed(owner)])


def _unpack(plan: Plan, owner: int, pack_N: Tensor) -> None:
    slots = plan.packed(owner)
    for slot, part in zip(slots, torch.split(pack_N, [slot.piece.numel for slot in slots]), strict=True):
        _weights(plan, slot).copy_(part)
