"""Training that `enhance`, `preserve` and their controls share.

`arm`: what is trained, and what came of it; `runner`: the trainings, one by one; `responses`: rows; `fitting`: the
loop; `looks`, `curve`: what is measured on the way. Only the settings are imported here: what was trained is read
without the trainer's libraries.
"""

from safelocus.training.settings import Schedule, TrainingSettings

__all__ = ["Schedule", "TrainingSettings"]
