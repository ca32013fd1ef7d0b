"""The exact gradient of LoRA under protection, where the approximate one of the plain layer is not enough.

    effective weight   W = W0 + M * s B A       M: 0 at the protected coordinates P, 1 elsewhere
    exact              dB = s (M * G) A^T,   dA = s B^T (M * G),    G = dL/dW = dy^T x
    plain layer        dB = s G A^T,         dA = s B^T G

The forward pass and the gradient of the input are exact either way, since the weights at P cancel the adapter.
What is missing, - s (P * G) A^T and - s B^T (P * G), is added here by an identity on the layer's output, an
ordinary autograd function, so accumulation, mixed precision and data parallelism see a gradient like any other.
It needs G, one matrix product more per layer: about half a LoRA step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safelocus.preservation.lora import LoraUpdate


class _MaskedGradient(torch.autograd.Function):
    """y -> y; adds what protection takes off the gradient of A and B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, layout: tuple[float, bool]) -> Any:
        ctx.save_for_backward(x, a, b, index)
        ctx.scaling, ctx.is_transposed = layout
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, a, b, index = ctx.saved_tensors
        rows, columns = dy.flatten(0, -2), x.flatten(0, -2).to(dy.dtype)
        # as the tensor lies in memory: GPT-2 stores [in, out]
        whole = columns.t() @ rows if ctx.is_transposed else rows.t() @ columns
        only = torch.zeros_like(whole).put_(index, whole.take(index))
        only = (only.t() if ctx.is_transposed else only) * -ctx.scaling
        return dy, None, (b.t().to(dy.dtype) @ only).to(a.dtype), (only @ a.t().to(dy.dtype)).to(b.dtype), None, None


def masking(update: Callable[[], LoraUpdate | None], index: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """A forward hook for the layer of an update that makes its gradient exact; both may move, so they are asked for."""

    def correct(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        current = update()
        if current is None or not current.is_added or not torch.is_grad_enabled():
            return output
        for adapter in current.adapters:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            layout = (layer.scaling[adapter], bool(layer.fan_in_fan_out))
            output = _MaskedGradient.apply(output, inputs[0], a, b, index(), layout)
        return output

    return correct
