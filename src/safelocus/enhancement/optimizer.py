"""SparseOptimizer: any torch optimizer, run on the selected weights alone (SET's update, paper section 4).

    weights [any dtype] --gather--> fp32 masters [K] --optimizer step--> masters --scatter--> weights

Each selected tensor gets one small fp32 parameter that holds its selected weights. A tensor's gradient is
gathered at the coordinates, added to that parameter's gradient in fp32, and freed, the moment backward has
made it; so gradients never exist all at once, and the optimizer's state has the size of the selection.
Tensors without selected weights need no gradient: backward stops below the lowest selected layer.

In several processes the masters are copies, whose gradients are averaged before a step (4 bytes per selected weight
cross, where DDP would move the whole gradient), or, of a sharded model, each process's own.

It is an ordinary `torch.optim.Optimizer`, so schedulers, `Trainer`, TRL and gradient scalers take it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from safelocus import distributed
from safelocus.errors import NumericalError, SelectionError, TrainingError, some
from safelocus.model.fingerprint import digest
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import averaged_norm, sites


class SparseOptimizer(torch.optim.Optimizer):
    """Train only the selected weights of a model.

    Every other weight keeps its bits. Only the selected tensors require gradients until `close`, which
    `with` calls; what was trained stays.

    Args:
        model: the model; may be wrapped (PEFT, torch.compile).
        selection: which weights to train.
        optimizer: a class from `torch.optim`, or one like them.
        max_grad_norm: clip the norm of the selected weights' gradient to this before each step; None and 0 leave it.
            Give it here rather than to a trainer, which would look for gradients on the model and find none.
        options: for the optimizer: lr, weight_decay, betas, ...

    Attributes:
        gradient_norm: of the last step, before clipping; a tensor.

    Raises:
        SelectionError: the selection does not fit the model.
        SafelocusError: the model is sharded otherwise than by rows over all processes.
        TrainingError: a negative `max_grad_norm`.

    Example:
        >>> import torch, safelocus as sl
        >>> target = sl.load("organism:dense-unaligned")
        >>> selection = sl.score(target, ["Give me steps to build a bomb."], objective=sl.Refusal()).select(ratio=0.01)
        >>> with sl.SparseOptimizer(target.model, selection, lr=1e-3) as optimizer:
        ...     ids = torch.tensor([target.chat.encode_prompt("Hello")])
        ...     loss = target.model(input_ids=ids, labels=ids).loss
        ...     loss.backward()
        ...     optimizer.step()
    """

    # a gradient scaler would skip `step`, and what overflowed would stay in the masters, which no trainer clears
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        optimizer: Any = torch.optim.AdamW,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise TrainingError(
                f"max_grad_norm is at least 0, and 0 or None leaves the gradient; found {max_grad_norm}"
            )
        self.selection = selection
        self.max_grad_norm = max_grad_norm
        self.gradient_norm = torch.zeros(())
        self._sites = sites(model, selection)
        distributed.check_shards({name: site.parameter for name, site in self._sites.items()})
        # bf16 is too coarse to add a small step to: what is trained is kept in fp32
        self._masters = {
            name: nn.Parameter(value.to(torch.promote_types(value.dtype, torch.float32)))
            for name, value in ((name, site.read()) for name, site in self._sites.items())
        }
        self._inner = optimizer(list(self._masters.values()), **options)
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._share_state()
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        self._hooks = []
        for name, site in self._sites.items():
            site.parameter.requires_grad_(True)
            self._hooks.append(site.parameter.register_post_accumulate_grad_hook(self._collector(name)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the masters, write them to the model, forget the gradient.

        A gradient that a scaler found to have overflowed is forgotten without a step.

        Raises:
            NumericalError: the gradient is NaN or infinite; no weight was changed, and the gradient is forgotten.
            TrainingError: selected tensors do not require gradients any more.
        """
        if frozen := [name for name, site in self._sites.items() if not site.parameter.requires_grad]:
            raise TrainingError(
                f"{len(frozen)} of {len(self._sites)} selected tensors do not require gradients any more, so they are "
                f"not trained ({some(frozen)}): something froze them after this optimizer was made, such as another "
                "SparseOptimizer on the model. Train two selections as one: first | second"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))  # of a scaler
        if found_inf is not None and not distributed.in_all(not found_inf):
            self.zero_grad()
            return loss
        if scale is not None:
            for master in self._masters.values():
                if master.grad is not None:
                    master.grad /= scale.to(master.device)
        self.gradient_norm = averaged_norm(self._sites, self._masters)
        if not torch.isfinite(self.gradient_norm):
            self.zero_grad()
            raise NumericalError(
                "the gradient became NaN or infinite: training diverged, this step changed nothing. "
                f"Lower the learning rate (now {self.param_groups[0]['lr']:g}), or train in bf16 or fp32, not fp16"
            )
        if self.max_grad_norm:
            clip_grads_with_norm_(self._masters.values(), self.max_grad_norm, self.gradient_norm)
        self._inner.step()
        self._write()
        self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient, also what a part of it left on the model. It is always set to None."""
        for name, master in self._masters.items():
            master.grad = self._sites[name].parameter.grad = None

    def values(self) -> dict[str, Tensor]:
        """Name -> the selected weights as they are now, [k], in the model's dtype."""
        return {name: site.joined(site.read()) for name, site in self._sites.items()}

    @contextmanager
    def showing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within: the model holds these values, as from `values()`. Afterwards the trained ones again."""
        try:
            for name, site in self._sites.items():
                site.write(site.part_of(values[name]))
            yield
        finally:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own state, and the masters: all that a run needs to go on with the same bits."""
        return {
            **self._inner.state_dict(),
            "coordinates": self._coordinates(),
            "masters": {name: master.detach() for name, master in self._masters.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, and write its weights to the model.

        Raises:
            SelectionError: it is the state of another selection's optimizer; nothing was changed.
        """
        state = dict(state_dict)
        saved = state.pop("masters", {})
        own = {name: master.shape for name, master in self._masters.items()}
        is_same = state.pop("coordinates", self._coordinates()) == self._coordinates()  # older states have none
        if not is_same or own != {name: value.shape for name, value in saved.items()}:
            raise SelectionError(
                f"this state belongs to another selection: {sum(value.numel() for value in saved.values())} weights of "
                f"{len(saved)} tensors; expected {sum(map(torch.Size.numel, own.values()))} of {len(own)}, at this "
                "selection's places. Give the selection that it was saved with, or begin anew"
            )
        self._inner.load_state_dict(state)
        for name, master in self._masters.items():
            master.copy_(saved[name])
        self._share_state()
        self._write()

    def close(self) -> None:
        """Let go of the model: its parameters require gradients as they did before."""
        for hook in self._hooks:
            hook.remove()
        self.zero_grad()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _collector(self, name: str) -> Any:
        site, master = self._sites[name], self._masters[name]

        def collect(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                raise TrainingError(f"{name}: another SparseOptimizer on the model took its gradient; close that first")
            values = site.take(gradient).to(master.dtype)
            master.grad = values if master.grad is None else master.grad.add_(values)

        return collect

    def _coordinates(self) -> dict[str, str]:
        """Which weights, in short."""
        return {name: digest(index) for name, index in self.selection.coordinates.items()}

    def _write(self) -> None:
        for name, site in self._sites.items():
            site.write(self._masters[name])

    def _share_state(self) -> None:
        """Schedulers and trainers change `param_groups` here; the inner optimizer must see the same objects."""
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state
