"""Enhancement: a model before and after its selected weights were trained, and controls trained the same way.

Every number here rests on held-out prompts, but for those of the looks (`curve`, `sweep`), which rest on the
validation part on which learning rates and moments to stop were chosen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelocus.patch import Patch
from safelocus.training.arm import Experiment, TrainedArm

PATCH = "safety.patch.safetensors"
_TOLD = ("num_weights", "description", "learning_rate", "step", "share", "stopped")


@dataclass(frozen=True, kw_only=True)
class Enhancement(Experiment):
    """What `run_enhancement` found.

    Attributes:
        before: the model as it was.
        trained: the selection first, then the controls.
        patch: the selection's new values, against the model as it was.
        settings: of every training; the learning rate is each trial's own.
        notes: what a reader should mind.
        provenance: model, selection, data, what was retained, validation.
    """

    patch: Patch

    @property
    def selection(self) -> TrainedArm:
        return self.trained[0]

    def to_json(self) -> dict[str, Any]:
        """Everything but responses and values."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "change": {name: difference.to_json() for name, difference in self.comparison.differences.items()},
            "training": _told(self.selection),
            "controls": {name: _told(arm) for name, arm in self.controls.items()},
            "sweep": [entry for arm in self.trained for entry in _sweep(arm)],
            "patch": {"k": self.patch.k, "num_changed": self.patch.num_changed},
            **super().to_json(),
        }

    def save(self, folder: Path) -> None:
        """Write the patch, `results.json`, and the evaluations with their responses as `Experiment.save`."""
        self.patch.save(folder / PATCH)
        super().save(folder)


def _told(arm: TrainedArm) -> dict[str, Any]:
    return {**arm.to_json(*_TOLD), "back": [point.to_json() for point in arm.trial.back]}


def _sweep(arm: TrainedArm) -> list[dict[str, Any]]:
    """One entry per learning rate, with the measures of its last kept look on the validation part."""
    if not arm.trial.curve:
        return []
    return [
        {
            "kind": arm.name,
            "learning_rate": trial.learning_rate,
            "chosen": number == arm.chosen,
            **trial.point.to_json(),
        }
        for number, trial in enumerate(arm.trials)
    ]
