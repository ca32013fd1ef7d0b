"""Preserve (SPA), as a whole run: learn a task with the selected weights protected, and see what it cost and kept.

    for each arm (protected, unprotected, controls):  W0 -> train on the task -> measure -> W0, to the bit

Input: a target, a selection, a lesson and an examination. Output: a `Preservation`; the protected model, or its
adapter and patch, in a folder. `preserve` is the same protection for a script of one's own.
"""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from safelocus import distributed
from safelocus.errors import RunError, TrainingError
from safelocus.evaluation import Evaluation, TargetResponder
from safelocus.evaluation.evaluation import UTILITY
from safelocus.evaluation.measures import Measure
from safelocus.preservation.attachment import check_fingerprint, preserve
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.preservation import PROTECTED, UNPROTECTED, Arm, Preservation, measures_of
from safelocus.preservation.protection import LoraMode, Protection
from safelocus.prompts import PromptSet
from safelocus.resume import claim
from safelocus.run import write_json
from safelocus.scoring import versions
from safelocus.selection import Selection
from safelocus.sparse import gather
from safelocus.target import Target
from safelocus.training import Checkpoints, Curve, CurvePoint, LossPoint, TrainingSettings, fit, training_rows
from safelocus.training.examination import Examination, check_apart
from safelocus.training.lesson import Lesson
from safelocus.training.responses import own_answers

ADAPTER, MODEL, PATCH = "adapter", "model", "protection.patch.safetensors"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA adapter to train instead of all weights.

    Attributes:
        rank: of each update.
        alpha: its scale, over the rank; default: twice the rank.
        modules: names of the modules that get one; default: all linear layers.
        mode: how weights are protected from it, see `preserve`.
    """

    rank: int = 16
    alpha: int | None = None
    modules: tuple[str, ...] = ()
    mode: LoraMode = "exact"

    def wrap(self, model: Any) -> Any:
        """The model with the adapter, whose modules are put into it.

        Raises:
            TrainingError: there are no such modules, or the output layer is among them.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=list(self.modules) if self.modules else "all-linear",
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for an attribute that has a new name
                warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)  # its own patterns
                wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise TrainingError(f"no LoRA adapter could be made for {', '.join(self.modules)}: {error}") from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise TrainingError("the trainer computes the loss past an adapter on the output layer; leave that out")
        return wrapped


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """Rows mixed into the task's, the practitioner's usual remedy: the model's own answers to a few prompts.

    Attributes:
        prompts: harmful ones, and harmless ones against over-refusal. Responses in them are not used.
        share: of all rows.
    """

    prompts: Sequence[PromptSet]
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise TrainingError(f"the share of mixed-in rows lies between 0 and 1, found {self.share}")


