"""Preserve (SPA), as a whole run: learn a task with the selected weights protected, and see what it cost and kept.

Input: a target, a selection, a task and an examination. Output: a `Preservation`; the protected model, or its
adapter and patch, in a folder. `preserve` is the same protection for a script of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safelocus.errors import TrainingError
from safelocus.evaluation import Evaluation, Task
from safelocus.evaluation.result import UTILITY
from safelocus.model.generation import longest_prompt
from safelocus.model.target import Target
from safelocus.objective import Lexicon
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.mixing import Mixed
from safelocus.preservation.result import PROTECTED, UNPROTECTED, Preservation, measures_of
from safelocus.preservation.trainee import ADAPTER, DTYPES, MODEL, check_adapter, learner
from safelocus.prompts import PromptSet
from safelocus.run.resume import claim, part_of
from safelocus.selection.selection import Selection
from safelocus.training import TrainingSettings
from safelocus.training.arm import single_words
from safelocus.training.examination import Examination, check_apart, facts
from safelocus.training.lora import Lora
from safelocus.training.responses import rows_with_remarks, without_listed
from safelocus.training.runner import Runner, check_made_for

if TYPE_CHECKING:
    from datasets import Dataset


def run_preservation(
    target: Target,
    selection: Selection,
    data: PromptSet,
    task: Task,
    *,
    examination: Examination,
    controls: Mapping[str, Selection | Callable[[], Selection]] | None = None,
    unprotected: bool = False,
    lora: Lora | None = None,
    calibration: Calibration | None = None,
    mixed: Mixed | None = None,
    unlearned: Lexicon | None = None,
    settings: TrainingSettings | None = None,
    every: int | None = None,
    look: int = 48,
    folder: Path | None = None,
    merge: bool = False,
    save_dtype: str | None = None,
    allow_seen: bool = False,
    allow_mismatch: bool = False,
    checkpoint: Path | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
    **changes: Any,
) -> Preservation:
    """Train on a task with the selected weights protected, and measure the model before, during and after.

    Args:
        target: the model; it comes back as it was, to the bit.
        selection: which weights to protect.
        data: what to learn, prompts with responses.
        task: questions that tell whether it was learned; see `read_lesson`.
        examination: harmful and harmless prompts, and tasks for utility.
        controls: by name, other selections to protect instead; a function is called when its turn comes.
        unprotected: train without protection too.
        lora: train an adapter instead of all weights.
        calibration: keep the model's answers by small steps on the protected weights (see `Calibration`).
        mixed: rows mixed into the task's, in every arm that protects something.
        unlearned: expressions that carry no loss where the task's answers say them, in every arm; what the model
            itself says, in mixed-in rows, does not hold them.
        settings: of the training.
        every: steps between looks; default: none but the first and the last.
        look: prompts and questions of each kind that a look uses, at most.
        folder: where the protected model (`model/`), or adapter and patch (`adapter/`), are saved.
        merge: save the model with its adapter merged, its protected weights exact.
        save_dtype: "float32", "bfloat16" or "float16", of the model that is saved; default: that of its files.
        allow_seen: measure with prompts that the task's rows, calibration or mixed-in rows use.
        allow_mismatch: the selection was made for another model (a fine-tuned sibling).
        checkpoint: folder for unfinished work; the same call resumes from it. Of several
            processes each has its own, and as many resume.
        notes: what a reader of the result should mind already.
        progress: show bars.
        changes: to the settings: steps=1000, learning_rate=2e-5, ...

    Raises:
        TrainingError: nothing that is selected is trained, an adapter cannot be made or protected from, or a type that
            no model is saved in.
        SelectionError: a selection made for another model.
        NumericalError: the training diverged; the model has its old weights again.
    """
    settings = replace(settings or TrainingSettings(), **changes)
    if save_dtype not in (None, *DTYPES):
        raise TrainingError(f"save_dtype {save_dtype!r}: expected {', '.join(DTYPES)}")
    make = learner(
        target, lora=lora, calibration=calibration, folders={PROTECTED: folder}, merge=merge,
        dtype=None if save_dtype is None else DTYPES[save_dtype],
    )  # fmt: skip
    sets = [data, *(calibration.prompts if calibration else ()), *(mixed.prompts if mixed else ())]
    remarks = [*notes, *check_apart(examination, sets, allow_seen=allow_seen)]
    remarks += check_made_for(target, selection, allow_mismatch=allow_mismatch)
    if lora is not None:
        check_adapter(target, lora, [selection, *(each for each in (controls or {}).values() if not callable(each))])
    claim(checkpoint, {
        "the model": target, "--data": data, "the task": task, "the selection": selection,
        "unprotected": unprotected, "the adapter": lora, "the calibration": calibration,
        "the rows mixed in": mixed, "the expressions not learned": unlearned, "the examination": examination,
        **settings.to_json(), "every": every or settings.steps, "look": look, "merge": merge,
        "save_dtype": save_dtype,
    })  # fmt: skip
    rows, lacking = _rows(target, data, unlearned, settings)
    plain = rows
    if mixed is not None:
        mixture, repeated = mixed.into(
            data, target, size=len(plain), lexicon=unlearned, checkpoint=part_of(checkpoint, "mixed"), progress=progress
        )
        remarks += repeated
        rows, lacking = _rows(target, mixture, unlearned, settings)
        sources = ", ".join(dict.fromkeys(part.source for part in mixed.prompts))
        remarks.append(
            f"{len(mixture) - len(data)} of {len(rows)} rows are the model's own answers to {sources}"
            f"{', but in the unprotected arm' if unprotected else ''}; what they do is not told apart from what "
            "holding weights does"
        )
    asked = [*sets[1:], *([data] if task.source == data.source else [])]
    remarks += [*lacking, *examination.only_first, *(said for part in asked if (said := part.only_first))]
    remarks += _losses(target, lora)
    examined = replace(examination, tasks=(task, *examination.tasks))
    runner = Runner(
        target=target, rows=rows, other_rows={UNPROTECTED: plain}, settings=settings, examination=examined,
        measures=lambda evaluation: measures_of(evaluation, task.name), look=examined.smaller(look, settings.seed),
        every=every, make=make, sets=sets, checkpoint=checkpoint, progress=progress,
        written={} if folder is None else {PROTECTED: folder / (MODEL if lora is None or merge else ADAPTER)},
        described=_described(data, task, lora, calibration, mixed, unlearned),
    )  # fmt: skip
    arms = {PROTECTED: selection, **({UNPROTECTED: None} if unprotected else {}), **(controls or {})}
    found = runner.run(selection, arms)
    remarks += [*_unasked(found["before"], task.name), *single_words(found["before"], found["trained"])]
    return Preservation(**found, notes=tuple(remarks), before_measures=measures_of(found["before"], task.name))


def _rows(
    target: Target, prompts: PromptSet, unlearned: Lexicon | None, settings: TrainingSettings
) -> "tuple[Dataset, list[str]]":
    longest = min(settings.max_length, longest_prompt(target, 0))
    rows, remarks = rows_with_remarks(prompts, target.chat, max_length=longest)
    if unlearned is None:
        return rows, remarks
    rows, remark = without_listed(rows, unlearned, target)
    return rows, [*remarks, remark]


def _losses(target: Target, lora: Lora | None) -> list[str]:
    """Remarks on what is lost before the training: small steps, and matrices that have no adapter."""
    remarks = []
    if lora is None and torch.finfo(target.model.dtype).bits < 32:
        remarks.append(
            f"all weights are trained in {str(target.model.dtype).removeprefix('torch.')}, which rounds small steps "
            "away; float32 (--dtype float32) keeps them"
        )
    if lora is not None and (left_out := lora.left_out(target.model, target.layout)):
        remarks.append(left_out)
    return remarks


def _unasked(evaluation: Evaluation, task: str) -> list[str]:
    """A remark where questions about the task could not be asked at all, or thoughts about them did not end."""
    questions = [row for row in evaluation.rows if row["source"] == task and row["set"] == UTILITY]
    failures = [row["failure"] for row in questions if row["failure"] is not None]
    if not failures:
        return []
    return [
        f"{len(failures)} of {len(questions)} questions about the task could not be asked or answered, the first: "
        f"{failures[0]}"
    ]


def _described(
    data: PromptSet,
    task: Task,
    lora: Lora | None,
    calibration: Calibration | None,
    mixed: Mixed | None,
    unlearned: Lexicon | None,
) -> dict[str, Any]:
    """For provenance."""
    calibrated = None
    if calibration is not None:
        plain = {key: value for key, value in calibration.identity().items() if key != "prompts"}
        plain["learning_rate"] = calibration.learning_rate or ("a tenth of the adapter's" if lora else "the training's")
        calibrated = {**plain, "prompts": [{"source": p.source, "hash": p.hash} for p in calibration.prompts]}
    return {
        "data": facts(data),
        "task": task.describe(),
        "lora": None if lora is None else asdict(lora),
        "calibration": calibrated,
        "mixed": mixed and mixed.describe(),
        "unlearned": unlearned and unlearned.describe(),
    }
