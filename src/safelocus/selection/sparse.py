"""The one place where a selection's indices touch a model's tensors: read, write, and put back exactly.

    sites(model, selection)             -> name -> Site: where each tensor's selected weights are in this process
    gather(model, selection)            -> name -> values at the coordinates, in the parameter's dtype
    scatter(model, selection, values)      writes values there
    restoring(model, selection)            within: write what you like there; afterwards: the old bits

A parameter may have any dtype, strides and device, and any name that PEFT, `torch.compile` or FSDP gives it.
Where it is sharded (FSDP2), every process reads and writes the weights of its own shard and no others; values are
given and returned for all selected weights, in every process, which all must ask at the same time.
A selection that finds no tensor, or not all of its tensors, is an error that lists names; so are values of
another length. Bits are moved as integers, so NaN payloads, negative zeros and 8-bit floats survive.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from safelocus.distributed import all_reduce_sum, average_gradients, check_shards, is_sharded, local, norm
from safelocus.errors import SelectionError, some
from safelocus.model.fingerprint import bits
from safelocus.selection.selection import Selection

_SUMMED = {torch.int16: torch.int32}


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """The selected weights of one tensor that this process holds: k of them, all unless it is sharded.

    Attributes:
        parameter: the tensor.
        index: int64 [k], flat indices into the tensor (its local shard), on its device.
        num_selected: weights of the whole tensor that are selected.
        position: int64 [k], which of these are held here; None for all, in order.
    """

    parameter: nn.Parameter
    index: Tensor
    num_selected: int
    position: Tensor | None = None

    def read(self) -> Tensor:
        """[k] copies of the weights."""
        own = bits(local(self.parameter.detach()))
        return own.take(self.index.to(own.device)).view(self.parameter.dtype)

    def write(self, values: Tensor) -> None:
        """Put [k] values in place, rounded to the parameter's dtype."""
        own = bits(local(self.parameter.detach()))
        # put_ counts elements in logical order whatever the strides are, like the flat indices
        own.put_(self.index.to(own.device), bits(values.detach().to(own.device, self.parameter.dtype)))

    def take(self, gradient: Tensor) -> Tensor:
        """[k] elements of a tensor that is shaped and sharded like the parameter, such as its gradient."""
        return local(gradient.detach()).take(self.index)

    def part_of(self, values: Tensor) -> Tensor:
        """[k] of the values given for all selected weights of the whole tensor."""
        return values if self.position is None else values[self.position.to(values.device)]

    def joined(self, values: Tensor) -> Tensor:
        """The values of all selected weights of the whole tensor, from the [k] of each process; the same in all.

        Raises:
            SafelocusError: processes hold the same rows, or parts of rows.
        """
        if self.position is None:
            return values
        check_shards({"a selected tensor": self.parameter})
        own = bits(values)
        # exactly one process has each of them, so the sum of bits is a copy; no backend sums 16-bit integers
        joined = torch.zeros(self.num_selected, dtype=_SUMMED.get(own.dtype, own.dtype), device=own.device)
        joined[self.position.to(own.device)] = own.to(joined.dtype)
        return all_reduce_sum(joined).to(own.dtype).view(values.dtype)


def sites(model: nn.Module, selection: Selection) -> dict[str, Site]:
    """Canonical name -> site, for every tensor of the selection, in its order.

    Raises:
        SelectionError: tensors are missing or have another shape (names are listed), hold no values
            (offloaded to disk or on the meta device), or are of a type without single weights (4-bit).
    """
    return {
        name: _site(parameter, selection[name]) for name, parameter in selected_parameters(model, selection).items()
    }


