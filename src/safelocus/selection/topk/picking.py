"""Pick weights: the highest, the lowest, a uniform draw, or whole groups (rows, heads, experts, ...).

Input: scores by tensor name; for groups, which one each weight belongs to. Output: `Picked`, on the CPU.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from safelocus import distributed
from safelocus.model.layout import Groups
from safelocus.selection.topk.chunks import Picked, Which, chunks, places, slices
from safelocus.selection.topk.shortlist import shortlist
from safelocus.selection.topk.threshold import check_count, count_ties, find_threshold, gather

Reduce = Literal["mean", "sum"]
_DENSE = 32  # a random draw of more than this fraction of all uses a mask


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
        return _take(scores, random_k(sizes, k, seed=seed), sizes)
    if sharded:
        return pick_from_shards(scores, k, which, chunk_size)
    if (found := shortlist(scores, k, which=which, chunk_size=chunk_size)) is not None:
        return found.cpu()
    return pick_by_counting(scores, k, which=which, chunk_size=chunk_size)


def pick_by_counting(
    scores: Mapping[str, Tensor], k: int, *, which: Which = "top", chunk_size: int | None = None
) -> Picked:
    """`pick` for "top" and "bottom" in three passes, whatever the scores are."""
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


def count_eligible(scores: Tensor, *, chunk_size: int | None = None) -> int:
    """How many elements are not marked with -inf."""
    return sum(int((chunk != -torch.inf).count_nonzero()) for _, chunk in slices(scores, chunk_size))


def _take(scores: Mapping[str, Tensor], ordinals: Mapping[str, Tensor], num_eligible: Mapping[str, int]) -> Picked:
    """Turn ordinals among the eligible elements (int64, ascending) into coordinates with their scores."""
    indices, values = {}, {}
    for name, ordinal in ordinals.items():
        flat = scores[name].detach().reshape(-1)
        index = ordinal if num_eligible[name] == flat.numel() else places(flat != -torch.inf).cpu()[ordinal]
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


def pick_from_shards(scores: Mapping[str, Tensor], k: int, which: Which, chunk_size: int | None) -> Picked:
    """`pick` where every process holds some rows of each tensor (see `distributed`); all of them get all coordinates.

    Every process counts its own rows, the counts are summed, all agree on the threshold, and each gathers alone, with
    its share of the ties; a fourth pass counts those. The outcome, on every process, is that of a single one.
    """
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
        for *_, chunk_excluded in chunks(tensor, "top", name, None):  # raises for NaN and the like
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
        for start, chunk in slices(flat, None):
            inside = is_chosen[start : start + chunk.numel()] & (chunk != -torch.inf)
            found.append(places(inside).cpu() + start)
        index = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        if index.numel():
            indices[name], values[name] = index, flat[index.to(flat.device)].cpu()
    return Picked(indices=indices, scores=values)


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
