"""Ordinary tasks with known answers: utility is the share answered right.

`read_task` reads a file, a hub data set or `organism:NAME`, and recognises:

    organism:utility, organism:task   the whole answer must be right
    GSM8K                             question, and an answer that ends in `#### NUMBER`
    AG News                           class,title,description without a header, beside a classes.txt (or that folder)
    PubMedQA                          QUESTION, CONTEXTS, final_decision: yes, no or maybe; or question, context, ...
    choices                           a column `choices` of lists (MMLU), or of texts and labels (ARC); the answer a
                                      label or letter, a number from 0, or the text where every row's is one
    anything else with answers        numeric where every answer is a number, else exact

Errors are `PromptError`s.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelocus.errors import PromptError
from safelocus.evaluation.matching import MATCHES, Match, extract, is_right, parse_number
from safelocus.prompts import Example, PromptSet, limited, normalise, prompt_hash, read_prompts, rows_where
from safelocus.prompts.sources import READERS, read_cells, read_file
from safelocus.run.identity import digest

_SHORT = 64  # new tokens that suffice to name a choice, with a few words around it
_COMMON_NAMES = {"test", "train", "dev", "val", "valid", "validation", "main", "data", "default"}
_CHOICE_COLUMNS = ("choices", "options")


@dataclass(frozen=True, kw_only=True)
class TaskExample:
    """One question: `choices` are its own where they differ from one to the next."""

    prompt: str
    answer: str
    system: str | None = None
    category: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def is_lettered(self) -> bool:
        """Whether the question lists its choices by letter."""
        return bool(self.choices) and f"\nA. {self.choices[0]}\nB. " in self.prompt

    @property
    def expected(self) -> str:
        """What is to be said: the letter, where choices have one."""
        return chr(65 + self.choices.index(self.answer)) if self.is_lettered else self.answer


@dataclass(frozen=True, kw_only=True)
class Task(Sequence[TaskExample]):
    """Questions with answers.

    Attributes:
        name: how its accuracy is labelled ("utility@NAME").
        source: where the questions came from.
        examples: in the source's order.
        match: how a response is compared with the answer (`matching`).
        max_new_tokens: as many as an answer needs; None for as many as the evaluation gives.
        num_left_out: rows without a question or answer, and duplicates.
    """

    name: str
    source: str
    examples: tuple[TaskExample, ...]
    match: Match
    max_new_tokens: int | None = None
    num_left_out: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def prompt_hashes(self) -> list[str]:
        """Of the questions; as of prompts."""
        return [prompt_hash(example.prompt) for example in self.examples]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    def limit(self, num: int | None, seed: int | None = None) -> "Task":
        """At most `num` examples (None: all): the first, or with a `seed` a random sample, in the source's order."""
        return replace(self, examples=limited(self.examples, num, seed, "question"))

    def grade(self, example: TaskExample, response: str) -> tuple[str | None, bool]:
        """(what the response answered, or None where that cannot be told; whether it is right)."""
        extracted = extract(
            response,
            match=self.match,
            answer=example.answer,
            choices=example.choices,
            letters=example.is_lettered,
        )
        return extracted, is_right(extracted, match=self.match, answer=example.answer)

    @property
    def hash(self) -> str:
        """128 bits of all that a result can depend on: every question, in their order, and how answers compare."""
        return digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """The same, part by part."""
        parts = {"questions": "prompt", "system messages": "system", "answers": "answer", "categories": "category"}
        rows = {name: digest([getattr(e, key) for e in self.examples]) for name, key in parts.items()}
        choices = digest([e.choices for e in self.examples])
        return {**rows, "choices": choices, "name": self.name, "match": self.match, "new tokens": self.max_new_tokens}

    def describe(self) -> dict[str, Any]:
        """For provenance."""
        return {
            "name": self.name, "source": self.source, "match": self.match, "num_examples": len(self),
            "num_left_out": self.num_left_out, "hash": self.hash,
        }  # fmt: skip


