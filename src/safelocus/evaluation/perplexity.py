"""How surprised a target is by given responses: nats per token, teacher-forced.

A measure of damage that needs no generation and moves before accuracy does. Only the response's tokens
count, not the prompt's and not the one that ends the turn.
"""

import torch

from safelocus import distributed
from safelocus.model.forcing import teacher_force
from safelocus.model.generation import longest_prompt
from safelocus.model.target import Target
from safelocus.progress import track
from safelocus.prompts import PromptSet


@torch.no_grad()
def nats_per_token(
    target: Target, prompts: PromptSet, *, batch_size: int = 8, progress: bool = True
) -> list[tuple[float | None, int]]:
    """(mean negative log-likelihood of the response's tokens, their number) per example, in order.

    None where the response has no tokens or does not fit the model's positions. All examples have responses.
    """
    pairs = [
        target.chat.encode_pair(example.prompt, example.response or "", system=example.system) for example in prompts
    ]
    room = longest_prompt(target, 0)
    found: list[tuple[float | None, int]] = [(None, len(response)) for _, response in pairs]
    fitting = [i for i, (p, r) in enumerate(pairs) if r and len(p) + len(r) <= room]
    order = sorted(fitting, key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = distributed.share(batches, in_step=target.is_sharded)
    here: dict[int, tuple[float, int]] = {}
    for share in track(own, "reading", enabled=progress and distributed.is_main(), unit=lambda b: len(b or ())):
        batch = batches[-1] if share is None else share  # through a sharded model all pass together
        forced = teacher_force(target, [pairs[i][0] for i in batch], [pairs[i][1] for i in batch])
        for i, total in zip(batch, forced.log_likelihood(len(batch)).tolist(), strict=True):
            here[i] = (-total / len(pairs[i][1]), len(pairs[i][1]))
    for i, value in distributed.merged(here).items():
        found[i] = value
    return found
