"""A task to learn: rows to train on, and questions like them, set aside, that tell whether it was learned.

Anything with prompts and responses will do (responses are learned whole), and the data sets that `read_task`
recognises and `read_prompts` does not (AG News, PubMedQA): there the answer is the response.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from safelocus.errors import PromptError
from safelocus.evaluation.tasks import Task, read_task, recognise_task, task_of
from safelocus.prompts import PromptSet, prompt_hash, read_prompts
from safelocus.training.examination import split_task


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned.

    Attributes:
        prompts: with responses, to train on.
        task: questions that are not among them.
    """

    prompts: PromptSet
    task: Task


def read_lesson(source: str | Path, *, held_out: str | Path | None = None, share: float = 0.1) -> Lesson:
    """Read a task to learn.

    Args:
        source: what to train on: file, hub address or `organism:NAME`.
        held_out: questions to measure with; default: a share of the source, by content.

    Raises:
        PromptError: nothing has a response, too little to set any aside, or questions that are trained on.

    Example:
        >>> lesson = read_lesson("organism:task", held_out="organism:task-heldout")
        >>> len(lesson.prompts), len(lesson.task)
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
        return Lesson(prompts=prompts, task=task)
    if recognised is not None:
        rest, task = split_task(recognised, share)
        return Lesson(prompts=_prompts_of(rest), task=task)
    rest_prompts, aside = prompts.split(share, salt="safelocus lesson")
    return Lesson(prompts=rest_prompts, task=task_of(aside))


def _prompts_of(task: Task) -> PromptSet:
    rows = [{"prompt": example.prompt, "response": example.answer} for example in task.examples]
    return replace(read_prompts(rows), source=task.source)