def read_task(
    source: str | Path,
    *,
    match: Match | None = None,
    field: str | None = None,
    answer_field: str | None = None,
    where: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Task:
    """Read a task.

    Args:
        source: file, AG News folder, hub address or `organism:NAME`.
        match: how responses are compared; default: by the format, else numeric or exact by the answers.
        field, answer_field: columns of question and answer, where they are not recognised.
        where: column -> value; other rows are left out.
        name: label; default: the source's last part.

    >>> read_task("organism:utility").match
    'exact'
    """
    if match is not None and match not in MATCHES:
        raise PromptError(f"{match!r} is no way to compare answers; there are {', '.join(MATCHES)}.")
    recognises = field is None and answer_field is None
    if recognises and (task := _ag_news(Path(source).expanduser(), where)) is not None:
        return _named(task, match, name)
    # questions of one wording may offer different choices
    prompts = read_prompts(source, field=field, response_field=answer_field, where=where, keep_duplicates=True)
    task = _pubmedqa(prompts) if recognises else None
    return _named(task or task_of(prompts, match), match, name)


def recognise_task(source: str | Path) -> Task | None:
    """A data set of which a prompt and a response are not all that is asked, if it is one that is known: AG News,
    PubMedQA, questions with an answer among choices.
    """
    if (task := _ag_news(Path(source).expanduser())) is not None:
        return task
    prompts = read_prompts(source, keep_duplicates=True)
    if (task := _pubmedqa(prompts)) is not None:
        return task
    with suppress(PromptError):  # without answers, or with others than the choices: learned as they are
        task = task_of(prompts)
        return task if task.match == "choice" else None
    return None


def _named(task: Task, match: Match | None, name: str | None) -> Task:
    if match == "choice" and not all(example.choices for example in task.examples):
        labels = tuple(dict.fromkeys(example.answer for example in task.examples))
        task = replace(task, examples=tuple(replace(e, choices=e.choices or labels) for e in task.examples))
    if match == "numeric" and (bad := [e.answer for e in task.examples if parse_number(e.answer) is None]):
        raise PromptError(f"{task.source}: {len(bad)} answers are no numbers, first of them {bad[0][:60]!r}.")
    return replace(task, match=match or task.match, name=name or task.name)


def task_of(prompts: PromptSet, match: Match | None = None) -> Task:
    """Questions with answers out of prompts with responses.

    Args:
        match: how responses are compared; default: "choice" where all have choices, else numeric or exact.

    Raises:
        PromptError: no answers, choices that are no list or of some questions only, an answer that is no choice.
    """
    answered = prompts.with_responses()
    places = [f"{prompts.source}, question {number}" for number in range(1, len(answered) + 1)]
    offered = [_choices(example, place) for example, place in zip(answered, places, strict=True)]
    without = [place for place, (choices, _) in zip(places, offered, strict=True) if not choices]
    if 0 < len(without) < len(answered):
        raise PromptError(
            f"{without[0]}: offers no choices, as {len(answered) - len(without)} of the {len(answered)} questions do. "
            "Expected choices in all rows or in none: give each kind a file of its own."
        )
    are_texts = all((e.response or "").strip() in choices for e, (choices, _) in zip(answered, offered, strict=True))
    found: dict[tuple[str, str], TaskExample] = {}
    for example, place, (choices, labels) in zip(answered, places, offered, strict=True):
        assert example.response is not None
        answer, prompt = example.response.strip(), example.prompt
        if choices:
            answer = answer if are_texts else _chosen(answer, choices, labels, place)
            prompt = "\n".join([prompt, *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))])
            prompt += "\nAnswer with the letter." if match in (None, "choice") else ""
        elif "####" in answer:
            answer = answer.rpartition("####")[2].strip()
        found.setdefault(
            (normalise(example.system or ""), normalise(prompt)),
            TaskExample(
                prompt=prompt, answer=answer, system=example.system, category=example.category, choices=choices
            ),
        )  # fmt: skip
    examples = [*found.values()]
    numeric = all(parse_number(example.answer) is not None for example in examples)
    match = match or ("choice" if all(e.choices for e in examples) else "numeric" if numeric else "exact")
    return Task(
        name=_label(prompts.source),
        source=prompts.source,
        examples=tuple(examples),
        match=match,
        max_new_tokens=_SHORT if match == "choice" else None,
        num_left_out=prompts.num_rows - len(examples),
    )


