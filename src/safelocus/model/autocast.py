"""Which type a CPU computes in: products in bf16 over fp32 weights, where it has units for that.

    weights, sums, masters    fp32
    matrix products           bf16 (autocast), if measured to be quicker here; else fp32

CPUs with such units (avx512_bf16, AMX) multiply in bf16 more than twice as fast as in fp32; others several times more
slowly. Both are timed once, on matrices of the model's size (milliseconds). Small models stay in fp32: there the time
goes elsewhere, and nothing is to depend on the machine.

Input: a model. Output: the same model, whose forward passes are in autocast whoever calls it.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

_ROWS = 256
_SMALLEST = 512  # width below which products do not decide
_GAIN = 1.5  # that the casts and the coarser numbers should bring at least


def quicker(config: Any) -> torch.dtype | None:
    """bf16 where products of this model's size are clearly quicker in it on this CPU; None for fp32."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or 0
    return torch.bfloat16 if width >= _SMALLEST and _gain(width) >= _GAIN else None


@lru_cache
def _gain(width: int) -> float:
    """Times that bf16 is quicker than fp32, for [rows, width] times [width, 4 width]."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(_ROWS, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = min(best, time.perf_counter() - began)
        seconds[dtype] = best
    return seconds[torch.float32] / seconds[torch.bfloat16]


class Autocast:
    """Forward passes of a model in autocast. Make one with `attach`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._open: list[torch.autocast] = []

    @classmethod
    def attach(cls, model: Any, dtype: torch.dtype) -> "Autocast":
        """Let every forward pass of the model, which is on a CPU, compute in `dtype`, errors in it or not."""
        autocast = cls(dtype)
        model.register_forward_pre_hook(autocast._enter)
        model.register_forward_hook(autocast._leave, always_call=True)
        return autocast

    def within(self) -> torch.autocast:
        """For many passes: casts of the weights are kept until its end."""
        return torch.autocast("cpu", self.dtype)

    def _enter(self, *_: Any) -> None:
        context = self.within()
        context.__enter__()
        self._open.append(context)

    def _leave(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def many_passes(autocast: Autocast | None) -> AbstractContextManager[object]:
    """Within: passes share the casts of the weights, which must not change meanwhile."""
    return nullcontext() if autocast is None else autocast.within()
