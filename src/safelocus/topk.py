"""Exact global top-k, bottom-k and random-k over a stream of named score tensors.

    K = { i : rank of score_i among all n scores <= k }    ties: score, then tensor order, then flat index

Input: a mapping of names to non-negative, finite float32 tensors of any shape, in tensor order. The
mapping may load its tensors lazily: each pass asks for one tensor at a time, and three passes are made
whatever n and k are. `-inf` marks a weight that is not eligible: it is never counted nor picked. NaN,
`+inf` and other negative numbers are errors that name the tensor.

The bits of a non-negative float32 order like the integer they spell. One pass counts the high 15 bits
of every score, which finds the 1/32768th of the number line that holds the k-th score; the second
counts the low 16 bits within it, which fixes the k-th score itself; the third gathers what lies above,
and the first of the ties. Nothing is sorted or sampled, and nothing larger than a chunk is copied
(a tensor that is not contiguous is, once per pass).

Counts add up: where scores are sharded (see `distributed`), every process counts its own rows, the counts
are summed, all agree on the threshold, and each gathers alone, with its share of the ties. A fourth pass
counts those. The outcome, on every process, is that of a single one.

Output: `Picked`, int64 flat indices (ascending) and float32 scores per tensor, on the CPU.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from safelocus import distributed
from safelocus.errors import NumericalError, SelectionError

Which = Literal["top", "bottom", "random"]
Reduce = Literal["mean", "sum"]

_LOW_BITS = 16
_HIGH_BITS = 31 - _LOW_BITS  # the sign bit of a non-negative number is zero
_LARGEST_FINITE = 0x7F7FFFFF  # bits of the largest finite float32
_ABSOLUTE = 0x7FFFFFFF  # every bit but the sign
_EXCLUDED = -1  # the key of a weight that may not be picked, below every other key
_DENSE = 32  # a random draw of more than this fraction of all uses a mask
_CHUNK_CPU = 1 << 15  # the most that torch does in one thread: no barriers to wait at on a busy machine
_CHUNK_ACCELERATOR = 1 << 24  # large enough to hide the launch of a kernel


@dataclass(frozen=True, kw_only=True)
class Picked:
    """Coordinates taken from a stream of tensors; tensors from which nothing was taken are left out.

    `indices`: name -> int64 [k of this tensor], flat, ascending. `scores`: name -> float32, aligned.
    `num_groups`: how many groups were taken, where groups were ranked instead of weights.
    """

    indices: dict[str, Tensor]
    scores: dict[str, Tensor]
    num_groups: int | None = None

    @property
    def num_weights(self) -> int:
        return sum(index.numel() for index in self.indices.values())


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where the k-th score lies: what is above `key` is taken, and the first `num_ties` equal to it."""

    key: int
    num_ties: int


def pick(
    scores: Mapping[str, Tensor],
    k: int,
    *,
    which: Which = "top",
    seed: int = 0,
    chunk_size: int | None = None,
) -> Picked:
    """Exactly `k` weights: the highest, the lowest, or a uniform draw without replacement.

    Raises SelectionError when fewer than `k` are eligible, NumericalError for scores that are not
    finite and non-negative. The result does not depend on `chunk_size`.
    """
    sharded = distributed.any_sharded(scores)
    if which == "random":
        scores = distributed.Each(distributed.whole, scores) if sharded else scores
        sizes = {name: count_eligible(scores[name], chunk_size=chunk_size) for name in scores}
        return take(scores, random_k(sizes, k, seed=seed), chunk_size=chunk_size)
    if sharded:
        return _pick_from_shards(scores, k, which, chunk_size)
    threshold = find_threshold(scores, k, which=which, chunk_size=chunk_size)
    indices, values = {}, {}
    num_ties = threshold.num_ties
    for name in scores:
        index, value, num_taken = gather(
            scores[name], threshold.key, num_ties, which=which, name=name, chunk_size=chunk_size
        )
        num_ties -= num_taken
        if index.numel():
            indices[name], values[name] = index, value
    picked = Picked(indices=indices, scores=values)
    assert picked.num_weights == k, (picked.num_weights, k)
    return picked


