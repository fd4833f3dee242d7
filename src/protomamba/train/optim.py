"""Optimizers by name, and which parameters have weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import TrainFields
from protomamba.model.registry import resolve
from protomamba.schema import Schema, part_settings

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to A_log (a rate) nor prototypes (only directions count).

    Biases, norms and D are vectors.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("A_log", "prototypes")


class Optimizer(Protocol):
    """What moves the parameters. Its state goes by parameter name, so that it survives growing and freezing.

    Your own is constructed as `Class(named, config)`: the trainable parameters by name, and an instance of its nested
    `Config(Schema)`, whose fields --optimizer-option sets. Derived from `OptimizerBase` it needs only
    `slots` and `step`.
    """

    slots: ClassVar[tuple[str, ...]]  # the tensors it keeps for a parameter, as they are called in the state
    elementwise: ClassVar[bool]  # an element's update looks at no other: several ranks may share a parameter
    named: dict[str, nn.Parameter]
    config: Any  # its settings

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update at rate `lr` with every gradient multiplied by `scale` (clipping)."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The slots of each parameter that has been updated, in place: not copies."""

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a state by name; names that are not trained here are ignored. ValueError for another shape."""

    def unverified(self) -> dict[str, dict[str, Tensor]]:
        """The slots that may hold a NaN or Inf: all that were not found finite as they are now."""

    def bytes_to_come(self) -> int:
        """How much larger the state gets once every parameter has been updated."""


class OptimizerBase:
    """The bookkeeping of an optimizer whose slots are tensors kept by parameter name."""

    slots: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False

    class Config(Schema):
        """The settings of --optimizer-option."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any) -> None:
        self.named = dict(named)
        self.config = config
        self._state: dict[str, dict[str, Tensor]] = {}

    def step(self, lr: float, scale: float = 1.0) -> None:
        raise NotImplementedError(f"{type(self).__name__}: define `step(lr, scale)`")

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self._state

    def unverified(self) -> dict[str, dict[str, Tensor]]:
        return self.state()

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name in (name for name in self.named if name in state):
            self.check(name, state[name])
            self._state[name] = {slot: tensor.clone() for slot, tensor in state[name].items()}

    def check(self, name: str, slots: Mapping[str, Tensor]) -> None:
        """ValueError unless the slots are ours, and those of more than one element have the parameter's shape."""
        shape = self.named[name].shape
        if set(slots) != set(self.slots):
            raise ValueError(f"{name}: a state of {', '.join(slots)}, expected {', '.join(self.slots)}")
        for slot, tensor in slots.items():
            if tensor.ndim == len(shape) and tensor.shape != shape:
                # A fused update would read and write beyond the smaller of the two.
                raise ValueError(f"{name}: {slot} of shape {tuple(tensor.shape)} for a parameter of {tuple(shape)}")

    def bytes_to_come(self) -> int:
        fresh = (p for name, p in self.named.items() if name not in self.state())
        return sum(len(self.slots) * p.numel() * p.element_size() for p in fresh)


class AdamW(OptimizerBase):
    """AdamW (arXiv 1711.05101) in one pass over the memory: decoupled decay on matrices only, see `decays`."""

    slots = ("step", *MOMENTS)
    elementwise = True

    class Config(Schema):
        weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled weight decay (matrices only)")
        beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
        beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
        adam_eps: float = Field(1e-8, gt=0, le=1, description="epsilon")
        row_wise_moment: bool = Field(
            False, description="row-sparse tables: one second moment per row, its mean, instead of one per element"
        )
        momentum_by_touch: bool = Field(
            False, description="row-sparse tables: a row's first moment decays when it is read, not at every update"
        )

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any) -> None:
        super().__init__(named, config)
        # The moments as the last update left them, all finite: (tensor, version) by name and slot.
        self._verified: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def step(self, lr: float, scale: float = 1.0) -> None:
        config, names = self.config, [name for name, p in self.named.items() if p.grad is not None]
        spoilt = kernels.adamw(
            [self._tensors(name) for name in names],
            lr=lr,
            scale=scale,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.adam_eps,
        )
        for name, bad in zip(names, spoilt, strict=True):
            for slot in MOMENTS:
                moment = self._state[name][slot]
                self._verified[name, slot] = (moment, -1 if bad else moment._version)

    def _tensors(self, name: str) -> kernels.AdamWTensors:
        parameter = self.named[name]
        assert parameter.grad is not None
        slots = self._state.get(name)
        if slots is None:
            zero = torch.zeros((), dtype=torch.float32)
            slots = {"step": zero, **{slot: torch.zeros_like(parameter.detach()) for slot in MOMENTS}}
            self._state[name] = slots
        decay = self.config.weight_decay if decays(name, parameter) else 0.0
        first, second = (slots[slot] for slot in MOMENTS)
        return kernels.AdamWTensors(parameter.detach(), parameter.grad, first, second, slots["step"], decay)

    def unverified(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {slot: x for slot, x in slots.items() if slot != "step" and not self._is_verified(name, slot, x)}
            for name, slots in self._state.items()
        }

    def _is_verified(self, name: str, slot: str, x: Tensor) -> bool:
        """Whether this is what the last update wrote and found finite: a later writer has raised the version."""
        tensor, version = self._verified.get((name, slot), (None, -1))
        return x is tensor and x._version == version

    def bytes_to_come(self) -> int:
        fresh = [p for name, p in self.named.items() if name not in self._state]
        return sum(2 * p.numel() * p.element_size() + torch.float32.itemsize for p in fresh)


