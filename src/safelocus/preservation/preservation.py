"""Preservation: a model before and after it learned a task with its selected weights protected, and without.

Every arm starts from the same bits, sees the same rows in the same order, and is measured on the same prompts,
which nothing was trained or chosen on.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safelocus.evaluation import Evaluation, EvaluationComparison, compare_evaluations
from safelocus.evaluation.evaluation import UTILITY
from safelocus.evaluation.measures import Measure, rate
from safelocus.run import write_json
from safelocus.training import CurvePoint, LossPoint, TrainingSettings

PROTECTED, UNPROTECTED = "protected", "unprotected"


def measures_of(evaluation: Evaluation, task: str) -> dict[str, Measure]:
    """The evaluation's measures, with the learned task's accuracy as `task` and apart from `utility`."""
    measures = {name: value for name, value in evaluation.measures.items() if not name.startswith("utility")}
    questions = [row for row in evaluation.rows if row["set"] == UTILITY]
    for name, rows in (
        ("task", [row for row in questions if row["source"] == task]),
        ("utility", [row for row in questions if row["source"] != task]),
    ):
        if rows:
            measures[name] = rate([row["correct"] for row in rows])
    return measures


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training.

    Attributes:
        kind: "protected", "unprotected", or the control that was protected: "random", "bottom", ...
        num_protected: weights held.
        num_changed: of these, how many do not have their old bits in the model as it would be shipped; None where
            calibration is meant to change them, or nothing is protected.
        curve: measures during the training, from step 0 on.
        losses: of every step.
        after: the model afterwards.
        measures: of `after`, the task apart.
        seconds: of the training, looks left out.
        notes: what a reader should mind.
    """

    kind: str
    num_protected: int
    num_changed: int | None
    curve: list[CurvePoint] = field(repr=False)
    losses: list[LossPoint] = field(repr=False)
    after: Evaluation
    measures: dict[str, Measure]
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: measure.to_json() for name, measure in self.measures.items()},
            "num_protected": self.num_protected,
            "num_changed": self.num_changed,
            "seconds": round(self.seconds, 2),
            "curve": [point.to_json() for point in self.curve],
            "final_loss": self.losses[-1].loss,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """What `run_preservation` found.

    Attributes:
        before: the model as it was.
        before_measures: of it, the task apart.
        arms: the protected training first.
        settings: of every training.
        notes: what a reader should mind.
        provenance: model, selection, data, calibration.
    """

    before: Evaluation
    before_measures: dict[str, Measure]
    arms: tuple[Arm, ...]
    settings: TrainingSettings
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def protected(self) -> Arm:
        return self.arms[0]

    @property
    def unprotected(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.kind == UNPROTECTED), None)

    @property
    def controls(self) -> dict[str, Arm]:
        return {arm.kind: arm for arm in self.arms if arm.kind not in (PROTECTED, UNPROTECTED)}

    @property
    def comparison(self) -> EvaluationComparison:
        """What the protected training changed, in pairs of the same prompts."""
        return compare_evaluations(self.before, self.protected.after)

    def to_json(self) -> dict[str, Any]:
        """Everything but responses."""
        protected = self.protected.to_json()
        return {
            "before": {name: measure.to_json() for name, measure in self.before_measures.items()},
            "after": {key: value for key, value in protected.items() if key != "curve"},
            "unprotected": None if self.unprotected is None else self.unprotected.to_json(),
            "controls": {kind: arm.to_json() for kind, arm in self.controls.items()},
            "curve": protected["curve"],
            "losses": [asdict(loss) for loss in self.protected.losses],
            "settings": self.settings.to_json(),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }

    def save(self, folder: Path) -> None:
        """Write `results.json`, and evaluations with their responses in `before/`, `after/` and `unprotected/`."""
        named = {"before": self.before, "after": self.protected.after}
        if self.unprotected is not None:
            named["unprotected"] = self.unprotected.after
        for name, evaluation in named.items():
            (folder / name).mkdir(exist_ok=True)
            evaluation.save(folder / name)
        write_json(folder / "results.json", self.to_json())
