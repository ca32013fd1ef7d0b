"""Norms of each weight matrix's inputs, for the Wanda score |theta_ij| * ||X_j||_2.

Every matrix product with an eligible weight is observed where it is computed, so that fused experts
(one weight tensor, one product per expert on that expert's tokens) are seen like ordinary layers: each
expert has the norms of its own inputs only. Sequences must not be padded: an expert's product does not
tell which of its tokens are padding.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safelocus.errors import SafelocusError
from safelocus.model.layout.tensor import TensorLayout

# function -> positions of (input, weight) among its arguments, and whether the weight is stored [in, out]
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, False),
    torch.addmm: (1, 2, True),  # GPT-2's Conv1D
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    torch.bmm: (0, 1, True),
}
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class InputNorms(TorchFunctionMode):
    """Sum of squares of the inputs of every weight, per input feature, fp32.

    `squares[name]` has the tensor's shape with its output axis reduced to 1 ([1, in] for a Linear,
    [E, 1, in] for fused experts), so that it broadcasts against the tensor.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], layouts: Mapping[str, TensorLayout]) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights.items()}
        self.squares: dict[str, Tensor] = {}
        for name, weight in weights.items():
            shape = list(weight.shape)
            if layouts[name].fused_experts and layouts[name].source.count(layouts[name].source[0]) > 1:
                raise SafelocusError(
                    f"{name}: its experts stand one below the other in one axis, where the inputs of each cannot be "
                    "told apart; choose another method than wanda (esi, gradient, snip, magnitude)"
                )
            input_axis = layouts[name].input_axis
            assert input_axis is not None, f"{name} is eligible but no matrix"
            shape[(len(shape) - 2) + (len(shape) - 1) - input_axis] = 1  # the other one of the last two axes
            self.squares[name] = torch.zeros(shape, dtype=torch.float32, device=weight.device)

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Within: forward passes are observed; experts run one by one so that each product is seen."""
        implementation = getattr(model.config, "_experts_implementation", None)
        try:
            if implementation not in (None, "eager"):
                model.set_experts_implementation("eager")  # type: ignore[operator]
            with self:
                yield
        finally:
            if implementation not in (None, "eager"):
                model.set_experts_implementation(implementation)  # type: ignore[operator]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            of_input, of_weight, transposed = _PRODUCTS[func]
            if len(args) > max(of_input, of_weight) and isinstance(args[of_weight], Tensor):
                self._observe(args[of_input], args[of_weight], transposed)
                if func in _MATMULS and args[of_weight].dim() > 1:  # Mamba: weight @ inputs
                    self._observe(args[of_weight].mT, args[of_input], False)
        return func(*args, **(kwargs or {}))

    def _observe(self, inputs: Tensor, weight: Tensor, transposed: bool) -> None:
        known = self._weights.get(weight.untyped_storage().data_ptr())
        if known is None or not inputs.is_floating_point():
            return
        name, whole = known
        features = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        square = features.square().sum(dim=0)  # [in]
        target = self.squares[name]
        if weight.dim() == whole.dim() - 1:  # one expert's slice: which one tells its place in memory
            expert = (weight.storage_offset() - whole.storage_offset()) // math.prod(whole.shape[1:])
            target = target[expert]
        target += square[:, None] if transposed else square[None, :]
