"""How far two judges agree beyond chance: Cohen's kappa.

    kappa = (p_o - p_e) / (1 - p_e)

with p_o the share of responses on which they agree and p_e what two independent judges with the same
habits would reach. The interval is Wilson's for p_o, carried through with p_e held fixed. The usual one
(Fleiss, Cohen and Everitt 1969) collapses to a point at perfect agreement and covers the truth in 46 to
93 % of samples of 30 where it should in 95 %; this one does in 93 to 98 % (docs/judges.md).
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safelocus.evaluation.measures import proportion


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
