"""The shortlist: every score that can be among the first k, found in one read of all.

A sample guesses a key that a few more than k scores reach; one pass gathers those. If k or more were gathered, the
first k are among them, and are found there exactly. If fewer, or far too many (ties), there is no shortlist, and the
caller counts all scores instead. So the outcome is exact, and does not depend on the sample.

Input: scores by tensor name. Output: `Picked`, or None.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from safelocus.selection.topk.chunks import ABSOLUTE, Picked, Which, chunks, reaching

_SAMPLE = 1 << 18
_MARGIN = 6  # standard deviations by which a random sample would have to err for the shortlist to be too short
_RAREST = 8  # for more than this fraction of all, a shortlist is no shorter than the scores
_SLACK = 1 << 16
_CHUNK_CPU = 1 << 18  # scores and what is made of them stay in a core's cache


def shortlist(
    scores: Mapping[str, Tensor],
    k: int,
    *,
    which: Which = "top",
    chunk_size: int | None = None,
    sample: int = _SAMPLE,
) -> Picked | None:
    """The first `k`, as `pick` finds them, but where the scores are; None where a shortlist is impossible or no gain.

    `sample`: how many scores make the guess.
    """
    least = _guess(scores, k, which, sample) if k > 0 else None
    if least is None:
        return None
    most, num_found = 2 * k + _SLACK, 0
    # room for all at once: many small pieces, kept between what each chunk needs for a moment, scatter over the heap
    device = scores[next(iter(scores))].device
    index, values = (torch.empty(most, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    ends: dict[str, int] = {}
    for name in scores:
        tensor = scores[name]
        size = chunk_size or (_CHUNK_CPU if tensor.device.type == "cpu" else None)
        for start, chunk, keys, _ in chunks(tensor, which, name, size):
            local = reaching(keys, least)
            span = slice(num_found, num_found + local.numel())
            if span.stop > most:
                return None
            index[span], values[span] = local + start, chunk[local]
            num_found = span.stop
        ends[name] = num_found
    return _first(index[:num_found], values[:num_found], ends, k, which) if num_found >= k else None


def _guess(scores: Mapping[str, Tensor], k: int, which: Which, sample: int) -> int | None:
    """A key that slightly more than `k` scores should reach."""
    sizes = {name: scores[name].numel() for name in scores}
    total = sum(sizes.values())
    if total < 2 * sample or k * _RAREST > total:
        return None
    stride = (total // sample) | 1  # odd, so that it runs through all columns of a matrix
    drawn, start = [], 0
    for name, size in sizes.items():
        drawn.append(_keys(scores[name].detach().reshape(-1)[-start % stride :: stride], which))
        start += size
    keys = torch.cat([part.to(drawn[0].device) for part in drawn])
    expected = keys.numel() * k / total
    rank = math.ceil(expected + _MARGIN * math.sqrt(expected)) + 1
    least = _kth_lowest(keys, keys.numel() - rank) if rank < keys.numel() else 0
    return least if least > 0 else None  # zero: all scores reach it


def _first(index: Tensor, values: Tensor, ends: Mapping[str, int], k: int, which: Which) -> Picked:
    """The first `k` of the shortlist, which holds at least as many; `ends`: how much of it each tensor completes."""
    keys = _keys(values, which) & ABSOLUTE  # -0.0 ranks as 0.0
    threshold = _kth_lowest(keys, keys.numel() - k)
    taken, tied = keys > threshold, keys == threshold
    taken |= tied & (tied.cumsum(0) <= k - taken.sum())
    before = torch.cat([torch.zeros_like(taken[:1], dtype=torch.int64), taken.cumsum(0)])
    stops = before[torch.tensor([*ends.values()], device=before.device)].tolist()
    index, values = index[taken], values[taken]
    spans = {name: slice(start, stop) for name, start, stop in zip(ends, [0, *stops[:-1]], stops, strict=True)}
    return Picked(
        indices={name: index[span] for name, span in spans.items() if span.stop > span.start},
        scores={name: values[span] for name, span in spans.items() if span.stop > span.start},
    )


def _keys(scores: Tensor, which: Which) -> Tensor:
    """As in `chunks`, of scores that need not be checked."""
    keys = scores.contiguous().view(torch.int32)
    return keys ^ ABSOLUTE if which == "bottom" else keys


def _kth_lowest(keys: Tensor, number: int) -> int:
    """The key that `number` others stand before in ascending order."""
    if keys.device.type == "cpu":
        return int(np.partition(keys.numpy(), number)[number])
    # torch.kthvalue works in one block of an accelerator; topk in all of them
    if 2 * number < keys.numel():
        return int(keys.topk(number + 1, largest=False, sorted=False).values.amax())
    return int(keys.topk(keys.numel() - number, sorted=False).values.amin())
