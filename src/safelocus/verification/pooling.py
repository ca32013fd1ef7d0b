"""Means and differences over seeds x prompts, with 95 % intervals that account for both.

Every disturbance (a seed) is measured on the same prompts, so outcomes form a table y[s, p]: two crossed
random effects. Treating its S * P entries as independent would make intervals far too narrow. Instead

    var(mean) = var(seed means) / S + var(prompt means) / P - residual / (S P)

(the residual is in both of the first terms) and Student's t at Satterthwaite's degrees of freedom, for which
few seeds give wide intervals. Where seeds make no difference (S = 1) only the second term remains.

    level        Wilson's interval with the effective number of observations p (1 - p) / var(mean): within
                 [0, 1], and of positive width at 0 and 1, where it is that of P prompts
    difference   squares and adds such intervals of two sides, as Newcombe does (1998, method 10; Zou and Donner
                 2008 for any two):

        low  = value - sqrt(below_1^2 + above_2^2 - 2 rho below_1 above_2)       below, above: from a mean to its ends
        high = value + sqrt(above_1^2 + below_2^2 - 2 rho above_1 below_2)

                 of outcomes on the same prompts the sides are the two rates; of changes, the rate of those gained
                 and that of those lost. So few changes, or none, leave an interval that is wide on the other side,
                 where Student's t would have next to none; elsewhere it is no narrower than that. rho is what the
                 variance of the difference says of how the sides' means vary together; a positive one less
                 1 / (2 P sd_1 sd_2), as Newcombe has it.

Input: float arrays [seeds, prompts] of 0, 1 and NaN (unscorable), or of their changes. Output: `Measure`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from safelocus.evaluation.measures import Measure

Outcomes = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Table:
    """Outcomes [seeds, prompts], NaN where unscorable."""

    outcomes: Outcomes

    @cached_property
    def num_observations(self) -> int:
        return int((~np.isnan(self.outcomes)).sum())

    @cached_property
    def num_prompts(self) -> int:
        """With an outcome."""
        return int((~np.isnan(self.by_prompt)).sum())

    @cached_property
    def by_seed(self) -> NDArray[np.float64]:
        """Means of all seeds in their order; NaN where a seed has no outcome. `by_prompt` likewise."""
        return _means(self.outcomes, axis=1)

    @cached_property
    def by_prompt(self) -> NDArray[np.float64]:
        return _means(self.outcomes, axis=0)

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.by_seed))

    @cached_property
    def residual(self) -> float:
        """var of what neither seed nor prompt explains, over the number of observations; 0 if anything is missing."""
        present = self.outcomes[~np.isnan(self.by_seed)][:, ~np.isnan(self.by_prompt)]
        seeds, prompts = present.shape
        if min(seeds, prompts) < 2 or np.isnan(present).any():
            return 0.0
        rest = present - present.mean(1, keepdims=True) - present.mean(0) + present.mean()
        return float((rest**2).sum() / ((seeds - 1) * (prompts - 1)) / present.size)

    @cached_property
    def spread(self) -> tuple[float, float]:
        """(variance of the mean, degrees of freedom)."""
        return _combine([_of(self.by_seed)], [_of(self.by_prompt)], self.residual)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A mean, how far its interval reaches to either side, and its variance."""

    mean: float
    below: float
    above: float
    variance: float

    def __mul__(self, unit: float) -> "_Side":
        return _Side(
            mean=unit * self.mean, below=unit * self.below, above=unit * self.above, variance=unit**2 * self.variance
        )

    def minus(self, other: "_Side", variance: float, quantile: float, *, correction: float = 0.0) -> "_Side":
        """The difference, whose own variance says how the two vary together; no narrower than Student's t of it."""
        rho = 0.0
        if self.variance > 0 and other.variance > 0:
            rho = (self.variance + other.variance - variance) / (2 * math.sqrt(self.variance * other.variance))
            rho = max(-1.0, rho) if rho < 0 else max(0.0, min(1.0, rho) - correction)

        def add(x: float, y: float) -> float:
            return math.sqrt(max(x * x + y * y - 2 * rho * x * y, quantile**2 * variance, 0.0))

        return _Side(
            mean=self.mean - other.mean, below=add(self.below, other.above), above=add(self.above, other.below),
            variance=variance,
        )  # fmt: skip


def level(outcomes: Outcomes) -> Measure:
    """The mean of a proportion over seeds and prompts."""
    table = Table(outcomes)
    if not table.num_observations:
        return Measure(value=None, low=None, high=None, n=0)
    side = _rate(table, LEVEL)
    return Measure(
        value=side.mean,
        low=max(0.0, side.mean - side.below),
        high=min(1.0, side.mean + side.above),
        n=table.num_observations,
    )


