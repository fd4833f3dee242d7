"""The argument struct of every native op, by name: the mirror of csrc's `...Args`, and how its bytes are written.

A struct is a list of fields of 8-byte words. `native` compares each with the loaded library's own description of it
(name, kind, offset), so that an op can only be called by names that stand in the same places on both sides.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

# What a field may be, how many words it takes, and what makes them of the argument `{0}`: an int, a float, a contiguous
# tensor or None, a (batch, row, lane) tensor with adjacent lanes or None, a contiguous (batch, row) mask or None.
_WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pool": ("qq", ("parallel_for", "threads()")),  # torch's thread pool: every struct starts with it
    "int": ("q", ("{0}",)),
    "float": ("d", ("{0}",)),
    "pointer": ("q", ("0 if {0} is None else {0}.data_ptr() or empty({0})",)),
    "view": (
        "qqq",
        tuple(
            f"0 if {{0}} is None else {{0}}.{word}" for word in ("data_ptr() or empty({0})", "stride(0)", "stride(1)")
        ),
    ),
    "mask": (
        "qqq",
        tuple(f"0 if {{0}} is None else {word}" for word in ("{0}.data_ptr() or empty({0})", "{0}.shape[1]", "1")),
    ),
}
# As csrc describes it, a mask is a view whose rows are single lanes.
_NATIVE_KINDS = {"mask": "view"}


def _empty(x: Any) -> int:
    """The address of a tensor that has none: 0 for one without elements, ValueError for one without data (meta)."""
    if x.numel():
        raise ValueError(f"a native op got a tensor of shape {tuple(x.shape)} on {x.device}, which has no data")
    return 0


class Field(NamedTuple):
    """One field of a struct: its name, its kind in csrc, and the number of the byte at which it starts."""

    name: str
    kind: str
    offset: int


class Arguments:
    """An argument struct, declared by lines of `names: kind` in the order of the C++ struct.

    Fields of kind int and float must be given in a call; the others are None, that is null, unless they are.
    """

    def __init__(self, *lines: str) -> None:
        pairs = (line.split(":") for line in lines)
        self.kinds = {"pool": "pool"} | {name: kind.strip() for names, kind in pairs for name in names.split()}
        self._format = "".join(_WORDS[kind][0] for kind in self.kinds.values())

    def fields(self) -> list[Field]:
        """The fields in order, as the library describes them."""
        found, offset = [], 0
        for name, kind in self.kinds.items():
            found.append(Field(name, _NATIVE_KINDS.get(kind, kind), offset))
            offset += 8 * len(_WORDS[kind][0])
        return found

    def compile(
        self, then: Callable[[bytes], Any], parallel_for: int, threads: Callable[[], int]
    ) -> Callable[..., Any]:
        """A function of the fields by name that hands the packed struct to `then` and returns what that does.

        Written out as one expression, because a step of a small model is bound by the cost of its calls.
        """
        given = [name if kind in ("int", "float") else f"{name}=None" for name, kind in self.kinds.items()]
        words = [word.format(name) for name, kind in self.kinds.items() for word in _WORDS[kind][1]]
        names = {
            "then": then,
            "pack": struct.Struct(self._format).pack,
            "parallel_for": parallel_for,
            "threads": threads,
            "empty": _empty,
        }
        source = f"lambda *, {', '.join(given[1:])}: then(pack({', '.join(words)}))"
        function: Callable[..., Any] = eval(source, names)
        return function


_SCAN = Arguments(
    "B L E N is_bf16 softplus: int",
    "u delta Bm Cm z y: view", "reset: mask",
    "A skip bias initial last chunks: pointer",
    "dy du ddelta dBm dCm dz: view",
    "dlast dA dskip dbias dinitial: pointer",
)  # fmt: skip
_CONV = Arguments(
    "B L E K is_bf16: int",
    "u y: view", "reset: mask",
    "weight bias initial last: pointer",
    "dy du: view",
    "dlast dweight dbias dinitial: pointer",
)  # fmt: skip
_BLOCK = Arguments(
    "B L D E N R K: int", "eps: float", "reset: mask",
    "x norm in_proj taps conv_bias x_proj dt_proj dt_bias A skip out_proj conv_initial ssm_initial: pointer",
    "u uz normed scale projected delta chunks: pointer",
    "out conv_last ssm_last: pointer",
    "dout dconv_last dssm_last: pointer",
    "dx dnorm d_in_proj dtaps dconv_bias d_x_proj d_dt_proj d_dt_bias dA_log dskip d_out_proj: pointer",
    "dconv_initial dssm_initial: pointer",
)  # fmt: skip
_NORM = Arguments(
    "T D out_is_bf16: int", "eps: float",
    "x residual weight y total scale: pointer",
    "dy dtotal dx dweight: pointer",
)  # fmt: skip
_PROTOTYPE_LOSS = Arguments(
    "T D V: int",
    "z prototypes targets weight cosine inverse_z inverse_p loss: pointer",
    "factor: float", "dcosine dz dprototypes: pointer",
)  # fmt: skip

OPS = {
    "scan_forward": _SCAN,
    "scan_backward": _SCAN,
    "conv_forward": _CONV,
    "conv_backward": _CONV,
    "norm_forward": _NORM,
    "norm_backward": _NORM,
    "prototype_loss_forward": _PROTOTYPE_LOSS,
    "prototype_loss_backward": _PROTOTYPE_LOSS,
    "sphere_softmax": Arguments(
        "T S: int", "scale: float", "rows log_chance classes targets own rate down dlog_scale: pointer"
    ),
    "sphere_turn": Arguments("T D: int", "unit inverse gradient index total: pointer"),
    "keep_lengths": Arguments("T D: int", "length: float", "lengths index x: pointer"),
    "sphere_unit": Arguments("T D: int", "x index unit inverse: pointer"),
    "draw_classes": Arguments(
        "G K C most: int", "even slack: float",
        "logits tokens own own_end limit start places count log_chance: pointer",
    ),
    "judge_block": Arguments(
        "T C K R start row: int", "factor: float",
        "scores values classes log_sum own targets reserved rank: pointer",
    ),
    "adamw": Arguments(
        "count: int", "lr scale beta1 beta2 eps: float",
        "sizes parameters gradients exp_avg exp_avg_sq steps decay spoilt: pointer",
    ),
    "square_sums": Arguments("count: int", "sizes data sums: pointer"),
    "block_forward": _BLOCK,
    "block_backward": _BLOCK,
    "matmul": Arguments("M N K a_row b_row add_row out_row a_transposed b_transposed: int", "a b add out: pointer"),
    "product": Arguments("T rows columns x_stride kind: int", "x w scale y: pointer"),
    "transpose": Arguments("rows columns in_row: int", "x out: pointer"),
    "step": Arguments(
        "B D E N R K: int", "eps: float", "x: pointer",
        "norm taps conv_bias dt_bias A skip: pointer",
        "kind: int", "in_proj x_proj dt_proj out_proj in_scale x_scale dt_scale out_scale: pointer",
        "conv_state ssm_state out: pointer",
    ),
    "stack_step": Arguments(
        "B D V layers unit: int", "eps scale: float",
        "blocks tokens embedding norm: pointer", "kind: int", "head head_scale x z scores: pointer",
    ),
}  # fmt: skip
