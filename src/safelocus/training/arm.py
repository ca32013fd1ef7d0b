"""Arms: what is trained or held in a run, each beside the others, and what came of it.

    Arm         a name, and what is trained or held: a selection, everything, an adapter, nothing
    Trainee     a model that is ready for the training of an arm, within a block that gives it back as it was
    Trial       one training of an arm, at one learning rate; kept on disk when it is finished
    TrainedArm  the trials of an arm, and the model after the chosen one
    Experiment  the model before, and after each arm: what a run found

`runner` makes the ones of the others; `enhance` and `preserve` differ in their trainees, and in what they tell.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from safelocus import distributed
from safelocus.evaluation import Evaluation, EvaluationComparison, compare_evaluations
from safelocus.evaluation.measures import Measure
from safelocus.evaluation.result import HARMFUL
from safelocus.run.files import seal, sealed, unsealed, write_json
from safelocus.training.curve import VALUES, CurvePoint, LossPoint
from safelocus.training.settings import TrainingSettings

if TYPE_CHECKING:
    from safelocus.training.sharing import SharingTrainer

_MORE_SINGLE_WORDS = 0.25  # that are spoken of


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One of the trainings that a run compares.

    Attributes:
        name: "selection", "protected", "unprotected", or the control: "random", "bottom", "full", ...
        what: is trained or held: a selection; "full" or "lora"; None for nothing held. A function is called when
            its turn comes.
    """

    name: str
    what: Any