def difference(
    first: Outcomes,
    second: Outcomes | None = None,
    *,
    paired: Literal["prompts", "seeds"] = "prompts",
    level: float = LEVEL,
    units: tuple[float, float] = (1.0, 1.0),
) -> Measure:
    """Mean of `first` minus mean of `second` (of nothing: the mean of `first`, a table of changes itself).

    Args:
        first, second: [seeds, prompts]. Paired by prompts: outcomes on the same ones, by independent seeds, or one
            row, without seeds; prompts that one side has no outcome of are left out. Paired by seeds: changes, by the
            same seeds on prompts of their own.
        level: of the interval; more than 0.95 where several differences are looked at.
        units: what a change of one counts, on each side; paired by seeds.
    """
    num_observations = sum(Table(each).num_observations for each in (first, second) if each is not None)
    if second is not None and paired == "prompts" and 1 in (len(first), len(second)):
        first, second = first - second, None
    if second is not None and paired == "prompts":
        common = ~np.isnan(first).all(axis=0) & ~np.isnan(second).all(axis=0)
        first, second = first[:, common], second[:, common]
    a, b = Table(first), None if second is None else Table(second)
    if not a.num_observations or (b is not None and not b.num_observations):
        return Measure(value=None, low=None, high=None, n=0)
    if b is None:
        found, most = _change(a, level), 1.0
    elif paired == "prompts":
        found, most = _beside(a, b, level), 1.0
    else:
        found, most = _across(a, b, level, units), math.inf
    return Measure(
        value=found.mean, low=max(-most, found.mean - found.below), high=min(most, found.mean + found.above),
        n=num_observations,
    )  # fmt: skip


def _rate(table: Table, level: float, freedom: float | None = None) -> _Side:
    """Wilson's interval of a proportion, with the effective number of observations.

    `freedom`: of the difference that it is a side of; by default its own.
    """
    p, (variance, own) = table.mean, table.spread
    freedom = own if freedom is None else freedom
    if 0 < p < 1 and variance > 0:
        n = min(max(p * (1 - p) / variance, 1.0), float(table.num_observations))
    else:
        n, freedom = float(table.num_prompts), max(table.num_prompts - 1, 1)
    z2 = _quantile(level, freedom) ** 2
    middle, half = (
        (p + z2 / (2 * n)) / (1 + z2 / n),
        math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n),
    )
    below, above = p - max(0.0, middle - half), min(1.0, middle + half) - p
    return _Side(mean=p, below=max(0.0, below), above=max(0.0, above), variance=variance)


def _change(table: Table, level: float, freedom: float | None = None) -> _Side:
    """The rate of what was gained less that of what was lost."""
    variance, own = table.spread
    gained, lost = (
        _rate(Table(np.maximum(sign * table.outcomes, 0)), level, own if freedom is None else freedom)
        for sign in (1, -1)
    )
    return gained.minus(lost, variance, _quantile(level, own if freedom is None else freedom))


def _beside(a: Table, b: Table, level: float) -> _Side:
    """Of two rates on the same prompts."""
    variance, freedom = _combine(
        [_of(a.by_seed), _of(b.by_seed)], [_of(a.by_prompt - b.by_prompt)], a.residual + b.residual
    )
    deviations = math.sqrt(a.mean * (1 - a.mean) * b.mean * (1 - b.mean))
    correction = 1 / (2 * a.num_prompts * deviations) if deviations else 0.0
    sides = _rate(a, level, freedom), _rate(b, level, freedom)
    return sides[0].minus(sides[1], variance, _quantile(level, freedom), correction=correction)


def _across(a: Table, b: Table, level: float, units: tuple[float, float]) -> _Side:
    """Of two changes by the same seeds, on prompts of their own."""
    sides = [(unit * table.by_seed, unit * table.by_prompt) for table, unit in zip((a, b), units, strict=True)]
    (seeds, prompts), (other_seeds, other_prompts) = sides
    same = len(seeds) == len(other_seeds) and (~np.isnan(seeds - other_seeds)).sum() > 1
    by_seed = [_of(seeds - other_seeds)] if same else [_of(seeds), _of(other_seeds)]
    residual = units[0] ** 2 * a.residual + units[1] ** 2 * b.residual
    variance, freedom = _combine(by_seed, [_of(prompts), _of(other_prompts)], residual)
    changes = _change(a, level, freedom) * units[0], _change(b, level, freedom) * units[1]
    return changes[0].minus(changes[1], variance, _quantile(level, freedom))


def _means(values: Outcomes, axis: int) -> NDArray[np.float64]:
    counts = (~np.isnan(values)).sum(axis=axis)
    return np.where(counts, np.nansum(values, axis=axis) / np.maximum(counts, 1), np.nan)


def _of(means: NDArray[np.float64]) -> tuple[float, int]:
    """(variance of their mean, degrees of freedom); (0, 0) for fewer than two."""
    means = means[~np.isnan(means)]
    return (float(means.var(ddof=1) / len(means)), len(means) - 1) if len(means) > 1 else (0.0, 0)


def _combine(
    by_seed: list[tuple[float, int]], by_prompt: list[tuple[float, int]], residual: float
) -> tuple[float, float]:
    """(variance, Satterthwaite's degrees of freedom)."""
    terms = by_seed + by_prompt
    total = sum(variance for variance, _ in terms)
    squares = sum(variance**2 / freedom for variance, freedom in terms if freedom)
    freedom = total**2 / squares if squares else max(freedom for _, freedom in terms)
    # the residual can be overestimated: neither effect alone is ever undercut
    sides = (sum(variance for variance, _ in by_seed), sum(variance for variance, _ in by_prompt))
    return max(total - residual, *sides), max(float(freedom), 1.0)


def _quantile(level: float, freedom: float) -> float:
    return float(special.stdtrit(freedom, 0.5 + level / 2))
