"""Mixing: rows of the model's own answers among a task's rows, so that it goes on answering as it did.

The practitioner's remedy, which needs no weights to be found and goes with whatever trains the model; on a real model
it kept more refusals than freezing or calibrating (docs/results/real-preserve.md).

    Mixed   prompts and a share, for `run_preservation`
    mix     the same for a data set that a trainer takes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelocus.errors import PromptError, TrainingError
from safelocus.model.target import Target
from safelocus.objective import Lexicon
from safelocus.prompts import Example, PromptSet, read_prompts
from safelocus.training.responses import own_answers

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS = ("embedded:refusals", "embedded:ordinary", "embedded:alarming")
SHARE, ANSWER_TOKENS = 1 / 6, 64  # of all rows, and of an answer: what was measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """Rows of the model's own answers to a few prompts.

    Attributes:
        prompts: harmful ones, and harmless ones against over-refusal. Responses in them are not used.
        share: of all rows.
        max_new_tokens: length of the answers; longer ones are cut, and teach no end.
    """

    prompts: Sequence[PromptSet]
    share: float = SHARE
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise TrainingError(f"the share of mixed-in rows lies between 0 and 1, found {self.share}")

    def into(
        self,
        data: PromptSet,
        target: Target,
        *,
        lexicon: Lexicon | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> PromptSet:
        """The task's rows, and as often as their share needs the model's own answers, the sets in equal parts.

        Args:
            lexicon: expressions that these answers do not hold.
            checkpoint: folder for answers that are there already.
        """
        answered = [
            own_answers(
                target, part, max_new_tokens=self.max_new_tokens, cut=True, lexicon=lexicon,
                checkpoint=None if checkpoint is None else checkpoint / str(number), progress=progress,
            )
            for number, part in enumerate(self.prompts)
        ]  # fmt: skip
        return replace(data, examples=(*data.examples, *self._drawn(answered, len(data))))

    def _drawn(self, answered: Sequence[PromptSet], size: int) -> list[Example]:
        each = max(round(size * self.share / (1 - self.share) / len(answered)), 1)
        return [part.examples[number % len(part)] for part in answered for number in range(each)]


def mix(
    rows: "Dataset",
    target: Target,
    prompts: Sequence[PromptSet | str] = PROMPTS,
    *,
    share: float = SHARE,
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> "Dataset":
    """A data set for a trainer, with rows of the model's own answers among its own, shuffled.

    Args:
        rows: in a form that TRL takes: `messages`; `prompt` and `completion`, of messages or text; `text`.
        target: the model as it is before the training, which answers.
        prompts: sets that come in equal parts; give harmful and harmless ones.
        share: of all rows.
        max_new_tokens: answers that do not end within are left out, since such rows cannot be cut.
        seed: of the order.

    Returns:
        Dataset: columns as in `rows`; those that an answer has nothing for are None.

    Raises:
        PromptError: rows of another form; no answer ended.
        TrainingError: a share that is none.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=sl.mix(rows, target), ...)    # doctest: +SKIP
        >>> protection = sl.preserve(trainer, selection)                            # doctest: +SKIP
    """
    from datasets import Dataset, concatenate_datasets

    write = _writer(rows, target)
    mixed = Mixed(prompts=[read_prompts(part) for part in prompts], share=share)
    answered = [
        own_answers(target, part, max_new_tokens=max_new_tokens, progress=progress) for part in mixed.prompts
    ]  # fmt: skip
    nothing = dict.fromkeys(rows.column_names)
    added = [nothing | write(example) for example in mixed._drawn(answered, len(rows))]
    return concatenate_datasets([rows, Dataset.from_list(added, features=rows.features)]).shuffle(seed=seed)


def _writer(rows: "Dataset", target: Target) -> Callable[[Example], dict[str, Any]]:
    """How an answered prompt is written as one of these rows."""
    columns = {*rows.column_names}

    def said(example: Example) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        system = [] if example.system is None else [{"role": "system", "content": example.system}]
        asked = [*system, {"role": "user", "content": example.prompt}]
        return asked, [{"role": "assistant", "content": example.response or ""}]

    if "messages" in columns:
        return lambda example: {"messages": [message for part in said(example) for message in part]}
    if {"prompt", "completion"} <= columns:
        if len(rows) and isinstance(rows[0]["prompt"], list):
            return lambda example: dict(zip(("prompt", "completion"), said(example), strict=True))
        return lambda example: {"prompt": _as_text(example, target), "completion": example.response or ""}
    if "text" in columns:
        return lambda example: {"text": _as_text(example, target) + (example.response or "")}
    raise PromptError(
        f"rows with columns {sorted(columns)}; expected `messages`, `prompt` and `completion`, or `text`: mix before "
        "the trainer makes tokens of them"
    )


def _as_text(example: Example, target: Target) -> str:
    """What stands before an answer, in the target's chat format."""
    ids = target.chat.encode_prompt(example.prompt, system=example.system)
    bos = target.tokenizer.bos_token_id
    return str(target.tokenizer.decode(ids[1:] if ids[:1] == [bos] else ids))  # trainers put it there themselves
