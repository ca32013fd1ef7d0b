"""Scores in chunks, as integers that rank them; and what is picked of them, whichever way.

The bits of a non-negative float32 order like the integer they spell, so a score's key is its bits; for "bottom" they
are turned round. `-inf` marks a weight that is not eligible: its key lies below every other.

Input: one score tensor of any shape. Output: flat chunks with their keys, in order. NaN, `+inf` and other negative
numbers are errors that name the tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from safelocus.errors import NumericalError, SelectionError

Which = Literal["top", "bottom", "random"]

ABSOLUTE = 0x7FFFFFFF  # every bit but the sign
_LARGEST_FINITE = 0x7F7FFFFF  # bits of the largest finite float32
_EXCLUDED = -1  # the key of a weight that may not be picked, below every other key
_CHUNK_CPU = 1 << 15  # the most that torch does in one thread: no barriers to wait at on a busy machine
_CHUNK_ACCELERATOR = 1 << 26  # nearly always a whole tensor: each chunk waits for the device


def reaching(keys: Tensor, least: int) -> Tensor:
    """Where keys are at least `least`: int64 [k], ascending."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(keys.numpy() >= least))
    return (keys >= least).nonzero().squeeze(1)


def places(mask: Tensor) -> Tensor:
    """Where a flat mask is true: int64 [k], ascending. numpy's scan is twice as fast as torch's."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def slices(scores: Tensor, chunk_size: int | None) -> Iterator[tuple[int, Tensor]]:
    """(flat index of the first element, flat chunk), in order."""
    if chunk_size is None:
        chunk_size = _CHUNK_CPU if scores.device.type == "cpu" else _CHUNK_ACCELERATOR
    start = 0
    for chunk in scores.detach().reshape(-1).split(chunk_size):
        yield start, chunk
        start += chunk.numel()


def chunks(
    scores: Tensor, which: Which, name: str, chunk_size: int | None
) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """(flat index of the first element, chunk, int32 keys that rank it, whether some are excluded)."""
    if scores.dtype != torch.float32:
        raise SelectionError(f"scores of {name!r} are {scores.dtype}: expected torch.float32. Convert them first.")
    for start, chunk in slices(scores, chunk_size):
        if not chunk.numel():
            continue
        keys = chunk.view(torch.int32)
        lowest, highest = torch.stack(keys.aminmax()).tolist()
        is_excluded = None
        if lowest < 0 or highest > _LARGEST_FINITE:
            is_excluded = chunk == -torch.inf
            if not bool((is_excluded | (chunk.isfinite() & (chunk >= 0))).all()):
                raise NumericalError(_complaint(scores, name, chunk_size))
            keys = keys & ABSOLUTE  # -0.0 ranks as 0.0
        if which == "bottom":
            keys = keys ^ ABSOLUTE  # reverses the order
        if is_excluded is not None:
            keys = keys.masked_fill(is_excluded, _EXCLUDED)
        yield start, chunk, keys, is_excluded is not None


def _complaint(scores: Tensor, name: str, chunk_size: int | None) -> str:
    num_nan = num_infinite = num_negative = 0
    for _, chunk in slices(scores, chunk_size):
        num_nan += int(chunk.isnan().count_nonzero())
        num_infinite += int((chunk == torch.inf).count_nonzero())
        num_negative += int(((chunk < 0) & chunk.isfinite()).count_nonzero())
    return (
        f"scores of {name!r} cannot be ranked: of {scores.numel()} there are {num_nan} NaN, {num_infinite} "
        f"infinite and {num_negative} negative. Expected finite, non-negative numbers. Look for the batch "
        "in which the gradients overflowed, or compute them in float32."
    )


@dataclass(frozen=True, kw_only=True)
class Picked:
    """Coordinates taken from a stream of tensors; tensors from which nothing was taken are left out.

    `indices`: name -> int64 [k of this tensor], flat, ascending. `scores`: name -> float32, aligned.
    """

    indices: dict[str, Tensor]
    scores: dict[str, Tensor]

    @property
    def num_weights(self) -> int:
        return sum(index.numel() for index in self.indices.values())

    def cpu(self) -> "Picked":
        """The same on the CPU."""
        return replace(
            self,
            indices={name: index.cpu() for name, index in self.indices.items()},
            scores={name: score.cpu() for name, score in self.scores.items()},
        )
