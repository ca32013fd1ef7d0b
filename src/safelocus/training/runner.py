"""Runner: train the arms of a run one after the other, and measure what that made of the model.

    for each arm:  W0 -> train, at every rate -> choose -> measure -> W0, to the bit

Unfinished trainings go on where they stopped, and finished ones are read instead of repeated.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.evaluation import Evaluation, TargetResponder
from safelocus.evaluation.divergence import Original, answered
from safelocus.evaluation.measures import Measure
from safelocus.evaluation.result import HARMLESS
from safelocus.evaluation.surprise import with_surprising
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.run.identity import versions
from safelocus.run.resume import part_of
from safelocus.selection.selection import Selection
from safelocus.training.arm import Arm, TrainedArm, Trainee, Trial
from safelocus.training.curve import CurvePoint, back, cost, nearest
from safelocus.training.examination import Examination
from safelocus.training.fitting import Checkpoints, fit
from safelocus.training.looks import BestLook, Curve, at_rest
from safelocus.training.settings import TrainingSettings

if TYPE_CHECKING:
    from datasets import Dataset

Make = Callable[[Arm, TrainingSettings], AbstractContextManager[Trainee]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Runner:
    """All that the trainings of one run share.

    Attributes:
        target: the model; it comes back as it was, to the bit.
        rows: from `training_rows`.
        other_rows: arm -> what it learns instead.
        make: gets the model ready for an arm, within a block that gives it back.
        settings: of every training.
        rates: learning rates to try, for every arm; default: that of the settings.
        examination: what is measured before and after.
        measures: of an evaluation, by name.
        original: what the model said before; how far it is from that is measured after each training (`kl`).
        look: what is measured during a training; None for no looks.
        every: steps between looks; None: one at the end.
        early_stopping: keep the best look, and stop when more would not help (see `curve`).
        interpolate: keep the best on the straight line from the original weights to what was trained (see `curve`).
        sets: that are trained on, or calibrated with.
        written: arm -> what its training leaves on disk besides.
        described: what is trained on and looked at, for provenance.
        remarks: what a reader should mind about the rows.
        checkpoint: folder for unfinished work; None keeps nothing.
        progress: show bars.
    """

    target: Target
    rows: "Dataset"
    other_rows: Mapping[str, "Dataset"] = field(default_factory=dict)
    make: Make
    settings: TrainingSettings
    rates: tuple[float, ...] = ()
    examination: Examination | None = None
    measures: Callable[[Evaluation], dict[str, Measure]] = lambda evaluation: evaluation.measures
    original: Original | None = None
    look: Examination | None = None
    every: int | None = None
    early_stopping: bool = False
    interpolate: bool = False
    sets: Sequence[PromptSet] = ()
    written: Mapping[str, Path] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    checkpoint: Path | None = None
    progress: bool = True

    def run(self, selection: Selection, arms: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the model, train and measure all arms: the fields of an `Experiment`.

        Args:
            arms: name -> what is trained or held; see `Arm`.

        Raises:
            NumericalError: a training diverged; the model has its old weights again.
            RunError: a checkpoint of another run; weights that did not come back.
        """
        fingerprint = self.target.fingerprint()
        before = self.examine("before")
        runner = replace(self, original=self._said(before))
        trained = tuple(runner.arm(Arm(name=name, what=what)) for name, what in arms.items())
        fingerprint.came_back(self.target.fingerprint(), after="training")
        trained = tuple(map(self._without_salad, trained))
        made = {
            "model": self.target.name, "fingerprint": fingerprint.id, "selection": selection.describe(),
            **self.described, "used": self._used(selection), "versions": versions(),
        }  # fmt: skip
        settings = replace(self.settings, learning_rate=self.rates[0]) if len(self.rates) == 1 else self.settings
        return {"before": before, "trained": trained, "settings": settings, "provenance": made}

    def _used(self, selection: Selection) -> dict[str, list[str]]:
        """Where all came from that weights were found, trained or chosen with; hashes of what is measured with too."""
        chosen = [self.look.harmful] if self.look is not None and self.described.get("validation") else []
        sets, found = [*self.sets, *chosen], selection.provenance
        hashes = {*found.extra.get("prompt_hashes", ()), *(value for part in sets for value in part.prompt_hashes)}
        assert self.examination is not None
        return {
            "sources": sorted({*filter(None, [found.prompts]), *(part.source for part in sets)}),
            "also_measured": sorted(hashes & self.examination.prompt_hashes),
        }

    def _said(self, before: Evaluation) -> Original | None:
        """What the model, as it is, says to harmless prompts; None where there are none, or it says nothing."""
        said = [
            (r["prompt"], r["system"], r["response"]) for r in before.rows if r["set"] == HARMLESS and r["response"]
        ]
        return Original.of(self.target, answered(said), progress=self.progress) if said else None

    def _without_salad(self, arm: TrainedArm) -> TrainedArm:
        """Its answers that surprise the model as it was are no answers; asked when that is here again."""
        after = with_surprising(arm.after, self.target, progress=self.progress)
        return replace(arm, after=after, measures=self.measures(after))

    def examine(self, name: str) -> Evaluation:
        """Measure the model as it is."""
        assert self.examination is not None
        return self.examination.evaluate(
            TargetResponder(target=self.target), original=self.original,
            checkpoint=part_of(self.checkpoint, name), progress=self.progress,
        )  # fmt: skip

    def arm(self, arm: Arm) -> TrainedArm:
        """Train an arm at every rate, and measure the best of its trials."""
        arm = replace(arm, what=arm.what()) if callable(arm.what) else arm
        rates = self.rates or (self.settings.learning_rate,)
        trials = tuple(self.train(arm, replace(self.settings, learning_rate=rate)) for rate in rates)
        chosen = _choose(trials)
        after = trials[chosen].after
        if after is None:
            with self.shown(arm, trials[chosen]):
                after = self.examine(f"after-{arm.name}")
        return TrainedArm(name=arm.name, trials=trials, chosen=chosen, after=after, measures=self.measures(after))

    @contextmanager
    def shown(self, arm: Arm, trial: Trial) -> Iterator[None]:
        """Within: the model with what was trained."""
        with self.make(arm, self.settings) as trainee:
            assert trainee.write is not None
            assert trial.values is not None
            trainee.write(trial.values)
            yield

    def train(self, arm: Arm, settings: TrainingSettings) -> Trial:
        """Train from the original weights, and give the model back."""
        folder = part_of(self.checkpoint, f"{arm.name}-{settings.learning_rate:g}")
        checkpoints = None
        if folder is not None:
            checkpoints = Checkpoints(folder=folder, inputs={"the weights of the arm": arm.what})
            checkpoints.check()
            if (finished := Trial.load(folder)) is not None:
                self._check_written(arm, folder)
                return finished
        with self.make(arm, settings) as trainee:
            trial = self._fit(self.other_rows.get(arm.name, self.rows), trainee, settings, checkpoints)
            if trial.values is None:
                trial = replace(trial, after=self.examine(f"after-{arm.name}"))
        if folder is not None:
            trial.save(folder)
            for unfinished in folder.glob("checkpoint-*"):
                shutil.rmtree(unfinished)
        return trial

    def _check_written(self, arm: Arm, folder: Path) -> None:
        """Of a finished training, which is not repeated; the first process wrote it."""
        place = self.written.get(arm.name)
        if place is not None and not distributed.gather_objects(place.exists())[0]:
            raise RunError(
                f"{place}: is not there, and the training that makes it is finished ({folder}): it was not to be saved "
                "then, or lies elsewhere. Remove that folder to train again"
            )

    def _fit(
        self, rows: "Dataset", trainee: Trainee, settings: TrainingSettings, checkpoints: Checkpoints | None
    ) -> Trial:
        folder = None if checkpoints is None else checkpoints.folder
        keeper = curve = None
        if self.look is not None:
            if self.early_stopping:
                assert trainee.read is not None
                keeper = BestLook(trainee.read, folder)
            looks = _Looks(self.target, self.look, self.measures)
            curve = Curve(
                looks, every=self.every or settings.steps, stop_when=keeper, folder=part_of(folder, "curve")
            )  # fmt: skip
        began = time.monotonic()
        losses = fit(
            self.target, rows, replace(settings, max_grad_norm=None) if trainee.clips else settings,
            model=trainee.model, optimizer=trainee.optimizer, callbacks=[] if curve is None else [curve],
            prepare=trainee.prepare, trainer=trainee.trainer, checkpoints=checkpoints, progress=self.progress,
        )  # fmt: skip
        seconds = time.monotonic() - began - (0.0 if curve is None else looks.seconds)
        step, values = losses[-1].step, None
        if keeper is not None and curve is not None:
            step, values = keeper.values(curve.points)
        elif trainee.read is not None:
            values = trainee.read()
        share, gone = 1.0, list[CurvePoint]()
        if self.interpolate and curve is not None and values is not None:
            share, values, gone = _interpolated(trainee, values, step, curve.points, looks)
        if trainee.settle is not None:
            trainee.settle()
        return Trial(
            learning_rate=settings.learning_rate,
            num_weights=trainee.num_weights,
            description=trainee.description,
            num_changed=trainee.num_changed,
            notes=trainee.notes,
            step=step,
            losses=losses,
            curve=[] if curve is None else curve.points,
            share=share,
            back=gone,
            stopped=None if curve is None else curve.reason,
            seconds=seconds,
            values=None if values is None else {name: value.cpu() for name, value in values.items()},
        )


