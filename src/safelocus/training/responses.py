"""What a model says, and is to say: training rows, its own answers as such, and logits along their responses.

A row has the target's own chat format, the one it is scored and evaluated with, and the loss on the response alone:

    {"input_ids": [...], "labels": [-100, ..., response ids, end of turn]}

Where an encoder reads the prompt, that is all of `input_ids`, and the decoder's own ids stand in `decoder_ids`, with
`labels` of the same length. In a conversation every response has its loss, given all that was said before it.

How far a model moves from an original along such responses is in `evaluation.divergence`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from torch import Tensor

from safelocus.errors import PromptError
from safelocus.evaluation.responding import Request, TargetResponder, collect
from safelocus.model.chat import ChatFormat
from safelocus.model.forcing import decoder_start, logits_at, pad
from safelocus.model.target import Target
from safelocus.objective import Lexicon
from safelocus.prompts import Example, Prompt, PromptSet
from safelocus.run.resume import Journal, claim

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # the label of tokens that carry no loss, for transformers


def training_rows(prompts: PromptSet, chat: ChatFormat, *, max_length: int = 1024) -> "Dataset":
    """One row per prompt that has a response, or per conversation, of which every response is learned.

    Args:
        max_length: responses are cut there; a row whose prompt leaves no room for a response is left out.

    Raises:
        PromptError: no prompt has a response, or none fits.
    """
    return rows_with_remarks(prompts, chat, max_length=max_length)[0]


def rows_with_remarks(prompts: PromptSet, chat: ChatFormat, *, max_length: int = 1024) -> "tuple[Dataset, list[str]]":
    """`training_rows`, and what they lack of the prompts, in sentences: rows cut or left out, turns not learned."""
    from datasets import Dataset

    answered = prompts.with_responses()
    encoded = [encode_rows(example, chat) for example in answered]
    whole = [row for rows, _ in encoded for row in rows]
    left = [row for row in whole if any(label != IGNORED for label in row["labels"][:max_length])]
    if chat.reads_apart:  # a prompt is read whole, or not at all
        left = [row for row in left if len(row["input_ids"]) <= max_length]
    if not left:
        raise PromptError(
            f"{prompts.source}: all {len(answered)} prompts are longer than {max_length} tokens; "
            "raise the maximum length"
        )
    num_turns = sum(example.unread + 1 + len(example.later) - example.context for example in answered)
    lacks = (
        (len(whole) - len(left), len(whole), f"rows are left out: their prompts alone have {max_length} tokens or more "
         "(--max-length)"),
        (sum(len(row["labels"]) > max_length for row in left), len(whole), f"rows are cut to {max_length} tokens "
         "(--max-length)"),
        (num_turns - sum(learned for _, learned in encoded), num_turns, "answers in conversations are not learned: "
         "they do not follow a request, or the model takes nothing of what came before"),
    )  # fmt: skip
    remarks = [f"{prompts.source}: {number:,} of {of:,} {what}" for number, of, what in lacks if number]
    return Dataset.from_list([{name: ids[:max_length] for name, ids in row.items()} for row in left]), remarks


def encode_rows(example: Example, chat: ChatFormat) -> tuple[list[dict[str, list[int]]], int]:
    """Rows of an example, and how many responses they teach: all of a conversation in one row, as a rule.

    Several rows where a template shows what was said in another way than while it was said (without thoughts, say).
    """
    system = chat.system if example.system is None else example.system
    later = example.later if chat.kind == "chat" and not chat.reads_apart else ()
    rows: list[dict[str, list[int]]] = []
    learned, history = 0, list[tuple[str, str]]()
    for number, (request, response) in enumerate([(example.prompt, example.response or ""), *later]):
        try:
            prompt, answer = chat.encode_pair(
                Prompt(request, history=tuple(history)), response, system=system,
                end=example.complete or number < len(later),
            )  # fmt: skip
        except jinja2.TemplateError:
            if not history:
                raise
            break  # it takes none
        is_learned = number >= example.context
        learned += is_learned
        if chat.reads_apart:
            labels = answer if is_learned else [IGNORED] * len(answer)
            rows.append({"input_ids": prompt, "decoder_ids": answer, "labels": labels})
            continue
        labels = [IGNORED] * len(prompt)
        if rows and prompt[: len(rows[-1]["input_ids"])] == rows[-1]["input_ids"]:
            before = rows.pop()["labels"]
            labels = before + labels[len(before) :]
        labels += answer if is_learned else [IGNORED] * len(answer)
        rows.append({"input_ids": [*prompt, *answer], "labels": labels})
        history.append((request, response))
    return [row for row in rows if any(label != IGNORED for label in row["labels"])], learned


def without_listed(rows: "Dataset", lexicon: Lexicon, target: Target) -> "tuple[Dataset, str]":
    """Rows without a loss where a response says a listed expression, or a neighbour of one; and how many these are.

    What comes before and after is learned as ever, and the model's own opinion about the expression is left as it is.
    """
    sequences: dict[int, list[list[int]]] = {}
    for ids in lexicon.sequences_for(target).ids:
        sequences.setdefault(ids[0], []).append([*ids])

    def masked(labels: list[int]) -> list[int]:
        kept = [*labels]
        for start, token in enumerate(labels):
            for ids in sequences.get(token, ()):
                if labels[start : start + len(ids)] == ids:
                    kept[start : start + len(ids)] = [IGNORED] * len(ids)
        return kept

    before = rows["labels"]
    after = [masked(labels) for labels in before]
    learned, left = (sum(label != IGNORED for row in part for label in row) for part in (before, after))
    found = rows.remove_columns("labels").add_column("labels", after)
    return found, f"{learned - left:,} of {learned:,} response tokens are of listed expressions, and not learned"


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseBatch:
    """Padded rows, and where their responses are.

    Attributes:
        inputs: input_ids and attention_mask, [B, L]; decoder_ids [B, T] beside an encoder.
        labels: [B, L], or [B, T]; IGNORED where nothing is learned.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], padding: int, device: torch.device) -> "ResponseBatch":
        """Of rows as `training_rows` makes them."""
        padded = padded_rows(rows, padding, device)
        return cls(labels=padded.pop("labels"), inputs=padded)

    @cached_property
    def tokens(self) -> Tensor:
        """[N] the response tokens, row after row."""
        return self.labels[self.labels != IGNORED]

    def num_values(self, model: Any) -> int:
        """N V, of `logits`."""
        return len(self.tokens) * int(model.config.get_text_config().vocab_size)

    def logits(self, model: Any) -> Tensor:
        """[N, V] in fp32: what predicts each response token."""
        positions = (self.labels != IGNORED).flatten().nonzero().squeeze(1)
        inputs = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        if "decoder_ids" in self.inputs:
            ids = self.inputs["decoder_ids"]
            start = ids.new_full((len(ids), 1), decoder_start(model.config))
            return logits_at(
                model, {**inputs, "decoder_input_ids": torch.cat([start, ids[:, :-1]], dim=1)}, positions
            ).float()  # fmt: skip
        return logits_at(model, inputs, positions - 1).float()  # a token is predicted by the one before it


