"""Count the tokens that each expert of a mixture-of-experts model was given.

An expert that no token of the prompts and responses ever reached has a gradient of exactly zero; that
says nothing about its importance, so such experts are counted and reported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safelocus.model.layout import Layout, canonical_name


class RoutingCounter:
    """Tokens routed to each expert during forward passes with gradients (padding left out), as often as they are run:
    those of a prompt with several responses once, where they stand in one row (`forcing`).

    Works on modules that hold fused expert weights and are called with (hidden states, indices of the
    experts chosen [tokens, k], ...), as all of transformers 5's are. `tokens[tensor]` is a count per
    expert [E] for every fused tensor that was seen.
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
