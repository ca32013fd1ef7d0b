"""Picking whole groups of weights: rows, heads, experts, ....

Input: scores, and which group each weight belongs to. Output: `Picked`, with the number of groups taken.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from safelocus import distributed
from safelocus.model.layout import Groups
from safelocus.selection.topk.chunks import Which, chunks, places, slices
from safelocus.selection.topk.picked import Picked
from safelocus.selection.topk.threshold import check_count

Reduce = Literal["mean", "sum"]


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
