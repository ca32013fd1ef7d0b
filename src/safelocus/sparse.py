"""The one place where a selection's indices touch a model's tensors: read, write, and put back exactly.

    gather(model, selection)            -> name -> values at the coordinates, in the parameter's dtype
    scatter(model, selection, values)      writes values there
    restoring(model, selection)            within: write what you like there; afterwards: the old bits

A parameter may have any dtype, strides and device, and any name that PEFT, `torch.compile` or FSDP gives it.
A selection that finds no tensor, or not all of its tensors, is an error that lists names; so are values of
another length. Bits are moved as integers, so NaN payloads, negative zeros and 8-bit floats survive.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safelocus.errors import SelectionError
from safelocus.selection import Selection

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def selected_parameters(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Canonical name -> the parameter, for every tensor of the selection, in its order.

    Raises:
        SelectionError: tensors are missing or have another shape (names are listed), or hold no values
            (offloaded to disk or on the meta device).
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
        SelectionError: see `selected_parameters`.

    Example:
        >>> values = gather(target.model, selection)                      # doctest: +SKIP
        >>> scatter(target.model, selection, values)     # changes nothing  # doctest: +SKIP
    """
    return {
        name: _bits(parameter).take(selection[name].to(parameter.device)).view(parameter.dtype)
        for name, parameter in selected_parameters(model, selection).items()
    }


def scatter(model: nn.Module, selection: Selection, values: Mapping[str, Tensor]) -> None:
    """Write `values` (name -> [k of this tensor], any device) at the coordinates, rounded to each parameter's dtype.

    Nothing is written unless everything fits. Raises SelectionError for names or lengths that differ.
    """
    parameters = selected_parameters(model, selection)
    if differing := sorted(set(values) ^ set(parameters)):
        raise SelectionError(
            f"values and selection name different tensors: {', '.join(differing[:5])}"
            f"{' ...' if len(differing) > 5 else ''}. Give one value per selected weight"
        )
    for name in parameters:
        if values[name].shape != selection[name].shape:
            raise SelectionError(
                f"values for {name!r} have shape {list(values[name].shape)}; expected "
                f"{list(selection[name].shape)}, one per selected weight"
            )
    for name, parameter in parameters.items():
        _write(parameter, selection[name], values[name].detach().to(parameter.device, parameter.dtype))


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
    parameters = selected_parameters(model, selection)
    saved = gather(model, selection)
    try:
        yield saved
    finally:
        interrupted = None
        while parameters:
            try:
                # a tensor leaves the list when it is written: an interruption repeats at most that one
                name = next(iter(parameters))
                _write(parameters[name], selection[name], saved[name].to(parameters[name].device))
                del parameters[name]
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


def _bits(parameter: Tensor) -> Tensor:
    """The same memory as integers of the same width; strides stay as they are."""
    if parameter.element_size() not in _INTEGERS:
        raise SelectionError(
            f"weights of type {parameter.dtype} cannot be changed one by one; load them as bf16 or fp32"
        )
    return parameter.detach().view(_INTEGERS[parameter.element_size()])


def _write(parameter: nn.Parameter, index: Tensor, values: Tensor) -> None:
    """In place. `put_` counts elements in logical order whatever the strides are, like the flat indices."""
    assert values.dtype == parameter.dtype, f"the parameter became {parameter.dtype} while its weights were changed"
    with torch.no_grad():
        _bits(parameter).put_(index.to(parameter.device), _bits(values))
