"""What a model says: its own answers as training data, and logits along the responses of training rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelocus.errors import PromptError
from safelocus.evaluation.responding import Request, TargetResponder, collect
from safelocus.forcing import logits_at, pad
from safelocus.prompts import PromptSet
from safelocus.resume import Journal, claim
from safelocus.target import Target
from safelocus.training.rows import IGNORED


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
        labels, _ = pad([row["labels"] for row in rows], 0, device)
        is_response = (labels != IGNORED) & mask.bool()
        return cls(
            inputs={"input_ids": ids, "attention_mask": mask},
            positions=is_response.flatten().nonzero().squeeze(1) - 1,  # a token is predicted by the one before it
            tokens=labels[is_response],
        )

    def logits(self, model: Any) -> Tensor:
        """[N, V] in fp32: what predicts each response token."""
        return logits_at(model, self.inputs, self.positions).float()


def own_answers(
    target: Target,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> PromptSet:
    """The prompts with the model's own answers in place of any given; unfinished answers are left out.

    Raises:
        PromptError: no answer came to its end.
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
        replace(example, response=replies[request.key].text)
        for example, request in zip(prompts, requests, strict=True)
        if replies[request.key].finished and replies[request.key].text
    ]
    if not answered:
        raise PromptError(
            f"{prompts.source}: none of the model's own answers to {len(prompts)} prompts ended within "
            f"{max_new_tokens} tokens; allow more (--max-new-tokens), or give answers"
        )
    return replace(prompts, examples=tuple(answered))
