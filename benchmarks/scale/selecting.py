"""Top-k: exactly 1 % of n scores.

Baseline: `torch.cat` of all scores, then `torch.topk`. Limit: reading the scores once (`sum`).
*kept*: where scores are on an accelerator, "top" without moving the result to the CPU.
"""

from functools import partial

import torch
from machine import Machine
from rows import Row

from safelocus.selection.topk import pick
from safelocus.selection.topk.shortlist import shortlist

NUM_TENSORS = 20
RATIO = 0.01


def make(num_weights: int, device: str) -> dict[str, torch.Tensor]:
    """Tensors of equal size and heavy tail, made in place so that their making leaves no higher peak."""
    torch.manual_seed(0)
    tensors = {}
    for i in range(NUM_TENSORS):
        tensor = torch.empty(num_weights // NUM_TENSORS, device=device)
        for chunk in tensor.split(1 << 24):
            chunk.uniform_().square_()
        tensors[f"layers.{i}"] = tensor
    return tensors


def dense(tensors: dict[str, torch.Tensor], k: int) -> None:
    torch.topk(torch.cat(list(tensors.values())), k, sorted=False)


def read(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.sum()


def measure(num_weights: int, machine: Machine) -> list[Row]:
    tensors = make(num_weights, machine.device)
    k = int(RATIO * num_weights)
    actions = {which: partial(pick, tensors, k, which=which) for which in ("top", "bottom", "random")}
    if machine.is_cuda:
        actions["kept"] = partial(shortlist, tensors, k)
    names = list(actions)
    actions["read"] = partial(read, tensors)
    # the concatenation, and values and indices of all scores that torch.topk sorts or partitions
    if num_weights * (4 + 4 + 16) < machine.memory:
        actions["dense"] = partial(dense, tensors, k)
    times = machine.alternate(actions)
    return [
        Row(
            what=which,
            kind="",
            weights=num_weights,
            units=num_weights,
            ours=times[which],
            baseline=times.get("dense"),
            limit=times["read"],
            bytes=4 * num_weights,
            more={"time/read": times[which].over(times["read"])[0]},
        )
        for which in names
    ]
