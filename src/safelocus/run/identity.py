"""What a result depends on, part by part and in words: so that unfinished work never passes for another run's.

    Identity.of({"the model": target, "--data": prompts, "the selection": selection, "batch_size": 8})

Each kind of input says itself what it is, by a method `identity()`: a target its weights, their dtype, its chat
template, tokenizer and system prompt; prompts every row with its response and system message; a selection its
coordinates. Whatever has no such method is what its `describe()` or its fields say, or itself; a callable of one's own
is its code and its plain settings (attributes whose names begin with "_" are none). What differs between
two identities is named down to the part: "the responses of --data", "the system prompt of the model".

`Provenance` is what scores, and whatever is made from them, say of where they come from.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from types import CodeType
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
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    # of a function or a callable of one's own: its code, and its settings as far as they are plain
    return [name, *found] if callable(value) and not isinstance(value, type) and (found := _settings(value)) else name


def _settings(value: Any) -> list[Any]:
    """The code of a callable, and what it was given: defaults, closure, public attributes of it or of its object."""
    if isinstance(value, partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    is_method = hasattr(value, "__func__")
    function = value.__func__ if is_method else value if hasattr(value, "__code__") else type(value).__call__
    code = getattr(function, "__code__", None)
    own = getattr(value.__self__ if is_method else value, "__dict__", {})
    given = {name: each for name, each in own.items() if not name.startswith("_")}
    if code is not None:
        cells = zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
        given |= {**dict(cells), "defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    kept = {name: _plain(each) for name, each in given.items() if _tells(each)}
    return [*([] if code is None else [digest(_read(code))]), *([kept] if kept else [])]


def _tells(value: Any) -> bool:
    """Whether a value says all that it is, and the same in every process."""
    if isinstance(value, Mapping):
        return all(map(_tells, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_tells, value))
    says = is_dataclass(value) or callable(getattr(value, "identity", None))
    return value is None or isinstance(value, str | int | float) or says


def _read(code: CodeType) -> list[Any]:
    """What a function does, wherever it stands."""
    constants = [each for each in code.co_consts if not isinstance(each, frozenset)]  # in an order of their own
    read = [_read(each) if isinstance(each, CodeType) else repr(each) for each in constants]
    return [code.co_code.hex(), code.co_names, read]


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


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What scores were made from. Plain JSON values; unknown things are None.

    Attributes:
        method: "esi", "snip", ...; "manual" for coordinates that no scores stand behind.
        model, prompts: as they were given.
        objective: what S was, as `objective.describe` tells it.
        prompts_hash, num_prompts, seed: of the scoring.
        fingerprint: `Fingerprint.to_json()` of the target.
        versions: package -> version.
        extra: anything else worth keeping.
    """

    method: str = "manual"
    model: str | None = None
    objective: dict[str, Any] | None = None
    prompts: str | None = None
    prompts_hash: str | None = None
    num_prompts: int | None = None
    seed: int | None = None
    fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def objective_label(self) -> str | None:
        """The objective in a few words: "guard meta-llama/Llama-Guard-3-8B"."""
        if self.objective is None:
            return None
        return " ".join(str(self.objective[key]) for key in ("kind", "name") if key in self.objective)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {package: importlib.metadata.version(package) for package in ("safelocus", "torch", "transformers")}