def _pick_from_shards(scores: Mapping[str, Tensor], k: int, which: Which, chunk_size: int | None) -> Picked:
    """`pick` where every process holds some rows of each tensor; all of them get all coordinates."""
    held = distributed.Each(distributed.held, scores)
    threshold = find_threshold(held, k, which=which, chunk_size=chunk_size, total=distributed.all_reduce_sum)
    own_ties = count_ties(held, threshold.key, which=which, chunk_size=chunk_size)
    ties = torch.stack(distributed.gather_objects(own_ties), dim=1)  # [tensors, processes]: the order of flat indices
    before = (ties.flatten().cumsum(0).view_as(ties) - ties)[:, distributed.rank()]
    quotas = (threshold.num_ties - before).clamp_min(0).tolist()
    own: dict[str, tuple[Tensor, Tensor]] = {}
    for name, quota in zip(scores, quotas, strict=True):
        tensor = scores[name]
        offset = distributed.flat_offset(tensor)
        index, value, _ = gather(
            distributed.held(tensor), threshold.key, quota, which=which, offset=offset, name=name, chunk_size=chunk_size
        )
        if index.numel():
            own[name] = index, value
    parts = distributed.gather_objects(own)
    found = {name: [part[name] for part in parts if name in part] for name in scores}
    picked = Picked(
        indices={name: torch.cat([index for index, _ in pieces]) for name, pieces in found.items() if pieces},
        scores={name: torch.cat([value for _, value in pieces]) for name, pieces in found.items() if pieces},
    )
    assert picked.num_weights == k, (picked.num_weights, k)
    return picked


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
        return Threshold(key=_ABSOLUTE, num_ties=0)
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
    counts = torch.zeros(1 << (31 - shift), dtype=torch.int64)
    for name in scores:
        for _, _, keys, some_excluded in _chunks(scores[name], which, name, chunk_size):
            eligible = keys[keys >= 0] if some_excluded else keys
            _count_into(counts, eligible >> shift)
    return counts


def refine(
    scores: Mapping[str, Tensor], high_bin: int, *, which: Which = "top", chunk_size: int | None = None
) -> Tensor:
    """How many scores inside one high bin have each pattern of low bits: int64 [2**16], on the CPU."""
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for name in scores:
        for _, _, keys, _ in _chunks(scores[name], which, name, chunk_size):
            inside = keys[_places((keys >> _LOW_BITS) == high_bin)]
            _count_into(counts, inside & (counts.numel() - 1))
    return counts


def count_ties(
    scores: Mapping[str, Tensor], key: int, *, which: Which = "top", chunk_size: int | None = None
) -> Tensor:
    """How many scores of each tensor lie exactly at the threshold `key`: int64 [tensors], on the CPU."""
    found = [
        sum(int((keys == key).count_nonzero()) for *_, keys, _ in _chunks(scores[name], which, name, chunk_size))
        for name in scores
    ]
    return torch.tensor(found, dtype=torch.int64)


def _count_into(counts: Tensor, bins: Tensor) -> None:
    """Add one to the count of each bin. On the CPU unlike torch.bincount's, the cost is of `bins` only."""
    if bins.device.type == "cpu":
        counts.index_add_(0, bins, torch.ones((), dtype=torch.int64).expand(bins.shape))
    else:
        counts += torch.bincount(bins, minlength=counts.numel()).cpu()


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
    for start, chunk, keys, _ in _chunks(scores, which, name, chunk_size):
        num_left = num_ties - num_taken
        local = _places(keys >= threshold if num_left else keys > threshold)
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


def count_eligible(scores: Tensor, *, chunk_size: int | None = None) -> int:
    """How many elements are not marked with -inf."""
    return sum(int((chunk != -torch.inf).count_nonzero()) for _, chunk in _slices(scores, chunk_size))


def take(scores: Mapping[str, Tensor], ordinals: Mapping[str, Tensor], *, chunk_size: int | None = None) -> Picked:
    """Turn ordinals among the eligible elements (int64, ascending) into coordinates with their scores."""
    indices, values = {}, {}
    for name, ordinal in ordinals.items():
        flat = scores[name].detach().reshape(-1)
        if count_eligible(flat, chunk_size=chunk_size) == flat.numel():
            index = ordinal
        else:
            index = _places(flat != -torch.inf).cpu()[ordinal]
        indices[name] = index
        values[name] = flat[index.to(flat.device)].cpu()
    return Picked(indices=indices, scores=values)