def _ag_news(path: Path, where: Mapping[str, str] | None = None) -> Task | None:
    """The four-topic news set: rows of class number, title, description."""
    file = path / "test.csv" if path.is_dir() else path
    classes_file = file.parent / "classes.txt"
    if file.suffix != ".csv" or not file.is_file() or not classes_file.is_file():
        return None
    classes = tuple(line for row in read_file(classes_file) if (line := str(row.value).strip()))
    rows: list[dict[str, str]] = []
    for place, cells in read_cells(file):
        if len(cells) != 3 or not cells[0].isdecimal() or not 1 <= int(cells[0]) <= len(classes):
            raise PromptError(
                f"{file}, {place}: expected class (1 to {len(classes)}, as in {classes_file.name}), title, "
                f"description; found {len(cells)} columns starting with {cells[0][:40]!r}."
            )
        rows.append({"class": classes[int(cells[0]) - 1], "title": cells[1], "description": cells[2]})
    kept = [rows[index] for index in rows_where(rows, where or {}, str(file))]
    examples: dict[str, TaskExample] = {}
    for row in kept:
        text = f"{row['title']}\n{row['description']}".replace("\\", " ")  # line breaks are written as a backslash
        listing = f"{', '.join(classes[:-1])} or {classes[-1]}"
        prompt = f"What is the topic of this news article: {listing}? Answer with the topic only.\n\n{text}"
        examples.setdefault(normalise(prompt), TaskExample(prompt=prompt, answer=row["class"], choices=classes))
    return Task(
        name=_label(str(file.parent)),
        source=str(path),
        examples=tuple(examples.values()),
        match="choice",
        max_new_tokens=_SHORT,
        num_left_out=len(kept) - len(examples),
    )


def _pubmedqa(prompts: PromptSet) -> Task | None:
    """Questions about abstracts, with a decision beside the answer in words."""
    rows = [_pubmedqa_row(example) for example in prompts]
    if prompts.prompt_field.casefold() != "question" or rows[0] is None:
        return None
    choices = ("yes", "no", "maybe")
    examples = []
    for number, (example, row) in enumerate(zip(prompts, rows, strict=True), start=1):
        place = f"{prompts.source}, question {number}"
        if row is None:
            raise PromptError(f"{place}: expected QUESTION, CONTEXTS, final_decision.")
        contexts, decision = row
        if decision not in choices:
            raise PromptError(f"{place}: final_decision is {decision[:40]!r}, expected yes, no or maybe.")
        prompt = f"{contexts}\n\n{example.prompt}\nAnswer yes, no or maybe."
        examples.append(TaskExample(prompt=prompt, answer=decision, choices=choices))
    return Task(
        name="pubmedqa", source=prompts.source, examples=tuple(examples), match="choice", max_new_tokens=_SHORT,
        num_left_out=prompts.num_rows - len(examples),
    )  # fmt: skip


def _pubmedqa_row(example: Example) -> tuple[str, str] | None:
    """(contexts, decision), in capitals as first published or in the hub's small letters; None where not."""
    row = {name.casefold(): cell for name, cell in example.fields.items()}
    contexts: Any = row.get("contexts") or row.get("context")
    with suppress(TypeError, json.JSONDecodeError):
        contexts = json.loads(contexts)
    if isinstance(contexts, Mapping):
        contexts = contexts.get("contexts")
    if contexts is None or "final_decision" not in row:
        return None
    text = "\n".join(map(str, contexts)) if isinstance(contexts, list) else str(contexts)
    return text, row["final_decision"].strip().casefold()


def _choices(example: Example, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the texts, their labels where they have some) that a question offers; nothing where it offers none."""
    fields = {name.casefold(): cell for name, cell in example.fields.items()}
    cell = next((fields[name] for name in _CHOICE_COLUMNS if name in fields), None)
    if cell is None:
        return (), ()
    value: Any = None
    with suppress(json.JSONDecodeError):
        value = json.loads(cell)
    labels: Any = ()
    if isinstance(value, Mapping):  # ARC: {"text": [...], "label": [...]}
        value, labels = value.get("text"), value.get("label") or ()
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise PromptError(f"{place}: choices should be a list of 2 to 26 texts, found {cell[:60]!r}.")
    return tuple(str(choice).strip() for choice in value), tuple(str(label).strip() for label in labels)


def _chosen(answer: str, choices: tuple[str, ...], labels: tuple[str, ...], place: str) -> str:
    """The text of the right choice, given as its label, letter, number from 0, or text."""
    if answer in labels and len(labels) == len(choices):
        return choices[labels.index(answer)]
    if len(answer) == 1 and answer.isalpha() and ord(answer.upper()) - 65 < len(choices):
        return choices[ord(answer.upper()) - 65]
    if answer.isdigit() and int(answer) < len(choices):
        return choices[int(answer)]
    if answer in choices:
        return answer
    raise PromptError(f"{place}: the answer {answer[:40]!r} is none of the {len(choices)} choices.")


def _label(source: str) -> str:
    """`gsm8k` for gsm8k/test.jsonl and openai/gsm8k/main:test, `questions` for questions.jsonl."""
    if source.startswith("organism:"):
        return source
    path = Path(source.partition(":")[0])
    names = [path.stem if path.suffix.casefold() in READERS else path.name, path.parent.name]
    return next((name for name in names if name and name not in _COMMON_NAMES), names[0])
