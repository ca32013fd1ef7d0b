"""What a result depends on, part by part and in words: so that unfinished work never passes for another run's.

    Identity.of({"the model": target, "--data": prompts, "the selection": selection, "batch_size": 8})

Each kind of input says itself what it is, by a method `identity()`: a target its weights, their dtype, its chat
template, tokenizer and system prompt; prompts every row with its response and system message; a selection its
coordinates. Whatever has no such method is what its `describe()` or its fields say, or itself. What differs between
two identities is named down to the part: "the responses of --data", "the system prompt of the model".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import xxhash


@dataclass(frozen=True)
class Identity:
    """Name -> what it is: plain JSON values, nested where a thing has parts."""

    parts: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Self:
        """Of inputs by their names, in the words in which a user knows them."""
        return cls({name: _plain(value) for name, value in inputs.items()})

    def differences(self, other: "Identity") -> list[str]:
        """What differs, in words, with both values where they are short."""
        names = dict.fromkeys([*self.parts, *other.parts])
        found = (_difference(name, self.parts.get(name), other.parts.get(name)) for name in names)
        return [difference for difference in found if difference is not None]


def digest(value: Any) -> str:
    """128 bits of a JSON value, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def _plain(value: Any) -> Any:
    """As it will be read back from JSON."""
    for method in ("identity", "describe"):
        if callable(own := getattr(value, method, None)):
            return _plain(own())
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    # a function, or an object of one's own, cannot be looked into
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _difference(name: str, own: Any, other: Any) -> str | None:
    """The first part that differs: the others may follow from it, as answers from a selection's coordinates."""
    if own == other:
        return None
    if isinstance(own, Mapping) and isinstance(other, Mapping) and own.keys() == other.keys():
        part = next(part for part in own if own[part] != other[part])
        return _difference(f"the {part} of {name}", own[part], other[part])
    if all(value is None or isinstance(value, int | float) for value in (own, other)):
        return f"{name} ({json.dumps(other)} there, {json.dumps(own)} here)"
    return name
