"""The processes that work on one run, and who holds what: the only place that knows of ranks.

Two ways to share the work, both under a process group that `torchrun`, `accelerate launch` or the caller
made; alone, every function here does nothing or the obvious:

    copies   every process has the whole model and takes its share of the prompts, or of the rows to train on
    shards   FSDP2 (`fully_shard`): every process has its rows (dim 0) of every tensor as a DTensor, and
             all of them pass through the model together, each with its own prompts; also a group of one, whose
             weights wait in the host's memory

Whatever must be seen as a matrix is gathered one tensor at a time (`whole`), so its numbers are those of
a single process, bit for bit; what is counted is counted on shards and summed.

    launching   a launcher's processes become a group, and end together
    exchange    what they share out, and tell each other
    reduction   sums, means and norms of gradients
    shards      rows of tensors
"""

from safelocus.distributed.exchange import (
    all_reduce_sum,
    barrier,
    check_same,
    gather_objects,
    in_all,
    is_main,
    merged,
    rank,
    share,
    world_size,
)
from safelocus.distributed.launching import leave, processes
from safelocus.distributed.reduction import average_gradients, norm, summing_gradients
from safelocus.distributed.shards import (
    Each,
    any_sharded,
    check_shards,
    first_row,
    flat_offset,
    held,
    is_sharded,
    keep_on_host,
    local,
    of_rows,
    reshard_after_use,
    sharded_like,
    used_on,
    whole,
)

__all__ = [
    "Each",
    "all_reduce_sum",
    "any_sharded",
    "average_gradients",
    "barrier",
    "check_same",
    "check_shards",
    "first_row",
    "flat_offset",
    "gather_objects",
    "held",
    "in_all",
    "is_main",
    "is_sharded",
    "keep_on_host",
    "leave",
    "local",
    "merged",
    "norm",
    "of_rows",
    "processes",
    "rank",
    "reshard_after_use",
    "sharded_like",
    "share",
    "summing_gradients",
    "used_on",
    "whole",
    "world_size",
]