def selected_parameters(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Canonical name -> the parameter, for every tensor of the selection, in its order.

    Raises:
        SelectionError: see `sites`.
    """
    own = dict(model.named_parameters())
    matched = selection.require({name: tuple(parameter.shape) for name, parameter in own.items()})
    if empty := [name for name in matched.values() if own[name].is_meta]:
        raise SelectionError(
            f"{len(empty)} selected tensors hold no values here (meta device: offloaded?), first of them {empty[0]!r}. "
            "Load the model without offloading (--device cpu, or one with enough memory)"
        )
    return {canonical: own[name] for canonical, name in matched.items()}


def gather(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """Copies of the weights at the coordinates: name -> [k of this tensor], dtype and device of the parameter.

    Raises:
        SelectionError: see `sites`.

    Example:
        >>> values = gather(target.model, selection)                      # doctest: +SKIP
        >>> scatter(target.model, selection, values)     # changes nothing  # doctest: +SKIP
    """
    return {name: site.joined(site.read()) for name, site in sites(model, selection).items()}


def scatter(model: nn.Module, selection: Selection, values: Mapping[str, Tensor]) -> None:
    """Write `values` (name -> [k of this tensor], any device) at the coordinates, rounded to each parameter's dtype.

    Nothing is written unless everything fits. Raises SelectionError for names or lengths that differ.
    """
    found = sites(model, selection)
    if differing := sorted(set(values) ^ set(found)):
        raise SelectionError(
            f"values and selection name different tensors: {some(differing)}. Give one value per selected weight"
        )
    for name in found:
        if values[name].shape != selection[name].shape:
            raise SelectionError(
                f"values for {name!r} have shape {list(values[name].shape)}; expected "
                f"{list(selection[name].shape)}, one per selected weight"
            )
    for name, site in found.items():
        site.write(site.part_of(values[name]))


@contextmanager
def restoring(model: nn.Module, selection: Selection) -> Iterator[dict[str, Tensor]]:
    """Within: the weights at the coordinates may be changed. Afterwards they have their old bits again.

    That holds whatever ends the block: its end, an exception, or Ctrl-C, even one that arrives while the
    bits are being written back (it is raised when they are all there). Blocks may be nested and overlap.
    Only the selection's coordinates are restored. Noise is never subtracted: in floating point that
    would not give the old weights back.

    Yields:
        The old values, as from `gather`; copies that may be read but should not be changed.

    Example:
        >>> with restoring(target.model, selection) as values:                                    # doctest: +SKIP
        ...     scatter(target.model, selection, {name: 0 * value for name, value in values.items()})
    """
    found = sites(model, selection)
    dtypes = {name: site.parameter.dtype for name, site in found.items()}
    saved = {name: site.read() for name, site in found.items()}
    try:
        yield {name: found[name].joined(value) for name, value in saved.items()}
    finally:
        interrupted = None
        while found:
            try:
                # a tensor leaves the list when it is written: an interruption repeats at most that one
                name = next(iter(found))
                assert found[name].parameter.dtype == dtypes[name], f"{name} changed its dtype in between"
                found[name].write(saved[name])
                del found[name]
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


@contextmanager
def requiring_gradients(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within: the given tensors alone require gradients. Afterwards: those parameters that did before."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def averaged_norm(found: Mapping[str, Site], masters: Mapping[str, Tensor]) -> Tensor:
    """Average over the processes the gradients of copies of selected weights that each of them has; the norm of all.

    Args:
        found: of `sites`: those of a shard are each process's own.
        masters: name -> the copy, [k of this process], with its gradient.
    """
    sharded, copied = (
        [masters[name] for name, site in found.items() if (site.position is None) == is_copied]
        for is_copied in (False, True)
    )
    average_gradients(copied)
    own, shared = ([m.grad for m in each if m.grad is not None] for each in (sharded, copied))
    return norm(own, shared) if sharded else get_total_norm(shared)


def _site(parameter: nn.Parameter, index: Tensor) -> Site:
    if not parameter.is_floating_point():
        raise SelectionError(
            f"weights of type {parameter.dtype} cannot be changed one by one; load them as bf16 or fp32"
        )
    device = local(parameter).device
    if not is_sharded(parameter):
        return Site(parameter=parameter, index=index.to(device), num_selected=len(index))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shard: Any = parameter
    shape, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    here = torch.ones_like(index, dtype=torch.bool)
    flat = torch.zeros_like(index)
    for along, size, first in zip(torch.unravel_index(index, shard.shape), shape, offset, strict=True):
        here &= (along >= first) & (along < first + size)
        flat = flat * size + (along - first)
    position = here.nonzero().squeeze(1)
    return Site(
        parameter=parameter, index=flat[position].to(device), num_selected=len(index), position=position.to(device)
    )