def random_k(sizes: Mapping[str, int], k: int, *, seed: int) -> dict[str, Tensor]:
    """Draw `k` of sum(sizes) elements uniformly without replacement: name -> ascending int64 ordinals.

    Depends on the seed, the sizes and their order only; uses O(k) memory. As many as are missing are
    drawn independently, repeats are dropped, and so on until none is missing: which numbers are in no
    way enters the rule, so by symmetry every k-subset is equally likely. Above one half the complement
    is drawn instead, so that repeats stay rare.
    """
    total = sum(sizes.values())
    check_count(k, total)
    generator = np.random.Generator(np.random.PCG64(seed))
    if k > total // _DENSE:  # a byte per element is within O(k), and faster than sorting
        is_drawn = np.zeros(total, dtype=np.bool_)
        num_missing = min(k, total - k)
        while num_missing:
            fresh = _distinct(generator.integers(total, size=num_missing, dtype=np.int64))
            fresh = fresh[~is_drawn[fresh]]
            is_drawn[fresh] = True
            num_missing -= fresh.size
        return _split_by_size(np.flatnonzero(is_drawn if 2 * k <= total else ~is_drawn), sizes)
    drawn = np.empty(0, dtype=np.int64)
    while drawn.size < k:
        fresh = generator.integers(total, size=k - drawn.size, dtype=np.int64)
        drawn = _distinct(np.concatenate([drawn, fresh]))
    return _split_by_size(drawn, sizes)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Ascending, without repeats; sorts in place. (np.unique hashes integers: slower, and more memory.)"""
    numbers.sort()
    is_first = np.ones(numbers.size, dtype=np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=is_first[1:])
    return numbers[is_first]


def _split_by_size(ordinals: np.ndarray, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Cut ascending ordinals over all tensors into ordinals within each; empty tensors are left out."""
    split, start = {}, 0
    first = 0
    for name, size in sizes.items():
        last = int(np.searchsorted(ordinals, start + size))
        if last > first:
            split[name] = torch.from_numpy(ordinals[first:last] - start)
        first, start = last, start + size
    return split


class Groups(Protocol):
    """Which group each weight belongs to; `safelocus.layout.Groups` is one."""

    num_groups: int

    def sum_into(self, totals: Tensor, name: str, values: Tensor) -> None:
        """Add `values` (of tensor `name`'s shape) per group to `totals` [num_groups], in its dtype."""

    def expand(self, name: str, per_group: Tensor) -> Tensor:
        """Each weight's entry of `per_group` [num_groups]: a tensor of tensor `name`'s shape."""


def pick_groups(
    scores: Mapping[str, Tensor],
    k: int,
    groups: Groups,
    *,
    which: Which = "top",
    reduce: Reduce = "mean",
    seed: int = 0,
) -> Picked:
    """Whole groups of weights (rows, heads, experts, ...) whose sizes add up to at most `k`.

    Groups are ranked by the mean or sum of their scores in float64 (or shuffled, for "random"; ties by
    group number) and taken in that order until the next one would exceed `k`. There the taking stops,
    even if a later, smaller group would still fit: a group taken never ranks below one left out. Weights
    that are not eligible count for nothing and are not taken with their group. Two passes over the
    scores; extra memory is a few bytes per weight of one tensor. Sharded scores are gathered one tensor at a
    time, and every process ranks the groups.
    """
    if distributed.any_sharded(scores):
        scores = distributed.Each(distributed.whole, scores)
    sums = torch.zeros(groups.num_groups, dtype=torch.float64)
    sizes = torch.zeros(groups.num_groups, dtype=torch.int64)
    for name in scores:
        tensor, some_excluded = scores[name].detach(), False
        for *_, chunk_excluded in _chunks(tensor, "top", name, None):  # raises for NaN and the like
            some_excluded |= chunk_excluded
        is_eligible = torch.ones((), dtype=torch.bool, device=tensor.device).expand(tensor.shape)
        if some_excluded:
            is_eligible = tensor != -torch.inf
            tensor = tensor.masked_fill(~is_eligible, 0.0)
        groups.sum_into(sums, name, tensor.contiguous())
        groups.sum_into(sizes, name, is_eligible)
    check_count(k, int(sizes.sum()))
    chosen = _choose_groups(sums / sizes if reduce == "mean" else sums, sizes, k, which, seed)
    indices, values = {}, {}
    for name in scores:
        flat = scores[name].detach().reshape(-1)
        is_chosen = groups.expand(name, chosen.to(flat.device)).reshape(-1)
        found = []
        for start, chunk in _slices(flat, None):
            inside = is_chosen[start : start + chunk.numel()] & (chunk != -torch.inf)
            found.append(_places(inside).cpu() + start)
        index = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        if index.numel():
            indices[name], values[name] = index, flat[index.to(flat.device)].cpu()
    return Picked(indices=indices, scores=values, num_groups=int(chosen.sum()))


