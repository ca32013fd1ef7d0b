"""Lesson: all that the trainings of one run share; what is learned, what is retained, how it is looked at.

Input: a target, refusals, and what to retain, as sets or by name. Output: tunings, of whatever is to be trained; and
patches of the model against them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safelocus import distributed
from safelocus.enhancement.retention import Retention, with_answers
from safelocus.enhancement.trainee import adapter, every_weight, sparse
from safelocus.enhancement.tuning import Maker, Tuning, tune
from safelocus.evaluation import TargetResponder
from safelocus.identity import Identity
from safelocus.patch import Patch
from safelocus.prompts import PromptSet, read_prompts
from safelocus.resume import claim
from safelocus.scoring import versions
from safelocus.selection import Selection
from safelocus.target import Target
from safelocus.training import Checkpoints, TrainingSettings, training_rows
from safelocus.training.examination import Examination, check_apart

if TYPE_CHECKING:
    from datasets import Dataset

Source = PromptSet | str | Path | Iterable[object]
Control = Selection | Literal["full", "lora"]

ANSWER_TOKENS = 64  # of the model's own answers: whether it refuses shows in the first ones
UNHELD = (
    "nothing is retained, so nothing holds the model back from refusing harmless requests or losing other abilities: "
    "retain harmless prompts, such as embedded:ordinary and embedded:alarming (--retain, retain=)"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """All that the trainings of one run share: what is learned, what is retained, how it is looked at."""

    target: Target
    data: PromptSet
    retained: tuple[PromptSet, ...]
    rows: "Dataset"
    retention: Retention | None
    own_answers: bool
    answer_tokens: int
    validation: Examination | None
    every: int
    early_stopping: bool
    settings: TrainingSettings
    checkpoint: Path | None
    progress: bool

    @classmethod
    def of(
        cls,
        target: Target,
        data: Source,
        *,
        retain: Source | Sequence[PromptSet] | None,
        retain_kl: float,
        retain_weight: float,
        retain_rows: int,
        own_answers: bool,
        answer_tokens: int,
        validation: Examination | None,
        settings: TrainingSettings,
        checkpoint: Path | None,
        progress: bool,
        further: Mapping[str, Any],
        **looks: Any,
    ) -> "Lesson":
        """Read and check the data, and let the model answer what has no answer. See `enhance`.

        Args:
            further: other inputs of the run, by name; unfinished work is taken up with the same ones only.
        """
        prompts, sets = _read(data).with_responses(), _sets(retain)
        inputs = {
            "--data": prompts, "--retain": sets, "retain_kl": retain_kl, "retain_weight": retain_weight,
            "retain_rows": retain_rows, "own_answers": own_answers, "answer_tokens": answer_tokens,
            **settings.to_json(), **looks,
        }  # fmt: skip
        distributed.check_same(Identity.of(inputs).parts)
        claim(checkpoint, {"the model": target, **inputs, "the validation": validation, **further})
        if validation is not None:
            check_apart(validation, [prompts, *sets])
        kept = with_answers(
            target, sets, own=own_answers, max_new_tokens=answer_tokens,
            checkpoint=part_of(checkpoint, "retained"), progress=progress,
        )  # fmt: skip
        rows = [training_rows(part, target.chat, max_length=settings.max_length) for part in (prompts, *kept)]
        retention = None
        if kept:
            retention = Retention(sets=tuple(rows[1:]), kl=retain_kl, weight=retain_weight, per_refusal=retain_rows)
        return cls(
            target=target, data=prompts, retained=tuple(kept), rows=rows[0], retention=retention,
            own_answers=own_answers, answer_tokens=answer_tokens, validation=validation, settings=settings,
            checkpoint=checkpoint, progress=progress, **looks,
        )  # fmt: skip

    @property
    def sets(self) -> list[PromptSet]:
        return [self.data, *self.retained]

    @property
    def notes(self) -> list[str]:
        """What a reader of the results should mind."""
        return [] if self.retained else [UNHELD]

    def teach(self, kind: str, what: Control, settings: TrainingSettings, *, num_weights: int = 0) -> Tuning:
        """Train this, and give the model back as it was; resumed where it was interrupted.

        Args:
            kind: its name, under which unfinished work is kept.
            num_weights: that an adapter should have about.
        """
        validation, responder = self.validation, TargetResponder(target=self.target)
        return tune(
            self.target,
            maker(self.target, what, num_weights),
            self.rows,
            settings,
            retention=self.retention,
            look=None if validation is None else lambda: validation.evaluate(responder).measures,
            every=self.every,
            early_stopping=self.early_stopping and validation is not None,
            checkpoints=self._checkpoints(kind, what, settings),
            progress=self.progress,
        )

    def patch(self, selection: Selection, tuning: Tuning) -> Patch:
        """The model, which is as it was, against what was trained."""
        made = {
            "made_by": "enhance",
            "learning_rate": tuning.learning_rate,
            "step": tuning.step,
            "stopped": tuning.stopped,
            "settings": self.settings.to_json(),
            **self.describe(),
            "notes": self.notes,
            "versions": versions(),
        }
        return Patch.of(self.target, selection, new=tuning.values, metadata=made)

    def describe(self) -> dict[str, Any]:
        """For provenance, and to tell one run from another."""
        retention, validation = self.retention, self.validation
        return {
            "data": _facts(self.data),
            "retained": [_facts(part) for part in self.retained],
            "retain_kl": None if retention is None else retention.kl,
            "retain_weight": None if retention is None else retention.weight,
            "retain_rows": None if retention is None else retention.per_refusal,
            "own_answers": self.own_answers,
            "answer_tokens": self.answer_tokens,
            "validation": None if validation is None else _looks(validation, self.every, self.early_stopping),
        }

    def _checkpoints(self, kind: str, what: Control, settings: TrainingSettings) -> Checkpoints | None:
        if self.checkpoint is None:
            return None
        folder = self.checkpoint / f"{kind}-{settings.learning_rate:g}"
        return Checkpoints(folder=folder, inputs={"the weights to train": what})


def maker(target: Target, what: Control, num_weights: int) -> Maker:
    """How to train this; an adapter of about so many weights."""
    if isinstance(what, Selection):
        return lambda settings: sparse(target, what, settings)
    if what == "lora":
        return lambda settings: adapter(target, num_weights, settings)
    return lambda settings: sparse(target, every_weight(target), settings)


def _read(source: Source) -> PromptSet:
    return source if isinstance(source, PromptSet) else read_prompts(source)


def _sets(source: Source | Sequence[PromptSet] | None) -> list[PromptSet]:
    """One set or several; a PromptSet is a sequence too, but not of sets."""
    if source is None:
        return []
    if isinstance(source, list | tuple) and all(isinstance(part, PromptSet) for part in source):
        return list(source)
    return [_read(source)]


def _facts(prompts: PromptSet) -> dict[str, Any]:
    return {"source": prompts.source, "num_prompts": len(prompts), "hash": prompts.hash}


def _looks(validation: Examination, every: int, early_stopping: bool) -> dict[str, Any]:
    return {
        "harmful": _facts(validation.harmful),
        "harmless": None if validation.harmless is None else _facts(validation.harmless),
        "tasks": [task.describe() for task in validation.tasks],
        "judges": [judge.describe() for judge in validation.judges],
        "every": every,
        "early_stopping": early_stopping,
    }


def part_of(checkpoint: Path | None, name: str) -> Path | None:
    """A folder within the checkpoint, where there is one."""
    return None if checkpoint is None else checkpoint / name
