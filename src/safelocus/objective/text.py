"""S through discrete text: objectives that read what the target answers.

Per batch: the target answers greedily; a reader (guard or classifier) gives each answer a score and its
gradient in the reader's input embeddings; `transfer` turns that into a gradient on the target's logits;
the target is teacher-forced on its own answer. A thought before it is read by nobody and stands with the prompt; one
that did not end leaves an empty answer, which adds nothing to the gradient. The tensor returned has the reader's score
as its value and the transferred gradient as its derivative, so one backward pass per batch is all that is left.
`AnswerLog` keeps the answers that scores rest on, as they come and when all are there.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor

from safelocus import distributed
from safelocus.errors import ModelError
from safelocus.model.chat import continuation, tokenizer_digest
from safelocus.model.fingerprint import Fingerprint, dtype_name
from safelocus.model.forcing import Forced, pad, sent, teacher_force
from safelocus.model.generation import Response, generate, room_for_prompt
from safelocus.objective.transfer import GuardReading, Transfer, Variant
from safelocus.run.files import read_lines, sealed, unsealed, write_lines

if TYPE_CHECKING:
    from safelocus.model.target import Target

_READER = (
    "kind", "name", "preset", "preset_hash", "chat_template", "tokenizer", "unsafe", "multi_label", "weights", "dtype",
)  # fmt: skip

ResponseListener = Callable[[Sequence[str], Sequence[Response], Tensor], None]


@dataclass(kw_only=True, eq=False)
class AnswerObjective(ABC):
    """Common part of objectives that score what the target answers.

    Attributes:
        max_new_tokens: length of the target's answers (published code: 256).
        on_responses: called with (prompts, responses, scores) for every batch, e.g. to save them; the score of an
            answer without a verdict is NaN.
    """

    max_new_tokens: int = 256
    on_responses: ResponseListener | None = None

    def __call__(self, target: "Target", prompts: Sequence[str]) -> Tensor:
        """Scores [B] of the target's own greedy answers; differentiable in its weights."""
        return self.score_responses(target, prompts, generate(target, prompts, max_new_tokens=self.max_new_tokens))

    @abstractmethod
    def score_responses(self, target: "Target", prompts: Sequence[str], responses: Sequence[Response]) -> Tensor:
        """Scores [B] of given answers; differentiable in the target's weights."""


