"""Projection: updates that would lower an objective to first order lose what lowers it (A-GEM, of the update itself).

    u   what a step of the optimizer changes, g the gradient of S in the trained weights before it
    u'  =  u - min(0, <g, u>) / <g, g> * g        so that <g, u'> = max(0, <g, u>)

The optimizer's own update is projected, and not its gradient (Chaudhry et al. 2019, 1812.00420): what Adam makes of a
projected gradient can lower S again, as can weight decay. It holds for any optimizer and model, an encoder-decoder too.

It holds to first order and on what S is measured on at that step. A step costs a gradient of S more, and a copy of the
trained weights and that gradient in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from safelocus import distributed
from safelocus.errors import TrainingError


class Projection:
    """Steps of an optimizer that do not lower an objective, to first order; until `remove()`, or the end of `with`.

    Attributes:
        num_steps: how many were taken.
        num_projected: how many of them would have lowered it.

    Args:
        what: an optimizer, or a `transformers.Trainer` or any of TRL's, before `train()`.
        objective: S now, higher is safer: a scalar tensor, differentiable in the trained weights. Called before each
            step, and free to measure it on other prompts each time.

    Raises:
        TrainingError: neither; several processes; and at a step where S depends on no trained weight or is no number.

    Example:
        >>> lexicon = sl.Lexicon.load("words.txt")                                        # doctest: +SKIP
        >>> projection = Projection(optimizer, lambda: lexicon(target, next(prompts)).mean())  # doctest: +SKIP
    """

    def __init__(self, what: Any, objective: Callable[[], Tensor]) -> None:
        if distributed.world_size() > 1:
            raise TrainingError("updates are projected in one process; start it without torchrun")
        self._objective = objective
        self._hooks: list[Any] = []
        self._callback: _Attach | None = None
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # weights, their values, dS in them
        self.num_steps = self.num_projected = 0
        if isinstance(what, Trainer):
            self._callback = _Attach(self, what)
            what.add_callback(self._callback)
        elif isinstance(what, torch.optim.Optimizer):
            self.follow(what)
        else:
            raise TrainingError(f"a projection takes a torch optimizer or a transformers.Trainer; found {type(what)}")

    def follow(self, optimizer: Any) -> None:
        """Project the steps of this optimizer from now on, and of no other; a trainer's when training begins."""
        self._let_go()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)
        ]  # fmt: skip

    def remove(self) -> None:
        """Let go of the optimizer or trainer."""
        self._let_go()
        if self._callback is not None:
            self._callback.trainer.remove_callback(self._callback)
            self._callback = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _let_go(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            score = self._objective()
            if score.numel() != 1:
                raise TrainingError(
                    f"the objective of the projection has {score.numel()} values; expected one, their mean say"
                )
            if not torch.isfinite(score):
                raise TrainingError(f"the objective of the projection is {score.item()}; expected a finite number")
            if not score.requires_grad:
                raise TrainingError("the objective of the projection depends on no trained weight")
            slopes = torch.autograd.grad(score, weights, allow_unused=True)
        self._before = [
            (p, p.detach().clone(), slope) for p, slope in zip(weights, slopes, strict=True) if slope is not None
        ]
        if not self._before:
            raise TrainingError("the objective of the projection depends on no weight that the optimizer trains")

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        change = _sum([(slope.float() * (p - old).float()).sum() for p, old, slope in self._before])
        size = _sum([slope.float().square().sum() for _, _, slope in self._before])
        self.num_steps += 1
        if change < 0:
            self.num_projected += 1
            for weight, _old, slope in self._before:
                weight.sub_((change / size).to(slope) * slope)
        self._before = []


class _Attach(TrainerCallback):
    """A trainer makes its optimizer late."""

    def __init__(self, projection: Projection, trainer: Trainer) -> None:
        self._projection = projection
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        self._projection.follow(optimizer)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """On one device, in fp32."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
