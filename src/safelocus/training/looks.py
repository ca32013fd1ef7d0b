"""Looks at a model while it is trained: each makes a point of its curve, and leaves the training as it was.

The model is put into evaluation mode for a look and back, and the random state is what it was. Points are kept on disk
beside the checkpoints, so that a resumed run has all of them, and so is what was trained at the best of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from safelocus.errors import TrainingError
from safelocus.evaluation.measures import Measure
from safelocus.model.generation import as_used
from safelocus.run.resume import Journal
from safelocus.training.curve import VALUES, CurvePoint, best, reason_to_stop


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
        elif self.points and self.points[-1].step == state.global_step:  # it may have been the last
            self._stop(control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            self._look(step, model, control)

    def _look(self, step: int, model: Any, control: Any) -> None:
        with at_rest(model):
            point = CurvePoint(step=step, measures=dict(self._measure()))
        self.points.append(point)
        self._journal.add([((step,), {name: measure.to_json() for name, measure in point.measures.items()})])
        self._stop(control)

    def _stop(self, control: Any) -> None:
        if self._stop_when is not None and (reason := self._stop_when(self.points)):
            self.reason, control.should_training_stop = reason, True


class BestLook:
    """For `Curve`: keeps what is trained as it was at the best look, and stops the training.

    Args:
        read: copies of what is trained.
        folder: where they are kept for a resumed run; None keeps them in memory only.
    """

    def __init__(self, read: Callable[[], dict[str, Tensor]], folder: Path | None) -> None:
        self._read, self._folder = read, folder
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    def __call__(self, points: Sequence[CurvePoint]) -> str | None:
        if len(points) > 1 and best(points) is points[-1]:
            step, values = points[-1].step, {name: value.cpu() for name, value in self._read().items()}
            self._kept = step, values
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                VALUES.write(self._file(step), {}, values)
        return reason_to_stop(points)

    def values(self, points: Sequence[CurvePoint]) -> tuple[int, Mapping[str, Tensor]]:
        """(step, what was trained then) of the best look."""
        step = best(points).step
        if self._kept is not None and self._kept[0] == step:
            return self._kept
        return step, VALUES.read(self._file(step))[1]

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"values-{step}.safetensors"


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Within: the model is as it is used, without gradients. Afterwards: as it was, random state included."""
    device = next(model.parameters()).device
    with as_used(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
