"""What processes share out, and what they tell each other; alone, everything is the obvious."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from safelocus.errors import RunError

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@overload
def share(items: Sequence[T]) -> list[T]: ...
@overload
def share(items: Sequence[T], *, in_step: bool) -> list[T | None]: ...
def share(items: Sequence[T], *, in_step: bool = False) -> list[T] | list[T | None]:
    """This process's items: every `world_size()`-th; with `in_step`, None fills up so that all have equally many."""
    own: list[T | None] = list(items[rank() :: world_size()])
    if in_step:
        own += [None] * (-(-len(items) // world_size()) - len(own))
    return own


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if world_size() > 1:
        carried = tensor if tensor.device.type in dist.get_backend_config() else tensor.to(_carrier())
        dist.all_reduce(carried)
        if carried is not tensor:
            tensor.copy_(carried)
    return tensor


def _carrier() -> torch.device:
    """Where tensors can be summed when the group knows only of accelerators."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def gather_objects(value: T) -> list[T]:
    """Every process's value, in their order, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def in_all(holds: bool) -> bool:
    """Whether it holds in every process."""
    return all(gather_objects(holds))


def merged(mapping: Mapping[Any, T]) -> dict[Any, T]:
    """One mapping from every process's part of it."""
    return {key: value for part in gather_objects(dict(mapping)) for key, value in part.items()}


def check_same(inputs: Mapping[str, Any]) -> None:
    """Raise RunError unless all processes were given the same inputs."""
    given = gather_objects(dict(inputs))
    if differing := [key for key in inputs if any(other.get(key) != given[0].get(key) for other in given)]:
        raise RunError(
            f"the {len(given)} processes of this run were given different inputs ({', '.join(differing)}). Give all of "
            "them the same: prompts are shared out here"
        )
