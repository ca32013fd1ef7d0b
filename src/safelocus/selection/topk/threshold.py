"""The k-th score, found by counting: two passes over all scores, whatever n and k are.

One pass counts the high 15 bits of every score, which finds the 1/32768th of the number line that holds the k-th
score; the second counts the low 16 bits within it, which fixes the k-th score itself. Counts add up, so processes
that hold shards can sum theirs.

Input: scores. Output: `Threshold`, and what `gather` finds above it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from safelocus.errors import SelectionError
from safelocus.selection.topk.chunks import ABSOLUTE, Which, chunks, places

_LOW_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where the k-th score lies: what is above `key` is taken, and the first `num_ties` equal to it."""

    key: int
    num_ties: int


def find_threshold(
    scores: Mapping[str, Tensor],
    k: int,
    *,
    which: Which = "top",
    chunk_size: int | None = None,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Threshold:
    """Two passes over the scores; raises SelectionError when fewer than `k` are eligible.

    `total` makes the counts of these scores into those of all, where processes hold shards.
    """
    high = total(histogram(scores, which=which, chunk_size=chunk_size))
    check_count(k, int(high.sum()))
    if k == 0:
        return Threshold(key=ABSOLUTE, num_ties=0)
    high_bin, num_above = find_bin(high, k)
    low = total(refine(scores, high_bin, which=which, chunk_size=chunk_size))
    low_bin, num_above_in_bin = find_bin(low, k - num_above)
    return Threshold(key=(high_bin << _LOW_BITS) | low_bin, num_ties=k - num_above - num_above_in_bin)


def histogram(
    scores: Mapping[str, Tensor],
    *,
    which: Which = "top",
    shift: int = _LOW_BITS,
    chunk_size: int | None = None,
) -> Tensor:
    """How many scores have each pattern of high bits: int64 [2**(31 - shift)], on the CPU.

    Bins ascend with the score for "top" and descend for "bottom". With a shift of 16 the exponent and
    7 bits of the mantissa remain: a bin is at most 2**-7 of its lower edge wide.
    """
    found = (
        (keys[keys >= 0] if some_excluded else keys) >> shift
        for name in scores
        for _, _, keys, some_excluded in chunks(scores[name], which, name, chunk_size)
    )
    return _count(found, 1 << (31 - shift))


def refine(
    scores: Mapping[str, Tensor], high_bin: int, *, which: Which = "top", chunk_size: int | None = None
) -> Tensor:
    """How many scores inside one high bin have each pattern of low bits: int64 [2**16], on the CPU."""
    num_bins = 1 << _LOW_BITS
    found = (
        keys[places((keys >> _LOW_BITS) == high_bin)] & (num_bins - 1)
        for name in scores
        for _, _, keys, _ in chunks(scores[name], which, name, chunk_size)
    )
    return _count(found, num_bins)


def count_ties(
    scores: Mapping[str, Tensor], key: int, *, which: Which = "top", chunk_size: int | None = None
) -> Tensor:
    """How many scores of each tensor lie exactly at the threshold `key`: int64 [tensors], on the CPU."""
    found = []
    for name in scores:
        ties = [(keys == key).count_nonzero() for *_, keys, _ in chunks(scores[name], which, name, chunk_size)]
        found.append(torch.stack(ties).sum().cpu() if ties else torch.zeros((), dtype=torch.int64))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)


def _count(found: Iterable[Tensor], num_bins: int) -> Tensor:
    """How often each bin is found: int64 [num_bins], on the CPU; counted where the bins are."""
    counts = torch.zeros(num_bins, dtype=torch.int64)
    for bins in found:
        counts = counts.to(bins.device)
        if bins.device.type == "cpu":  # unlike torch.bincount, this costs nothing per bin
            counts.index_add_(0, bins, torch.ones((), dtype=torch.int64).expand(bins.shape))
        else:
            counts += torch.bincount(bins, minlength=num_bins)
    return counts.cpu()


def find_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th highest (k >= 1), and how many lie in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_above, k))  # the first running total that reaches k
    num_above = int(from_above[position - 1]) if position else 0
    return counts.numel() - 1 - position, num_above


def gather(
    scores: Tensor,
    threshold: int,
    num_ties: int,
    *,
    which: Which = "top",
    offset: int = 0,
    name: str = "",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """What lies above the threshold, and the first `num_ties` equal to it.

    `offset` is the flat index of the first element, for a shard of a larger tensor. Returns int64 flat
    indices [k], float32 scores [k], both on the CPU, and the number of ties taken.
    """
    indices, values, num_taken = [], [], 0
    for start, chunk, keys, _ in chunks(scores, which, name, chunk_size):
        num_left = num_ties - num_taken
        local = places(keys >= threshold if num_left else keys > threshold)
        if num_left and local.numel():
            is_tie = keys[local] == threshold
            tie_rank = is_tie.cumsum(0)  # 1-based; int64
            num_found = int(tie_rank[-1])
            if num_found > num_left:
                local = local[~is_tie | (tie_rank <= num_left)]
            num_taken += min(num_found, num_left)
        if local.numel():
            values.append(chunk[local].cpu())
            indices.append(local.cpu().add_(offset + start))  # int64: safe above 2**31
    if not indices:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32), 0
    return torch.cat(indices), torch.cat(values), num_taken


def check_count(k: int, num_eligible: int) -> None:
    """Raise SelectionError unless 0 <= k <= num_eligible."""
    if k < 0:
        raise SelectionError(f"cannot select {k} weights: the number must not be negative")
    if k > num_eligible:
        raise SelectionError(
            f"cannot select {k} weights: only {num_eligible} are eligible. Ask for at most {num_eligible}."
        )
