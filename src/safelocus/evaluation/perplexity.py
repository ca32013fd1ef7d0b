"""How surprised a target is by given responses, teacher-forced.

    nats_per_token   -log q(response) / number of its tokens

A measure of damage that needs no generation and moves before accuracy does. Only the response's tokens count, not the
prompt's and not the one that ends the turn.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from safelocus import distributed
from safelocus.model.forcing import Forced, batches_by_length, teacher_force
from safelocus.model.generation import longest_prompt
from safelocus.model.target import Target
from safelocus.progress import size_of, track
from safelocus.prompts import PromptSet

T = TypeVar("T")


def nats_per_token(
    target: Target, prompts: PromptSet, *, batch_size: int = 8, progress: bool = True
) -> list[tuple[float | None, int]]:
    """(mean negative log-likelihood of the response's tokens, their number) per example, in order.

    None where the response has no tokens or does not fit the model's positions; NaN or infinity where the model
    computes such on the way. All examples have responses.
    """

    def surprise(forced: Forced, rows: Sequence[int]) -> list[float]:
        return [-value for value in forced.log_likelihood(len(rows)).tolist()]

    found = along(target, prompts, surprise, batch_size=batch_size, progress=progress)
    return [(None if total is None else total / num, num) for total, num in found]


@torch.no_grad()
def along(
    target: Target,
    prompts: PromptSet,
    read: Callable[[Forced, Sequence[int]], Sequence[T]],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[tuple[T | None, int]]:
    """(what `read` makes of a response, number of its tokens) per example, in order; None as for `nats_per_token`.

    Args:
        read: gets the logits along a batch's responses and the examples' numbers, and returns something per example.
    """
    pairs = [
        target.chat.encode_pair(example.prompt, example.response or "", system=example.system) for example in prompts
    ]
    room = longest_prompt(target, 0)
    fitting = [i for i, (p, r) in enumerate(pairs) if r and len(p) + len(r) <= room]
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in fitting]
    batches = [[fitting[i] for i in batch] for batch in batches_by_length(lengths, batch_size)]
    own = distributed.share(batches, in_step=target.is_sharded)
    here: dict[int, T] = {}
    for share in track(own, "reading", enabled=progress and distributed.is_main(), unit=size_of):
        batch = batches[-1] if share is None else share  # through a sharded model all pass together
        forced = teacher_force(target, [pairs[i][0] for i in batch], [pairs[i][1] for i in batch])
        here |= zip(batch, read(forced, batch), strict=True)
    found = distributed.merged(here)
    return [(found.get(i), len(response)) for i, (_, response) in enumerate(pairs)]
