"""Pick weights: the highest, the lowest, or a uniform draw.

Input: scores by tensor name. Output: `Picked`, on the CPU.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from safelocus import distributed
from safelocus.selection.topk.chunks import Which, places, slices
from safelocus.selection.topk.draw import random_k
from safelocus.selection.topk.picked import Picked
from safelocus.selection.topk.sharded import pick_from_shards
from safelocus.selection.topk.shortlist import shortlist
from safelocus.selection.topk.threshold import find_threshold, gather


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


def take(scores: Mapping[str, Tensor], ordinals: Mapping[str, Tensor], *, chunk_size: int | None = None) -> Picked:
    """Turn ordinals among the eligible elements (int64, ascending) into coordinates with their scores."""
    indices, values = {}, {}
    for name, ordinal in ordinals.items():
        flat = scores[name].detach().reshape(-1)
        if count_eligible(flat, chunk_size=chunk_size) == flat.numel():
            index = ordinal
        else:
            index = places(flat != -torch.inf).cpu()[ordinal]
        indices[name] = index
        values[name] = flat[index.to(flat.device)].cpu()
    return Picked(indices=indices, scores=values)