def run_preservation(
    target: Target,
    selection: Selection,
    lesson: Lesson,
    *,
    examination: Examination,
    controls: Mapping[str, Selection | Callable[[], Selection]] | None = None,
    unprotected: bool = False,
    lora: Lora | None = None,
    calibration: Calibration | None = None,
    mixed: Mixed | None = None,
    settings: TrainingSettings | None = None,
    every: int | None = None,
    look: int = 48,
    folder: Path | None = None,
    merge: bool = False,
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
        lesson: what to learn, and questions that tell whether it was learned.
        examination: harmful and harmless prompts, and tasks for utility.
        controls: by name, other selections to protect instead; a function is called when its turn comes.
        unprotected: train without protection too.
        lora: train an adapter instead of all weights.
        calibration: keep the model's answers by small steps on the protected weights (see `Calibration`).
        mixed: rows mixed into the task's, in every arm.
        settings: of the training.
        every: steps between looks; default: none but the first and the last.
        look: prompts and questions of each kind that a look uses, at most.
        folder: where the protected model (`model/`), or adapter and patch (`adapter/`), are saved.
        merge: save the model with its adapter merged, its protected weights exact.
        allow_seen: measure with prompts that calibration or mixed-in rows use.
        allow_mismatch: the selection was made for another model (a fine-tuned sibling).
        checkpoint: folder for unfinished work; the same call resumes from it. Of several
            processes each has its own, and as many resume.
        notes: what a reader of the result should mind already.
        progress: show bars.
        changes: to the settings: steps=1000, learning_rate=2e-5, ...

    Raises:
        TrainingError: nothing that is selected is trained.
        SelectionError: a selection made for another model.
        NumericalError: the training diverged; the model has its old weights again.
    """
    settings = replace(settings or TrainingSettings(), **changes)
    if lora and target.is_sharded:
        raise TrainingError("a LoRA adapter needs a model that is whole in each process, not sharded")
    sets = [*(calibration.prompts if calibration else ()), *(mixed.prompts if mixed else ())]
    remarks = [*notes, *check_apart(examination, [lesson.prompts, *sets], allow_seen=allow_seen)]
    fingerprint = target.fingerprint()
    check_fingerprint(target.model, selection, allow_mismatch)  # each arm does so again, and notes what it finds
    every = every or settings.steps
    inputs = {
        "the model": target, "--data": lesson.prompts, "the task": lesson.task, "the selection": selection,
        "the controls": controls, "unprotected": unprotected, "the adapter": lora, "the calibration": calibration,
        "the rows mixed in": mixed, "the examination": examination, **settings.to_json(), "every": every, "look": look,
        "merge": merge,
    }  # fmt: skip
    claim(checkpoint, inputs)
    prompts = lesson.prompts if mixed is None else _mix(target, lesson.prompts, mixed, settings, progress)
    rows = training_rows(prompts, target.chat, max_length=settings.max_length)
    if num_left := len(prompts) - len(rows):
        remarks.append(
            f"{num_left:,} of {len(prompts):,} rows are left out: their prompts alone have {settings.max_length} "
            "tokens or more (--max-length)"
        )
    examined = replace(examination, tasks=(lesson.task, *examination.tasks))
    run = _Run(
        target=target, rows=rows, settings=settings, examination=examined, task=lesson.task.name,
        look=_smaller(examined, look, settings.seed), every=every, lora=lora, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    if lora is None and torch.finfo(target.model.dtype).bits < 32:
        remarks.append(
            f"all weights are trained in {str(target.model.dtype).removeprefix('torch.')}, which rounds small steps "
            "away; float32 (--dtype float32) keeps them"
        )
    before = run.examine("before")
    remarks += _unasked(before, lesson.task.name)
    wanted: dict[str, Selection | Callable[[], Selection] | None] = {PROTECTED: selection}
    wanted |= {UNPROTECTED: None} if unprotected else {}
    wanted |= controls or {}
    arms = [
        run.arm(kind, what, calibration, folder if kind == PROTECTED else None, merge) for kind, what in wanted.items()
    ]
    if differences := fingerprint.differences(target.fingerprint()):
        raise RunError(
            f"the model did not come back as it was ({'; '.join(differences)}); something else changed its weights "
            "during the training. Load it anew, and begin again with nothing else running on it"
        )
    return Preservation(
        before=before,
        before_measures=measures_of(before, lesson.task.name),
        arms=tuple(arms),
        settings=settings,
        notes=tuple(remarks),
        provenance={
            "model": target.name,
            "fingerprint": fingerprint.id,
            "selection": selection.describe(),
            "data": {"source": lesson.prompts.source, "num_prompts": len(lesson.prompts), "hash": lesson.prompts.hash},
            "task": lesson.task.describe(),
            "lora": None if lora is None else asdict(lora),
            "calibration": _facts(calibration),
            "mixed": None
            if mixed is None
            else {"share": mixed.share, "sources": [part.source for part in mixed.prompts]},
            "versions": versions(),
        },
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What all arms share."""

    target: Target
    rows: Any
    settings: TrainingSettings
    examination: Examination
    task: str
    look: Examination
    every: int
    lora: Lora | None
    checkpoint: Path | None
    progress: bool

    def examine(self, name: str) -> Evaluation:
        part = None if self.checkpoint is None else self.checkpoint / name
        return self.examination.evaluate(TargetResponder(target=self.target), checkpoint=part, progress=self.progress)

    def arm(
        self,
        kind: str,
        what: Selection | Callable[[], Selection] | None,
        calibration: Calibration | None,
        folder: Path | None,
        merge: bool,
    ) -> Arm:
        """Train one arm from the original weights; a finished one is read instead."""
        own = None if self.checkpoint is None else self.checkpoint / kind
        if own is not None and (arm := _load(own, self.task)) is not None:
            return arm
        selection = what() if callable(what) else what
        checkpoints = None if own is None else Checkpoints(folder=own, inputs={"the protected weights": selection})
        model = self.target.model
        with _given_back(model):
            original = {} if selection is None else gather(model, selection)
            set_seed(self.settings.seed)  # adapters begin the same in every arm
            trained = model if self.lora is None else self.lora.wrap(model)
            held: list[Protection] = []

            def protect(trainer: Any) -> None:
                # the selection was checked at the beginning, and a control's belongs to no scores
                if selection is not None:
                    mode: LoraMode = "exact" if self.lora is None else self.lora.mode
                    held.append(preserve(trainer, selection, allow_mismatch=True, mode=mode, calibration=calibration))

            curve, losses, seconds = self._train(trained, protect, checkpoints)
            if folder is not None and self.lora is not None and not merge:
                _save_adapter(trained, self.target, held, folder / ADAPTER)
            if self.lora is not None:
                held[0].merge() if held else trained.merge_and_unload()
            if folder is not None and (self.lora is None or merge):
                _save_model(self.target, folder / MODEL)
            after = self.examine(f"after-{kind}")
            num_changed = None
            if selection is not None and calibration is None:
                num_changed = _count_changed(original, gather(model, selection))
            arm = Arm(
                kind=kind,
                num_protected=held[0].num_protected_in_all if held else 0,
                num_changed=num_changed,
                curve=curve,
                losses=losses,
                after=after,
                measures=measures_of(after, self.task),
                seconds=seconds,
                notes=tuple(held[0].notes) if held else (),
            )
        if checkpoints is not None:
            _save(arm, checkpoints.folder)
            for unfinished in checkpoints.folder.glob("checkpoint-*"):
                shutil.rmtree(unfinished)
        return arm

    def _train(
        self, model: Any, protect: Callable[[Any], None], checkpoints: Checkpoints | None
    ) -> tuple[list[CurvePoint], list[LossPoint], float]:
        responder, looking = TargetResponder(target=self.target), 0.0

        def measure() -> dict[str, Measure]:
            nonlocal looking
            began = time.monotonic()
            measures = measures_of(self.look.evaluate(responder), self.task)
            looking += time.monotonic() - began
            return measures

        curve = Curve(measure, every=self.every, folder=checkpoints.folder / "curve" if checkpoints else None)
        began = time.monotonic()
        losses = fit(
            self.target, self.rows, self.settings, model=model, callbacks=[curve], prepare=protect,
            checkpoints=checkpoints, progress=self.progress,
        )  # fmt: skip
        return curve.points, losses, time.monotonic() - began - looking


@contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Afterwards the model has the bits that it had, whatever was trained; a copy waits on the CPU meanwhile."""
    parameters = dict(model.named_parameters())
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    copies = {name: distributed.local(p.detach()).to("cpu", copy=True) for name, p in parameters.items()}
    try:
        yield
    finally:
        _without_adapter(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                distributed.local(parameter).copy_(copies[name])
                parameter.requires_grad_(required[name])


def _without_adapter(model: Any) -> None:
    """Take out what an adapter leaves: its layers after a failure, its configuration always."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    vars(model).pop("peft_config", None)
    for name, module in reversed(list(model.named_modules())):  # those within others first
        if isinstance(module, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())


def _save_model(target: Target, folder: Path) -> None:
    """Written by the first process; the others give it their rows, where the model is sharded."""
    model, state = target.model, None
    if target.is_sharded:
        own = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
        gathered = ((name, distributed.whole(value)) for name, value in own.items())
        state = {name: value.cpu() for name, value in gathered if distributed.is_main()}
    if distributed.is_main():
        # transformers would gather what it has sharded anew, and write tied weights twice
        config = vars(model.config)
        sharding = {"distributed_config": config.pop("distributed_config")} if "distributed_config" in config else {}
        try:
            model.save_pretrained(folder, state_dict=state)
        finally:
            config.update(sharding)
        target.tokenizer.save_pretrained(folder)


def _save_adapter(model: Any, target: Target, held: list[Protection], folder: Path) -> None:
    patch = held[0].patch() if held else None
    if not distributed.is_main():
        return
    model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    if patch is not None:
        patch.save(folder / PATCH)


def _count_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int:
    return sum(
        int((value.cpu().view(torch.uint8) != after[name].cpu().view(torch.uint8)).view(len(value), -1).any(1).sum())
        for name, value in before.items()
    )


def _mix(target: Target, prompts: PromptSet, mixed: Mixed, settings: TrainingSettings, progress: bool) -> PromptSet:
    """The task's rows and, as often as their share needs, the model's own answers, the sets in equal parts."""
    answered = [own_answers(target, part, progress=progress) for part in mixed.prompts]
    wanted = round(len(prompts) * mixed.share / (1 - mixed.share) / len(answered))
    added = [part.examples[i % len(part)] for part in answered for i in range(max(wanted, 1))]
    return replace(prompts, examples=(*prompts.examples, *added))


def _unasked(evaluation: Evaluation, task: str) -> list[str]:
    """A remark where questions about the task could not be asked at all."""
    questions = [row for row in evaluation.rows if row["source"] == task and row["set"] == UTILITY]
    failures = [row["failure"] for row in questions if row["failure"] is not None]
    if not failures:
        return []
    return [
        f"{len(failures)} of {len(questions)} questions about the task could not be asked, the first: {failures[0]}"
    ]


def _smaller(examination: Examination, num: int, seed: int) -> Examination:
    return replace(
        examination,
        harmful=examination.harmful.limit(num, seed=seed),
        harmless=None if examination.harmless is None else examination.harmless.limit(num, seed=seed),
        tasks=tuple(task.limit(num, seed=seed) for task in examination.tasks),
    )


def _facts(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    plain = {key: value for key, value in vars(calibration).items() if key not in ("target", "prompts")}
    return {**plain, "prompts": [{"source": part.source, "hash": part.hash} for part in calibration.prompts]}


def _save(arm: Arm, folder: Path) -> None:
    arm.after.save(folder)
    values = arm.to_json() | {"losses": [asdict(loss) for loss in arm.losses], "kind": arm.kind}
    write_json(folder / "arm.json", values)  # last: it says that all is there


def _load(folder: Path, task: str) -> Arm | None:
    file = folder / "arm.json"
    if not distributed.in_all(file.is_file()):
        return None
    values, after = json.loads(file.read_text(encoding="utf-8")), Evaluation.load(folder)
    return Arm(
        kind=values["kind"],
        num_protected=values["num_protected"],
        num_changed=values["num_changed"],
        curve=[CurvePoint.from_json(point) for point in values["curve"]],
        losses=[LossPoint(**loss) for loss in values["losses"]],
        after=after,
        measures=measures_of(after, task),
        seconds=values["seconds"],
        notes=tuple(values["notes"]),
    )
