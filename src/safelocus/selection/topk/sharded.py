"""Picking from scores that are sharded over processes (see `distributed`).

Every process counts its own rows, the counts are summed, all agree on the threshold, and each gathers alone, with its
share of the ties; a fourth pass counts those. The outcome, on every process, is that of a single one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from safelocus import distributed
from safelocus.selection.topk.chunks import Which
from safelocus.selection.topk.picked import Picked
from safelocus.selection.topk.threshold import count_ties, find_threshold, gather


def pick_from_shards(scores: Mapping[str, Tensor], k: int, which: Which, chunk_size: int | None) -> Picked:
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
