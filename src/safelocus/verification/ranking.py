"""Which scorer finds the weights that carry safety rather than everything? One line per scorer.

    per_utility = sum over settings of refusal lost / sum over settings of utility lost, as shares of the baseline

over the settings of one intervention that all scorers share. Its interval is a percentile bootstrap over seeds
and prompts (both resampled, independently: the pigeonhole bootstrap, which is conservative; Owen 2007). A
quotient needs a denominator: where utility's fall cannot be told from zero the interval is open above, and such
scorers come first, ordered by the refusal they break. Scorers that at no setting break refusals beyond random
selections come last, whatever their quotient.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelocus.verification.cells import Cells
from safelocus.verification.pooling import Outcomes
from safelocus.verification.verdict import SAFETY, UTILITY, Effect, has_contrast, lost_share, operating_point

_NUM_RESAMPLES = 2000
_TINY = 1e-3  # a mean fall of utility below this is no denominator


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One scorer.

    Attributes:
        effect: at its own operating point.
        has_contrast: whether its top selection breaks refusals beyond random ones there.
        per_utility, low, high: refusal lost per utility lost over all shared settings; None where utility was
            not measured or does not fall (`high` None: open above).
        mean_fall, mean_utility_fall: shares of refusal and utility lost, over the shared settings.
    """

    scorer: str
    effect: Effect
    has_contrast: bool
    per_utility: float | None
    low: float | None
    high: float | None
    mean_fall: float
    mean_utility_fall: float | None

    @property
    def keeps_utility(self) -> bool:
        """Utility was measured, and its fall cannot be told from zero: a quotient would be of chance."""
        return self.mean_utility_fall is not None and self.high is None

    def to_json(self) -> dict[str, Any]:
        return {
            "scorer": self.scorer,
            "has_contrast": self.has_contrast,
            "per_utility": self.per_utility,
            "low": self.low,
            "high": self.high,
            "mean_fall": self.mean_fall,
            "mean_utility_fall": self.mean_utility_fall,
            "operating_point": self.effect.to_json(),
        }


def rank(found: Cells, intervention: str, *, seed: int = 0) -> list[Rank]:
    """All scorers under one intervention, best first: contrast with random, then refusal lost per utility lost."""
    shared = [
        s
        for s in found.settings
        if s.intervention == intervention and all(found.pool("top", scorer, s) for scorer in found.scorers)
    ]
    ranks = []
    for scorer in found.scorers:
        effect, _ = operating_point(found, scorer, intervention)
        if effect is None:
            continue
        settings = shared or [effect.setting]
        falls, utility = (
            [lost for s in settings if (lost := lost_share(found, name, scorer, s)) is not None]
            for name in (SAFETY, UTILITY)
        )
        per_utility, low, high = _quotient(falls, utility, np.random.default_rng(seed))
        ranks.append(
            Rank(
                scorer=scorer,
                effect=effect,
                has_contrast=has_contrast(effect),
                per_utility=per_utility,
                low=low,
                high=high,
                mean_fall=float(np.mean([np.nanmean(fall) for fall in falls])) if falls else 0.0,
                mean_utility_fall=float(np.mean([np.nanmean(fall) for fall in utility])) if utility else None,
            )
        )
    return sorted(ranks, key=lambda r: (not r.has_contrast, *_place(r), -r.mean_fall))


def _place(entry: Rank) -> tuple[bool, float]:
    """Utility kept first (there the fall of refusal decides), then by quotient."""
    return not entry.keeps_utility, 0.0 if entry.keeps_utility else -(entry.per_utility or 0.0)


def _quotient(
    safety: list[Outcomes], utility: list[Outcomes], generator: np.random.Generator
) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of the sum of means of `safety` over that of `utility`."""
    if not safety or not utility:
        return None, None, None
    top, bottom = (np.array([sum(_means(t, w)) for w in _weights(t, generator)]) for t in (safety, utility))
    value_top, value_bottom = top[0], bottom[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where(bottom > _TINY * len(utility), top / bottom, np.where(top > 0, np.inf, 0.0))[1:]
    low, high = np.quantile(quotients, [0.025, 0.975], method="inverted_cdf")
    value = float(value_top / value_bottom) if value_bottom > _TINY * len(utility) else None
    return value, _finite(low), _finite(high)


def _weights(tables: list[Outcomes], generator: np.random.Generator) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(seeds, prompts) to take: the first as they are, then resampled."""
    seeds, prompts = max(len(table) for table in tables), tables[0].shape[1]
    resampled = [(_draw(generator, seeds), _draw(generator, prompts)) for _ in range(_NUM_RESAMPLES)]
    return [(np.arange(seeds), np.arange(prompts)), *resampled]


def _draw(generator: np.random.Generator, num: int) -> NDArray[np.intp]:
    return generator.integers(num, size=num, dtype=np.intp)


def _means(tables: list[Outcomes], taken: tuple[NDArray[np.intp], NDArray[np.intp]]) -> list[float]:
    seeds, prompts = taken
    # settings without noise have one row, whatever the seed
    return [float(np.nanmean(table[seeds % len(table)][:, prompts])) for table in tables]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