def _interpolated(
    trainee: Trainee, values: Mapping[str, Tensor], step: int, points: Sequence[CurvePoint], look: "_Looks"
) -> tuple[float, Mapping[str, Tensor], list[CurvePoint]]:
    """(share, values there, looks): the best on the straight line from the original weights to what was trained."""
    write, between = trainee.write, trainee.between
    assert write is not None
    assert between is not None

    def at(share: float) -> dict[str, Measure]:
        write(between(values, share))
        with at_rest(trainee.model):
            return look()

    looked = back(points, next(point for point in points if point.step == step), at)
    share = nearest(looked, points[0]).share
    return share, between(values, share), looked


class _Looks:
    """Measures of the model as it is, and the seconds that they took."""

    def __init__(self, target: Target, examination: Examination, measures: Callable[..., dict[str, Measure]]) -> None:
        self.seconds = 0.0
        self._responder = TargetResponder(target=target)  # a kept one encodes prompts once
        self._examination, self._measures = examination, measures

    def __call__(self) -> dict[str, Measure]:
        began = time.monotonic()
        measures = self._measures(self._examination.evaluate(self._responder))
        self.seconds += time.monotonic() - began
        return measures


def check_made_for(target: Target, selection: Selection, *, allow_mismatch: bool) -> list[str]:
    """Whether the selection is this model's: asked once per run, before anything long; what cannot be told, in words.

    Raises:
        SelectionError: it was made for another model.
    """
    own = target.fingerprint(like=selection.provenance.fingerprint)
    return selection.check(own, allow_mismatch=allow_mismatch)


def _choose(trials: Sequence[Trial]) -> int:
    """The best by its looks; of equals the gentlest learning rate."""
    if len(trials) == 1:
        return 0
    return min(range(len(trials)), key=lambda i: (cost(trials[i].point, trials[i].curve[0]), trials[i].learning_rate))
