"""The optimizer's state of pieces: cut from that of whole parameters, and put together again for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from protomamba.train.comm_layout import Piece
from protomamba.train.comm_mesh import FREE, Mesh
from protomamba.train.comm_messages import wait_for
from protomamba.train.comm_reduce import Plan

State = dict[str, dict[str, Tensor]]


def owned_parameters(plan: Plan, rank: int) -> dict[str, nn.Parameter]:
    """What a rank updates: its pieces, sharing the parameters' memory; a parameter itself where all of it is."""
    return {piece.name: _owned(plan.named[piece.name], piece) for piece in plan.layout.pieces[rank]}


def _owned(parameter: Tensor, piece: Piece) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and piece.numel == parameter.numel():
        return parameter
    return nn.Parameter(rows(parameter.detach(), piece, parameter))


def rows(tensor: Tensor, piece: Piece, parameter: Tensor) -> Tensor:
    """A piece of the parameter, or of anything with as many rows, as a view; a vector is one piece."""
    return tensor if parameter.ndim < 2 else tensor[piece.start : piece.stop]


def cut(plan: Plan, rank: int, state: Mapping[str, Mapping[str, Tensor]]) -> State:
    """What a rank needs of the state of whole parameters."""
    pieces = {piece.name: piece for piece in plan.layout.pieces[rank]}
    return {
        name: {
            slot: rows(x, pieces[name], plan.named[name]) if _goes_by_rows(x, plan.named[name]) else x
            for slot, x in state[name].items()
        }
        for name in state
        if name in pieces
    }


def _goes_by_rows(slot: Tensor, parameter: Tensor) -> bool:
    """Whether a slot has something for each row of the parameter, and not a count for all of it."""
    return slot.ndim > 0 and slot.shape[0] == parameter.shape[0]


def collect(plan: Plan, mesh: Mesh, state: State, everywhere: bool) -> State:
    """The state of whole parameters from every rank's pieces, in the parameters' order: on rank 0, or everywhere."""
    if mesh.world == 1:
        return {name: state[name] for name in plan.named if name in state}
    told = [json.loads(bytes(each.tolist())) for each in mesh.all_gather(_contents(state))]
    targets = range(mesh.world) if everywhere else range(1)
    parts = mesh.run(lambda: _exchange(mesh, state, told, targets))
    if mesh.rank not in targets:
        return {}
    found: dict[str, dict[str, list[Tensor]]] = {}
    for part in parts:
        for name, slots in part.items():
            for slot, tensor in slots.items():
                found.setdefault(name, {}).setdefault(slot, []).append(tensor)
    return {
        name: {slot: _joined(tensors) for slot, tensors in found[name].items()} for name in plan.named if name in found
    }


def gather_state(mesh: Mesh, state: State) -> State:
    """What every rank holds, in the order of the ranks, on rank 0; nothing on the others."""
    if mesh.world == 1:
        return state
    told = [json.loads(bytes(each.tolist())) for each in mesh.all_gather(_contents(state))]
    parts = mesh.run(lambda: _exchange(mesh, state, told, range(1)))
    return {name: slots for part in parts for name, slots in part.items()} if mesh.rank == 0 else {}


def _joined(tensors: list[Tensor]) -> Tensor:
    """Pieces in the order of the ranks, which is that of the rows; a count is the same in each."""
    return torch.cat(tensors) if len(tensors) > 1 and tensors[0].ndim else tensors[0]


def _contents(state: State) -> Tensor:
    entries = [
        (name, slot, list(x.shape), str(x.dtype).removeprefix("torch."))
        for name, slots in state.items()
        for slot, x in slots.items()
    ]
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _exchange(
    mesh: Mesh, state: State, told: list[list[tuple[str, str, list[int], str]]], targets: range
) -> list[State]:
    """Every rank's state at the targets, in the order of the ranks."""
    parts: list[State] = []
    for rank, entries in enumerate(told):
        part: State = state if rank == mesh.rank else {}
        for name, slot, shape, dtype in entries:
            if rank == mesh.rank:
                sent = state[name][slot].detach().contiguous()
                wait_for([mesh.send(sent.view(-1), peer, FREE) for peer in targets if peer != rank])
            elif mesh.rank in targets:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                wait_for([mesh.receive(tensor.view(-1), rank, FREE)])
                part.setdefault(name, {})[slot] = tensor
        parts.append(part)
    return parts
