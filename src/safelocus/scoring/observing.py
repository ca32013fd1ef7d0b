"""What is seen of forward passes: norms of each weight matrix's inputs, and the tokens that each expert was given.

Norms are for the Wanda score |theta_ij| * ||X_j||_2. Every matrix product with an eligible weight is observed where it
is computed, so that fused experts (one weight tensor, one product per expert on that expert's tokens) are seen like
ordinary layers: each expert has the norms of its own inputs only. Sequences must not be padded: an expert's product
does not tell which of its tokens are padding.

Tokens are counted since an expert that none of the prompts and responses ever reached has a gradient of exactly zero;
that says nothing about its importance, so such experts are reported.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safelocus.errors import SafelocusError, some
from safelocus.model.layout import Layout, canonical_name
from safelocus.model.layout.tensor import TensorLayout

# functions of torch and of its tensors, by name -> position of the left factor, which the right one follows
_PRODUCTS = {"linear": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_ANOTHER = "choose another method than wanda (esi, gradient, snip, magnitude)"


class InputNorms(TorchFunctionMode):
    """Sum of squares of the inputs of every weight, per input feature, fp32.

    `squares[name]` has the tensor's shape with its output axis reduced to 1 ([1, in] for a Linear,
    [E, 1, in] for fused experts), so that it broadcasts against the tensor.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], layouts: Mapping[str, TensorLayout]) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights.items()}
        self.layouts = layouts
        self.squares: dict[str, Tensor] = {}
        for name, weight in weights.items():
            shape = list(weight.shape)
            if layouts[name].fused_experts and layouts[name].source.count(layouts[name].source[0]) > 1:
                raise _unobservable(name, "its experts stand one below the other in one axis")
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

    def check_all_seen(self) -> None:
        """Raise SafelocusError where a matrix was part of no product that is known here; experts may have no tokens."""
        unseen = [
            name
            for name, square in self.squares.items()
            if not (self.layouts[name].fused_experts or self.layouts[name].expert is not None) and not square.any()
        ]
        if unseen:
            raise SafelocusError(
                f"wanda saw no inputs of {len(unseen)} tensors, which this model multiplies in a way of its own: "
                f"{some(unseen)}; {_ANOTHER}"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(getattr(func, "__name__", ""))
        if first is not None and len(args) > first + 1 and isinstance(args[first + 1], Tensor):
            left, right = torch.atleast_2d(args[first]), args[first + 1]
            right = right.mT if func is torch.nn.functional.linear else right if right.dim() > 1 else right[:, None]
            self._observe(left, right)
            self._observe(right.mT, left.mT)  # Mamba: weight @ inputs
        return func(*args, **(kwargs or {}))

    def _observe(self, inputs: Tensor, weight: Tensor) -> None:
        """inputs [..., tokens, in] and weight [..., in, out] are multiplied."""
        known = self._weights.get(weight.untyped_storage().data_ptr())
        if known is None or not inputs.is_floating_point():
            return
        name, whole = known
        if weight.dim() > whole.dim() and len(weight) > 1:
            raise _unobservable(name, "this model multiplies it in groups that stand one below the other in one axis")
        target = self.squares[name]
        if whole.dim() > 2:  # which experts these are tells their place in memory
            expert = (weight.storage_offset() - whole.storage_offset()) // math.prod(whole.shape[1:])
            target = target[expert : expert + (len(weight) if weight.dim() == whole.dim() else 1)]
        square = inputs.detach().float().square().sum(dim=-2)  # [..., in]
        # every expert's own where all are multiplied at once
        kept = min(weight.dim() - 1, whole.dim() - 1, square.dim())
        square = square.reshape(-1, *square.shape[square.dim() - kept :]).sum(dim=0)
        is_stored_so = weight.stride()[-2:] == whole.stride()[-2:]  # rather than turned round
        target += square[..., :, None] if is_stored_so else square[..., None, :]


def _unobservable(name: str, why: str) -> SafelocusError:
    return SafelocusError(f"{name}: {why}, where the inputs of each cannot be told apart; {_ANOTHER}")


class RoutingCounter:
    """Tokens routed to each expert during forward passes with gradients (padding left out), as often as they are run:
    those of a prompt with several responses once, where they stand in one row (`forcing`).

    Works on modules that hold fused expert weights and are called with (hidden states, indices of the
    experts chosen [tokens, k], ...), as nearly all of transformers 5's are: not those of JetMoE, DBRX and Llama 4.
    `tokens[tensor]` is a count per expert [E] for every fused tensor that was seen.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._modules: dict[nn.Module, tuple[list[str], int]] = {}
        modules = dict(model.named_modules())
        for name, _ in model.named_parameters():
            tensor = layout.tensors.get(canonical_name(name))
            if tensor is not None and "expert" in tensor.axes:
                module = modules[name.rpartition(".")[0]]
                num_experts = tensor.view[tensor.axes.index("expert")]
                self._modules.setdefault(module, ([], num_experts))[0].append(tensor.name)
        self.tokens: dict[str, Tensor] = {}
        self._mask: Tensor | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within: forward passes are counted."""
        handles = [self._model.register_forward_pre_hook(self._see_mask, with_kwargs=True)] if self._modules else []
        handles += [m.register_forward_pre_hook(self._see_routing, with_kwargs=True) for m in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_mask(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _see_routing(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # the generating pass sees the same tokens once more
            return
        candidates = [*args[1:], *kwargs.values()]
        chosen = next((a for a in candidates if isinstance(a, Tensor) and not a.is_floating_point()), None)
        if chosen is None:
            return
        names, num_experts = self._modules[module]
        chosen = chosen.reshape(-1, chosen.shape[-1])  # [tokens, k]
        is_token = torch.ones((), dtype=torch.bool, device=chosen.device)
        mask = self._mask
        if mask is not None and mask.ndim == 4:  # of rows with several responses, where padding sees padding alone
            mask = mask[:, 0, :, 0] == 0
        if mask is not None and mask.numel() == len(chosen):
            is_token = mask.reshape(-1, 1).to(chosen.device).bool()
        # one slot more: expert-parallel runs mark experts held elsewhere with index E. Neither a mask as an index nor
        # bincount: both wait for the device, here in every layer
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, chosen.reshape(-1).long(), is_token.expand_as(chosen).reshape(-1).long())
        counts = counts[:num_experts]
        for name in names:
            self.tokens[name] = self.tokens[name] + counts if name in self.tokens else counts
