"""Preserve (SPA): keep the selected weights while everything else is fine-tuned.

`attachment` has the verb, `protection` what it gives; `run` the whole run, `result` what that finds, `trainee` what
learns the task in it.
"""

from safelocus.preservation.attachment import preserve
from safelocus.preservation.protection import Protection

__all__ = ["Protection", "preserve"]
