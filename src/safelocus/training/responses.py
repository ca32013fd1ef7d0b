"""What a model says, and is to say: training rows, its own answers as such, and logits along their responses.

A row has the target's own chat format, the one it is scored and evaluated with, and the loss on the response alone:

    {"input_ids": [...], "labels": [-100, ..., response ids, end of turn]}

How far a model moves from an original along such responses is in `evaluation.divergence`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelocus.errors import PromptError
from safelocus.evaluation.responding import Request, TargetResponder, collect
from safelocus.model.chat import ChatFormat
from safelocus.model.forcing import logits_at, pad
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.run.resume import Journal, claim

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # the label of tokens that carry no loss, for transformers


def training_rows(prompts: PromptSet, chat: ChatFormat, *, max_length: int = 1024) -> "Dataset":
    """One row per prompt that has a response.

    Args:
        max_length: responses are cut there; a row whose prompt leaves no room for a response is left out.

    Raises:
        PromptError: no prompt has a response, or none fits.
    """
    from datasets import Dataset

    rows = []
    answered = prompts.with_responses()
    for example in answered:
        assert example.response is not None
        prompt, response = chat.encode_pair(
            example.prompt, example.response, system=example.system, end=example.complete
        )
        ids = [*prompt, *response][:max_length]
        if len(prompt) < max_length:
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if not rows:
        raise PromptError(
            f"{prompts.source}: all {len(answered)} prompts are longer than {max_length} tokens; "
            "raise the maximum length"
        )
    return Dataset.from_list(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseBatch:
    """Padded rows, and where their responses are.

    Attributes:
        inputs: input_ids and attention_mask, [B, L].
        positions: [N] flat positions (row * L + column) that predict a response token.
        tokens: [N] those response tokens, row after row.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], padding: int, device: torch.device) -> "ResponseBatch":
        """Of rows as `training_rows` makes them."""
        ids, mask = pad([row["input_ids"] for row in rows], padding, device)
        return cls.padded(ids, mask, pad([row["labels"] for row in rows], IGNORED, device)[0])

    @classmethod
    def padded(cls, ids: Tensor, mask: Tensor, labels: Tensor) -> "ResponseBatch":
        """Of a trainer's batch, each [B, L]; what is no response is IGNORED among the labels."""
        is_response = labels != IGNORED
        return cls(
            inputs={"input_ids": ids, "attention_mask": mask},
            positions=is_response.flatten().nonzero().squeeze(1) - 1,  # a token is predicted by the one before it
            tokens=labels[is_response],
        )

    def num_values(self, model: Any) -> int:
        """N V, of `logits`."""
        return len(self.tokens) * int(model.config.get_text_config().vocab_size)

    def logits(self, model: Any) -> Tensor:
        """[N, V] in fp32: what predicts each response token."""
        return logits_at(model, self.inputs, self.positions).float()


def own_answers(
    target: Target,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    cut: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> PromptSet:
    """The prompts with the model's own answers in place of any given.

    Args:
        cut: keep answers that do not come to their end, as incomplete ones; else they are left out.

    Raises:
        PromptError: no answer is left.
    """
    requests = [Request(prompt=e.prompt, system=e.system, max_new_tokens=max_new_tokens) for e in prompts]
    responder = TargetResponder(target=target)
    claim(
        checkpoint,
        {"the model": target, "the prompts": prompts, "batch_size": batch_size, "max_new_tokens": max_new_tokens},
    )
    journal = Journal(checkpoint, "responses")
    replies = collect(responder, requests, journal, batch_size=batch_size, progress=progress)
    answered = [
        replace(example, response=reply.text, complete=reply.finished)
        for example, reply in zip(prompts, (replies[request.key] for request in requests), strict=True)
        if reply.text and (cut or reply.finished)
    ]
    if not answered:
        raise PromptError(
            f"{prompts.source}: none of the model's own answers to {len(prompts)} prompts ended within "
            f"{max_new_tokens} tokens; allow more (--max-new-tokens), or give answers"
        )
    return replace(prompts, examples=tuple(answered))
