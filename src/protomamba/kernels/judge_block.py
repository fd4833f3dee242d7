"""judge_block: the best classes, the log of the sum and the rank of the target, block of scores by block of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.reference import Judging

_WRITTEN = {"classes_TK": torch.int64, "log_sum_T": torch.float64, "rank_T": torch.int64}


@torch.no_grad()
def judge_block(
    scores_TC: Tensor,
    start: int,
    judging: Judging,
    *,
    factor: float = 1.0,
    own_T: Tensor | None = None,
    targets_T: Tensor | None = None,
    reserved_R: Tensor | None = None,
) -> None:
    """Adds the scores of the C classes from `start` on to `judging`, in place: see `reference.judge_block`.

    One pass over scores that are still in the cache, no memory of its own, the same bits for any number of threads.
    Native for float32. reserved_R: in rising order, without one twice. ValueError for what does not fit.
    """
    sizes = _check(scores_TC, start, judging, own_T, targets_T, reserved_R)
    library = native.select("judge_block", scores_TC, (torch.float32,))
    if library is None:
        wanted = {"own_T": own_T, "targets_T": targets_T, "reserved_R": reserved_R}
        reference.judge_block(scores_TC, start, judging, factor=factor, **wanted)
        return
    scores = native.rows(scores_TC)
    library.judge_block(
        T=sizes["T"],
        C=sizes["C"],
        K=sizes.get("K", 0),
        R=sizes.get("R", 0),
        start=start,
        row=scores.stride(0),
        factor=factor,
        scores=scores,
        values=judging.values_TK,
        classes=judging.classes_TK,
        log_sum=judging.log_sum_T,
        own=None if own_T is None else own_T.float().contiguous(),
        targets=None if targets_T is None else targets_T.long().contiguous(),
        reserved=None if reserved_R is None else reserved_R.long().contiguous(),
        rank=judging.rank_T,
    )


def _check(scores_TC: Tensor, start: int, judging: Judging, *wanted: Tensor | None) -> dict[str, int]:
    """The size of each letter. ValueError, in one line, for what does not fit."""
    own_T, targets_T, reserved_R = wanted
    written: dict[str, Tensor | None] = judging._asdict()
    read = {"own_T": own_T, "targets_T": targets_T, "reserved_R": reserved_R}
    given = {"scores_TC": scores_TC, **read, **written}
    sizes = check_shapes("judge_block", sizes=None, like=None, **given)
    for name, tensor in written.items():
        dtype = _WRITTEN.get(name, scores_TC.dtype)
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            found = f"{tensor.dtype}" if tensor.dtype != dtype else f"strides {tensor.stride()}"
            raise ValueError(f"judge_block: {name}: expected contiguous {dtype}, which is written, got {found}")
    if start < 0:
        raise ValueError(f"judge_block: start: expected a class, 0 or more, got {start}")
    for names in (("values_TK", "classes_TK"), ("rank_T", "own_T", "targets_T")):
        if len({given[name] is None for name in names}) > 1:
            raise ValueError(f"judge_block: {' and '.join(names)}: expected all of them or none")
    if reserved_R is not None and not bool((reserved_R.diff() > 0).all()):
        raise ValueError("judge_block: reserved_R: expected classes in rising order, without one twice")
    return sizes
