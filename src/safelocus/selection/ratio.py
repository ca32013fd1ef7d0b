"""How many weights a ratio is.

K = floor(ratio * number of all the model's parameters)      of="model", as in the paper
K = floor(ratio * number of eligible weights)                of="eligible"
"""

from decimal import Decimal
from fractions import Fraction
from math import floor, isfinite
from numbers import Real

from safelocus.errors import SelectionError
from safelocus.model.layout import Layout


def count_for_ratio(
    layout: Layout, ratio: float | Fraction | Decimal, *, of: str = "model", num_eligible: int | None = None
) -> int:
    """K, floored exactly: 0.29 means 29/100, not the binary fraction nearest to it.

    `num_eligible` overrides the layout's where fewer weights may be selected. Raises SelectionError for
    a ratio outside (0, 1], for one that gives no weight, and for more weights than are eligible.
    """
    exact = exact_ratio(ratio)
    if of not in ("model", "eligible"):
        raise SelectionError(f"ratio of {of!r}: expected 'model' (all parameters) or 'eligible'")
    num_eligible = layout.num_eligible if num_eligible is None else num_eligible
    total = layout.num_weights if of == "model" else num_eligible
    k = floor(exact * total)
    if k > num_eligible:
        largest = Decimal(num_eligible * 10**6 // total).scaleb(-6)
        raise SelectionError(
            f"ratio {ratio} of the model's {total:,} weights is {k:,}, but only {num_eligible:,} are "
            f"eligible (embeddings, norms, biases and routers never are). The largest usable "
            f'ratio is {largest}; or take it of="eligible".'
        )
    if k == 0:
        raise SelectionError(f"ratio {ratio} of {total:,} weights is less than one weight. Use a larger ratio.")
    return k


def exact_ratio(ratio: float | Fraction | Decimal) -> Fraction:
    """The ratio as it is written in decimal; SelectionError for what is none."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real | Decimal):
        raise SelectionError(f"ratio must be a number in (0, 1], found {ratio!r}")
    if not isfinite(ratio):
        raise SelectionError(f"ratio must be in (0, 1], found {ratio}")
    exact = Fraction(ratio) if isinstance(ratio, int | Fraction | Decimal) else Fraction(str(ratio))
    if not 0 < exact <= 1:
        hint = f". For {ratio} % write {float(ratio) / 100:g}" if 1 < exact <= 100 else ""
        raise SelectionError(f"ratio must be in (0, 1], found {ratio}{hint}")
    return exact
