"""Means and differences over seeds x prompts, with 95 % intervals that account for both.

Every disturbance (a seed) is measured on the same prompts, so outcomes form a table y[s, p]: two crossed
random effects. Treating its S * P entries as independent would make intervals far too narrow. Instead

    var(mean) = var(seed means) / S + var(prompt means) / P - residual / (S P)

(the residual is in both of the first terms) and Student's t at Satterthwaite's degrees of freedom, for which
few seeds give wide intervals. Where seeds make no difference (S = 1) only the second term remains.

    level        Wilson's interval with the effective number of observations p (1 - p) / var(mean): within
                 [0, 1], and of positive width at 0 and 1, where it is that of P prompts
    difference   paired by prompt where both sides were measured on the same ones, by seed where on the
                 same disturbances; no standard error is below 1 / (P + 2), which is what one prompt that
                 changed sides in a set without any would leave (Agresti and Min 2005), in the units of the outcomes

Input: float arrays [seeds, prompts] of 0, 1 and NaN (unscorable). Output: `Measure`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safelocus.evaluation.measures import Measure

Outcomes = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Table:
    """Outcomes [seeds, prompts], NaN where unscorable; seeds or prompts without any outcome are dropped."""

    outcomes: Outcomes

    @cached_property
    def present(self) -> Outcomes:
        kept = ~np.isnan(self.outcomes)
        return self.outcomes[kept.any(axis=1)][:, kept.any(axis=0)]

    @property
    def num_observations(self) -> int:
        return int((~np.isnan(self.outcomes)).sum())

    @property
    def num_prompts(self) -> int:
        return self.present.shape[1]

    @cached_property
    def by_seed(self) -> NDArray[np.float64]:
        return np.nanmean(self.present, axis=1)

    @cached_property
    def by_prompt(self) -> NDArray[np.float64]:
        """Over all prompts in their order; NaN where a prompt has no outcome."""
        counts = (~np.isnan(self.outcomes)).sum(axis=0)
        return np.where(counts, np.nansum(self.outcomes, axis=0) / np.maximum(counts, 1), np.nan)

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())

    @cached_property
    def residual(self) -> float:
        """var of what neither seed nor prompt explains, over the number of observations; 0 if anything is missing."""
        seeds, prompts = self.present.shape
        if min(seeds, prompts) < 2 or np.isnan(self.present).any():
            return 0.0
        rest = self.present - self.present.mean(1, keepdims=True) - self.present.mean(0) + self.present.mean()
        return float((rest**2).sum() / ((seeds - 1) * (prompts - 1)) / self.present.size)


def level(outcomes: Outcomes) -> Measure:
    """The mean of a proportion over seeds and prompts."""
    table = Table(outcomes)
    if not table.num_observations:
        return Measure(value=None, low=None, high=None, n=0)
    p = table.mean
    variance, freedom = _combine([_of(table.by_seed)], [_of(table.by_prompt)], table.residual)
    if 0 < p < 1 and variance > 0:
        n = min(max(p * (1 - p) / variance, 1.0), float(table.num_observations))
    else:
        n, freedom = float(table.num_prompts), max(table.num_prompts - 1, 1)
    z2 = _quantile(LEVEL, freedom) ** 2
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low, high = max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))
    return Measure(value=p, low=float(low), high=float(high), n=table.num_observations)


def difference(
    first: Outcomes,
    second: Outcomes | None = None,
    *,
    paired: Literal["prompts", "seeds"] = "prompts",
    level: float = LEVEL,
    units: tuple[float, float] = (1.0, 1.0),
) -> Measure:
    """Mean of `first` minus mean of `second` (of nothing: the mean of `first`, a table of differences itself).

    Args:
        first, second: [seeds, prompts]. Paired by prompts, their prompts are the same ones and their seeds
            are independent; paired by seeds, the reverse.
        level: of the interval; more than 0.95 where several differences are looked at.
        units: what one prompt that changes sides adds to an outcome of the first and of the second.
    """
    a = Table(first)
    b = Table(second) if second is not None else None
    if not a.num_observations or (b is not None and not b.num_observations):
        return Measure(value=None, low=None, high=None, n=0)
    value = a.mean - (b.mean if b else 0.0)
    residual = a.residual + (b.residual if b else 0.0)
    if b is None:
        by_seed, by_prompt = [_of(a.by_seed)], [_of(a.by_prompt)]
    elif paired == "prompts":
        by_seed, by_prompt = [_of(a.by_seed), _of(b.by_seed)], [_of(a.by_prompt - b.by_prompt)]
    else:
        same = len(a.by_seed) == len(b.by_seed)
        by_seed = [_of(a.by_seed - b.by_seed)] if same else [_of(a.by_seed), _of(b.by_seed)]
        by_prompt = [_of(a.by_prompt), _of(b.by_prompt)]
    variance, freedom = _combine(by_seed, by_prompt, residual)
    floor = max(unit / (table.num_prompts + 2) for table, unit in zip((a, b), units, strict=True) if table)
    half = _quantile(level, freedom) * max(np.sqrt(variance), floor)
    num_observations = a.num_observations + (b.num_observations if b else 0)
    # unlike two rates, two changes of different rates can differ by more than one
    end = 1.0 if paired == "prompts" else max(1.0, abs(value) + half)
    return Measure(
        value=value, low=float(max(-end, value - half)), high=float(min(end, value + half)), n=num_observations
    )


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
    return float(stats.t.ppf(0.5 + level / 2, freedom))