class Muon(OptimizerBase):
    """torch's Muon (Jordan et al. 2024) for the matrices of the hidden layers, AdamW for all else.

    Muon orthogonalises the momentum of a matrix by Newton-Schulz iterations: each update moves all its directions
    alike. Its rate is `muon_lr` times that of the schedule. Embedding, head, convolutions and vectors have AdamW.
    """

    slots = ("momentum_buffer",)

    class Config(AdamW.Config):
        muon_lr: float = Field(5.0, gt=0, le=1e4, description="learning rate of Muon's matrices as a multiple of --lr")
        momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov)")

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any) -> None:
        super().__init__(named, config)
        hidden = {name: p for name, p in self.named.items() if is_hidden_matrix(name, p)}
        self._rest = AdamW({name: p for name, p in self.named.items() if name not in hidden}, config)
        self._hidden = hidden
        self._muon: torch.optim.Muon | None = None
        if hidden:
            self._muon = torch.optim.Muon(
                hidden.values(),
                lr=1e-3,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )

    def step(self, lr: float, scale: float = 1.0) -> None:
        self._rest.step(lr, scale)
        if self._muon is None:
            return
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self._hidden.values() if p.grad is not None], scale)
        for group in self._muon.param_groups:
            group["lr"] = lr * self.config.muon_lr
            # The decay of a step is lr times this: that of AdamW, whatever Muon's rate is.
            group["weight_decay"] = self.config.weight_decay / self.config.muon_lr
        self._muon.step()  # type: ignore[no-untyped-call]

    def state(self) -> dict[str, dict[str, Tensor]]:
        held = self._muon.state if self._muon is not None else {}
        of_muon = {name: {k: held[p][k] for k in self.slots} for name, p in self._hidden.items() if p in held}
        return {**self._rest.state(), **of_muon}

    def unverified(self) -> dict[str, dict[str, Tensor]]:
        of_muon = {name: slots for name, slots in self.state().items() if name in self._hidden}
        return {**self._rest.unverified(), **of_muon}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._rest.load_state({name: slots for name, slots in state.items() if name not in self._hidden})
        for name, parameter in self._hidden.items():
            if self._muon is not None and name in state:
                self.check(name, state[name])
                self._muon.state[parameter] = {k: state[name][k].clone() for k in self.slots}

    def bytes_to_come(self) -> int:
        held = self._muon.state if self._muon is not None else {}
        fresh = (p for p in self._hidden.values() if p not in held)
        return self._rest.bytes_to_come() + sum(p.numel() * p.element_size() for p in fresh)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: the matrix of a linear map between hidden activations."""
    return parameter.ndim == 2 and name.startswith("layers.") and decays(name, parameter)


OPTIMIZERS: dict[str, type[Any]] = {"adamw": AdamW, "muon": Muon}


def optimizer_class(config: TrainFields) -> Any:
    """The optimizer that the configuration names. ConfigError for one that is not there."""
    return resolve(config.optimizer, OPTIMIZERS, OptimizerBase, "optimizer")


def make_optimizer(named: Mapping[str, nn.Parameter], config: TrainFields) -> Optimizer:
    """The optimizer that the configuration names, over `named`, with its settings. ConfigError for a wrong one."""
    kind = optimizer_class(config)
    settings = part_settings(kind.Config, config, config.optimizer_option, "--optimizer-option")
    made: Optimizer = kind(named, settings)
    return made


def total_norm(square_sums: Iterable[float]) -> float:
    """The Euclidean norm from sums of squares; NaN or Inf if any is. 0 without any.

    Inf too where the squares are beyond float32, as they would be in AdamW's second moment.
    """
    norm = math.sqrt(sum(square_sums))
    return math.inf if norm > LARGEST_NORM else norm


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or Inf in it, or None. One pass over their memory."""
    sums = kernels.square_sums(list(tensors.values()))
    return next((name for name, squares in zip(tensors, sums, strict=True) if not math.isfinite(squares)), None)
