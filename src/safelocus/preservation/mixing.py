"""Mixing: rows of the model's own answers among a task's rows, so that it goes on answering as it did.

The practitioner's remedy, which needs no weights to be found and goes with whatever trains the model
(docs/results/real-preserve.md).

    Mixed   prompts and a share, for `run_preservation`
    mix     the same for a data set that a trainer takes
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelocus.errors import PromptError, TrainingError
from safelocus.model.target import Target
from safelocus.objective import Lexicon
from safelocus.prompts import Example, PromptSet, read_prompts
from safelocus.run.resume import part_of
from safelocus.training.examination import facts
from safelocus.training.responses import own_answers

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS = ("embedded:refusals", "embedded:ordinary", "embedded:alarming")
SHARE, ANSWER_TOKENS = 1 / 6, 64  # of all rows, and of an answer: what was measured
MOST = 0.9
_ASKED = 16  # prompts, before it is believed that no answer ends


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """Rows of the model's own answers to a few prompts.

    Attributes:
        prompts: sets, or what they are read from: harmful ones, and harmless ones against over-refusal; one that is
            named twice counts twice. Responses in them are not used.
        share: of all rows.
        max_new_tokens: length of the answers; longer ones are cut, and teach no end.
        seed: which prompts are drawn, where there are more than rows.
    """

    prompts: Sequence[PromptSet]
    share: float = SHARE
    max_new_tokens: int = ANSWER_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TrainingError("nothing to mix in: give at least one set of prompts, or no `Mixed`")
        if not 0 < self.share <= MOST:
            raise TrainingError(
                f"the share of mixed-in rows is above 0 and at most {MOST:g}, so that the task is learned; found "
                f"{self.share:g}"
            )
        object.__setattr__(self, "prompts", sets_of(self.prompts))

    def into(
        self,
        data: PromptSet,
        target: Target,
        *,
        size: int,
        lexicon: Lexicon | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> tuple[PromptSet, list[str]]:
        """The task's rows, and as often as their share needs the model's own answers, the sets in equal parts; remarks.

        Args:
            size: how many rows of the task are learned: those that are answered and not too long.
            lexicon: expressions that these answers do not hold.
            checkpoint: folder for answers that are there already.
        """
        how = {"max_new_tokens": self.max_new_tokens, "cut": True, "lexicon": lexicon, "progress": progress}
        added, remarks = self.rows(size, target, checkpoint, **how)
        return replace(data, examples=(*data.examples, *added)), remarks

    def rows(
        self, size: int, target: Target, checkpoint: Path | None = None, **how: Any
    ) -> tuple[list[Example], list[str]]:
        """What is mixed into so many rows, and what it lacks, in sentences. `how`: see `own_answers`.

        The model answers what is drawn, and more only where answers are left out.
        """
        each = max(round(size * self.share / (1 - self.share) / len(self.prompts)), 1)
        times = Counter(part.hash for part in self.prompts)
        found, remarks = list[Example](), list[str]()
        for number, part in enumerate({part.hash: part for part in self.prompts}.values()):
            folder, num = part_of(checkpoint, str(number)), each * times[part.hash]
            said = self._answered(part, num, target, folder, **how)
            found += [said[place % len(said)] for place in range(num)]
            if len(said) < min(num, len(part)):
                remarks.append(
                    f"{part.source}: {num:,} rows are mixed in, but only {len(said):,} answers came to their end, "
                    "which come again and again; allow longer ones, or give other prompts"
                )
        return found, remarks

    def _answered(
        self, part: PromptSet, num: int, target: Target, folder: Path | None, **how: Any
    ) -> tuple[Example, ...]:
        """So many prompts with answers, or as many as there are."""
        said, left, rounds = tuple[Example, ...](), part, 0
        while len(said) < num and len(left):
            drawn = left.limit(num - len(said), seed=self.seed)
            left = left.without(drawn)
            try:
                place = folder / f"more-{rounds}" if folder and rounds else folder
                said += own_answers(target, drawn, checkpoint=place, **how).examples
            except PromptError:
                # none of these; a model none of whose answers ends is not asked for ever
                if not said and (not len(left) or len(part) - len(left) >= _ASKED):
                    raise
            rounds += 1
        return said

    def describe(self) -> dict[str, Any]:
        return {
            "share": self.share, "max_new_tokens": self.max_new_tokens, "seed": self.seed,
            "prompts": [facts(part) for part in self.prompts],
        }  # fmt: skip


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
        rows: one split, in a form that TRL takes: `prompt` and `completion`, of messages or text; `messages`; `text`.
        target: the model as it is before the training, which answers; its system prompt comes along.
        prompts: sets that come in equal parts, at least one row of each, one that is named twice in two; give harmful
            and harmless ones.
        share: of all rows.
        max_new_tokens: answers that do not end within are left out, since such rows cannot be cut.
        seed: of what is drawn, and of the order.

    Returns:
        Dataset: columns and format as in `rows`; columns that an answer has nothing for are None.

    Warns:
        UserWarning: fewer answers ended than there are rows for, so that some come again.

    Raises:
        PromptError: rows of another form, or no prompts; no answer to a set's prompts ended.
        TrainingError: a share that is none.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=sl.mix(rows, target), ...)    # doctest: +SKIP
        >>> protection = sl.preserve(trainer, selection)                            # doctest: +SKIP
    """
    from datasets import Dataset, concatenate_datasets

    if not isinstance(rows, Dataset):
        raise PromptError(f"rows of type {type(rows).__name__}; expected a datasets.Dataset: one split, in memory")
    if not len(rows):
        raise PromptError("no rows to mix into: the data set is empty")
    if not prompts:
        raise PromptError("no prompts to mix in: give at least one set")
    shown = rows.format
    shown |= shown.pop("format_kwargs")
    rows = rows.with_format(None)
    write = _writer(rows, target)
    mixed = Mixed(prompts=sets_of(prompts), share=share, seed=seed)
    said, remarks = mixed.rows(len(rows), target, max_new_tokens=max_new_tokens, progress=progress)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    nothing = dict.fromkeys(rows.column_names)
    if "chat_template_kwargs" in nothing:  # which a trainer unpacks
        nothing["chat_template_kwargs"] = rows[0]["chat_template_kwargs"]
    added = Dataset.from_list([nothing | write(example) for example in said], features=rows.features)
    return concatenate_datasets([rows, added]).shuffle(seed=seed).with_format(**shown)


