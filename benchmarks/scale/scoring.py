"""Scoring: teacher forcing and backward with sums in fp32, and what a run does once, whatever the prompts are.

    passes      forward, backward and sums of one batch; per weight and prompt
    backward    the second part of it alone
    once        fingerprint, sigma, the scores' arithmetic and their statistics; per weight

Baseline of *passes*: one prompt at a time, gradients of the whole model, logits at every position, fp32 sums.
Limit: the floating-point operations of the model on the tokens that are no padding, at the speed of a large product.
"""

import itertools
from contextlib import ExitStack

import torch
from machine import Machine, Times
from models import active_weights, build, num_bytes, num_weights, target_of
from rows import Row

import safelocus as sl
from safelocus.model.forcing import teacher_force
from safelocus.scoring.gradients import GradientAccumulator, named_weights


class Batch:
    """Prompts of the organisms with answers of random tokens."""

    def __init__(self, target, num_prompts: int, num_tokens: int) -> None:
        texts = list(itertools.islice(itertools.cycle(sl.read_prompts("organism:harmful").texts), num_prompts))
        self.prompts = [target.chat.encode_prompt(text) for text in texts]
        answers = torch.randint(100, 1000, (num_prompts, num_tokens), generator=torch.Generator().manual_seed(0))
        self.answers = answers.tolist()
        self.num_positions = num_prompts * num_tokens
        self.num_tokens = sum(map(len, self.prompts)) + num_prompts * (num_tokens - 1)

    def value(self, target):
        return teacher_force(target, self.prompts, self.answers).log_likelihood(len(self.prompts)).sum()


def plain(target, batch: Batch) -> None:
    """The same gradient in the straightforward way."""
    model = target.model
    model.requires_grad_(True)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=target.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def measure(kind: str, size: str, machine: Machine, *, num_prompts: int, num_tokens: int) -> list[Row]:
    model = build(kind, size, device=machine.device, dtype=machine.dtype)
    target, weights = target_of(model), num_weights(model)
    batch = Batch(target, num_prompts, num_tokens)
    rows = _passes(target, batch, active_weights(kind, size, model), machine, {"kind": kind, "weights": weights})
    prompts = sl.read_prompts("organism:harmful").limit(1)
    times = machine.alternate({"once": lambda: sl.score(target, prompts, method="magnitude", progress=False)})
    return [*rows, Row(what="once", kind=kind, weights=weights, units=weights, ours=times["once"])]


def _passes(target, batch: Batch, active: int, machine: Machine, of: dict) -> list[Row]:
    model = target.model
    accumulator = GradientAccumulator(named_weights(model, target.layout.eligible_tensors))
    collecting, held = ExitStack(), []

    def forward() -> None:
        collecting.enter_context(accumulator.collecting(model))
        held.append(batch.value(target))

    def backward() -> None:
        held.pop().backward()
        accumulator.check_finite("the only batch")
        collecting.close()

    product, product_flops = machine.matmul()
    actions = {"forward": forward, "backward": backward, "product": product}
    # weights and sums of ours, gradients and sums of the baseline
    if 2 * num_bytes(model) * (1 + 4 / machine.dtype.itemsize) < machine.memory:
        actions["plain"] = lambda: plain(target, batch)
    times = machine.alternate(actions)
    passes = [f + b for f, b in zip(times["forward"].seconds, times["backward"].seconds, strict=True)]
    head = model.get_output_embeddings().weight.numel()
    # backward: of inputs and weights, but of the head's input alone
    backward_flops = 4 * active * batch.num_tokens + 2 * head * batch.num_positions
    flops = backward_flops + 2 * active * batch.num_tokens + 2 * head * batch.num_positions
    shared = {**of, "units": of["weights"] * len(batch.prompts), "limit": times["product"]}
    return [
        Row(
            what="passes",
            ours=Times(seconds=tuple(passes)),
            baseline=times.get("plain"),
            flops=flops,
            limit_units=flops / product_flops,
            **shared,
        ),
        Row(
            what="backward",
            ours=times["backward"],
            flops=backward_flops,
            limit_units=backward_flops / product_flops,
            **shared,
        ),
    ]
