"""Drawing k of n without replacement.

Input: the sizes of tensors, in order, and a seed. Output: ascending ordinals within each tensor.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from safelocus.selection.topk.threshold import check_count

_DENSE = 32  # a random draw of more than this fraction of all uses a mask


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
