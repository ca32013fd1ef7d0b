"""How concentrated the scores are: which part of their sum lies in the highest-scored weights.

    mass(x) = sum of the floor(x * n) highest scores / sum of all n scores
    Gini    = sum_i (2 i - n - 1) s_(i) / (n * sum of s),  s ascending: 0 all equal, towards 1 one holds all

Input: the score tensors (non-negative float32). Output: a `Concentration`, plain numbers.

Nothing is sorted or copied whole. The bits of a non-negative float32 order like the integer they spell,
so one pass that counts and sums (in float64) the scores by their high 17 bits gives the curve exactly
wherever a bin ends; a bin is at most 2**-9 of its lower edge wide. Inside a bin the curve is drawn
straight. The true one bends upwards from there, by at most the bound that is stored beside the numbers:
never more than 2**-11 of the sum, and around 1e-7 for scores that are spread as they commonly are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safelocus.errors import NumericalError

_SHIFT = 14
_NUM_BINS = 1 << (31 - _SHIFT)  # the sign bit of a non-negative number is zero
_ABSOLUTE = 0x7FFFFFFF  # every bit but the sign: -0.0 counts as 0.0
_CHUNK_CPU = 1 << 20
_CHUNK_ACCELERATOR = 1 << 24
_PER_DECADE = 10

# 1e-5 to 1, evenly spaced on a logarithmic axis, whole powers of ten among them
FRACTIONS = tuple(
    10.0 ** (i // _PER_DECADE) if i % _PER_DECADE == 0 else 10.0 ** (i / _PER_DECADE)
    for i in range(-5 * _PER_DECADE, 1)
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The floor(fraction * n) = `num_weights` highest scores hold `mass` of the sum of all n."""

    fraction: float
    num_weights: int
    mass: float


@dataclass(frozen=True, kw_only=True)
class Concentration:
    """Curve and Gini coefficient of all scores.

    `mass` is never too high and at most `mass_error` too low; `gini` likewise with `gini_error`. Points
    whose fraction is not even one weight are left out.
    """

    num_weights: int
    num_zero: int  # scores that are exactly zero
    total: float  # sum of all scores
    points: tuple[Point, ...]
    mass_error: float
    gini: float
    gini_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Concentration":
        return cls(**{**values, "points": tuple(Point(**point) for point in values["points"])})


def concentration(tensors: Mapping[str, Tensor]) -> Concentration:
    """Concentration of all scores in `tensors`: one pass, O(chunk) extra memory.

    Raises:
        NumericalError: a score is negative or not finite, or all of them are zero.
    """
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64)
    sums = torch.zeros(_NUM_BINS, dtype=torch.float64)
    num_nonzero = 0
    for name, chunk in _chunks(tensors):
        bits = chunk.view(torch.int32) & _ABSOLUTE
        if not bool(((chunk >= 0) & (bits < 0x7F800000)).all()):
            raise NumericalError(
                f"scores of {name!r} cannot be mapped: expected finite, non-negative numbers, found NaN, "
                "infinity or negative ones. Score again in float32."
            )
        bins = bits >> _SHIFT
        counts += torch.bincount(bins, minlength=_NUM_BINS).cpu()
        sums += torch.bincount(bins, weights=chunk.double(), minlength=_NUM_BINS).cpu()
        num_nonzero += int(torch.count_nonzero(chunk))
    if num_nonzero == 0:
        raise NumericalError("every score is zero: nothing to map. Does the objective depend on the weights?")
    return _summarise(counts.numpy(), sums.numpy(), num_nonzero)


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise NumericalError(f"scores of {name!r} are {tensor.dtype}: expected torch.float32. Convert them first.")
        size = _CHUNK_CPU if tensor.device.type == "cpu" else _CHUNK_ACCELERATOR
        for chunk in tensor.detach().reshape(-1).split(size):
            yield name, chunk


def _summarise(all_counts: np.ndarray, all_sums: np.ndarray, num_nonzero: int) -> Concentration:
    filled = np.flatnonzero(all_counts)[::-1]  # from the highest scores down
    counts, sums = all_counts[filled], all_sums[filled]
    edges = np.stack([filled, filled + 1]).astype(np.int32) << _SHIFT
    # scores of a bin are in [low, high)
    low, high = np.minimum(edges.view(np.float32), np.finfo(np.float32).max).astype(np.float64)
    num_weights, total = int(counts.sum()), float(sums.sum())
    means = sums / counts
    counts_above, sums_above = np.cumsum(counts) - counts, np.cumsum(sums) - sums

    points, mass_error = [], 0.0
    for fraction in FRACTIONS:
        num_top = math.floor(fraction * num_weights + 1e-6)  # 0.1 * 30 must give 3
        if num_top == 0:
            continue
        i = int(np.searchsorted(counts_above, num_top)) - 1  # the bin that holds the last of them
        inside = num_top - int(counts_above[i])
        # the true sum inside is at most inside * high, and what is left is at least (count - inside) * low
        error = min(inside * (high[i] - means[i]), (int(counts[i]) - inside) * (means[i] - low[i]))
        mass_error = max(mass_error, float(error) / total)
        mass = (float(sums_above[i]) + inside * float(means[i])) / total
        points.append(Point(fraction=fraction, num_weights=num_top, mass=min(mass, 1.0)))

    share = counts / num_weights
    lorenz_above = sums_above / total  # part of the sum held by higher bins
    # twice the area under the Lorenz curve; the curve is straight within a bin, which overestimates it
    area = float(np.sum(share * (2.0 * (1.0 - lorenz_above) - sums / total)))
    # a bin's true curve lies between its chord and the tangents with the slopes of low and high: a triangle
    inside_triangles = share**2 * (high - means) * (means - low) / (high - low)
    gini_error = float(np.sum(np.maximum(inside_triangles, 0.0))) * num_weights / total
    return Concentration(
        num_weights=num_weights,
        num_zero=num_weights - num_nonzero,
        total=total,
        points=tuple(points),
        mass_error=mass_error,
        gini=max(0.0, 1.0 - area),
        gini_error=gini_error,
    )
