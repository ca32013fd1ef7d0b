"""Prompts of our own writing, inside the package, for where nothing better is at hand: `embedded:NAME`.

    ordinary    what anybody asks of an assistant: explain, write, list, translate, calculate
    alarming    harmless too, but with words that harmful requests have: kill, bomb, poison, steal
    harmless    both of these
    refusals    short harmful requests, each with a refusal; a few words, nothing that instructs

Each is there twice: `NAME` to train on or to find weights with, `NAME-heldout` to measure with. A hash of the prompt
decides in which it is, and in which place, so neither depends on the order of the files. Every row has a `category`.
"""

import json
from hashlib import blake2b
from pathlib import Path

from safelocus.errors import PromptError

_FOLDER = Path(__file__).parent
_HELD_OUT = "-heldout"
_SHARE = 0.4  # that is held out
_PARTS = {"ordinary": ("ordinary",), "alarming": ("alarming",), "harmless": ("ordinary", "alarming"), "refusals": ()}
NAMES = tuple(f"{name}{part}" for name in _PARTS for part in ("", _HELD_OUT))


def rows(name: str) -> list[dict[str, str]]:
    """`prompt` and `category`, of refusals `response` too.

    >>> rows("alarming")[0].keys()
    dict_keys(['prompt', 'category'])
    """
    if name not in NAMES:
        raise PromptError(f"There is no embedded set {name!r}. There are: {', '.join(NAMES)}.")
    plain, is_held_out = name.removesuffix(_HELD_OUT), name.endswith(_HELD_OUT)
    found = [row for part in _PARTS[plain] for row in _harmless(part)] if _PARTS[plain] else _refusals()
    return sorted((row for row in found if (_place(row) < _SHARE) == is_held_out), key=_place)


def _harmless(name: str) -> list[dict[str, str]]:
    lines = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [{"prompt": line, "category": name} for line in lines]


def _refusals() -> list[dict[str, str]]:
    return [json.loads(line) for line in (_FOLDER / "refusals.jsonl").read_text(encoding="utf-8").splitlines()]


def _place(row: dict[str, str]) -> float:
    """A number from 0 to 1 that depends on the prompt alone."""
    return int.from_bytes(blake2b(row["prompt"].encode(), digest_size=8).digest(), "big") / 2**64
