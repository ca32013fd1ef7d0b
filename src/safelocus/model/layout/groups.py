"""Groups of weights: which unit of a granularity each weight belongs to, over the whole model.

    granularity  one group is
    weight       one weight
    row          one output unit of one matrix
    column       one input unit of one matrix
    head         one attention head's rows (columns, for output projections) of one matrix;
                 a matrix without heads is one group
    neuron       one hidden unit of an MLP: the same unit of gate and up (rows) and down (column),
                 jointly across tensors, per layer and expert; elsewhere a row
    expert       all matrices of one expert of a layer, jointly across tensors (the shared expert is
                 one group); a matrix that is no expert's is one group
    matrix       one matrix
    layer        all eligible matrices of one layer; a matrix outside the layers is one group

Within one part of one tensor, ids are affine in the weight's coordinates:

    id = base + expert_stride * expert + unit // span,    unit = the weight's row or its column (or 0)

so nothing of the model's size is ever stored: ids are computed for given flat indices, and sums per
group by reducing axes. Ids run from 0 to num_groups - 1, in tensor order; at granularity "matrix"
they follow the order of the eligible matrices.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from safelocus.model.layout.tensor import GRANULARITIES, TensorLayout


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Ids of one part of one tensor."""

    base: int
    expert_stride: int
    side: str  # "row", "column", or "" when all of an expert's matrix is in one group
    span: int  # consecutive units that form one group
    num_units: int  # rows or columns of the matrix; 1 without a side
    num_experts: int
    size: int  # weights that one expert's matrix adds to each of its groups

    def ids(self, device: torch.device | None = None) -> Tensor:
        """Group of each unit: int64 [num_experts, num_units]."""
        experts = torch.arange(self.num_experts, device=device) * self.expert_stride
        units = torch.arange(self.num_units, device=device) // self.span
        return self.base + experts[:, None] + units


