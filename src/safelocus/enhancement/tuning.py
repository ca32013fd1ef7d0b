"""Tuning: one training of one trainee at one learning rate, and what came of it.

The model is given back as it was; what was trained is in `values`, to be written again when it is needed. With a
folder, an unfinished tuning goes on where it stopped, and a finished one is read instead of repeated.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from safelocus import distributed
from safelocus.enhancement.looks import BestLook
from safelocus.enhancement.retention import Retention
from safelocus.enhancement.trainee import Trainee
from safelocus.evaluation.measures import Measure
from safelocus.run import write_json
from safelocus.target import Target
from safelocus.training import Checkpoints, Curve, CurvePoint, LossPoint, TrainingSettings, fit

if TYPE_CHECKING:
    from datasets import Dataset

Maker = Callable[[TrainingSettings], AbstractContextManager[Trainee]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuning:
    """What came of a training.

    Attributes:
        learning_rate: its peak.
        num_weights, description: what was trained.
        step: that `values` are of; the last, or that of the best look.
        losses: of every step.
        points: looks, the first before any step; empty where none were taken.
        stopped: why it ended early, in words; None where it did not.
        seconds: that training and looks took; of a resumed one, since it was resumed.
        values: what was trained, on the CPU.
    """

    learning_rate: float
    num_weights: int
    description: str
    step: int
    losses: list[LossPoint]
    points: list[CurvePoint]
    stopped: str | None
    seconds: float
    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def point(self) -> CurvePoint:
        """The look at the step that was kept."""
        return next(point for point in self.points if point.step == self.step)

    def to_json(self) -> dict[str, Any]:
        """Everything but the values."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("losses", "points", "values")},
            "losses": [asdict(loss) for loss in self.losses],
            "curve": [point.to_json() for point in self.points],
        }

    def save(self, folder: Path) -> None:
        save_file(dict(self.values), folder / "values.safetensors")
        write_json(folder / "tuning.json", self.to_json())  # last: it says that all is there

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What `save` wrote; None where it did not, or not in every process."""
        file = folder / "tuning.json"
        if not distributed.in_all(file.is_file()):
            return None
        plain = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            losses=[LossPoint(**loss) for loss in plain.pop("losses")],
            points=[CurvePoint.from_json(point) for point in plain.pop("curve")],
            values=load_file(folder / "values.safetensors"),
            **plain,
        )


def tune(
    target: Target,
    make: Maker,
    rows: "Dataset",
    settings: TrainingSettings,
    *,
    retention: Retention | None = None,
    look: Callable[[], Mapping[str, Measure]] | None = None,
    every: int | None = None,
    early_stopping: bool = False,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> Tuning:
    """Train, and give the model back as it was.

    Args:
        make: makes what is trained, such as `lambda settings: sparse(target, selection, settings)`.
        rows: from `training_rows`.
        look: measures the model as it is, on a validation part.
        every: steps between looks; default: one at the end.
        early_stopping: keep the best look, and stop when more would not help (see `looks`).
        checkpoints: where the tuning is kept, unfinished and finished.

    Raises:
        NumericalError: training diverged; the model has its old weights again.
        RunError: the checkpoint belongs to another run.
    """
    if checkpoints is not None:
        checkpoints.check()
        if (finished := Tuning.load(checkpoints.folder)) is not None:
            return finished
    began = time.monotonic()
    folder = None if checkpoints is None else checkpoints.folder
    with make(settings) as trainee:
        keeper = BestLook(trainee.read, folder) if early_stopping else None
        curve = None
        if look is not None:
            curve = Curve(look, every=every or settings.steps, stop_when=keeper, folder=folder and folder / "curve")

        def prepare(run: Any) -> None:
            run.retention, run.original = retention, trainee.original

        losses = fit(
            target,
            rows,
            replace(settings, max_grad_norm=None) if trainee.clips else settings,
            model=trainee.model,
            optimizer=trainee.optimizer,
            callbacks=[] if curve is None else [curve],
            prepare=prepare,
            trainer=trainee.trainer,
            checkpoints=checkpoints,
            progress=progress,
        )
        step, values = (
            (losses[-1].step, trainee.read()) if curve is None or keeper is None else keeper.values(curve.points)
        )
        tuning = Tuning(
            learning_rate=settings.learning_rate,
            num_weights=trainee.num_weights,
            description=trainee.description,
            step=step,
            losses=losses,
            points=[] if curve is None else curve.points,
            stopped=None if curve is None else curve.reason,
            seconds=time.monotonic() - began,
            values={name: value.cpu() for name, value in values.items()},
        )
    if folder is not None:
        tuning.save(folder)
    return tuning
