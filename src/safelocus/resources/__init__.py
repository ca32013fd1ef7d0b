"""Resources: bytes and time that each stage needs, from a configuration alone, and the settings that fit a device.

Device + Subject (configuration) -> rehearsal -> Need -> Choice
"""

from safelocus.resources.choosing import Choice, DoesNotFit, choose, choose_training, in_bytes, in_words
from safelocus.resources.devices import Device, find_device
from safelocus.resources.rehearsal import Pass, Rehearsal, Subject, classifier_bytes
from safelocus.resources.stages import Answering, Lengths, Need, Scoring, Settings, Training

__all__ = [
    "Answering",
    "Choice",
    "Device",
    "DoesNotFit",
    "Lengths",
    "Need",
    "Pass",
    "Rehearsal",
    "Scoring",
    "Settings",
    "Subject",
    "Training",
    "choose",
    "choose_training",
    "classifier_bytes",
    "find_device",
    "in_bytes",
    "in_words",
]  # fmt: skip
