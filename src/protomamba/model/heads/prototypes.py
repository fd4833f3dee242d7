"""Where prototypes stand on the sphere: placed far apart before training, measured, and kept apart during it.

Nothing here is of size V x V: cosines are computed for a block of rows at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba.kernels.reference import unit
from protomamba.model.heads.many import BLOCK_CLASSES

# Cosines held at once when all prototypes meet all others: 16 MiB of float32.
BLOCK_COSINES = 4_194_304
# Points are not copied whole where they are this many times as many as those that are asked for.
MANY_TIMES = 256
# What polishing may cost in all, in floating-point operations (about a second on one core), and the passes it needs.
POLISH_BUDGET = 2e10
POLISH_PASSES = 100


def place(count: int, width: int, seed: int = 0) -> Tensor:
    """(count, width) float32 unit vectors far apart from one another: the largest cosine is made small.

    count <= width + 1: the simplex, every cosine -1 / (count - 1). count <= 2 width: orthogonal simplexes, largest
    cosine 0. Both are optimal (Rankin 1955). Beyond: a polynomial code (`polynomial_code`), polished by descent as
    far as a second goes. A function of its arguments alone; takes O(count * width) memory.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(count, width)
    generator = torch.Generator().manual_seed(seed)
    if count <= 2 * width:
        return rotated(orthogonal_simplexes(count, width), generator).float()
    if count <= code_capacity(width):
        start_VD = polynomial_code(count, width)
    else:
        start_VD = unit(torch.randn(count, width, generator=generator))
    return polished(start_VD)


def orthogonal_simplexes(count: int, width: int) -> Tensor:
    """(count, width) float64, count <= 2 width: simplexes of near-equal size in orthogonal subspaces, as few as fit."""
    number = max(1, count - width)
    points_VD = torch.zeros(count, width, dtype=torch.float64)
    row = column = 0
    for index in range(number):
        size = count // number + (index < count % number)
        points_VD[row : row + size, column : column + max(size - 1, 1)] = simplex(size)
        row, column = row + size, column + size - 1
    return points_VD


def simplex(count: int) -> Tensor:
    """(count, max(count - 1, 1)) float64 unit vectors, every cosine -1 / (count - 1), in Helmert's basis."""
    if count == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    k = torch.arange(1, count, dtype=torch.float64)
    corners = torch.triu((k * (k + 1)).rsqrt().expand(count, count - 1).clone())
    corners[torch.arange(1, count), torch.arange(count - 1)] = -k * (k * (k + 1)).rsqrt()
    return corners * math.sqrt(count / (count - 1))


def rotated(points_VD: Tensor, generator: torch.Generator) -> Tensor:
    """The points turned by a random rotation, so that no coordinate of z is special: layers of random plane rotations.

    Plane rotations instead of a random orthogonal matrix: O(V D log D), and element by element, so that the result does
    not depend on the number of threads.
    """
    width = points_VD.shape[1]
    half = width // 2
    for _ in range(4 * math.ceil(math.log2(width + 1)) if half else 0):
        order = torch.randperm(width, generator=generator)
        left, right = order[:half], order[half : 2 * half]
        angle = torch.rand(half, generator=generator, dtype=torch.float64) * (2 * math.pi)
        x, y = points_VD[:, left], points_VD[:, right]
        points_VD[:, left] = x * angle.cos() - y * angle.sin()
        points_VD[:, right] = x * angle.sin() + y * angle.cos()
    return points_VD


