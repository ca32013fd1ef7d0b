"""Which scorer finds the weights that carry safety rather than everything? One line per scorer.

    per_utility = sum over settings of refusal lost / sum over settings of utility lost, as shares of the baseline

over the settings of one intervention that all scorers share. Its interval is a percentile bootstrap over seeds
and prompts (both resampled, independently: the pigeonhole bootstrap, which is conservative; Owen 2007); a draw that
has no answer of some setting is left out. A quotient needs a denominator: scorers under which utility's fall cannot
be told from zero have none, and come first, ordered by the refusal they break. Scorers that do not break refusals
beyond their controls come last, whatever their quotient.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelocus.verification.cells import Cells
from safelocus.verification.pooling import Outcomes
from safelocus.verification.verdict import SAFETY, UTILITY, Effect, lost_share, operating_point

_NUM_RESAMPLES = 2000
_TINY = 1e-3  # a mean fall of utility below this is no denominator


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One scorer.

    Attributes:
        effect: at its own operating point.
        per_utility, low, high: refusal lost per utility lost over all shared settings; None where utility was
            not measured or does not fall (`high` None: open above).
        keeps_utility: utility was measured, and its fall cannot be told from zero: a quotient would be of chance.
        mean_fall, mean_utility_fall: shares of refusal and utility lost, over the shared settings.
    """

    scorer: str
    effect: Effect
    per_utility: float | None
    low: float | None
    high: float | None
    keeps_utility: bool
    mean_fall: float
    mean_utility_fall: float | None

    @property
    def has_contrast(self) -> bool:
        """Whether its top selection breaks refusals beyond its controls at its operating point."""
        return self.effect.has_contrast

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "has_contrast": self.has_contrast, "operating_point": self.effect.to_json()}
        del values["effect"]
        return values


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
        per_utility, low, high, keeps = _quotient(falls, utility, np.random.default_rng(seed))
        ranks.append(
            Rank(
                scorer=scorer,
                effect=effect,
                per_utility=per_utility,
                low=low,
                high=high,
                keeps_utility=keeps,
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
) -> tuple[float | None, float | None, float | None, bool]:
    """(value, low, high) of the sum of means of `safety` over that of `utility`; whether the latter may be zero."""
    if not safety or not utility:
        return None, None, None, False
    seeds = _counts(generator, max(map(len, (*safety, *utility))))
    top, bottom = (_sums(tables, seeds, _counts(generator, tables[0].shape[1])) for tables in (safety, utility))
    least = _TINY * len(utility)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where(bottom > least, top / bottom, np.where(top > 0, np.inf, 0.0))
    quotients[np.isnan(top + bottom)] = np.nan
    low, high = np.nanquantile(quotients[1:], [0.025, 0.975], method="inverted_cdf")
    keeps = float(np.nanquantile(bottom[1:], 0.025, method="inverted_cdf")) <= least
    value = float(quotients[0]) if bottom[0] > least else None
    return value, _finite(low), _finite(high), keeps


def _counts(generator: np.random.Generator, number: int) -> NDArray[np.float64]:
    """How often each of so many is taken [1 + resamples, number]: once, then as drawn."""
    drawn = generator.multinomial(number, [1 / number] * number, size=_NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn])


def _sums(tables: list[Outcomes], seeds: NDArray[np.float64], prompts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the means of the tables, as often as seeds and prompts are taken; NaN where nothing of one of them is."""
    total = np.zeros(len(seeds))
    for table in tables:
        # settings without noise have one row, whatever the seed
        taken = seeds @ np.eye(len(table))[np.arange(seeds.shape[1]) % len(table)]
        is_known = ~np.isnan(table)
        sums, counts = (
            ((taken @ values) * prompts).sum(axis=1) for values in (np.where(is_known, table, 0.0), is_known)
        )
        total += np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return total


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
