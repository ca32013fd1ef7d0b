"""The pattern tests as a table, the same in the terminal and on the page."""

from collections.abc import Mapping, Sequence

from safelocus.report import text
from safelocus.report.grid import Grid
from safelocus.report.patterns import Pattern

PATTERNS_NOTE = (
    "The paper finds safety in the value matrices, the MLPs and the middle layers of dense models, and in the expert "
    "MLPs of late layers of mixture-of-experts models. Each is tested against chance that deals out the densities of "
    "this model anew, among the components of a layer or among layers, sizes kept; weights of one matrix never "
    "count as independent."
)
_HEADINGS = ("pattern", "claimed", "share", "size", "fold", "p", "p turned")
_CAPTION = (
    "claimed: by the paper, for this kind of model; fold: share / size [95 % interval]; p: "
    "permutation test, one-sided, Holm-corrected; p turned: keeps the order of the layers"
)


def patterns_grid(found: Mapping[str, Sequence[Pattern]]) -> Grid:
    """One row per model and pattern; the model's name stands in the title, or where there are several, in a column."""
    several = len(found) > 1
    label = "" if several or not found else f": {next(iter(found))}"
    return Grid(
        title=f"Patterns of the paper{label}",
        headings=(("model",) if several else ()) + _HEADINGS,
        rows=tuple(((name,) if several else ()) + _row(p) for name, tested in found.items() for p in tested),
        caption=_CAPTION,
        num_labels=3 if several else 2,
    )


def _row(pattern: Pattern) -> tuple[str, ...]:
    interval = "" if pattern.low is None or pattern.high is None else f" [{pattern.low:.2f}, {pattern.high:.2f}]"
    return (
        pattern.name,
        "yes" if pattern.claimed else "no",
        text.share_percent(pattern.share),
        text.share_percent(pattern.expected),
        f"{pattern.fold:.2f}{interval}",
        text.p_value(pattern.p_holm),
        text.UNKNOWN if pattern.p_rotation is None else text.p_value(pattern.p_rotation),
    )
