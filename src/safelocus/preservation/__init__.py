"""Preserve (SPA): keep the selected weights while everything else is fine-tuned."""

from safelocus.preservation.attachment import preserve
from safelocus.preservation.protection import Protection

__all__ = ["Protection", "preserve"]