@dataclass(kw_only=True, eq=False)
class TextObjective(AnswerObjective):
    """Common part of `Guard` and `Classifier`.

    Attributes:
        name: path or hub id of the reader, for provenance.
        model, tokenizer: the reader; its parameters never collect gradients.
        tau: temperature of the relaxation of the target's tokens (published code: 0.3).
        gumbel_seed: seed of the relaxation's Gumbel noise; None for none.
        variant: of the vocabulary transfer; None takes identity or character, whichever applies.
    """

    name: str
    model: Any
    tokenizer: Any
    tau: float = 0.3
    gumbel_seed: int | None = None
    variant: Variant | None = None
    _transfers: WeakKeyDictionary[Any, dict[Any, Transfer]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    def score_responses(self, target: "Target", prompts: Sequence[str], responses: Sequence[Response]) -> Tensor:
        """Scores [B] of given answers; differentiable in the target's weights."""
        transfer = self.transfer_for(target)
        ids = [list(response.answer_ids) for response in responses]
        read = [transfer.response_text(i) for i in ids]
        reading = self.read(
            prompts, [text for text, _ in read], response_ids=ids if transfer.variant == "identity" else None
        )
        aligned = transfer.align(reading, [spans for _, spans in read])  # [N, d]
        forced = force_answers(target, prompts, responses)
        slope = transfer.logit_gradient(forced.logits.detach(), aligned, tau=self.tau, seeds=self._seeds(prompts, ids))
        if self.on_responses is not None:  # reads the scores, so it waits for the device, which has its work by now
            unread = torch.tensor(reading.unread, dtype=torch.long, device=reading.score.device)
            self.on_responses(prompts, responses, reading.score.index_fill(0, unread, torch.nan))
        return with_slope(reading.score, forced, slope)

    def _seeds(self, prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int] | None:
        """Of the noise, which belongs to prompt and position, in whatever batch, process or resumed run they come."""
        if self.gumbel_seed is None:
            return None
        named = [f"{self.gumbel_seed}:{getattr(prompt, 'system', None)}:{prompt}" for prompt in prompts]
        return [
            xxhash.xxh3_64_intdigest(f"{name}:{position}".encode("utf-8", "surrogatepass")) >> 1
            for name, own in zip(named, ids, strict=True)
            for position in range(len(own))
        ]

    def transfer_for(self, target: "Target") -> Transfer:
        """The vocabulary transfer to this target; made once (seconds for a vocabulary of 128k)."""
        made = self._transfers.setdefault(target.tokenizer, {})
        vocabulary = target.model.get_output_embeddings().weight.shape[0]
        if (vocabulary, self.variant) not in made:
            made[vocabulary, self.variant] = Transfer(
                target.tokenizer,
                self.tokenizer,
                self.model.get_input_embeddings(),
                target_vocabulary=vocabulary,
                variant=self.variant,
            )
        return made[vocabulary, self.variant]

    @abstractmethod
    def read(
        self, prompts: Sequence[str], responses: Sequence[str], *, response_ids: list[list[int]] | None = None
    ) -> GuardReading:
        """Score answers and differentiate in the reader's input embeddings.

        `response_ids` are given where reader and target share a vocabulary: the reader must then see
        exactly those tokens, not its own tokenization of the text.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What this objective is, for provenance (JSON)."""

    def identity(self) -> dict[str, Any]:
        """All that its scores depend on."""
        return {**self.describe(), **self.identity_of_reader()}

    def is_the_one(self, described: Mapping[str, Any]) -> bool:
        """Whether `describe` told of this model, read in the same way; its relaxation may be another.

        What earlier versions did not tell is taken to be the same.
        """
        own = self.describe()
        return all(described.get(part, own.get(part)) == own.get(part) for part in _READER)

    def identity_of_reader(self) -> dict[str, Any]:
        """All that its verdicts on given answers depend on."""
        return {"weights": self._weights, "tokenizer": self._vocabulary}

    def _check_positions(self, inputs: Sequence["ReaderInput"]) -> None:
        """ModelError where the reader has fewer positions than it is to read tokens."""
        if (longest := max(len(each.ids) for each in inputs)) > self._num_positions:
            raise ModelError(
                f"{self.name} has {self._num_positions} positions, and {longest} tokens to read; let the model answer "
                "in fewer (--max-new-tokens), or leave such prompts out"
            )

    @cached_property
    def _num_positions(self) -> int:
        named = (part for name, part in self.model.named_modules() if name.endswith("position_embeddings"))
        offset = (getattr(part, "padding_idx", None) for part in named)  # RoBERTa counts on from there
        return room_for_prompt(self.model.config, 0) - sum(each + 1 for each in offset if each is not None)

    @cached_property
    def _weights(self) -> str:
        return Fingerprint.of_tensors(self.model.config, self.model.named_parameters()).id

    @cached_property
    def _vocabulary(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def _describe_reading(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "tokenizer": self._vocabulary,
            "dtype": dtype_name(self.model.dtype),
            "max_new_tokens": self.max_new_tokens,
            "tau": self.tau,
            "gumbel_seed": self.gumbel_seed,
            "transfer": self.variant or "automatic",
        }


def force_answers(target: "Target", prompts: Sequence[str], responses: Sequence[Response]) -> Forced:
    """The target along answers of its own, each behind its prompt and its thought."""
    before = [
        [*target.chat.encode_prompt(prompt), *response.ids[: response.num_thought]]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return teacher_force(target, before, [list(response.answer_ids) for response in responses])


def with_slope(scores: Tensor, forced: Forced, slope: Tensor) -> Tensor:
    """Scores [B] as they are, with `slope` [N, V] for their derivative in the logits."""
    # linear in the logits: its derivative is exactly `slope`, and no copy of [N, V] is made
    linear = torch.einsum("nv,nv->n", forced.logits, slope).to(scores.dtype)
    scores = scores.to(linear.device)
    relaxed = torch.zeros_like(scores).index_add(0, forced.row, linear)
    return scores + (relaxed - relaxed.detach())  # which is zero: scores keep every bit


@dataclass(frozen=True, kw_only=True)
class ReaderInput:
    """One conversation as the reader's tokens: where the response stands and what it covers."""

    ids: list[int]
    response_positions: list[int]
    response_spans: list[tuple[int, int]]


def tokenize_around(
    tokenizer: Any,
    prefix: str,
    response: str,
    suffix: str,
    *,
    add_special_tokens: bool,
    response_ids: Sequence[int] | None = None,
) -> ReaderInput:
    """Tokenize prefix + response + suffix and find the response's tokens by characters.

    With `response_ids` the response is put in as these tokens, between the tokens of prefix and suffix.
    """
    if response_ids is not None:
        before = tokenizer(prefix, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        after = continuation(tokenizer, prefix + response, suffix)
        positions = list(range(len(before), len(before) + len(response_ids)))
        return ReaderInput(
            ids=[*before, *response_ids, *after],
            response_positions=positions,
            response_spans=[(i, i + 1) for i in range(len(response_ids))],
        )
    encoded = tokenizer(
        prefix + response + suffix,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    start, end = len(prefix), len(prefix) + len(response)
    positions, spans, previous = [], [], 0
    for position, (left, right) in enumerate(encoded["offset_mapping"]):
        if left == right:  # a token of spaces alone, where the tokenizer trims its offsets (GPT-2, RoBERTa)
            left = min(previous, right)
        previous = right
        if left < end and right > start:  # special tokens cover nothing: (0, 0)
            positions.append(position)
            # a token that begins before the response is the response's as far as it goes
            spans.append((max(left, start) - start, min(right, end) - start))
    return ReaderInput(ids=list(encoded["input_ids"]), response_positions=positions, response_spans=spans)


def batch_inputs(model: Any, tokenizer: Any, inputs: Sequence[ReaderInput]) -> dict[str, Tensor]:
    """Ids and mask [B, L], padded on the right, where the reader's embedding is."""
    device = model.get_input_embeddings().weight.device
    ids, mask = pad([i.ids for i in inputs], padding_id(tokenizer), device)
    return {"input_ids": ids, "attention_mask": mask}


def embedding_gradients(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[ReaderInput],
    score: Callable[[dict[str, Tensor]], Tensor],
) -> GuardReading:
    """Run the reader once, padded on the right, and differentiate `score` in its input embeddings.

    Args:
        score: from the model's inputs (ids and mask, [B, L]) to scores [B].
    """
    batch = batch_inputs(model, tokenizer, inputs)
    seen: list[Tensor] = []

    def catch(_module: Any, _args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        with torch.enable_grad():
            values = score(batch).float()
            (gradient,) = torch.autograd.grad(values.sum(), seen[0])  # [B, L, d]
    finally:
        handle.remove()
    width = gradient.shape[1]
    places = torch.tensor([b * width + p for b, i in enumerate(inputs) for p in i.response_positions], dtype=torch.long)
    rows = gradient.flatten(0, 1)[sent(places, gradient.device)].split([len(i.response_positions) for i in inputs])
    return GuardReading(score=values.detach(), gradients=list(rows), spans=[i.response_spans for i in inputs])


def without(reading: GuardReading, unread: Sequence[int]) -> GuardReading:
    """A reading in which some responses, by number, count as unread."""
    score, gradients = reading.score.clone(), list(reading.gradients)
    for number in unread:
        score[number], gradients[number] = 0.0, torch.zeros_like(gradients[number])
    return replace(reading, score=score, gradients=gradients, unread=tuple(unread))


def padding_id(tokenizer: Any) -> int:
    """What a reader's batches are filled up with."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0  # padding is masked: any id will do


class AnswerLog:
    """Keeps every answer and its score in a JSON-lines file; never printed.

    Unfinished, the file has a line for each batch of this process, as they come; `finish` makes one for each answer, of
    all processes, in the order of a single one. A batch that a resumed run repeats counts once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches = path.with_name(f"{path.name}.unfinished")

    def __call__(self, prompts: Any, responses: Any, scores: Any) -> None:
        rows = [
            {
                "prompt": prompt,
                **({"system": system} if (system := getattr(prompt, "system", None)) else {}),
                "response": response.text,
                "finished": response.finished,
                **({"thought": response.thought} if response.thought is not None else {}),
                **({"in_thought": True} if response.in_thought else {}),
                "safety": None if math.isnan(value) else value,
            }
            for prompt, response, value in zip(prompts, responses, scores.tolist(), strict=True)
        ]
        with self._batches.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(sealed(rows))}")  # begins a line: another may have been cut off

    def finish(self) -> list[dict[str, Any]]:
        """Write the answers of all processes, and return them; every process calls this.

        Those that an earlier attempt wrote stay: one that failed later is resumed, and asks only what comes after.
        """
        batches: dict[Any, list[dict[str, Any]]] = {}
        if self._path.is_file():
            batches[None] = read_lines(self._path)
        for line in self._batches.read_bytes().split(b"\n") if self._batches.is_file() else ():
            with suppress(json.JSONDecodeError, UnicodeDecodeError):  # cut off by a crash: the batch was repeated
                json.loads(line)
                rows = unsealed(line, self._batches)
                batches[tuple((row["prompt"], row.get("system")) for row in rows)] = rows
        rounds = zip_longest(*distributed.gather_objects(list(batches.values())), fillvalue=[])
        found = {(row["prompt"], row.get("system")): row for each in rounds for rows in each for row in rows}
        answers = list(found.values())
        if distributed.is_main() and answers:
            write_lines(self._path, answers)
        distributed.barrier()
        self._batches.unlink(missing_ok=True)
        return answers
