"""Calibration: the task never trains the protected weights; small steps between its own do, so that the model goes
on answering as it did.

    every N steps:  theta_P <- theta_P - AdamW( d/dtheta_P  KL(original || model)(original's own answers) )

A frozen weight keeps its value but not its meaning: the others move around it. Calibration gives the selected weights
to one purpose, what the original model said to a few prompts (harmful ones, and harmless ones, so that the model does
not learn to refuse everything). The original is not kept: its answers are generated once, and the probabilities along
them stored, the `num_kept` likeliest tokens and the rest in one. After ASCENT (2026), which alternates task updates
with calibration steps along the singular directions of the gradient of S; here they are confined to a selection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelocus.errors import TrainingError
from safelocus.training.curve import at_rest
from safelocus.training.responses import ResponseBatch, likeliest, own_answers
from safelocus.training.rows import IGNORED, training_rows

if TYPE_CHECKING:
    from safelocus.prompts import PromptSet
    from safelocus.target import Target


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """How to calibrate.

    Attributes:
        target: the model that is trained, with its tokenizer.
        prompts: sets that take turns; give harmful and harmless ones. Responses in them are not used.
        every: steps of the task between two of calibration.
        learning_rate: of AdamW on the protected weights.
        batch_size: prompts of each set in one calibration step.
        num_kept: tokens whose probability is stored at each place.
        max_new_tokens: length of the original's answers; unfinished ones are left out.
        max_length: tokens of prompt and answer.
        max_grad_norm: the gradient on the protected weights is clipped to this norm.
        seed: of the order of the prompts.
    """

    target: "Target"
    prompts: Sequence["PromptSet"]
    every: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 8
    num_kept: int = 64
    max_new_tokens: int = 256
    max_length: int = 1024
    max_grad_norm: float = 1.0
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """How, and with which prompts; the target is that of the training."""
        return {name: value for name, value in vars(self).items() if name != "target"}

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "num_kept", "max_new_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise TrainingError(f"calibration: {name} is at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"calibration: {name} is a positive number, found {getattr(self, name)}")
        if not self.prompts:
            raise TrainingError("calibration needs prompts: harmful ones, and harmless ones against over-refusal")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What the original model said to one prompt.

    Attributes:
        row: input_ids and labels.
        tokens: int32 [n, num_kept], the likeliest tokens at each of the n places of the response.
        log_probs: fp32 [n, num_kept], theirs.
    """

    row: dict[str, Any]
    tokens: Tensor
    log_probs: Tensor


@torch.no_grad()
def references(calibration: Calibration, *, progress: bool = True) -> list[list[Reference]]:
    """Per set, what the model as it is now answers, and how likely each token is to it. On the CPU.

    Raises:
        PromptError: no answer to a set's prompts came to its end.
    """
    with at_rest(calibration.target.model):
        return [_references(calibration, prompts, progress) for prompts in calibration.prompts]


def _references(calibration: Calibration, prompts: "PromptSet", progress: bool) -> list[Reference]:
    target, found = calibration.target, []
    answered = own_answers(target, prompts, max_new_tokens=calibration.max_new_tokens, progress=progress)
    rows = list(training_rows(answered, target.chat, max_length=calibration.max_length))
    for start in range(0, len(rows), calibration.batch_size):
        part = rows[start : start + calibration.batch_size]
        kept = likeliest(batch_of(part, target).logits(target.model), calibration.num_kept)
        lengths = [sum(label != IGNORED for label in row["labels"]) for row in part]
        tokens, values = (each.cpu().split(lengths) for each in kept)
        found += [
            Reference(row=row, tokens=t.clone(), log_probs=v.clone())
            for row, t, v in zip(part, tokens, values, strict=True)
        ]
    return found


def batch_of(rows: Sequence[dict[str, Any]], target: "Target") -> ResponseBatch:
    """Rows of references, padded, where the target takes its inputs."""
    padding: Any = target.tokenizer.pad_token_id
    return ResponseBatch.of(rows, int(padding), target.device)
