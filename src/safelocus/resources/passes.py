"""What the stages do with a model, in the shapes of their data, to be rehearsed on tensors without data.

A phase grows with the batch. Its peak is the largest of several sums that each grow along a line, so it is convex, and
the chord between a batch of one and a large one is never below it: two rehearsals tell all batch sizes between.

Input: a `Rehearsal` and the tokens of rows. Output: functions of a model for `Rehearsal.peak`, and `Chord`s of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from safelocus.model.forcing import PACKING_ERRORS, Forced, logits_at
from safelocus.objective.refusal import COMPLIANCES, REFUSALS
from safelocus.resources.need import Lengths
from safelocus.resources.rehearsal import Peak, Rehearsal, inputs

LARGE = 64  # batch of the chord's other end
OPENINGS, OPENING_TOKENS = len(REFUSALS) + len(COMPLIANCES), 7  # of the refusal objective
_TRANSFER = 3 * (256 << 20)  # of the vocabulary transfer, which works in chunks (objective.transfer)
_VALUE = 4  # bytes of fp32


class Chord:
    """A peak for every batch size, from two rehearsals at most.

    Args:
        peak: of a batch, rehearsed.
        large: batch of the other end; where it is asked for alone, a batch of one need not be rehearsed.
    """

    def __init__(self, peak: Callable[[int], Peak], *, large: int = LARGE) -> None:
        self._peak, self._large = cache(peak), max(large, 2)

    def __call__(self, batch: int) -> Peak:
        if batch in (1, self._large):
            return self._peak(batch)
        small, large = astuple(self._peak(1)), astuple(self._peak(self._large))
        share = (batch - 1) / (self._large - 1)
        return Peak(*(max(round(low + (high - low) * share), 0) for low, high in zip(small, large, strict=True)))


@lru_cache(maxsize=8)
def generation(rehearsal: Rehearsal, lengths: Lengths) -> Callable[[int], Peak]:
    """The cache at its longest, a tenth more for the layer of it that grows by a copy, and a pass over the prompts.

    Several stages of one model generate alike.
    """
    size = rehearsal.cache(lengths.both)
    prefill = Chord(lambda b: rehearsal.peak(last_logits(b, lengths.prompt), trained=nothing))

    def peak(batch: int) -> Peak:
        pass_over = prefill(batch)
        return replace(pass_over, activations=pass_over.activations + round(size * batch * 1.1))

    return peak


def nothing(_: str) -> bool:
    """The weights that are trained: none."""
    return False


def refusal(batch: int, prompt: int) -> Callable[[Any], Tensor]:
    """As `Refusal`: every prompt with all openings behind it, or with each, where a model takes no such rows."""
    responses = batch * OPENINGS
    num_logits = responses * OPENING_TOKENS

    def packed(model: Any) -> Tensor:
        length = prompt + OPENINGS * (OPENING_TOKENS - 1)
        given = inputs(batch, length)
        given["attention_mask"] = torch.zeros(batch, 1, length, length, dtype=model.dtype, device="meta")
        given["position_ids"] = torch.zeros_like(given["input_ids"])
        return logits_at(model, given, torch.zeros(num_logits, dtype=torch.long, device="meta"))

    def work(model: Any) -> Tensor:
        try:
            logits = None if model.config.is_encoder_decoder else packed(model)
        except PACKING_ERRORS:
            logits = None
        if logits is None:
            logits = _logits(model, responses, prompt + OPENING_TOKENS, num_logits)
        index = torch.zeros(len(logits), dtype=torch.long, device="meta")
        return Forced(logits=logits, token=index, row=index).log_likelihood(responses).sum()

    return work


def transferred(batch: int, lengths: Lengths) -> Callable[[Any], Tensor]:
    """As `TextObjective`: logits along the answers, and their gradient of the same size, made in chunks."""

    def work(model: Any) -> Tensor:
        logits = _logits(model, batch, lengths.both, batch * lengths.response)
        slope = torch.empty_like(logits)
        torch.empty(min(4 * _VALUE * logits.numel(), _TRANSFER), dtype=torch.uint8, device="meta")
        return torch.einsum("nv,nv->n", logits, slope).float().sum()

    return work


def reading(batch: int, length: int) -> Callable[[Any], Tensor]:
    """As a guard reads: one verdict for each row, differentiated in the embeddings."""

    def work(model: Any) -> Tensor:
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        try:
            return _logits(model, batch, length, batch).float().logsumexp(-1).sum()
        finally:
            handle.remove()

    return work


def training(
    rehearsal: Rehearsal, lengths: Lengths, retained_rows: int, *, routers: bool
) -> Callable[[int], Callable[[Any], Iterator[Tensor]]]:
    """What is retained, by itself (`retention`), and then the loss of `SharingTrainer`.

    Args:
        routers: are trained too, so that their balance is part of the loss, which is then TRL's own.
    """
    from trl.trainer.utils import add_fused_lm_head

    from safelocus.training.responses import divergence, likeliest
    from safelocus.training.sharing import FEW_VALUES

    base = rehearsal.model.get_base_model() if hasattr(rehearsal.model, "get_base_model") else rehearsal.model
    if "forward" not in vars(base):  # rehearsed as a training before
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    length = lengths.retained or lengths.row

    def retained(model: Any, rows: int) -> Tensor:
        with torch.no_grad():  # the original, along one row at a time
            kept = likeliest(_logits(model, 1, length, lengths.response).float())
        own = _logits(model, rows, length, rows * lengths.response).float()
        return divergence(own, *(each.repeat(rows, 1) for each in kept))

    def work(batch: int) -> Callable[[Any], Iterator[Tensor]]:
        def step(model: Any) -> Iterator[Tensor]:
            if retained_rows:
                yield retained(model, batch * retained_rows)
            number = batch * lengths.response
            if (
                number * rehearsal.vocabulary <= FEW_VALUES and not routers
            ):  # on a CPU; elsewhere TRL's tiles, of about that size
                logits = _logits(model, batch, lengths.row, number).float()
                yield cross_entropy(logits, torch.zeros(number, dtype=torch.long, device="meta"), reduction="sum")
            else:
                given = inputs(batch, lengths.row)
                yield model(**given, labels=given["input_ids"], fused_lm_head=True).loss

        return step

    return work


def last_logits(batch: int, length: int) -> Callable[[Any], None]:
    """As prompts are read before the first token of an answer, and as a guard judges: no gradients."""

    @torch.no_grad()
    def work(model: Any) -> None:
        _logits(model, batch, length, batch).float()

    return work


def likelihood(batch: int, length: int) -> Callable[[Any], None]:
    """As a perplexity is measured: logits along whole rows, for how much of them is the answer is not known."""

    @torch.no_grad()
    def work(model: Any) -> None:
        logits = _logits(model, batch, length, batch * length)
        index = torch.zeros(len(logits), dtype=torch.long, device="meta")
        Forced(logits=logits, token=index, row=index).log_likelihood(batch)

    return work


def _logits(model: Any, batch: int, length: int, number: int) -> Tensor:
    given = inputs(batch, length)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    return logits_at(model, given, torch.zeros(number, dtype=torch.long, device="meta"))
