"""Enhancement: a model before and after its selected weights were trained, and controls trained the same way.

Every number here rests on held-out prompts, but for those of the looks (`curve`, `sweep`), which rest on the
validation part on which learning rates and moments to stop were chosen.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safelocus.enhancement.tuning import Tuning
from safelocus.evaluation import Evaluation, EvaluationComparison, compare_evaluations
from safelocus.patch import Patch
from safelocus.run import write_json
from safelocus.training import TrainingSettings

PATCH = "safety.patch.safetensors"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training one kind of weights made of the model.

    Attributes:
        kind: "selection", or the control: "random", "bottom", "snip", ..., "full", "lora".
        tunings: one per learning rate.
        chosen: index of the one that was evaluated.
        after: the model with it, on held-out prompts.
    """

    kind: str
    tunings: tuple[Tuning, ...]
    chosen: int
    after: Evaluation

    @property
    def tuning(self) -> Tuning:
        return self.tunings[self.chosen]

    def to_json(self) -> dict[str, Any]:
        tuning = self.tuning
        return {
            **{name: measure.to_json() for name, measure in self.after.measures.items()},
            "num_weights": tuning.num_weights,
            "description": tuning.description,
            "learning_rate": tuning.learning_rate,
            "step": tuning.step,
            "stopped": tuning.stopped,
            "seconds": round(tuning.seconds, 1),
            "final_loss": tuning.losses[-1].loss,
        }


@dataclass(frozen=True, kw_only=True)
class Enhancement:
    """What `run_enhancement` found.

    Attributes:
        before: the model as it was.
        trained: the selection first, then the controls.
        patch: the selection's new values, against the model as it was.
        settings: of every training; the learning rate is each tuning's own.
        notes: what a reader should mind.
        provenance: model, selection, data, what was retained, validation.
    """

    before: Evaluation
    trained: tuple[Trained, ...]
    patch: Patch
    settings: TrainingSettings
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def selection(self) -> Trained:
        return self.trained[0]

    @property
    def after(self) -> Evaluation:
        return self.selection.after

    @property
    def controls(self) -> dict[str, Trained]:
        return {trained.kind: trained for trained in self.trained[1:]}

    @property
    def comparison(self) -> EvaluationComparison:
        """What changed, in pairs of the same prompts."""
        return compare_evaluations(self.before, self.after)

    def to_json(self) -> dict[str, Any]:
        """Everything but responses and values."""
        chosen = self.selection.tuning
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "change": {name: difference.to_json() for name, difference in self.comparison.differences.items()},
            "training": self.selection.to_json(),
            "controls": {kind: trained.to_json() for kind, trained in self.controls.items()},
            "curve": [point.to_json() for point in chosen.points],
            "losses": [asdict(loss) for loss in chosen.losses],
            "sweep": [entry for trained in self.trained for entry in _sweep(trained)],
            "patch": {"k": self.patch.k, "num_changed": self.patch.num_changed},
            "settings": self.settings.to_json(),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }

    def save(self, folder: Path) -> None:
        """Write the patch, `results.json`, and the evaluations with their responses in `before/` and `after/`."""
        self.patch.save(folder / PATCH)
        for name, evaluation in (("before", self.before), ("after", self.after)):
            (folder / name).mkdir(exist_ok=True)
            evaluation.save(folder / name)
        write_json(folder / "results.json", self.to_json())


def _sweep(trained: Trained) -> list[dict[str, Any]]:
    """One entry per learning rate, with the measures of its last kept look on the validation part."""
    if not trained.tuning.points:
        return []
    return [
        {
            "kind": trained.kind,
            "learning_rate": tuning.learning_rate,
            "chosen": number == trained.chosen,
            **tuning.point.to_json(),
        }
        for number, tuning in enumerate(trained.tunings)
    ]
