"""How much two selections, or two sets of scores, agree.

    IoU                 = |A and B| / |A or B|
    expected overlap    = |A| |B| / n       of two independent draws of these sizes from n eligible weights
    expected IoU        = expected overlap / (|A| + |B| - expected overlap)
    rank correlation    = Spearman's rho of the scores, ties at their average rank

Input: two `Selection`s or two `Scores` of models with the same tensors (siblings too). Output: a frozen
`SelectionComparison` or `ScoreComparison` of plain numbers.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any, overload

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from safelocus.errors import SelectionError
from safelocus.model.layout import Layout, Matrix, TensorLayout
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection, check_same_shapes

_MAX_RANKED = 10_000_000  # weights ranked by Spearman's rho: some ten seconds and 1 GB


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Agreement of two selections within a region of the model (or all of it).

    `num_weights` counts what could have been selected there. `iou` is None where neither has any weight.
    `expected_iou` is what blind chance gives two selections of these sizes.
    """

    num_weights: int
    num_a: int
    num_b: int
    num_both: int
    iou: float | None
    expected_iou: float | None

    @classmethod
    def of(cls, num_weights: int, num_a: int, num_b: int, num_both: int) -> "Overlap":
        num_either = num_a + num_b - num_both
        chance = num_a * num_b / num_weights if num_weights else 0.0
        return cls(
            num_weights=num_weights,
            num_a=num_a,
            num_b=num_b,
            num_both=num_both,
            iou=num_both / num_either if num_either else None,
            expected_iou=chance / (num_a + num_b - chance) if num_either else None,
        )


@dataclass(frozen=True, kw_only=True)
class SelectionComparison:
    """Overlap of two selections: overall, and where.

    `a`, `b`: what they are (`Selection.describe`). `layers`: by "3", or "encoder.3" where there are stacks,
    "none" outside layers. `components`: by "query", ...
    """

    a: dict[str, Any]
    b: dict[str, Any]
    overall: Overlap
    layers: dict[str, Overlap]
    components: dict[str, Overlap]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rho over `num_weights` weights, of which every `stride`-th was ranked.

    `rho` is None where one side's scores are all equal: ranks then say nothing.
    """

    rho: float | None
    num_weights: int
    num_ranked: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class ScoreComparison:
    """Agreement of two sets of scores: ranks over all weights, and the overlap of their top `ratio`.

    `correlation` and `components` are exact where `stride` is 1; the strided subsample of larger models is
    the same each time, and no multiple of a tensor's dimensions, so that all rows and columns are met.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    correlation: Correlation
    components: dict[str, Correlation]
    ratio: float
    top: SelectionComparison

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@overload
def compare(a: Selection, b: Selection) -> SelectionComparison: ...
@overload
def compare(a: Scores, b: Scores, *, ratio: float = ..., max_ranked: int = ...) -> ScoreComparison: ...
@overload
def compare(
    a: Selection | Scores, b: Selection | Scores, *, ratio: float = ..., max_ranked: int = ...
) -> SelectionComparison | ScoreComparison: ...
def compare(
    a: Selection | Scores, b: Selection | Scores, *, ratio: float = 0.01, max_ranked: int = _MAX_RANKED
) -> SelectionComparison | ScoreComparison:
    """Compare two selections, or two sets of scores.

    Args:
        ratio: scores are compared by the IoU of their top `ratio` of the model's weights.
        max_ranked: rank at most this many weights; above it, a strided subsample.

    Raises:
        SelectionError: the models' tensors differ, one is a selection and the other scores, or scores were
            saved without tensors.
    """
    if isinstance(a, Selection) and isinstance(b, Selection):
        return _compare_selections(a, b)
    if isinstance(a, Scores) and isinstance(b, Scores):
        return _compare_scores(a, b, ratio, max_ranked)
    raise SelectionError(
        f"cannot compare {type(a).__name__} with {type(b).__name__}: expected two selections or two sets of "
        "scores. Select from the scores first."
    )


def _compare_selections(a: Selection, b: Selection) -> SelectionComparison:
    _check_same_layout(a.layout, b.layout)
    only_eligible = a.only_eligible and b.only_eligible
    both = a.combine(b, "&", allow_mismatch=True).per_matrix_counts()
    # one layout may divide a tensor otherwise than the other
    counts = [selection.per_matrix_counts() for selection in (a, replace(b, layout=a.layout))]
    matrices = [m for m in a.layout.matrices if m.eligible or (not only_eligible and _any_has(counts, m))]
    rows = [
        (m, (m.num_weights, counts[0].get(m.name, 0), counts[1].get(m.name, 0), both.get(m.name, 0))) for m in matrices
    ]
    return SelectionComparison(
        a=a.describe(),
        b=b.describe(),
        overall=Overlap.of(*_total(numbers for _, numbers in rows)),
        layers={str(key): overlap for key, overlap in _by(rows, _layer).items()},
        components={str(key): overlap for key, overlap in _by(rows, lambda m: m.component).items()},
    )


