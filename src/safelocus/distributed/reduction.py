"""Gradients of several processes: their mean, their sum, their norm."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from safelocus.distributed.exchange import all_reduce_sum, world_size
from safelocus.distributed.shards import is_sharded


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of what every process holds whole by their mean over the processes.

    One process's missing gradient counts as zero where another has one; what is sharded, FSDP2 has averaged already.
    """
    own = [parameter for parameter in parameters if not is_sharded(parameter)] if world_size() > 1 else []
    if not own:
        return
    # experts that no token of this process came to have no gradient, and all processes must reduce the same tensors
    found = all_reduce_sum(torch.tensor([parameter.grad is not None for parameter in own], dtype=torch.int32))
    for parameter, num_found in zip(own, found.tolist(), strict=True):
        if num_found:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = all_reduce_sum(gradient.detach()).div_(world_size())


def norm(own: Iterable[Tensor], shared: Iterable[Tensor] = ()) -> Tensor:
    """Euclidean norm of many tensors: `own`, of which each process holds another part, and `shared`, the same in all.

    Every element counts once; the result is the same in all processes, and on the CPU.
    """
    parts = [get_total_norm(list(tensors)).double().cpu() ** 2 for tensors in (own, shared)]
    return (all_reduce_sum(parts[0]) + parts[1]).sqrt().float()


@contextmanager
def summing_gradients(model: nn.Module) -> Iterator[None]:
    """Within: FSDP2 adds up the gradients of all processes, where it would take their mean."""
    groups = _parameter_groups(model) if dist.is_initialized() else []
    before = [(group.gradient_divide_factor, group.force_sum_reduction_for_comms) for group in groups]
    try:
        for group in groups:
            # a forced sum: other ways to divide by one are known to NCCL only
            group.gradient_divide_factor, group.force_sum_reduction_for_comms = 1.0, True
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            group.gradient_divide_factor, group.force_sum_reduction_for_comms = values


def _parameter_groups(model: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters; its setters have no getters, and what was set must come back."""
    from torch.distributed.fsdp import FSDPModule

    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [group for state in states for group in state._fsdp_param_groups]
