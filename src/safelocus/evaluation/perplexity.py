"""What a target thinks of given responses, teacher-forced: how surprised it is, and how far it is from an original.

    nats_per_token   -log q(response) / number of its tokens
    kl_per_token     mean over its tokens of KL(p || q), the next token's distributions: p the original's, q ours

Measures of damage that need no generation and move before accuracy does. Only the response's tokens count, not the
prompt's and not the one that ends the turn.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from safelocus import distributed
from safelocus.errors import ModelError
from safelocus.model.forcing import batches_by_length, teacher_force
from safelocus.model.generation import longest_prompt
from safelocus.model.target import Target
from safelocus.progress import track
from safelocus.prompts import PromptSet

Ids = list[list[int]]


def nats_per_token(
    target: Target, prompts: PromptSet, *, batch_size: int = 8, progress: bool = True
) -> list[tuple[float | None, int]]:
    """(mean negative log-likelihood of the response's tokens, their number) per example, in order.

    None where the response has no tokens or does not fit the model's positions. All examples have responses.
    """

    def surprise(prompt_ids: Ids, response_ids: Ids) -> Tensor:
        return -teacher_force(target, prompt_ids, response_ids).log_likelihood(len(response_ids))

    return _per_token(surprise, target, prompts, batch_size, progress)


def kl_per_token(
    target: Target, original: Target, prompts: PromptSet, *, batch_size: int = 8, progress: bool = True
) -> list[tuple[float | None, int]]:
    """(mean KL(original || target) in nats, number of tokens) per example, in order; as for `nats_per_token`.

    Raises:
        ModelError: the two do not share a vocabulary, so their distributions are over different things.
    """
    if target.tokenizer.get_vocab() != original.tokenizer.get_vocab():
        raise ModelError(
            f"{target.name} and {original.name} have different vocabularies; expected a model and its original"
        )

    def divergence(prompt_ids: Ids, response_ids: Ids) -> Tensor:
        first, second = (teacher_force(model, prompt_ids, response_ids) for model in (original, target))
        p = torch.log_softmax(first.logits.float(), dim=-1).to(second.logits.device)  # [N, V]
        kl = (p.exp() * (p - torch.log_softmax(second.logits.float(), dim=-1))).sum(-1)
        return torch.zeros(len(response_ids), device=kl.device).index_add(0, second.row, kl)

    return _per_token(divergence, target, prompts, batch_size, progress)


@torch.no_grad()
def _per_token(
    total: Callable[[Ids, Ids], Tensor], target: Target, prompts: PromptSet, batch_size: int, progress: bool
) -> list[tuple[float | None, int]]:
    """(`total` of a response / its tokens, their number) per example; `total` takes prompts and responses."""
    pairs = [
        target.chat.encode_pair(example.prompt, example.response or "", system=example.system) for example in prompts
    ]
    room = longest_prompt(target, 0)
    found: list[tuple[float | None, int]] = [(None, len(response)) for _, response in pairs]
    fitting = [i for i, (p, r) in enumerate(pairs) if r and len(p) + len(r) <= room]
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in fitting]
    batches = [[fitting[i] for i in batch] for batch in batches_by_length(lengths, batch_size)]
    own = distributed.share(batches, in_step=target.is_sharded)
    here: dict[int, tuple[float, int]] = {}
    for share in track(own, "reading", enabled=progress and distributed.is_main(), unit=lambda b: len(b or ())):
        batch = batches[-1] if share is None else share  # through a sharded model all pass together
        totals = total([pairs[i][0] for i in batch], [pairs[i][1] for i in batch]).tolist()
        for i, value in zip(batch, totals, strict=True):
            here[i] = (value / len(pairs[i][1]), len(pairs[i][1]))
    for i, both in distributed.merged(here).items():
        found[i] = both
    return found
