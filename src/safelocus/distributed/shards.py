"""Weights that are spread over processes by rows (FSDP2, DTensor): what is here, what is whole, what is where."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelocus.distributed.exchange import is_main, world_size
from safelocus.errors import SafelocusError


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
