"""Measures: a value with its 95 % interval and the number of observations behind it.

Every number in `results.json` has this shape. Proportions take Wilson's score interval, which does not
collapse at 0 and 1 (an ASR of 0 in 50 prompts is [0, 0.07], not [0, 0]); means take the bootstrap.
Two runs over the same prompts are compared in pairs: Newcombe's interval for the difference of paired
proportions (1998, method 10) and the exact McNemar test.

How far two judges agree beyond chance is Cohen's kappa,

    kappa = (p_o - p_e) / (1 - p_e)

with p_o the share of responses on which they agree and p_e what two independent judges with the same
habits would reach. The interval is Wilson's for p_o, carried through with p_e held fixed. The usual one
(Fleiss, Cohen and Everitt 1969) collapses to a point at perfect agreement and covers the truth in 46 to
93 % of samples of 30 where it should in 95 %; this one does in 93 to 98 % (docs/judges.md).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from scipy import stats

_LEVEL = 0.95
_NUM_RESAMPLES = 9999
_ROUNDING = 1e-12  # relative


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A value with its 95 % interval.

    Attributes:
        value: None where nothing could be observed (n = 0).
        low, high: ends of the interval; None where there is none (n = 0; a mean of one observation).
        n: observations counted; those that could not be scored are left out.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __post_init__(self) -> None:
        assert self.n >= 0
        assert (self.value is None) == (self.n == 0), "a value needs observations and the reverse"
        assert all(math.isfinite(x) for x in (self.value, self.low, self.high) if x is not None)

    def __str__(self) -> str:
        """`0.123 [0.045, 0.289] (n=40)`."""
        return f"{_text(self.value, self.low, self.high)} (n={self.n})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{each.name: values[each.name] for each in fields(cls)})


def is_measure(value: Any) -> bool:
    """Whether it is the JSON of a measure, or of what has all that one has."""
    return isinstance(value, Mapping) and {"value", "low", "high", "n"} <= set(value)


@dataclass(frozen=True, kw_only=True)
class Difference(Measure):
    """What changed from one run to another over the same prompts: second minus first.

    Attributes:
        value: difference of the two proportions, -1 to 1; None without pairs.
        low, high: its 95 % interval.
        n: pairs in which both could be scored.
        p: exact McNemar test of "no difference", two-sided; None without pairs.
    """

    p: float | None

    def __str__(self) -> str:
        """`-0.200 [-0.340, -0.057] (n=50, p=0.013)`."""
        p = "" if self.p is None else f", p={self.p:.2g}"
        return f"{_text(self.value, self.low, self.high)} (n={self.n}{p})"


def proportion(num_hits: int, n: int) -> Measure:
    """A proportion with Wilson's interval.

    Example:
        >>> str(proportion(0, 50))
        '0.000 [0.000, 0.071] (n=50)'
    """
    assert 0 <= num_hits <= n, f"{num_hits} hits of {n}"
    if n == 0:
        return Measure(value=None, low=None, high=None, n=0)
    low, high = _wilson(num_hits, n)
    return Measure(value=num_hits / n, low=low, high=high, n=n)


def rate(outcomes: Iterable[bool | None]) -> Measure:
    """The proportion of True among outcomes that are True or False; None (unscorable) is left out."""
    scored = [bool(outcome) for outcome in outcomes if outcome is not None]
    return proportion(sum(scored), len(scored))


def mean(values: Iterable[float | None], *, seed: int = 0) -> Measure:
    """A mean with its bootstrap interval (BCa, 9,999 resamples); None (unscorable) is left out.

    Observations that are equal but for rounding have the interval [v, v]: resampling knows of no others. For yes/no
    outcomes use `rate`, which does not have this fault.

    Args:
        values: finite numbers or None.
        seed: of the resampling.
    """
    scored = np.array([value for value in values if value is not None], dtype=np.float64)
    assert np.isfinite(scored).all(), "a value that is not a number is unscorable: pass None"
    if len(scored) == 0:
        return Measure(value=None, low=None, high=None, n=0)
    value = float(scored.mean())
    if len(scored) == 1:
        return Measure(value=value, low=None, high=None, n=1)
    if np.ptp(scored) <= _ROUNDING * np.abs(scored).max():  # BCa divides by such differences
        return Measure(value=value, low=value, high=value, n=len(scored))
    interval = stats.bootstrap(
        (scored,), np.mean, n_resamples=_NUM_RESAMPLES, confidence_level=_LEVEL, method="BCa",
        batch=max(1, 10_000_000 // len(scored)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Measure(value=value, low=float(interval.low), high=float(interval.high), n=len(scored))


def paired_difference(first: Sequence[bool | None], second: Sequence[bool | None]) -> Difference:
    """How a proportion changed from `first` to `second`, measured on the same prompts.

    Interval: Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10 (square and add Wilson's
    intervals, with his continuity-corrected correlation). It stays sound where the runs agree on every
    prompt: two identical runs of 40 prompts differ by 0 with an interval of up to +-0.09, not +-0.

    Args:
        first, second: outcomes in the same order; None where one could not be scored, which leaves the
            pair out.

    Example:
        >>> str(paired_difference([True] * 8 + [False] * 2, [False] * 10))
        '-0.800 [-0.943, -0.384] (n=10, p=0.0078)'
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n = len(pairs)
    if n == 0:
        return Difference(value=None, low=None, high=None, n=0, p=None)
    both, lost, gained, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    p1, p2 = (both + lost) / n, (both + gained) / n
    low1, high1 = _wilson(both + lost, n)
    low2, high2 = _wilson(both + gained, n)
    phi = _correlation(both, lost, gained, neither)
    value = p2 - p1
    below = _square_and_add(p2 - low2, high1 - p1, phi)
    above = _square_and_add(high2 - p2, p1 - low1, phi)
    discordant = lost + gained
    return Difference(
        value=value,
        low=max(-1.0, value - below),
        high=min(1.0, value + above),
        n=n,
        p=float(stats.binomtest(lost, discordant).pvalue) if discordant else 1.0,
    )


