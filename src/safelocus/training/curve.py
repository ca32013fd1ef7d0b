"""A learning curve: measures taken now and then while a model is trained, and a reason to stop before the end.

Input: a function that measures the model as it is. Output: points, step by step; kept on disk beside the
checkpoints, so that a resumed run has all of them. A look changes nothing in the training: the model is put
into evaluation mode for it and back, and the random state is what it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import TrainerCallback

from safelocus.errors import TrainingError
from safelocus.evaluation.measures import Measure
from safelocus.generation import as_used
from safelocus.resume import Journal


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What was measured after `step` optimizer steps; 0 is the model before any."""

    step: int
    measures: dict[str, Measure]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, **{name: measure.to_json() for name, measure in self.measures.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        measures = {name: Measure.from_json(value) for name, value in values.items() if name != "step"}
        return cls(step=values["step"], measures=measures)


class Curve(TrainerCallback):
    """Measures before the first step, every so many steps, and after the last.

    Args:
        measure: measures of the model as it is: name -> Measure.
        every: steps between two looks.
        stop_when: called after every look with all points so far; a reason, given in words, ends the training.
        folder: where points are kept for a resumed run; None keeps them in memory only.

    Attributes:
        points: so far, by step.
        reason: why the training was stopped early; None where it was not.

    Example:
        >>> curve = Curve(lambda: evaluate(target, ...).measures, every=10)   # doctest: +SKIP
        >>> fit(target, rows, settings, callbacks=[curve])                     # doctest: +SKIP
        >>> curve.points[-1].measures["asr"]                                   # doctest: +SKIP
    """

    def __init__(
        self,
        measure: Callable[[], Mapping[str, Measure]],
        *,
        every: int,
        stop_when: Callable[[Sequence[CurvePoint]], str | None] | None = None,
        folder: Path | None = None,
    ) -> None:
        if every < 1:
            raise TrainingError(f"a look every {every} steps is impossible; expected at least 1")
        self.points: list[CurvePoint] = []
        self.reason: str | None = None
        self._measure, self._every, self._stop_when = measure, every, stop_when
        self._journal = Journal(folder, "curve")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        # looks after the checkpoint that is resumed from will be taken again
        known = [step for step in range(state.global_step + 1) if (step,) in self._journal]
        self.points = [CurvePoint.from_json({"step": step, **self._journal[(step,)]}) for step in known]
        if not self.points and state.global_step == 0:
            self._look(0, model, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            self._look(step, model, control)

    def _look(self, step: int, model: Any, control: Any) -> None:
        with at_rest(model):
            point = CurvePoint(step=step, measures=dict(self._measure()))
        self.points.append(point)
        self._journal.add([((step,), {name: measure.to_json() for name, measure in point.measures.items()})])
        if self._stop_when is not None and (reason := self._stop_when(self.points)):
            self.reason, control.should_training_stop = reason, True


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Within: the model is as it is used, without gradients. Afterwards: as it was, random state included."""
    device = next(model.parameters()).device
    with as_used(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
