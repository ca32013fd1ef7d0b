"""Where the command line prints: results on standard output, everything else on the error stream."""

import json
from typing import Any

from rich.console import Console

results = Console()
errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Machine-readable result: one JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201


def note(message: str) -> None:
    """A remark for people, on the error stream."""
    errors.print(message, highlight=False, soft_wrap=True)
