"""Follow elements through code that only rearranges tensors: stacks, concatenates, transposes, cuts, reshapes.

transformers 5 keeps some weights in another form than their files (experts fused, query, key and value
joined, ...) and converts them while loading. Which element of which file an element in memory came from is
found by running that very conversion on tensors without values (meta device) and recording, below autograd,
what every copying operation was. An element's place is then pulled back through the record: a view is
undone by its strides, a copy by its coordinates, a concatenation or stack by finding the operand.

    with Rearrangement() as recorded:
        fused = torch.stack([recorded.source("a", (2, 3)), recorded.source("b", (2, 3))])
    recorded.origins(fused, torch.tensor([7]))      # [Origin(name="b", positions=[0], index=[1])]

Nothing is allocated but the coordinates asked for. An operation that computes instead of rearranging is an
error that names it, raised when an element that went through it is asked for.

The record of tensors with values can be undone: what was written into the results since goes back, copy by copy, to
where it came from.

    with Rearrangement() as recorded:
        fused = torch.stack([recorded.follow("a", a), recorded.follow("b", b)])
    fused[0] = 1.0
    recorded.undo()                                                         # a is 1.0 everywhere
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safelocus.errors import ModelError

_COPIES = {"aten::clone", "aten::_to_copy", "aten::contiguous", "aten::_reshape_copy"}
_JOINS = {"aten::cat", "aten::stack"}
_CHUNK = 1 << 22  # coordinates followed at once: each takes a few int64 of scratch


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Where some of the elements asked for come from: one source.

    Attributes:
        name: of the source.
        positions: int64 [k], which of the elements asked for.
        index: int64 [k], flat indices into the source, aligned with them.
    """

    name: str
    positions: Tensor
    index: Tensor


@dataclass(frozen=True)
class _Source:
    name: str


@dataclass(frozen=True)
class _Made:
    operation: str
    output: Tensor
    inputs: Sequence[Tensor]
    dim: int


class Rearrangement(TorchDispatchMode):
    """Within the block: records what happens to tensors of `source`."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, _Source | _Made] = {}
        self._tape: list[_Made] = []
        self._alive: list[Tensor] = []  # a freed storage's address would be used again

    def source(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor without values whose elements will be recognised."""
        return self.follow(name, torch.empty(tuple(shape), device="meta"))

    def follow(self, name: str, tensor: Tensor) -> Tensor:
        """The same tensor; its elements will be recognised."""
        self._alive.append(tensor)
        self._made[_storage(tensor)] = _Source(name)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, list | tuple) else [result]:
            # what is written in place is computed, wherever it lay before
            if isinstance(output, Tensor) and (func._schema.is_mutable or _storage(output) not in self._made):
                operation = func._schema.name
                inputs = list(args[0]) if operation in _JOINS else [a for a in args if isinstance(a, Tensor)]
                dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) if operation in _JOINS else 0
                self._alive.append(output)
                made = _Made(operation, output, inputs, dim % max(output.dim(), 1))
                self._made[_storage(output)] = made
                if inputs:  # else it is a source to be
                    self._tape.append(made)
        return result

    @property
    def computed(self) -> str | None:
        """An operation that computed instead of rearranging; None where there was none."""
        return next((made.operation for made in self._tape if made.operation not in _COPIES | _JOINS), None)

    @torch.no_grad()
    def undo(self) -> None:
        """Carry what the results hold now back into the sources; only copies and joins were recorded."""
        assert self.computed is None, self.computed
        for made in reversed(self._tape):
            if made.operation in _COPIES:
                parts: Sequence[Tensor] = [made.output]
            elif made.operation == "aten::stack":
                parts = made.output.unbind(made.dim)
            else:
                parts = made.output.split([operand.shape[made.dim] for operand in made.inputs], made.dim)
            for operand, part in zip(made.inputs, parts, strict=made.operation in _JOINS):
                operand.copy_(part)

    def origins(self, tensor: Tensor, index: Tensor) -> list[Origin]:
        """Where the elements at flat indices (int64 [k]) of a recorded tensor come from, one entry per source.

        Raises:
            ModelError: an element is not a mere copy of a source's element.
        """
        found: dict[str, list[Origin]] = {}
        for start in range(0, index.numel(), _CHUNK):
            part = index[start : start + _CHUNK]
            positions = torch.arange(start, start + part.numel())
            for origin in self._follow(tensor, _coordinates(part, tensor.shape), positions):
                found.setdefault(origin.name, []).append(origin)
        return [
            Origin(
                name=name,
                positions=torch.cat([part.positions for part in parts]),
                index=torch.cat([part.index for part in parts]),
            )
            for name, parts in found.items()
        ]

    def _follow(self, tensor: Tensor, coordinates: list[Tensor], positions: Tensor) -> Iterator[Origin]:
        offset = torch.full_like(positions, int(tensor.storage_offset()))
        for coordinate, stride in zip(coordinates, tensor.stride(), strict=True):
            offset = offset + coordinate * stride
        made = self._made.get(_storage(tensor))
        if isinstance(made, _Source):
            yield Origin(name=made.name, positions=positions, index=offset)
            return
        if made is None or made.operation not in _COPIES | _JOINS:
            operation = "an operation out of sight" if made is None else made.operation
            raise ModelError(
                f"these weights are computed from those in the files ({operation}), not merely rearranged, so a change "
                "to them cannot be carried back. Apply the patch to the loaded model and save that"
            )
        output = made.output
        coordinates = [
            (offset // stride) % size for stride, size in zip(output.stride(), output.shape, strict=True)
        ]  # a fresh tensor is dense, so this inverts its strides
        if made.operation in _COPIES:
            yield from self._follow(made.inputs[0], coordinates, positions)
            return
        is_stack = made.operation == "aten::stack"
        sizes = torch.tensor([1 if is_stack else operand.shape[made.dim] for operand in made.inputs])
        ends = sizes.cumsum(0)
        operand_of = torch.bucketize(coordinates[made.dim], ends, right=True)
        order = operand_of.argsort(stable=True)
        counts = torch.bincount(operand_of, minlength=len(sizes)).tolist()
        for number, chosen in enumerate(order.split(counts)):
            if not chosen.numel():
                continue
            inner = [coordinate[chosen] for coordinate in coordinates]
            if is_stack:
                del inner[made.dim]
            else:
                inner[made.dim] = inner[made.dim] - (ends[number] - sizes[number])
            yield from self._follow(made.inputs[number], inner, positions[chosen])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _coordinates(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    return list(torch.unravel_index(index, tuple(shape))) if shape else []
