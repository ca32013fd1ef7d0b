"""SET: a training step of `SparseOptimizer` on 1 % of the weights.

    step        forward, backward, gathering gradients, AdamW on the selected weights, writing back; per weight
    optimizer   the last two alone; per selected weight

Baseline: dense AdamW, its gradients multiplied by a mask, the other weights put back after each step.
Limit: the step's floating-point operations at the speed of a large product.
"""

import torch
from machine import Machine, Times
from models import active_weights, build, num_bytes, num_weights, select
from rows import Row

from safelocus.enhancement.optimizer import SparseOptimizer

SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


class Masked:
    """Dense AdamW that changes the selected weights alone, as one would write it without this library."""

    def __init__(self, model, selection) -> None:
        self.inner = torch.optim.AdamW(model.parameters(), **SETTINGS)
        self.parameters = dict(model.named_parameters())
        self.masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        for name, index in selection.coordinates.items():
            self.masks[name].view(-1)[index.to(self.masks[name].device)] = True
        self.old = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad *= self.masks[name]
        self.inner.step()
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.where(self.masks[name], parameter, self.old[name]))

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def measure(kind: str, size: str, machine: Machine, *, num_tokens: int) -> list[Row]:
    model = build(kind, size, device=machine.device, dtype=machine.dtype)
    selection = select(model)
    optimizer = SparseOptimizer(model, selection, **SETTINGS)
    ids = torch.randint(1000, (1, num_tokens), device=machine.device)

    def loss(of) -> None:
        of(input_ids=ids, labels=ids).loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    product, product_flops = machine.matmul()
    actions = {"passes": lambda: loss(model), "step": step, "product": product}
    weights, held = num_weights(model), num_bytes(model)
    # weights, gradients, two moments, the old weights, and a byte of the mask
    if held + 5 * held + weights < machine.memory:
        other = build(kind, size, device=machine.device, dtype=machine.dtype)
        masked = Masked(other, selection)

        def baseline() -> None:
            loss(other)
            masked.step()
            masked.zero_grad()

        actions["masked"] = baseline
    times = machine.alternate(actions)
    whole = Times(seconds=tuple(map(sum, zip(times["passes"].seconds, times["step"].seconds, strict=True))))
    head = model.get_output_embeddings().weight.numel()
    flops = (6 * active_weights(kind, size, model) + 4 * head) * num_tokens
    k = selection.k
    return [
        Row(
            what="step",
            kind=kind,
            weights=weights,
            units=weights,
            ours=whole,
            baseline=times.get("masked"),
            limit=times["product"],
            limit_units=flops / product_flops,
            flops=flops,
            more={"optimizer's share": f"{times['step'].median / whole.median:.1%}"},
        ),
        Row(what="optimizer", kind=kind, weights=weights, units=k, ours=times["step"]),
    ]
