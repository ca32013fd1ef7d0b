"""Accumulate signed gradients over many batches, in fp32, one tensor at a time.

Each parameter's gradient is added to its fp32 accumulator, and freed, the moment backward has made it:
the model's gradients never exist all at once. Only tensors asked for get a gradient, so backward does
no weight-gradient work elsewhere. Accumulators may live on the device or on the CPU. Of a sharded model
(FSDP2) each process adds up the rows it holds, as the reduce-scatter of all processes' gradients delivers them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safelocus import distributed
from safelocus.errors import NumericalError, SelectionError, some
from safelocus.model.layout import canonical_name
from safelocus.selection.sparse import requiring_gradients


def named_weights(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, in the order of `names`; an error lists names that do not exist."""
    found = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    if missing := [name for name in names if name not in found]:
        raise SelectionError(f"{len(missing)} tensors are not in the model: {some(missing)}")
    return {name: found[name] for name in names}


class GradientAccumulator:
    """Sum of gradients per tensor, fp32.

    Args:
        weights: canonical name -> parameter, all of floating type.
        device: where the sums are kept; None for each parameter's own device, and for sharded parameters.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], *, device: torch.device | str | None = None) -> None:
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise NumericalError(
                    f"{name} has type {weight.dtype}, which has no gradient; score the model in bf16 or fp32, "
                    "not a quantized copy of it"
                )
        self.weights = dict(weights)
        self.is_sharded = distributed.any_sharded(self.weights)
        self.sums = {
            name: torch.zeros_like(
                weight.detach(), dtype=torch.float32, device=device, memory_format=torch.contiguous_format
            )
            for name, weight in weights.items()
        }
        self._finite: dict[str, Tensor] = {}

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Within: backward passes add to the sums, and only the tensors asked for require gradients."""
        with requiring_gradients(model, self.weights.values()), distributed.summing_gradients(model):
            handles = [w.register_post_accumulate_grad_hook(self._hook(name)) for name, w in self.weights.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for weight in self.weights.values():
                    weight.grad = None

    def check_finite(self, batch: str) -> None:
        """Raise if a gradient since the last check was NaN or infinite; waits for each device once."""
        flags, self._finite = self._finite, {}
        bad = []
        for device in dict.fromkeys(flag.device for flag in flags.values()):
            names = [name for name, flag in flags.items() if flag.device == device]
            finite = torch.stack([flags[name] for name in names]).tolist()
            bad += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        if self.is_sharded:  # what one process sees in its rows ends the run on all of them
            bad = distributed.united(bad)
        if bad:
            raise NumericalError(
                f"gradients of {len(bad)} tensors are NaN or infinite in {batch}, first of them {bad[0]}. "
                "Try fp32 or bf16 instead of fp16 (--dtype), and look at that batch's prompts"
            )

    def _hook(self, name: str) -> Any:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = distributed.local(weight.grad), None
            finite = torch.isfinite(gradient.sum(dtype=torch.float32))  # NaN and inf survive a sum
            self._finite[name] = finite & self._finite[name] if name in self._finite else finite
            total = distributed.local(self.sums[name])
            total.add_(gradient.to(total.device))  # adds bf16 to fp32 without a copy

        return add
