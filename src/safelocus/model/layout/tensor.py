"""One tensor of a model, understood as one or more logical weight matrices.

A fused tensor is viewed with its axes split by role, and a matrix is a basic index into that view:

    role     meaning                                                       side of the matrix
    expert   routed expert; one matrix per expert                          neither
    part     query | key | value, or gate | up, ...; one matrix per part   output
    head     attention head                                                output, or input beside `out`
    dim      channel of a head                                             output, or input beside `out`
    out, in  output and input units                                        output, input

A matrix's row is its output unit and its column its input unit, whatever the order in memory. Rows
count `head`, `part` (within the matrix's own extent) and `dim` in that order, so a head is always a
run of consecutive rows (columns where the heads are on the input side).

Splitting axes of a strided tensor never copies, so matrices are views: writing to one changes the
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

ELIGIBLE = (
    "query", "key", "value", "key_value", "output_gate", "beta", "decay", "output",  # attention, linear too
    "ssm_gate", "ssm_x", "ssm_b", "ssm_c", "ssm_dt", "ssm_output",  # state-space models
    "conv_b", "conv_c", "conv_x", "conv_output",  # gated short convolutions
    "laurel", "gate", "up", "down",
)  # fmt: skip
COMPONENTS = (*ELIGIBLE, "router", "norm", "embedding", "head", "bias", "adapter", "other", "unknown")
ROLES = ("expert", "part", "head", "dim", "out", "in")
GRANULARITIES = ("weight", "row", "column", "head", "neuron", "expert", "matrix", "layer")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One logical weight matrix: the unit for sigma and for every table."""

    name: str  # "model.layers.3.self_attn.qkv_proj.weight[query]", or the tensor's own name
    tensor: str  # canonical tensor name
    layer: int | None
    stack: str | None  # "encoder" or "decoder"; None in a decoder-only model
    component: str
    expert: int | None  # number of a routed expert
    shared_expert: bool = False
    index: tuple[int | slice, ...]  # into tensor.view(layout.view)
    num_weights: int
    eligible: bool


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """How one tensor divides into matrices. Plain data; nothing is allocated for its weights."""

    name: str  # canonical
    shape: tuple[int, ...]
    layer: int | None
    stack: str | None
    expert: int | None  # where each expert is a module of its own
    shared_expert: bool = False
    view: tuple[int, ...]  # shape once axes are split; as many elements as `shape`
    axes: tuple[str, ...]  # role of each axis of `view`
    source: tuple[int, ...]  # axis of `shape` that each axis of `view` comes from
    parts: tuple[tuple[str, int], ...]  # (component, extent along the part axis)
    block: str = field(default="", repr=False)  # module that holds the tensor's module: same MLP, same block

    def __post_init__(self) -> None:
        assert math.prod(self.view) == math.prod(self.shape), self
        assert len(self.view) == len(self.axes) == len(self.source), self
        assert "expert" not in self.axes[1:], f"{self.name}: the expert axis must come first"
        eligible = {component in ELIGIBLE for component, _ in self.parts}
        assert len(eligible) == 1, f"{self.name} mixes eligible and ineligible parts"

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def fused_experts(self) -> bool:
        """True when the tensor holds several experts, along its first axis."""
        return self.axes[:1] == ("expert",)

    @property
    def num_experts(self) -> int:
        """Experts along the tensor's own expert axis (1 without such an axis)."""
        return self.view[0] if self.fused_experts else 1

    @property
    def num_matrices(self) -> int:
        return self.num_experts * len(self.parts)

    @property
    def eligible(self) -> bool:
        return self.parts[0][0] in ELIGIBLE and self.num_weights > 0

    @property
    def part_axis(self) -> int | None:
        return self.axes.index("part") if "part" in self.axes else None

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(component for component, _ in self.parts)

    def _side(self, role: str) -> str:
        if role in ("head", "dim"):
            return "in" if "out" in self.axes else "out"
        return {"expert": "expert", "part": "out"}.get(role, role)

    @cached_property
    def row_axes(self) -> tuple[int, ...]:
        """Axes of `view` on the output side, in order."""
        return tuple(axis for axis, role in enumerate(self.axes) if self._side(role) == "out")

    @cached_property
    def column_axes(self) -> tuple[int, ...]:
        """Axes of `view` on the input side, in order."""
        return tuple(axis for axis, role in enumerate(self.axes) if self._side(role) == "in")

    @property
    def input_axis(self) -> int | None:
        """The axis of `shape` that runs over input units; None for a vector. What Wanda-like scores need."""
        return self.source[self.column_axes[-1]] if self.column_axes else None

    def extents(self, part: int) -> tuple[int, ...]:
        """Shape of one part in `view`: the part axis cut to the part's extent."""
        axis = self.part_axis
        return tuple(self.parts[part][1] if a == axis else size for a, size in enumerate(self.view))

    def num_rows(self, part: int) -> int:
        extents = self.extents(part)
        return math.prod(extents[axis] for axis in self.row_axes)

    def num_columns(self, part: int) -> int:
        extents = self.extents(part)
        return math.prod(extents[axis] for axis in self.column_axes)

    def num_heads(self, part: int) -> int:
        """Attention heads in a matrix of this part; 0 when it is not divided into heads."""
        if "head" not in self.axes and "dim" not in self.axes:
            return 0
        heads = self.view[self.axes.index("head")] if "head" in self.axes else 1
        # beside `dim`, the part axis counts heads: (part dim), or Falcon's (head part dim)
        return heads * self.parts[part][1] if {"part", "dim"} <= set(self.axes) else heads

    @property
    def heads_are_columns(self) -> bool:
        """True for output projections, whose heads lie on the input side."""
        return self._side("head") == "in"

    def part_index(self, part: int, expert: int | None = None) -> tuple[int | slice, ...]:
        """Basic index of a part into `view`, for one expert or (None) for all of them."""
        start = sum(extent for _, extent in self.parts[:part])
        extent = self.parts[part][1]
        cut: int | slice = start if extent == 1 and expert is not None else slice(start, start + extent)
        index: list[int | slice] = [cut if role == "part" else slice(None) for role in self.axes]
        if self.fused_experts and expert is not None:
            index[0] = expert
        return tuple(index)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Experts in order, and within each its parts in order."""
        return tuple(
            self._matrix(expert, part) for expert in range(self.num_experts) for part in range(len(self.parts))
        )

    def _matrix(self, expert: int, part: int) -> Matrix:
        component = self.parts[part][0]
        labels = [str(expert)] * self.fused_experts + [component] * ("part" in self.axes)
        return Matrix(
            name=f"{self.name}[{','.join(labels)}]" if labels else self.name,
            tensor=self.name,
            layer=self.layer,
            stack=self.stack,
            component=component,
            expert=expert if self.fused_experts else self.expert,
            shared_expert=self.shared_expert,
            index=self.part_index(part, expert),
            num_weights=math.prod(self.extents(part)) // self.num_experts,
            eligible=component in ELIGIBLE,
        )

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of `tensor` (of `shape`, any strides) as views, in the order of `matrices`."""
        assert tuple(tensor.shape) == self.shape, f"{self.name}: {tuple(tensor.shape)} is not {self.shape}"
        view = tensor.view(self.view)
        return [view[matrix.index] for matrix in self.matrices]

    def coordinates(self, flat_index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(expert, part, row, column) of each flat index: int64 [k] in, four int64 [k] out.

        Row and column are those of the index's own matrix. The tensor itself is never touched, so
        this works for tensors of any size, beyond 2**31 elements included.
        """
        coordinates: list[Tensor] = [flat_index] * len(self.view)
        rest = flat_index.to(torch.int64)
        for axis in range(len(self.view) - 1, -1, -1):
            coordinates[axis] = rest % self.view[axis]
            rest = rest // self.view[axis]
        zero = torch.zeros_like(rest)
        expert = coordinates[0] if self.fused_experts else zero
        part, extents = zero, list[int | Tensor](self.view)
        if self.part_axis is not None:
            sizes = torch.tensor([extent for _, extent in self.parts], device=rest.device)
            ends = sizes.cumsum(0)
            part = torch.bucketize(coordinates[self.part_axis], ends, right=True)
            coordinates[self.part_axis] = coordinates[self.part_axis] - (ends - sizes)[part]
            extents[self.part_axis] = sizes[part]
        row, column = zero, zero
        for axis in self.row_axes:
            row = row * extents[axis] + coordinates[axis]
        for axis in self.column_axes:
            column = column * extents[axis] + coordinates[axis]
        return expert, part, row, column

    def matrix_of(self, flat_index: Tensor) -> Tensor:
        """Ordinal into `matrices` of each flat index: int64 [k] -> int64 [k]."""
        expert, part, _, _ = self.coordinates(flat_index)
        return expert * len(self.parts) + part

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TensorLayout:
        return cls(
            name=values["name"],
            shape=tuple(values["shape"]),
            layer=values.get("layer"),
            stack=values.get("stack"),
            expert=values.get("expert"),
            shared_expert=values.get("shared_expert", False),
            view=tuple(values["view"]),
            axes=tuple(values["axes"]),
            source=tuple(values["source"]),
            parts=tuple((component, extent) for component, extent in values["parts"]),
            block=values["block"],
        )