def _wilson(num_hits: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(num_hits, n).proportion_ci(confidence_level=_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def _correlation(both: int, lost: int, gained: int, neither: int) -> float:
    """Newcombe's estimate of phi: of a positive one, n/2 is taken off; 0 where a margin is empty."""
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    if margins == 0:
        return 0.0
    product: float = both * neither - lost * gained
    if product > 0:
        product = max(product - (both + lost + gained + neither) / 2, 0)
    return product / math.sqrt(margins)


def _square_and_add(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _text(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of two judges on the same responses.

    Attributes:
        value: Cohen's kappa: 1 full agreement, 0 as by chance. None without common responses, and where
            both judges always said the same one thing: nothing is known of their telling things apart.
        low, high: 95 % interval of kappa; None with it.
        observed: share of responses on which they agree; None without common responses.
        n: responses that both could score.
    """

    value: float | None
    low: float | None
    high: float | None
    observed: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cohens_kappa(first: Sequence[Hashable | None], second: Sequence[Hashable | None]) -> Agreement:
    """Agreement of two judges' labels.

    Args:
        first, second: labels of the same responses in the same order; None where one could not be scored,
            which leaves the response out.

    Example:
        >>> cohens_kappa([True, True, False, False], [True, True, False, True]).value
        0.5
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n = len(pairs)
    num_equal = sum(a == b for a, b in pairs)
    observed = proportion(num_equal, n)
    rows, columns = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    num_by_chance = sum(rows[label] * columns[label] for label in rows)  # of n * n
    if observed.value is None or num_by_chance == n * n:
        return Agreement(value=None, low=None, high=None, observed=observed.value, n=n)
    assert observed.low is not None
    assert observed.high is not None
    chance = num_by_chance / n**2

    def kappa(agreement: float) -> float:
        return (agreement - chance) / (1 - chance)

    return Agreement(
        value=kappa(observed.value),
        low=max(-1.0, kappa(observed.low)),
        high=kappa(observed.high),
        observed=observed.value,
        n=n,
    )
