"""What the benchmark says that a rank holds and sends."""

from __future__ import annotations

from protomamba.bench.ranks import memory
from protomamba.bench.shapes import Shape
from protomamba.train.comm import Local
from tests.distributed.threads import ranks

# Wide enough that half of the blocks are about half of the parameters.
SHAPE = Shape("tiny", 2, 8, 32, 2)


def test_two_ranks_halve_the_moments_and_send_what_they_share() -> None:
    alone, (one, other) = memory(Local(), SHAPE), ranks(2, lambda comm: memory(comm, SHAPE))
    assert one == {**other, "shape": one["shape"]} and "2 ranks, as many rows each" in one["shape"]
    assert alone["sent_mib a step and rank"] == 0 < one["sent_mib a step and rank"]
    assert 0.45 < one["moments_mib a rank"] / alone["moments_mib a rank"] < 0.6
    assert alone["peak_rss_mib a rank"] > 0