def code_prime(width: int) -> int:
    """The largest prime p with 2 p <= width, or 0: the code's points live in p complex coordinates."""
    return next((n for n in range(width // 2, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1))), 0)


def code_capacity(width: int) -> int:
    """How many points `polynomial_code` has in that width, taking polynomials of degree 3 at most."""
    p = code_prime(width)
    return 4 * p**3 if p > 3 else 0


def polynomial_code(count: int, width: int) -> Tensor:
    """(count, width) float32 unit vectors whose cosines have a proven bound, at the cost of writing them down.

    A point is x -> i^q exp(2 pi i f(x) / p) / sqrt(p) over the p residues x, q in 0..3, f(x) = d x^3 + a x^2 + b x a
    polynomial over the integers mod p; real and imaginary parts are the coordinates. By Weil's bound on exponential
    sums the cosine of two points is at most 1 / sqrt(p) where all f have degree <= 2 (the first 4 p^2 points) and
    2 / sqrt(p) with degree 3. Random points reach about sqrt(4 ln V / D), three times as much at V = 4096, D = 128.
    """
    p = code_prime(width)
    points_VD = torch.zeros(count, width)
    x_P = torch.arange(p)
    for start in range(0, count, 4096):
        number = torch.arange(start, min(start + 4096, count))
        number, turn = number // 2, number % 2
        number, b = number // p, (number % p)[:, None]
        number, a = number // p, (number % p)[:, None]
        d, flip = (number // 2)[:, None], number % 2
        residue = (((d * x_P + a) % p * x_P + b) % p) * x_P % p
        angle = residue.double() * (2 * math.pi / p) + (turn * 0.5 + flip)[:, None] * math.pi
        block = slice(start, start + len(number))
        points_VD[block, :p], points_VD[block, p : 2 * p] = angle.cos(), angle.sin()
    return points_VD / math.sqrt(p)


def polished(points_VD: Tensor) -> Tensor:
    """The points after a descent on their largest cosines, for as many passes as the budget allows: none for very many.

    Each pass moves every point away from the softmax-weighted mean of the points nearest to it, by steps that shrink.
    """
    count, width = points_VD.shape
    passes = min(int(POLISH_BUDGET // (count * count * (4.0 * width + 200.0))), POLISH_PASSES)
    sharpness = 8.0 * math.sqrt(width)
    rows = max(1, min(512, BLOCK_COSINES // count))
    points_VD = points_VD.clone()
    for index in range(passes):
        for start in range(0, count, rows):
            block_RD = points_VD[start : start + rows]
            weight_RV = (cosines_to_others(points_VD, torch.arange(start, start + len(block_RD))) * sharpness).softmax(
                -1
            )
            moved_RD = block_RD - 0.4 * (1 - index / passes) * (weight_RV @ points_VD)
            points_VD[start : start + rows] = unit(moved_RD)
    return points_VD


def cosines_to_others(points_VD: Tensor, rows_R: Tensor) -> Tensor:
    """(R, V) cosines of the points `rows_R` to all points, -1 to themselves. Takes unit vectors."""
    cosine_RV = points_VD[rows_R] @ points_VD.t()
    cosine_RV[torch.arange(len(rows_R)), rows_R] = -1.0
    return cosine_RV


@torch.no_grad()
def nearest_cosines(points_VD: Tensor, sample: int | None = None) -> Tensor:
    """The cosine of each point, or of `sample` of them evenly spread, to its nearest neighbour among all. In blocks."""
    count = len(points_VD)
    if count < 2:
        return points_VD.new_full((count,), -1.0)
    chosen = torch.arange(count)
    if sample is not None and sample < count:
        chosen = torch.arange(sample) * count // sample
    if len(chosen) * MANY_TIMES < count:
        return _nearest_of_few(points_VD.detach(), chosen)
    points_VD = F.normalize(points_VD.detach(), dim=-1)
    rows = max(1, BLOCK_COSINES // count)
    return torch.cat([cosines_to_others(points_VD, block).amax(-1) for block in torch.split(chosen, rows)])


def _nearest_of_few(points_VD: Tensor, chosen_C: Tensor) -> Tensor:
    """`nearest_cosines` of a few among very many points: those are read once, and never copied whole."""
    few_CD, nearest_C = F.normalize(points_VD[chosen_C], dim=-1), points_VD.new_full((len(chosen_C),), -1.0)
    rows = max(1, min(BLOCK_CLASSES, BLOCK_COSINES // len(chosen_C)))
    for start in range(0, len(points_VD), rows):
        block_RD = points_VD[start : start + rows]
        cosine_CR = few_CD @ block_RD.t() / torch.linalg.vector_norm(block_RD, dim=-1).clamp_min(1e-12)
        own = (chosen_C >= start) & (chosen_C < start + rows)
        cosine_CR[own, chosen_C[own] - start] = -1.0
        nearest_C = torch.maximum(nearest_C, cosine_CR.amax(1))
    return nearest_C


def random_nearest_cosine(count: int, width: int) -> float:
    """The cosine of a random direction to the nearest of count - 1 others, on average: what no arrangement looks like.

    The mean of the largest of n independent cosines, 1 - the integral of F(c)^n, where F is their distribution on the
    sphere in `width` dimensions, with density proportional to sin(angle)^(width - 2). Error below 1e-3.
    """
    if count < 2 or width < 2:
        return -1.0 if count < 2 else 1.0
    angle = torch.linspace(math.pi, 0.0, 20_001, dtype=torch.float64)
    middle = (angle[1:] + angle[:-1]) / 2
    density = middle.sin().pow(width - 2)
    below = density.cumsum(0) / density.sum()
    cosine = angle.cos()
    return 1.0 - float((below.pow(count - 1) * (cosine[1:] - cosine[:-1])).sum())
