"""How far a model is from an original, along what the original said.

What an original says is kept as the K likeliest tokens of each place, with all others as one, so that it need not be
run again. The divergence is that over K + 1 outcomes, p the original's and q the model's:

    sum over the K  p log(p / q)  +  p_rest log(p_rest / q_rest)        p_rest = 1 - sum over the K of p

It is never more than KL(p || q), from which it differs by p_rest times the divergence among the other tokens. Along the
original's own answers its mean is what a training that retains behaviour holds down, and what is measured afterwards.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelocus.errors import ModelError, NumericalError, PromptError
from safelocus.evaluation.perplexity import along
from safelocus.model.forcing import Forced
from safelocus.model.generation import LOOK_AT_WEIGHTS, NO_NUMBER
from safelocus.model.target import Target
from safelocus.prompts import Example, PromptSet, read_prompts

Said = tuple[Tensor, Tensor]


def likeliest(logits: Tensor, num_kept: int = 64) -> Said:
    """int32 and fp32 [N, K]: the K likeliest tokens at each place, and their log-probabilities. logits [N, V] fp32."""
    log_probs, tokens = logits.log_softmax(-1).topk(min(num_kept, logits.shape[-1]), dim=-1)
    return tokens.int(), log_probs


def divergences(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """[N] of the model's distribution at each place from the kept one. logits [N, V] fp32; the rest: `likeliest`."""
    own = logits.log_softmax(-1).gather(1, tokens.long())  # [N, K]
    kept = (log_probs.exp() * (log_probs - own)).sum(-1)
    rest, own_rest = (1 - p.exp().sum(-1) for p in (log_probs, own))
    rest, own_rest = rest.clamp(min=0.0), own_rest.clamp(min=1e-6)
    return kept + rest * (rest.clamp(min=1e-6).log() - own_rest.log())


def divergence(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """Mean of `divergences`."""
    return divergences(logits, tokens, log_probs).mean()


def answered(given: Iterable[tuple[str, str | None, str | None]]) -> PromptSet:
    """Prompts with answers, of (prompt, system, answer); those without any words are left out."""
    examples = [Example(prompt=prompt, system=system, response=text) for prompt, system, text in given if text]
    if not examples:
        raise PromptError("the original answered no harmless prompt, so how far a model is from it cannot be measured")
    return read_prompts(examples)


@dataclass(frozen=True, kw_only=True, eq=False)
class Original:
    """What a model answered, and the next token's distribution at each place of that. Make one with `of`.

    Attributes:
        name: of the model.
        answers: prompts with its answers.
        said: per answer (int32 tokens, fp32 log-probabilities), each [its tokens, K]; None where it has no tokens.
        vocabulary: token -> id.
    """

    name: str
    answers: PromptSet
    said: Sequence[Said | None]
    vocabulary: dict[str, int]

    @classmethod
    def of(cls, target: Target, answers: PromptSet, *, batch_size: int = 8, progress: bool = True) -> "Original":
        """Of a model as it is, one pass over its answers.

        Raises:
            NumericalError: it computes NaN or infinity along them.
        """

        def kept(forced: Forced, rows: Sequence[int]) -> list[Said]:
            lengths = forced.row.bincount(minlength=len(rows)).tolist()
            return list(zip(*(part.cpu().split(lengths) for part in likeliest(forced.logits.float())), strict=True))

        said = [each for each, _ in along(target, answers, kept, batch_size=batch_size, progress=progress)]
        if without := sum(each is not None and not bool(each[1].isfinite().all()) for each in said):
            raise NumericalError(
                f"{without} of {len(said)} distributions of {target.name} are {NO_NUMBER}; {LOOK_AT_WEIGHTS}"
            )
        return cls(name=target.name, answers=answers, said=said, vocabulary=target.tokenizer.get_vocab())

    def kl_per_token(self, target: Target, *, batch_size: int = 8, progress: bool = True) -> list[float | None]:
        """Mean divergence in nats of a model from this one along each of its answers.

        None where an answer has no tokens, and where the model computes NaN or infinity along it.

        Raises:
            ModelError: the two do not share a vocabulary, so their distributions are over different things.
        """
        if target.tokenizer.get_vocab() != self.vocabulary:
            raise ModelError(
                f"{target.name} and {self.name} have different vocabularies; expected a model and its original"
            )

        def apart(forced: Forced, rows: Sequence[int]) -> list[float]:
            said = [each for row in rows if (each := self.said[row]) is not None]
            tokens, log_probs = (torch.cat(parts).to(forced.logits.device) for parts in zip(*said, strict=True))
            return forced.totals(divergences(forced.logits.float(), tokens, log_probs), len(rows)).tolist()

        found = along(target, self.answers, apart, batch_size=batch_size, progress=progress)
        return [total / num if total is not None and math.isfinite(total) else None for total, num in found]

    def identity(self) -> dict[str, Any]:
        return {"model": self.name, "answers": self.answers}

    def describe(self) -> dict[str, Any]:
        """For provenance."""
        return {"model": self.name, "num_answers": len(self.answers), "hash": self.answers.hash}
