"""Preservation: a model before and after it learned a task with its selected weights protected, and without.

Every arm starts from the same bits, sees the same rows in the same order, and is measured on the same prompts,
which nothing was trained or chosen on.
"""

from dataclasses import dataclass
from typing import Any

from safelocus.evaluation import Evaluation
from safelocus.evaluation.measures import Measure, rate
from safelocus.evaluation.result import UTILITY
from safelocus.training.arm import Experiment, TrainedArm

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
class Preservation(Experiment):
    """What `run_preservation` found: an `Experiment`, the protected training first.

    Attributes:
        before_measures: of the model as it was, the task apart.
    """

    before_measures: dict[str, Measure]

    @property
    def protected(self) -> TrainedArm:
        return self.trained[0]

    @property
    def unprotected(self) -> TrainedArm | None:
        return super().controls.get(UNPROTECTED)

    @property
    def controls(self) -> dict[str, TrainedArm]:
        return {name: arm for name, arm in super().controls.items() if name != UNPROTECTED}

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        bare = {} if self.unprotected is None else {UNPROTECTED: self.unprotected.after}
        return {**super().evaluations, **bare}

    def to_json(self) -> dict[str, Any]:
        """Everything but responses."""
        protected = _told(self.protected)
        return {
            "before": {name: measure.to_json() for name, measure in self.before_measures.items()},
            "after": {key: value for key, value in protected.items() if key != "curve"},
            "unprotected": None if self.unprotected is None else _told(self.unprotected),
            "controls": {name: _told(arm) for name, arm in self.controls.items()},
            **super().to_json(),
        }


def _told(arm: TrainedArm) -> dict[str, Any]:
    """Attributes of the arm's trial; a trial's number of weights is that of those held."""
    return {
        **arm.to_json("num_changed"),
        "num_protected": arm.trial.num_weights,
        "curve": [point.to_json() for point in arm.trial.curve],
        "notes": list(arm.trial.notes),
    }
