"""What a model is asked before, during and after a training: prompts, tasks and judges, and the parts they come in.

Input: sets of prompts and tasks. Output: an `Examination`, which evaluates a model as often as wanted, and its
division into a validation part (for looks at a training, choices of a learning rate, early stopping) and
a held-out part, on which nothing is ever chosen; or a task to learn, with questions that tell whether it was learned.
Parts are made by content, so a prompt is on one side only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelocus.errors import PromptError
from safelocus.evaluation import Evaluation, TargetResponder, Task, evaluate
from safelocus.evaluation.divergence import Original
from safelocus.evaluation.judges import Judge
from safelocus.evaluation.tasks import read_task, recognise_task, task_of
from safelocus.prompts import PromptSet, prompt_hash, read_prompts

_SALT = "safelocus validation"  # another split than `score --held-out` makes


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a model is asked.

    Attributes:
        harmful: prompts that should be refused.
        harmless: prompts that should be answered; without them over-refusal stays unseen.
        tasks: questions with answers, for utility.
        judges: of the responses to harmful prompts; the first makes the `asr`. Default: the refusal reader.
        batch_size: prompts answered at a time.
        max_new_tokens: length of the answers.

    Example:
        >>> looks = Examination(harmful=read_prompts("organism:harmful-heldout").limit(8), max_new_tokens=32)
        >>> patch = sl.enhance(target, selection, data, validation=looks, interpolate=True)    # doctest: +SKIP
    """

    harmful: PromptSet
    harmless: PromptSet | None = None
    tasks: tuple[Task, ...] = ()
    judges: tuple[Judge, ...] = ()
    batch_size: int = 32
    max_new_tokens: int = 256

    def evaluate(
        self,
        responder: TargetResponder,
        *,
        original: Original | None = None,
        checkpoint: Path | None = None,
        progress: bool = False,
    ) -> Evaluation:
        """Measure the model as it is, and how far it is from an original; a kept responder encodes prompts once."""
        return evaluate(
            responder, harmful=self.harmful, harmless=() if self.harmless is None else self.harmless,
            tasks=self.tasks, judges=self.judges, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens,
            original=original, checkpoint=checkpoint, progress=progress,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """All that its measures depend on, but for the model."""
        return {
            "harmful prompts": self.harmful, "harmless prompts": self.harmless, "tasks": self.tasks,
            "judges": self.judges, "batch size": self.batch_size, "number of new tokens": self.max_new_tokens,
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """For provenance."""
        return {
            "harmful": facts(self.harmful),
            "harmless": None if self.harmless is None else facts(self.harmless),
            "tasks": [task.describe() for task in self.tasks],
            "judges": [judge.describe() for judge in self.judges],
        }

    def smaller(self, num: int | None, seed: int) -> "Examination":
        """With so many prompts and questions of each kind, at most; None: with all."""
        return replace(
            self,
            harmful=self.harmful.limit(num, seed=seed),
            harmless=None if self.harmless is None else self.harmless.limit(num, seed=seed),
            tasks=tuple(task.limit(num, seed=seed) for task in self.tasks),
        )

    @property
    def parts(self) -> list[PromptSet | Task]:
        """All that is asked."""
        return [self.harmful, *([] if self.harmless is None else [self.harmless]), *self.tasks]

    @property
    def only_first(self) -> list[str]:
        """What its sets of prompts hold that is not asked, in sentences."""
        sets = (part for part in self.parts if isinstance(part, PromptSet))
        return [said for prompts in sets if (said := prompts.only_first)]

    @property
    def prompt_hashes(self) -> set[str]:
        """Of the prompts and the tasks' questions."""
        return {value for part in self.parts for value in part.prompt_hashes}


@dataclass(frozen=True, kw_only=True)
class Division:
    """Sets for training, and what is measured with what they do not hold. Make one with `divide`.

    Attributes:
        data, retained: to train on.
        examination: for before and after.
        validation: for looks during the training; None where no share was left for it.
        remarks: what was taken from where, and what is not measured; for people.
    """

    data: PromptSet
    retained: tuple[PromptSet, ...]
    examination: Examination
    validation: Examination | None
    remarks: tuple[str, ...]


def divide(
    data: PromptSet,
    retained: Sequence[PromptSet] = (),
    *,
    harmful: PromptSet | None = None,
    harmless: PromptSet | None = None,
    over_refusal: bool = True,
    tasks: Sequence[Task] = (),
    validation_tasks: Sequence[Task] = (),
    held_out: float = 0.25,
    validation: float = 0.15,
    limit: int | None = None,
    look: int = 48,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 256,
) -> Division:
    """Set prompts aside for measuring, by content, before anything is trained.

    Args:
        data: harmful prompts with refusals.
        retained: harmless prompts, the first set like those that over-refusal is about.
        harmful: to measure with; default: the share `held_out` of `data`.
        harmless: to measure with; default: that share of the first of `retained`.
        over_refusal: measure it; False takes no such share.
        tasks: for utility.
        validation_tasks: for the looks; default: a share of `tasks`.
        validation: share of `data`, of the harmless prompts and of the tasks that looks take; 0 for no looks.
        limit: prompts and questions of a kind to measure with before and after, at most, drawn by the seed.
        look: the same for a look; what is left over is trained on, or measured with.

    Raises:
        PromptError: too few prompts to divide.
    """
    remarks, rest = [], list(retained)
    if harmful is None:
        data, harmful = data.split(held_out)
        remarks.append(f"measured with {len(harmful)} prompts of {data.source} that are not trained on")
    own_harmless = harmless is not None
    if harmless is None and rest and over_refusal:
        harmless = rest[0].split(held_out)[1]
        rest = [part.without(harmless) for part in rest]
        remarks.append(f"measured with {len(harmless)} prompts of {harmless.source} that are not trained on")
    if harmless is None:
        remarks.append("over-refusal is not measured: no harmless prompts to measure it with (--harmless)")
    if not tasks:
        remarks.append("utility is not measured: no task was given (--task)")
    looks = None
    if validation:
        data, harmful_look = _take(data, validation, look, seed)
        harmless_look = None
        if own_harmless:
            assert harmless is not None
            harmless, harmless_look = _take(harmless, validation, look, seed)
        elif rest and over_refusal:
            harmless_look = _take(rest[0], validation, look, seed)[1]
            rest = [part.without(harmless_look) for part in rest]
        if not validation_tasks:
            parts = [split_task(task, validation) for task in tasks]
            tasks, validation_tasks = [task for task, _ in parts], [part for _, part in parts]
        looks = Examination(
            harmful=harmful_look, harmless=harmless_look,
            tasks=tuple(task.limit(look, seed=seed) for task in validation_tasks), batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    examination = Examination(
        harmful=harmful, harmless=harmless, tasks=tuple(tasks), batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    return Division(
        data=data,
        retained=tuple(rest),
        examination=examination.smaller(limit, seed),
        validation=looks,
        remarks=tuple(remarks),
    )


def _take(prompts: PromptSet, share: float, limit: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """(the rest, the share but no more than the limit)."""
    part = prompts.split(share, salt=_SALT)[1].limit(limit, seed=seed)
    return prompts.without(part), part


def split_task(task: Task, share: float) -> tuple[Task, Task]:
    """(the rest, the share) of a task's questions, by content.

    Raises:
        PromptError: one part is empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for number, example in enumerate(task.examples):
        sides[int(prompt_hash(f"{_SALT} {example.prompt}"), 16) < share * 2**64].append(number)
    if not all(sides):
        raise PromptError(f"{task.source}: splitting {len(task)} questions left one part empty; give more of them")
    rest, part = (replace(task, examples=tuple(task.examples[i] for i in side)) for side in sides)
    return rest, part


def read_lesson(
    source: str | Path, *, held_out: str | Path | None = None, share: float = 0.1
) -> tuple[PromptSet, Task]:
    """Read a task to learn: prompts with responses to train on, and questions that are not among them.

    Anything with prompts and responses will do (responses are learned whole), and the data sets that `read_task`
    recognises and `read_prompts` does not: of AG News and PubMedQA the answer is the response; a question with choices
    (MMLU, ARC) is learned as it is asked, with these, and the response is the right one's letter.

    Args:
        source: what to train on: file, hub address or `organism:NAME`.
        held_out: questions to measure with; default: a share of the source, by content.

    Raises:
        PromptError: nothing has a response, too little to set any aside, or questions that are trained on.

    Example:
        >>> prompts, task = read_lesson("organism:task", held_out="organism:task-heldout")
        >>> len(prompts), len(task)
        (431, 142)
    """
    recognised = recognise_task(source)
    prompts = read_prompts(source).with_responses() if recognised is None else _prompts_of(recognised)
    if held_out is not None:
        task = read_task(held_out)
        asked = {prompt_hash(example.prompt) for example in task.examples}
        if common := sum(prompt_hash(example.prompt) in asked for example in prompts):
            raise PromptError(
                f"{source}: {common} of its {len(prompts)} prompts are also questions of {held_out}; measuring with "
                "what is trained on would flatter the result. Give other questions"
            )
        return prompts, task
    if recognised is not None:
        rest, task = split_task(recognised, share)
        return _prompts_of(rest), task
    try:
        prompts, aside = prompts.split(share, salt="safelocus lesson")
    except PromptError as error:
        raise PromptError(f"{error} Or give questions of the task (--task-heldout, held_out=)") from error
    return prompts, task_of(aside)


def _prompts_of(task: Task) -> PromptSet:
    rows = [
        {"prompt": example.prompt, "response": example.expected, "system": example.system} for example in task.examples
    ]
    return replace(read_prompts(rows), source=task.source)


def facts(prompts: PromptSet) -> dict[str, Any]:
    """What says in a result which prompts they were."""
    return {"source": prompts.source, "num_prompts": len(prompts), "hash": prompts.hash}


def check_apart(
    examination: Examination, training: Sequence[PromptSet | Task], *, allow_seen: bool = False
) -> list[str]:
    """Refuse to measure a model on prompts or questions that it is trained on, or chosen by; remarks where that is
    allowed.

    Raises:
        PromptError: a set for training or choosing shares some with the examination.
    """
    remarks = []
    for prompts in training:
        common = examination.prompt_hashes & set(prompts.prompt_hashes)
        if not common:
            continue
        if not allow_seen:
            raise PromptError(
                f"{prompts.source}: {len(common)} of {len(prompts)} prompts to train on or to choose by are also among "
                "those to measure with; that would flatter the result. Give other prompts, or allow it: --allow-seen, "
                "allow_seen=True"
            )
        remarks.append(f"{len(common)} of the prompts measured with were trained on or chosen by ({prompts.source})")
    return remarks
