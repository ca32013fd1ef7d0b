"""Statistics of the scores of each logical matrix.

    mean = sum of scores / number, max, and quantiles by nearest rank: the ceil(q * n)-th smallest of n scores

Input: one score tensor and its layout. Output: a `MatrixStatistics` per matrix. Sums are float64. Quantiles
of up to 65536 weights are exact; above that they are read from a histogram of the scores' high 16 bits,
whose bins are 2**-8 of their lower edge wide: the middle of a bin is within 0.2 % of the true quantile.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from safelocus.errors import NumericalError
from safelocus.model.layout import TensorLayout
from safelocus.selection.topk import histogram

QUANTILES = ("0.5", "0.9", "0.99", "0.999")
_EXACT_UP_TO = 1 << 16
_BATCH = 1 << 22  # weights of several experts taken together
_SUMMED = 1 << 16  # weights of a float64 partial sum on the CPU: what they are converted to stays in the cache
_SHIFT = 15


@dataclass(frozen=True, kw_only=True)
class MatrixStatistics:
    """Scores of one logical matrix, summed up.

    Attributes:
        matrix, tensor, layer, stack, component, expert, shared_expert, num_weights: which one; see `Matrix`.
        sigma: standard deviation of its weights.
        gradient_norm: Euclidean norm of the gradient of S; None where the method takes none.
        mean, max, quantiles: of the scores; quantiles by their name in `QUANTILES`.
        tokens: routed to its expert while scoring; None elsewhere, and where they are not counted (`RoutingCounter`).
            Scores of an expert that no token reached are zero and say nothing.
    """

    matrix: str
    tensor: str
    layer: int | None
    stack: str | None
    component: str
    expert: int | None
    shared_expert: bool
    num_weights: int
    sigma: float | None
    gradient_norm: float | None
    mean: float
    max: float
    quantiles: dict[str, float]
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


def matrix_statistics(
    layout: TensorLayout,
    scores: Tensor,
    *,
    sigma: Sequence[float] | None = None,
    gradient_norm: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[MatrixStatistics]:
    """Statistics of all matrices of one tensor, in the order of `layout.matrices`.

    Args:
        scores: float32, of the tensor's shape.
        sigma, gradient_norm: one per matrix.
        tokens: one per expert of a fused tensor.

    Raises:
        NumericalError: NaN, infinite or negative scores, naming the tensor.
    """
    num_parts = len(layout.parts)
    measured: dict[int, tuple[float, float, list[float]]] = {}
    for part in range(num_parts):
        for first, block in _blocks(layout, scores, part):
            for row, values in enumerate(_measure(layout.name, block)):
                measured[(first + row) * num_parts + part] = values
    return [
        MatrixStatistics(
            matrix=matrix.name,
            tensor=matrix.tensor,
            layer=matrix.layer,
            stack=matrix.stack,
            component=matrix.component,
            expert=matrix.expert,
            shared_expert=matrix.shared_expert,
            num_weights=matrix.num_weights,
            sigma=None if sigma is None else float(sigma[number]),
            gradient_norm=None if gradient_norm is None else float(gradient_norm[number]),
            mean=measured[number][0],
            max=measured[number][1],
            quantiles=dict(zip(QUANTILES, measured[number][2], strict=True)),
            tokens=None if tokens is None else int(tokens[number // num_parts]),
        )
        for number, matrix in enumerate(layout.matrices)
    ]


def _blocks(layout: TensorLayout, scores: Tensor, part: int) -> Iterator[tuple[int, Tensor]]:
    """(first expert, scores [experts, weights of one matrix]): small experts together, large ones alone."""
    view = scores.detach().reshape(layout.view)[layout.part_index(part)]
    if layout.axes[0] != "expert":
        view = view[None]
    num_weights = view[0].numel()
    step = max(1, _BATCH // num_weights)
    for first in range(0, view.shape[0], step):
        experts = view[first : first + step]
        yield first, experts.reshape(experts.shape[0], num_weights)


def _measure(name: str, block: Tensor) -> list[tuple[float, float, list[float]]]:
    """(mean, max, quantiles) of each row."""
    num_weights = block.shape[1]
    lowest, highest = block.amin(dim=1), block.amax(dim=1)
    # NaN spreads to both
    if not bool((lowest >= 0).all() & highest.isfinite().all()):
        raise NumericalError(f"scores of {name!r} are not all finite and non-negative")
    sums = torch.zeros(block.shape[0], dtype=torch.float64, device=block.device)
    width = max(1, _SUMMED // len(block)) if block.device.type == "cpu" else num_weights
    for columns in block.split(width, dim=1):
        sums += columns.sum(dim=1, dtype=torch.float64)
    ranks = [max(1, ceil(float(quantile) * num_weights)) for quantile in QUANTILES]
    if num_weights <= _EXACT_UP_TO:
        quantiles = _ordered(block, [rank - 1 for rank in ranks]).tolist()
    else:
        quantiles = [_from_histogram(name, row, ranks, float(highest[i])) for i, row in enumerate(block)]
    means = (sums / num_weights).tolist()
    return list(zip(means, highest.tolist(), quantiles, strict=True))


def _ordered(block: Tensor, places: list[int]) -> Tensor:
    """What each row would have at some places if it were sorted: [rows, places]."""
    if block.device.type == "cpu":  # five times as fast as sorting
        return torch.from_numpy(np.partition(block.numpy(), places, axis=1)[:, places])
    return block.sort(dim=1).values[:, torch.tensor(places, device=block.device)]


def _from_histogram(name: str, scores: Tensor, ranks: Sequence[int], highest: float) -> list[float]:
    """The middles of the bins that hold the given ranks (1-based, ascending), none above the maximum."""
    counted = histogram({name: scores}, shift=_SHIFT).cumsum(0)
    bins = torch.searchsorted(counted, torch.tensor(ranks))  # the first running total that reaches the rank
    bits = torch.where(bins == 0, 0, (bins << _SHIFT) + (1 << (_SHIFT - 1)))  # the lowest bin is that of zero
    return [min(value, highest) for value in bits.to(torch.int32).view(torch.float32).tolist()]