def padded_rows(rows: Sequence[Mapping[str, Any]], padding: int, device: torch.device) -> dict[str, Tensor]:
    """Rows as `training_rows` makes them, as one batch."""
    ids, mask = pad([row["input_ids"] for row in rows], padding, device)
    batch = {"input_ids": ids, "attention_mask": mask}
    if "decoder_ids" in rows[0]:
        batch["decoder_ids"] = pad([row["decoder_ids"] for row in rows], padding, device)[0]
    return batch | {"labels": pad([row["labels"] for row in rows], IGNORED, device)[0]}


def own_answers(
    target: Target,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    cut: bool = False,
    lexicon: Lexicon | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> PromptSet:
    """The prompts with the model's own answers in place of any given.

    Args:
        cut: keep answers that do not come to their end, as incomplete ones; else they are left out.
        lexicon: expressions that the answers do not hold, in any token sequence that this list stands for: the
            likeliest other token is taken instead.

    Raises:
        PromptError: no answer is left.
    """
    requests = [Request(prompt=e.prompt, system=e.system, max_new_tokens=max_new_tokens) for e in prompts]
    never = () if lexicon is None else lexicon.sequences_for(target).ids
    responder = TargetResponder(target=target, never=never)
    claim(
        checkpoint,
        {
            "the model": responder, "the prompts": prompts, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        },
    )  # fmt: skip
    journal = Journal(checkpoint, "responses")
    replies = collect(responder, requests, journal, batch_size=batch_size, progress=progress)
    answered = [
        replace(example, response=reply.text, complete=reply.finished, later=(), context=0, unread=0)
        for example, reply in zip(prompts, (replies[request.key] for request in requests), strict=True)
        if reply.text and (cut or reply.finished)
    ]
    if not answered:
        what = "says anything outside of its thoughts" if cut else "comes to its end"
        raise PromptError(
            f"{prompts.source}: none of the model's own answers to {len(prompts)} prompts {what} within "
            f"{max_new_tokens} tokens; allow more, or take other prompts"
        )
    return replace(prompts, examples=tuple(answered))
