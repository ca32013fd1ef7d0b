"""Training that `enhance`, `preserve` and their controls share: arms and their runner, rows, settings, the loop."""

from safelocus.training.curve import Curve, CurvePoint
from safelocus.training.fitting import Checkpoints, LossPoint, fit
from safelocus.training.responses import training_rows
from safelocus.training.settings import Schedule, TrainingSettings

__all__ = ["Checkpoints", "Curve", "CurvePoint", "LossPoint", "Schedule", "TrainingSettings", "fit", "training_rows"]