def _choose_groups(ranked_by: Tensor, sizes: Tensor, k: int, which: Which, seed: int) -> Tensor:
    """bool [num_groups]: the first groups whose sizes add up to at most k. Empty groups are never chosen."""
    candidates = sizes.nonzero().squeeze(1)
    if which == "random":
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(candidates.numel())
        order = candidates[torch.from_numpy(shuffled)]
    else:
        order = candidates[torch.argsort(ranked_by[candidates], descending=which == "top", stable=True)]
    fits = sizes[order].cumsum(0) <= k  # sizes are positive, so this is a prefix
    chosen = torch.zeros(sizes.numel(), dtype=torch.bool)
    chosen[order[fits]] = True
    return chosen


def check_count(k: int, num_eligible: int) -> None:
    """Raise SelectionError unless 0 <= k <= num_eligible."""
    if k < 0:
        raise SelectionError(f"cannot select {k} weights: the number must not be negative")
    if k > num_eligible:
        raise SelectionError(
            f"cannot select {k} weights: only {num_eligible} are eligible. Ask for at most {num_eligible}."
        )


def _places(mask: Tensor) -> Tensor:
    """Where a flat mask is true: int64 [k], ascending. numpy's scan is twice as fast as torch's."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _slices(scores: Tensor, chunk_size: int | None) -> Iterator[tuple[int, Tensor]]:
    """(flat index of the first element, flat chunk), in order."""
    if chunk_size is None:
        chunk_size = _CHUNK_CPU if scores.device.type == "cpu" else _CHUNK_ACCELERATOR
    start = 0
    for chunk in scores.detach().reshape(-1).split(chunk_size):
        yield start, chunk
        start += chunk.numel()


def _chunks(
    scores: Tensor, which: Which, name: str, chunk_size: int | None
) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """(flat index of the first element, chunk, int32 keys that rank it, whether some are excluded)."""
    if scores.dtype != torch.float32:
        raise SelectionError(f"scores of {name!r} are {scores.dtype}: expected torch.float32. Convert them first.")
    for start, chunk in _slices(scores, chunk_size):
        if not chunk.numel():
            continue
        keys = chunk.view(torch.int32)
        lowest, highest = (int(bound) for bound in keys.aminmax())
        is_excluded = None
        if lowest < 0 or highest > _LARGEST_FINITE:
            is_excluded = chunk == -torch.inf
            if not bool((is_excluded | (chunk.isfinite() & (chunk >= 0))).all()):
                raise NumericalError(_complaint(scores, name, chunk_size))
            keys = keys & _ABSOLUTE  # -0.0 ranks as 0.0
        if which == "bottom":
            keys = keys ^ _ABSOLUTE  # reverses the order
        if is_excluded is not None:
            keys = keys.masked_fill(is_excluded, _EXCLUDED)
        yield start, chunk, keys, is_excluded is not None


def _complaint(scores: Tensor, name: str, chunk_size: int | None) -> str:
    num_nan = num_infinite = num_negative = 0
    for _, chunk in _slices(scores, chunk_size):
        num_nan += int(chunk.isnan().count_nonzero())
        num_infinite += int((chunk == torch.inf).count_nonzero())
        num_negative += int(((chunk < 0) & chunk.isfinite()).count_nonzero())
    return (
        f"scores of {name!r} cannot be ranked: of {scores.numel()} there are {num_nan} NaN, {num_infinite} "
        f"infinite and {num_negative} negative. Expected finite, non-negative numbers. Look for the batch "
        "in which the gradients overflowed, or compute them in float32."
    )
