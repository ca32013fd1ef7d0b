"""Resources: bytes and time that each stage needs, from a configuration alone, and the settings that fit a device.

Device + Subject (configuration) -> rehearsal -> Need -> Choice
"""

from safelocus.resources.choosing import (
    Choice,
    DoesNotFit,
    Placement,
    choose_answering,
    choose_scoring,
    choose_training,
    in_bytes,
)
from safelocus.resources.devices import Device, find_device
from safelocus.resources.duration import Duration, answering_duration, scoring_duration, training_duration
from safelocus.resources.memory import Answering, Scoring, Training
from safelocus.resources.need import Lengths, Need
from safelocus.resources.rehearsal import Peak, Rehearsal
from safelocus.resources.subject import Subject

__all__ = [
    "Answering",
    "Choice",
    "Device",
    "DoesNotFit",
    "Duration",
    "Lengths",
    "Need",
    "Peak",
    "Placement",
    "Rehearsal",
    "Scoring",
    "Subject",
    "Training",
    "answering_duration",
    "choose_answering",
    "choose_scoring",
    "choose_training",
    "find_device",
    "in_bytes",
    "scoring_duration",
    "training_duration",
]
