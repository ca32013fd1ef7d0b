"""Exact global top-k, bottom-k and random-k over a stream of named score tensors.

    K = { i : rank of score_i among all n scores <= k }    ties: score, then tensor order, then flat index

Input: a mapping of names to non-negative, finite float32 tensors of any shape, in tensor order. The
mapping may load its tensors lazily: each pass asks for one tensor at a time. `-inf` marks a weight that is not
eligible: it is never counted nor picked. NaN, `+inf` and other negative numbers are errors that name the tensor.

Two ways to the same outcome, both with a constant number of passes, whatever n and k are, and nothing larger than
a chunk copied (a tensor that is not contiguous is, once per pass) beside the result:

    shortlist    a sample guesses a bound, one pass gathers what reaches it, and the first k are found there
    threshold    where the guess was no good, or scores are sharded: two passes count bit patterns, which fixes the
                 k-th score, and a third gathers

Output: `Picked`, int64 flat indices (ascending) and float32 scores per tensor, on the CPU.
"""

from safelocus.selection.topk.chunks import Picked, Which
from safelocus.selection.topk.picking import Reduce, count_eligible, pick, pick_groups, random_k
from safelocus.selection.topk.threshold import histogram

__all__ = ["Picked", "Reduce", "Which", "count_eligible", "histogram", "pick", "pick_groups", "random_k"]