class Groups:
    """The groups of one granularity over some tensors, with ids comparable across them.

    Attributes: `granularity`; `tensors`, name -> TensorLayout; `num_groups`; `sizes`.
    """

    def __init__(self, tensors: Iterable[TensorLayout], granularity: str) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity {granularity!r} is not one of {', '.join(GRANULARITIES)}")
        self.granularity = granularity
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.num_groups = 0
        self._bases: dict[Hashable, int] = {}
        self._extents: dict[Hashable, int] = {}
        if granularity == "weight":
            for tensor in self.tensors.values():
                self._allocate(tensor.name, tensor.num_weights)
        else:
            self._plans = {
                name: tuple(self._plan(tensor, part) for part in range(len(tensor.parts)))
                for name, tensor in self.tensors.items()
            }

    def _allocate(self, key: Hashable, num_groups: int) -> int:
        """The first of `num_groups` consecutive ids; the same again for the same key, then of as many or fewer."""
        if key not in self._bases:
            self._bases[key] = self.num_groups
            self._extents[key] = num_groups
            self.num_groups += num_groups
        assert num_groups <= self._extents[key], f"{key}: {num_groups} groups where there were {self._extents[key]}"
        return self._bases[key]

    def _plan(self, tensor: TensorLayout, part: int) -> _Plan:
        component = tensor.parts[part][0]
        rows, columns, heads = tensor.num_rows(part), tensor.num_columns(part), tensor.num_heads(part)
        experts, num_parts = tensor.num_experts, len(tensor.parts)
        side, span = "", 1
        key: Hashable = None  # of groups that may hold other parts and tensors too
        if self.granularity in ("row", "column"):
            side = self.granularity
        elif self.granularity == "neuron":
            side = "column" if component == "down" else "row"
            if component in ("gate", "up", "down"):
                # the width keeps two unlike MLPs that share a module apart
                key = ("neuron", tensor.block, columns if component == "down" else rows)
        elif self.granularity == "head" and heads:
            side = "column" if tensor.heads_are_columns else "row"
            span = (columns if tensor.heads_are_columns else rows) // heads
        elif self.granularity == "expert":
            if tensor.fused_experts or tensor.expert is not None or tensor.shared_expert:
                number = "shared" if tensor.shared_expert else tensor.expert
                # a mixture of attentions (JetMoE) has experts of its own
                key = ("expert", tensor.stack, tensor.layer, component in ("gate", "up", "down"), number)
        elif self.granularity == "layer" and tensor.layer is not None:
            key = ("layer", tensor.stack, tensor.layer)

        num_units = {"row": rows, "column": columns, "": 1}[side]
        if side:
            stride = num_units // span
            base = self._allocate(key or (tensor.name, part), experts * stride)
        elif key is None:  # a group per matrix, in the order of tensor.matrices
            stride = num_parts
            base = self._allocate(tensor.name, experts * num_parts) + part
        else:
            stride = 0 if self.granularity == "layer" else 1
            base = self._allocate(key, experts if stride else 1)
        return _Plan(
            base=base,
            expert_stride=stride,
            side=side,
            span=span,
            num_units=num_units,
            num_experts=experts,
            size=rows * columns // num_units * span,
        )

    @cached_property
    def sizes(self) -> Tensor:
        """Weights in each group: int64 [num_groups]."""
        if self.granularity == "weight":
            return torch.ones((), dtype=torch.int64).expand(self.num_groups)
        sizes = torch.zeros(self.num_groups, dtype=torch.int64)
        for plans in self._plans.values():
            for plan in plans:
                ids = plan.ids()[:, :: plan.span].flatten()
                sizes.index_add_(0, ids, torch.full_like(ids, plan.size))
        return sizes

    def ids(self, name: str, flat_index: Tensor) -> Tensor:
        """Group of each flat index into tensor `name`: int64 [k] -> int64 [k]."""
        if self.granularity == "weight":
            return flat_index.to(torch.int64) + self._bases[name]
        expert, part, row, column = self.tensors[name].coordinates(flat_index)
        ids = torch.empty_like(expert)
        for number, plan in enumerate(self._plans[name]):
            unit = {"row": row, "column": column}.get(plan.side)
            found = plan.base + plan.expert_stride * expert
            found = found if unit is None else found + unit // plan.span
            ids = torch.where(part == number, found, ids) if number else found
        return ids

    def sum_into(self, totals: Tensor, name: str, values: Tensor) -> None:
        """Add `values` (of tensor `name`'s shape) per group to `totals` [num_groups], in its dtype.

        Reduces axes of views, so no id per weight is made.
        """
        tensor = self.tensors[name]
        if self.granularity == "weight":
            base = self._bases[name]
            totals[base : base + tensor.num_weights] += values.reshape(-1).to(totals.dtype)
            return
        view = values.view(tensor.view)
        for part, plan in enumerate(self._plans[name]):
            kept = self._kept_axes(tensor, plan)
            reduced = tuple(axis for axis in range(len(tensor.view)) if axis not in kept)
            sums = view[tensor.part_index(part)]
            sums = sums.sum(dim=reduced, dtype=totals.dtype) if reduced else sums.to(totals.dtype)
            totals.index_add_(0, plan.ids(totals.device).flatten(), sums.flatten().to(totals.device))

    def expand(self, name: str, per_group: Tensor) -> Tensor:
        """Each weight's entry of `per_group` [num_groups]: a new tensor of tensor `name`'s shape.

        With a boolean `per_group` this is the mask of the chosen groups' weights.
        """
        tensor = self.tensors[name]
        if self.granularity == "weight":
            base = self._bases[name]
            return per_group[base : base + tensor.num_weights].reshape(tensor.shape).clone()
        values = per_group.new_empty(tensor.view)
        for part, plan in enumerate(self._plans[name]):
            kept, extents = self._kept_axes(tensor, plan), tensor.extents(part)
            shape = [size if axis in kept else 1 for axis, size in enumerate(extents)]
            units = per_group[plan.ids(per_group.device)]
            values[tensor.part_index(part)] = units.reshape(shape)
        return values.reshape(tensor.shape)

    @staticmethod
    def _kept_axes(tensor: TensorLayout, plan: _Plan) -> tuple[int, ...]:
        """Axes of the view over which a part's ids vary, in order: experts, then units."""
        experts = (0,) if tensor.fused_experts else ()
        return experts + {"row": tensor.row_axes, "column": tensor.column_axes, "": ()}[plan.side]