def _any_has(counts: Iterable[Mapping[str, int]], matrix: Matrix) -> bool:
    return any(count.get(matrix.name) for count in counts)


Numbers = tuple[int, int, int, int]


def _by(rows: list[tuple[Matrix, Numbers]], key: Callable[[Matrix], Hashable]) -> dict[Hashable, Overlap]:
    grouped: dict[Hashable, list[Numbers]] = {}
    for matrix, numbers in rows:
        grouped.setdefault(key(matrix), []).append(numbers)
    return {found: Overlap.of(*_total(members)) for found, members in grouped.items()}


def _total(numbers: Iterable[Numbers]) -> Numbers:
    columns = list(zip(*numbers, strict=True)) or [(0,)] * 4
    return sum(columns[0]), sum(columns[1]), sum(columns[2]), sum(columns[3])


def _layer(matrix: Matrix) -> str:
    number = "none" if matrix.layer is None else str(matrix.layer)
    return number if matrix.stack is None else f"{matrix.stack}.{number}"


def _compare_scores(a: Scores, b: Scores, ratio: float, max_ranked: int) -> ScoreComparison:
    _check_same_layout(a.layout, b.layout)
    top = _compare_selections(a.select(ratio), b.select(ratio))
    stride = _stride(a.layout, max_ranked)
    ranked_a, ranked_b = (_ranked(scores, a.layout, stride) for scores in (a, b))
    names = list(dict.fromkeys(m.component for m in a.layout.matrices if m.eligible))
    sizes = {
        name: sum(m.num_weights for m in a.layout.matrices if m.component == name and m.eligible) for name in names
    }
    component = _components(a.layout, names, stride)
    return ScoreComparison(
        a={key: value for key, value in a.provenance.to_json().items() if key != "fingerprint"},
        b={key: value for key, value in b.provenance.to_json().items() if key != "fingerprint"},
        correlation=_correlate(ranked_a, ranked_b, a.layout.num_eligible, stride),
        components={
            name: _correlate(ranked_a[component == i], ranked_b[component == i], sizes[name], stride)
            for i, name in enumerate(names)
        },
        ratio=float(ratio),
        top=top,
    )


def correlate(a: Scores, b: Scores) -> Correlation:
    """Of all weights together: what `compare` says of that, without the components.

    Raises:
        SelectionError: as for `compare`.
    """
    _check_same_layout(a.layout, b.layout)
    stride = _stride(a.layout, _MAX_RANKED)
    ranked_a, ranked_b = (_ranked(scores, a.layout, stride) for scores in (a, b))
    return _correlate(ranked_a, ranked_b, a.layout.num_eligible, stride)


def _stride(layout: Layout, max_ranked: int) -> int:
    """The smallest stride that is small enough a sample and shares no factor with any dimension."""
    stride = max(1, -(-layout.num_eligible // max_ranked))
    sizes = {size for name in layout.eligible_tensors for size in layout.tensors[name].view}
    while stride > 1 and any(gcd(stride, size) > 1 for size in sizes):
        stride += 1
    return stride


def _sampled(layout: Layout, stride: int) -> Iterator[tuple[TensorLayout, Tensor]]:
    """Every `stride`-th eligible weight over all tensors: (tensor, flat indices)."""
    start = 0  # of the next tensor's first sampled weight, within that tensor
    for name in layout.eligible_tensors:
        tensor = layout.tensors[name]
        flat_index = torch.arange(start, max(start, tensor.num_weights), stride)
        start = start + flat_index.numel() * stride - tensor.num_weights
        yield tensor, flat_index


def _ranked(scores: Scores, layout: Layout, stride: int) -> np.ndarray:
    """The sampled scores, in the order of this layout."""
    found = []
    for tensor, flat_index in _sampled(layout, stride):
        flat = scores[tensor.name].detach().reshape(-1)
        found.append(flat[flat_index.to(flat.device)].cpu().numpy())
    return np.concatenate(found)


def _components(layout: Layout, names: list[str], stride: int) -> np.ndarray:
    """The place in `names` of each sampled weight's component."""
    found = []
    for tensor, flat_index in _sampled(layout, stride):
        of_matrix = torch.tensor([names.index(matrix.component) for matrix in tensor.matrices], dtype=torch.int8)
        found.append(of_matrix[tensor.matrix_of(flat_index)].numpy())
    return np.concatenate(found)


def _correlate(a: np.ndarray, b: np.ndarray, num_weights: int, stride: int) -> Correlation:
    varies = a.size > 1 and a.min() < a.max() and b.min() < b.max()
    rho = float(stats.spearmanr(a, b).statistic) if varies else None
    return Correlation(rho=rho, num_weights=num_weights, num_ranked=a.size, stride=stride)


def _check_same_layout(a: Layout, b: Layout) -> None:
    check_same_shapes(*({name: layout.tensors[name].shape for name in layout.eligible_tensors} for layout in (a, b)))