def embedded() -> tuple[PromptSet, ...]:
    """The sets that come with the package, harmful and harmless."""
    return sets_of(PROMPTS)


def sets_of(prompts: Sequence[PromptSet | str | Path] | PromptSet | str | Path) -> tuple[PromptSet, ...]:
    """Sets of prompts, read where they are named; one alone is one set."""
    return tuple(map(read_prompts, [prompts] if isinstance(prompts, str | Path | PromptSet) else prompts))


def _writer(rows: "Dataset", target: Target) -> Callable[[Example], dict[str, Any]]:
    """How an answered prompt is written as one of these rows, in the form that TRL reads where there are several."""
    columns = {*rows.column_names}
    column = "prompt" if {"prompt", "completion"} <= columns else "messages"
    given = next((row[column] for row in rows if row[column]), None) if column in columns else None
    if isinstance(given, list):
        if target.chat.template is not None:
            raise PromptError(
                f"{target.name} answers in a plain template, but rows of messages are written by the tokenizer's chat "
                "template: load it without a template, or give rows of text"
            )
        in_parts = not isinstance(given[0].get("content"), str)

        def message(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}

        def said(example: Example) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            system = target.chat.system if example.system is None else example.system
            if system and not target.chat.system_role:
                asked = [message("user", f"{system}\n\n{example.prompt}")]
            else:
                asked = [*([message("system", system)] if system else []), message("user", example.prompt)]
            return asked, [message("assistant", example.response or "")]

        if column == "messages":
            return lambda example: {"messages": [each for part in said(example) for each in part]}
        return lambda example: dict(zip(("prompt", "completion"), said(example), strict=True))
    if column == "prompt":
        return lambda example: dict(zip(("prompt", "completion"), _as_text(example, target), strict=True))
    if "text" in columns:
        return lambda example: {"text": "".join(_as_text(example, target))}
    raise PromptError(
        f"rows with columns {sorted(columns)}; expected `messages`, `prompt` and `completion`, or `text`: mix before "
        "the trainer makes tokens of them"
    )


def _as_text(example: Example, target: Target) -> list[str]:
    """[prompt, answer] as the target reads and writes them, with the end of its turn."""
    prompt, answer = target.chat.encode_pair(example.prompt, example.response or "", system=example.system, end=True)
    if prompt[:1] == [target.tokenizer.bos_token_id]:  # trainers put it there themselves
        prompt = prompt[1:]
    return [str(target.tokenizer.decode(ids)) for ids in (prompt, answer)]
