"""The processes that work on one run, and who holds what: the only place that knows of ranks.

Two ways to share the work, both under a process group that `torchrun`, `accelerate launch` or the caller
made; alone, every function here does nothing or the obvious:

    copies   every process has the whole model and takes its share of the prompts, or of the rows to train on
    shards   FSDP2 (`fully_shard`): every process has its rows (dim 0) of every tensor as a DTensor, and
             all of them pass through the model together, each with its own prompts; also a group of one, whose
             weights wait in the host's memory

Whatever must be seen as a matrix is gathered one tensor at a time (`whole`), so its numbers are those of
a single process, bit for bit; what is counted is counted on shards and summed.

In this order: what processes share out and tell each other; how a launcher's processes become a group and end
together; rows of tensors; sums, means and norms of gradients.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from safelocus.errors import ResourceError, RunError, SafelocusError

T = TypeVar("T")
_PATIENCE = 5.0  # seconds in which a launcher ends all processes after one
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # environment that a launcher leaves behind


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


def united(items: Iterable[T]) -> list[T]:
    """Every process's items, each once, in their order; the same in all."""
    return list(dict.fromkeys(item for part in gather_objects(list(items)) for item in part))


def check_same(inputs: Mapping[str, Any]) -> None:
    """Raise RunError unless all processes were given the same inputs."""
    given = gather_objects(dict(inputs))
    if differing := [key for key in inputs if any(other.get(key) != given[0].get(key) for other in given)]:
        raise RunError(
            f"the {len(given)} processes of this run were given different inputs ({', '.join(differing)}). Give all of "
            "them the same: prompts are shared out here"
        )


@contextmanager
def processes() -> Iterator[bool]:
    """Within: the processes that a launcher started form one group; yields whether they do.

    Nothing happens in a process started alone. Where one of them fails, or the launcher ends them, the others leave
    the block with a RunError.
    """
    if dist.is_initialized():
        yield False
        return
    if os.environ.get("WORLD_SIZE") == "1" or not set(_LAUNCHED) <= os.environ.keys():
        try:
            yield False
        finally:
            if dist.is_initialized():  # see `keep_on_host`
                dist.destroy_process_group()
        return
    _bind_accelerator()
    dist.init_process_group()  # gloo for tensors on the CPU, the accelerator's own library beside it
    try:
        with _ended_by_launcher():
            yield True
            barrier()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "peer" in str(error)):
            raise
        raise RunError(
            f"process {rank()}: another process of this run has ended; its own message, or the launcher's, says why"
        ) from error
    dist.destroy_process_group()


def leave(code: int = 0) -> None:
    """End this process now, its work done, without Python's own shutdown.

    gloo's threads release tensors when they come to it, and abort the process where Python is gone by then
    (pytorch#179291): a finished run would be reported as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _bind_accelerator() -> None:
    """Each process of a machine takes the accelerator of its own number."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        return
    local, available = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if local >= available:
        raise ResourceError(
            f"process {local} of this machine has no accelerator: there are {available}. Launch at most that many "
            f"(--nproc-per-node {available})"
        )
    torch.accelerator.set_device_index(local)


@contextmanager
def _ended_by_launcher() -> Iterator[None]:
    """Turns the launcher's SIGTERM into an error, so that what is half-written is cleaned up.

    A process that is ending already, with an error of its own, cleans up and says so undisturbed. Most errors, wrong
    inputs above all, are met by all processes at once: the first one says so, the others wait to be ended with it.
    """
    ended = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if sys.exc_info()[0] is None:
            ended = True
            raise RunError(f"process {rank()}: ended by the launcher, because another process failed or it was stopped")

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not is_main() and not ended and isinstance(error, Exception) and not isinstance(error, RuntimeError):
            signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
            time.sleep(_PATIENCE)
        raise
    signal.signal(signal.SIGTERM, previous)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (told without importing what only sharded models need)."""
    return hasattr(tensor, "to_local")


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the tensors is sharded; looks at none in a process without a group."""
    return dist.is_initialized() and any(is_sharded(tensors[name]) for name in tensors)


def check_shards(tensors: Mapping[str, Tensor]) -> None:
    """Raise SafelocusError for tensors that are sharded in any other way than by rows over all processes."""
    for name, tensor in tensors.items():
        sharded: Any = tensor
        if is_sharded(tensor) and not (
            sharded.device_mesh.size() == world_size()
            and len(sharded.placements) == 1
            and sharded.placements[0].is_shard(0)
        ):
            raise SafelocusError(
                f"{name} is sharded as {sharded.placements} over {sharded.device_mesh}. Expected FSDP2's rows, "
                f"(Shard(0),), over all {world_size()} processes: no tensor parallelism, no replicas of shards"
            )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows, or all of it; shares memory."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, gathered anew, and every process must ask at the same time."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a whole tensor, as a tensor sharded like `like`; the tensor itself where that is not."""
    if not is_sharded(like):
        return value
    return of_rows(value[first_row(like) :][: len(local(like))].clone(), like)  # a view would keep all of it in memory


def of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like`, of this process's rows."""
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(
        rows, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def first_row(tensor: Tensor) -> int:
    """Where this process's rows of a sharded tensor begin: a shard has ceil(rows / processes), as far as they go."""
    sharded: Any = tensor
    num_rows, mesh = tensor.shape[0], sharded.device_mesh
    return min(mesh.get_local_rank() * -(-num_rows // mesh.size()), num_rows)


def flat_offset(tensor: Tensor) -> int:
    """Flat index, in the whole tensor, of the first element that this process holds."""
    return first_row(tensor) * math.prod(tensor.shape[1:]) if is_sharded(tensor) else 0


def held(tensor: Tensor) -> Tensor:
    """What this process answers for, so that all together hold everything once: its rows.

    Of a tensor that is not sharded the main process holds all, the others nothing.
    """
    return local(tensor) if is_sharded(tensor) or is_main() else tensor.reshape(-1)[:0]


class Each(Mapping[str, Tensor]):
    """Many tensors, each passed through a function (`held`, `whole`) when it is asked for.

    What is gathered must be asked for by all processes, in the same order.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> None:
        self._function, self._tensors = function, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._function(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def keep_on_host(model: nn.Module, layers: Iterable[nn.Module], *, pin_memory: bool = True) -> None:
    """Let a model's weights wait in the host's memory; each layer comes to the accelerator when it is used.

    That is FSDP2 in a group of this one process, which is made where there is none: the model counts as sharded.

    Args:
        model: on the CPU.
        layers: what comes and goes as one; the rest of the model is one more.
        pin_memory: keep the weights where an accelerator can read them itself; needs one.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    for module in (*layers, model):
        fully_shard(module, offload_policy=CPUOffloadPolicy(pin_memory=pin_memory))


def used_on(tensor: Tensor) -> torch.device:
    """Where a tensor takes part in computations: shards may wait in the host's memory."""
    sharded: Any = tensor
    if not is_sharded(tensor) or sharded.device_mesh.device_type == "cpu":
        return tensor.device
    return torch.device(sharded.device_mesh.device_type, torch.accelerator.current_device_index())


def reshard_after_use(model: nn.Module) -> None:
    """Let every module of a sharded model go back to its rows after each pass, the outermost too.

    FSDP2 leaves that whole after a pass without backward: its tensors are no shards until the next one, what is written
    to them is lost, and what is written to their shards is not used.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)


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