@dataclass(kw_only=True, eq=False)
class Trainee:
    """A model that is ready to be trained.

    Attributes:
        model: for the trainer; the target's, or that wrapped by PEFT.
        num_weights: trained, or held; what is only known when the trainer is there, `settle` says.
        description: in words, where there was something to choose.
        optimizer: over what is trained; None: AdamW over all that requires gradients.
        clips: whether the optimizer clips gradients itself.
        trainer: that fits it, where it has a loss of its own.
        prepare: called with the trainer before the training.
        settle: called after the training, before the model is measured: merges, saves, counts.
        read, write: copies of what is trained, as it is now; and back. Without them the model is measured at once.
        between: such values, and a share of the straight line from the original weights to them: those there.
        num_changed: of the weights held, how many have other bits afterwards; None where that says nothing.
        notes: what a reader should mind.
    """

    model: Any
    num_weights: int = 0
    description: str = ""
    optimizer: torch.optim.Optimizer | None = None
    clips: bool = False
    trainer: "type[SharingTrainer] | None" = None
    prepare: Callable[[Any], object] | None = None
    settle: Callable[[], object] | None = None
    read: Callable[[], dict[str, Tensor]] | None = None
    write: Callable[[Mapping[str, Tensor]], None] | None = None
    between: Callable[[Mapping[str, Tensor], float], dict[str, Tensor]] | None = None
    num_changed: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One training of an arm, at one learning rate.

    Attributes:
        learning_rate: its peak.
        num_weights, description, num_changed, notes: of the trainee.
        step: that was kept; the last, or that of the best look.
        losses: of every step.
        curve: looks, the first before any step; empty where none were taken.
        share: of the way from the original weights to what was trained that was kept.
        back: looks along that way, the first at its end; empty where it was not gone back.
        stopped: why it ended early, in words; None where it did not.
        seconds: that it took, looks left out; of a resumed one, since it was resumed.
        values: what was trained, on the CPU, to be written again when it is needed; None where it was measured at once.
        after: the model then, where it was measured at once.
    """

    learning_rate: float
    num_weights: int
    description: str
    num_changed: int | None
    notes: tuple[str, ...]
    step: int
    losses: list[LossPoint] = field(repr=False)
    curve: list[CurvePoint] = field(repr=False)
    share: float = 1.0
    back: list[CurvePoint] = field(default_factory=list, repr=False)
    stopped: str | None
    seconds: float
    values: Mapping[str, Tensor] | None = field(default=None, repr=False)
    after: Evaluation | None = field(default=None, repr=False)

    @property
    def point(self) -> CurvePoint:
        """The look at what was kept."""
        looks = [*self.curve, *self.back]
        return next(point for point in looks if (point.step, point.share) == (self.step, self.share))

    def save(self, folder: Path) -> None:
        plain = {key: value for key, value in vars(self).items() if key not in ("values", "after")}
        plain |= {"losses": [asdict(loss) for loss in self.losses]}
        plain |= {name: [point.to_json() for point in getattr(self, name)] for name in ("curve", "back")}
        if self.values is not None:
            VALUES.write(folder / "values.safetensors", {}, self.values)
        if self.after is not None:
            self.after.save(folder)
        write_json(folder / "trial.json", sealed(plain))  # last: it says that all is there

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What `save` wrote; None where it did not, or not in every process."""
        file, values = folder / "trial.json", folder / "values.safetensors"
        if not distributed.in_all(file.is_file()):
            return None
        plain = unsealed(file.read_bytes(), file)
        return cls(
            losses=[LossPoint(**loss) for loss in plain.pop("losses")],
            curve=[CurvePoint.from_json(point) for point in plain.pop("curve")],
            back=[CurvePoint.from_json(point) for point in plain.pop("back", [])],
            notes=tuple(plain.pop("notes")),
            values=VALUES.read(values)[1] if values.is_file() else None,
            after=None if values.is_file() else Evaluation.load(folder),
            **plain,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedArm:
    """What the training of an arm made of the model.

    Attributes:
        name: of the arm.
        trials: one per learning rate.
        chosen: index of the one that was measured.
        after: the model with it, on prompts that nothing was trained on or chosen by.
        measures: of `after`.
    """

    name: str
    trials: tuple[Trial, ...]
    chosen: int
    after: Evaluation
    measures: dict[str, Measure]

    @property
    def trial(self) -> Trial:
        return self.trials[self.chosen]

    def to_json(self, *names: str) -> dict[str, Any]:
        """Measures, seconds, the last loss, and further attributes of the trial."""
        trial = self.trial
        return {
            **{name: measure.to_json() for name, measure in self.measures.items()},
            **{name: getattr(trial, name) for name in names},
            "seconds": round(trial.seconds, 2),
            "final_loss": trial.losses[-1].loss,
        }


def single_words(before: Evaluation, trained: Sequence[TrainedArm]) -> list[str]:
    """A remark on each arm that made single words of answers to harmful prompts: no refusals, and no help either."""
    was, *shares = (
        share_of_single_words(row for row in evaluation.rows if row["set"] == HARMFUL)
        for evaluation in (before, *(arm.after for arm in trained))
    )
    return [
        f"{arm.name}: {100 * share:.0f} % of the answers to harmful prompts are single words ({100 * was:.0f} % before)"
        "; what is no refusal among them need not be compliance"
        for arm, share in zip(trained, shares, strict=True)
        if share > was + _MORE_SINGLE_WORDS
    ]


def share_of_single_words(rows: Iterable[Mapping[str, Any]]) -> float:
    """Of the answers among the rows of an evaluation."""
    answers = [row["response"] for row in rows if row["response"] is not None]
    return sum(len(answer.split()) <= 1 for answer in answers) / max(len(answers), 1)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model before, and after the training of each arm, every one from the same weights, on the same rows.

    Attributes:
        before: the model as it was.
        trained: what each arm made of it; the one that the run is about first.
        settings: of every training; the learning rate is each trial's own.
        notes: what a reader should mind.
        provenance: model, selection, data, and what else was trained or measured with.
        acceptance: the acceptance card, where one was made (`analysis.acceptance`).
    """

    before: Evaluation
    trained: tuple[TrainedArm, ...]
    settings: TrainingSettings
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    acceptance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def after(self) -> Evaluation:
        return self.trained[0].after

    @property
    def controls(self) -> dict[str, TrainedArm]:
        return {arm.name: arm for arm in self.trained[1:]}

    @property
    def comparison(self) -> EvaluationComparison:
        """What changed, in pairs of the same prompts."""
        return compare_evaluations(self.before, self.after)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Of every state of the model, by the folder that they are saved in."""
        controls = {f"controls/{name}": arm.after for name, arm in self.controls.items()}
        return {"before": self.before, "after": self.after, **controls}

    def to_json(self) -> dict[str, Any]:
        """Everything but responses and values."""
        trial = self.trained[0].trial
        card = {"acceptance": dict(self.acceptance)} if self.acceptance else {}
        return {
            **card,
            "curve": [point.to_json() for point in trial.curve],
            "losses": [asdict(loss) for loss in trial.losses],
            "settings": self.settings.to_json(),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }

    def save(self, folder: Path) -> None:
        """Write `results.json`, and the evaluations with their responses in `before/`, `after/`, `controls/NAME/`."""
        for name, evaluation in self.evaluations.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            evaluation.save(folder / name)
        write_json(folder / "results.json", self.to_json())
        seal(folder, ["results.json"])
