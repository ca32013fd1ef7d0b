"""Where inside a matrix the selection lies: counts by bins of rows (outputs) and columns (inputs).

    density of a bin = selected weights in it / weights in it

Bins are of equal height and width, to one row or column. Where a side is divided into attention heads (a query
matrix's rows, an output projection's columns) no bin crosses the border of a head: a bin is a head, an equal part of
one, or several heads. The side of `gate` and `up` that gives neurons, and that of `down` that takes them, count
neurons.

Input: a selection. Output: frozen `Densities`, whose JSON has the counts in base64. A page has room for so many bins;
matrices with most selected weights come first, and those left out are counted.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safelocus.analysis.words import component_label
from safelocus.model.layout import Matrix, TensorLayout
from safelocus.selection.selection import Selection

BINS = (32, 16, 8)  # of a side, at most: fewer where so many matrices would not fit
ENOUGH = 500  # matrices for which finer bins are not given up
MAX_CELLS = 280_000  # bins of all matrices of a page: about 0.7 MB
_CHUNK = 1 << 22
_DESCRIPTION = 200  # what a matrix takes on the page beside its bins, in bins


@dataclass(frozen=True, kw_only=True)
class MatrixDensity:
    """One matrix and how many selected weights each of its bins holds.

    Attributes:
        name, stack, layer, component, expert: which; the component as it is spelled for people.
        rows, columns: weights along each side.
        row_heads, column_heads: attention heads along each side, 0 for none.
        row_unit, column_unit: what a row or column is: "neuron", "output" or "input".
        counts: selected weights [bins of rows, bins of columns].
    """

    name: str
    stack: str | None
    layer: int | None
    component: str
    expert: int | None
    rows: int
    columns: int
    row_heads: int
    column_heads: int
    row_unit: str
    column_unit: str
    counts: np.ndarray

    @property
    def num_selected(self) -> int:
        return int(self.counts.sum())

    def to_json(self) -> dict[str, Any]:
        """`counts` as base64 of little-endian unsigned integers of `bytes` bytes, rows by columns."""
        size = next(size for size in (1, 2, 4, 8) if int(self.counts.max()) < 256**size)
        return asdict(self) | {
            "num_selected": self.num_selected, "shape": list(self.counts.shape), "bytes": size,
            "counts": base64.b64encode(self.counts.astype(f"<u{size}").tobytes()).decode(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Densities:
    """The fullest matrices, and how many others with selected weights had no room."""

    matrices: tuple[MatrixDensity, ...]
    num_left_out: int

    def to_json(self) -> dict[str, Any]:
        return {"matrices": [matrix.to_json() for matrix in self.matrices], "num_left_out": self.num_left_out}


def densities(selection: Selection, *, max_cells: int = MAX_CELLS) -> Densities:
    """The fullest matrices with their bins.

    Args:
        selection: the K selected weights.
        max_cells: bins of all matrices together; at least one matrix is kept.
    """
    counts = selection.per_matrix_counts()
    tensors = {name: selection.layout.tensors[name] for name in selection.coordinates}
    num_filled = sum(1 for t in tensors.values() for matrix in t.matrices if counts[matrix.name])
    for most in BINS:
        kept = _fullest(tensors, counts, most, max_cells)
        if len(kept) >= min(num_filled, ENOUGH):
            break
    found = [each for name, tensor in tensors.items() for each in _of_tensor(tensor, selection[name], kept, most)]
    return Densities(matrices=tuple(found), num_left_out=num_filled - len(kept))


def _fullest(tensors: Mapping[str, TensorLayout], counts: Mapping[str, int], most: int, max_cells: int) -> set[str]:
    """Names of the matrices with most selected weights whose bins, up to `most` on a side, fit together."""
    bins = {
        matrix.name: math.prod(_bins(tensor, number % len(tensor.parts), most))
        for tensor in tensors.values()
        for number, matrix in enumerate(tensor.matrices)
        if counts[matrix.name]
    }
    kept: set[str] = set()
    for name in sorted(bins, key=lambda name: -counts[name]):
        max_cells -= bins[name] + _DESCRIPTION
        if max_cells < 0 and kept:
            break
        kept.add(name)
    return kept


def _of_tensor(tensor: TensorLayout, flat_index: Tensor, kept: set[str], most: int) -> Iterator[MatrixDensity]:
    numbers = [number for number, matrix in enumerate(tensor.matrices) if matrix.name in kept]
    if not numbers:
        return
    parts = len(tensor.parts)
    grids = {number: torch.zeros(_bins(tensor, number % parts, most), dtype=torch.int64) for number in numbers}
    for chunk in flat_index.split(_CHUNK):
        expert, part, row, column = tensor.coordinates(chunk)
        members = _by_matrix(expert * parts + part, tensor.num_matrices)
        for number in numbers:
            mine = members[number]
            height, width = grids[number].shape
            rows, columns = _extent(tensor, number % parts)
            places = (row[mine] * height // rows) * width + column[mine] * width // columns
            grids[number] += torch.bincount(places, minlength=height * width).view(height, width)
    for number in numbers:
        yield _density(tensor, tensor.matrices[number], number % parts, grids[number].numpy())


def _by_matrix(ordinal: Tensor, num_matrices: int) -> Sequence[Tensor | slice]:
    """Where the coordinates of each matrix stand in a chunk."""
    if num_matrices == 1:
        return [slice(None)]  # most tensors; sorting would take half of the time
    sizes = torch.bincount(ordinal, minlength=num_matrices)
    return ordinal.argsort(stable=True).split(sizes.tolist())


def _density(tensor: TensorLayout, matrix: Matrix, part: int, counts: np.ndarray) -> MatrixDensity:
    rows, columns = _extent(tensor, part)
    heads, beside = tensor.num_heads(part), tensor.heads_are_columns
    neurons = {"gate": "row", "up": "row", "down": "column"}.get(matrix.component)
    return MatrixDensity(
        name=matrix.name, stack=matrix.stack, layer=matrix.layer, expert=matrix.expert,
        component=component_label((matrix.component, matrix.shared_expert)),
        rows=rows, columns=columns, row_heads=0 if beside else heads, column_heads=heads if beside else 0,
        row_unit="neuron" if neurons == "row" else "output", column_unit="neuron" if neurons == "column" else "input",
        counts=counts,
    )  # fmt: skip


def _extent(tensor: TensorLayout, part: int) -> tuple[int, int]:
    return max(1, tensor.num_rows(part)), max(1, tensor.num_columns(part))


def _bins(tensor: TensorLayout, part: int, most: int) -> tuple[int, int]:
    heads = tensor.num_heads(part)
    rows, columns = _extent(tensor, part)
    beside = tensor.heads_are_columns
    return _bins_of_side(rows, 0 if beside else heads, most), _bins_of_side(columns, heads if beside else 0, most)


def _bins_of_side(extent: int, heads: int, most: int) -> int:
    """At most `most`, but for heads a bin each up to twice as many."""
    if heads <= 1:
        return min(most, extent)
    if heads <= 2 * most:
        return min(heads * max(1, most // heads), extent)
    return next(bins for bins in range(most, 0, -1) if heads % bins == 0)
