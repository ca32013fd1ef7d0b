"""How much two selections, or two sets of scores, agree, as tables."""

from safelocus.analysis.words import UNKNOWN
from safelocus.report.grid import Grid
from safelocus.scoring.comparison import ScoreComparison, SelectionComparison


def overlap_grid(title: str, comparison: SelectionComparison) -> Grid:
    parts = {"all": comparison.overall, **comparison.components}
    parts |= {f"layer {name}": overlap for name, overlap in comparison.layers.items()}
    rows = [
        (name, f"{each.num_a:,}", f"{each.num_b:,}", f"{each.num_both:,}", _iou(each.iou), _iou(each.expected_iou))
        for name, each in parts.items()
    ]
    return Grid(
        title=title, headings=("where", "in A", "in B", "both", "IoU", "chance"), rows=tuple(rows),
        caption="chance: IoU of two random selections of these sizes", sections=(1, 1 + len(comparison.components)),
    )  # fmt: skip


def correlation_grid(title: str, comparison: ScoreComparison) -> Grid:
    rows = [
        (
            name, UNKNOWN if each.rho is None else f"{each.rho:.3f}",
            f"{each.num_ranked:,} of {each.num_weights:,}",
        )
        for name, each in {"all": comparison.correlation, **comparison.components}.items()
    ]  # fmt: skip
    headings = ("where", "Spearman's rho", "weights ranked")
    return Grid(title=f"{title}: rank correlation of scores", headings=headings, rows=tuple(rows))


def _iou(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"
