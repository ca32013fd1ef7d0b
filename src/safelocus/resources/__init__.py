"""Resources: bytes and time that each stage needs, from a configuration alone, and the settings that fit a device.

Device + Subject (configuration) -> rehearsal -> Need -> Choice
"""

from safelocus.resources.choosing import Choice, DoesNotFit, Placement, choose_scoring, choose_training, in_bytes
from safelocus.resources.devices import Device, find_device
from safelocus.resources.duration import Duration, scoring_duration, training_duration
from safelocus.resources.memory import Lengths, Need, Scoring, Training
from safelocus.resources.rehearsal import Peak, Rehearsal
from safelocus.resources.subject import Subject

__all__ = [
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
    "choose_scoring",
    "choose_training",
    "find_device",
    "in_bytes",
    "scoring_duration",
    "training_duration",
]
