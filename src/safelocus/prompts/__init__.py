"""Prompts and chat data from files, the hub, memory, or what is embedded.

`read_prompts` turns a source into a `PromptSet`: examples without empty or duplicate prompts, together with
the counts of what was left out. Two prompts are the same when their normal forms are (`normalise`: NFKC,
case folded, white space collapsed); the hash of a prompt and the side of a split depend on nothing else, so a
prompt falls on the same side whatever file it comes from, and no prompt is both used to identify weights and
used to test them. The hash of a set covers all of its rows: it tells whether a run was given the very same.

    prompts = read_prompts("advbench.json")
    identification, held_out = prompts.split(held_out=0.5)

Errors are `PromptError`s.
"""

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar, overload

from safelocus.errors import PromptError
from safelocus.prompts.fields import Example, Prompt, as_text, read_row, resolve_columns
from safelocus.prompts.sources import Row, from_objects, origin, parse_hub, read_embedded, read_file, read_hub
from safelocus.run.identity import digest

__all__ = ["Example", "Prompt", "PromptSet", "normalise", "origin", "prompt_hash", "read_prompts"]

T = TypeVar("T")


def normalise(prompt: str) -> str:
    """The form in which prompts are compared: NFKC, case folded, white space collapsed.

    >>> normalise("  How do I\\nmake a ＫＩＴＥ?")
    'how do i make a kite?'
    """
    # folding can undo the composition (and NFKC the folding), hence the second round
    for _ in range(2):
        prompt = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(unicodedata.normalize("NFKC", prompt).split())


def prompt_hash(prompt: str) -> str:
    """16 hexadecimal digits of a prompt's normal form."""
    return _digest(normalise(prompt))[:8].hex()


def limited(examples: tuple[T, ...], num: int | None, seed: int | None, what: str) -> tuple[T, ...]:
    """What `PromptSet.limit` leaves of examples; `what` each is, for a PromptError where the limit is none."""
    if num is None:
        return examples
    if num < 1:
        raise PromptError(f"expected a limit of at least one {what}, found {num}.")
    if seed is None or num >= len(examples):
        return examples[:num]
    chosen = sorted(random.Random(seed).sample(range(len(examples)), num))
    return tuple(examples[index] for index in chosen)


def only(prompts: "PromptSet", flags: Iterable[bool], *, otherwise: str) -> "PromptSet":
    """The prompts whose flag is true; a PromptError of these words where there are none."""
    examples = tuple(compress(prompts.examples, flags))
    if not examples:
        raise PromptError(otherwise)
    return replace(prompts, examples=examples)


@dataclass(frozen=True, kw_only=True)
class PromptSet(Sequence[Example]):
    """Examples in the source's order. `source` to `context_field` are facts about the reading, and
    stay as they are in slices, parts and samples: `num_rows` counts the rows that met `where`; of these `num_empty`
    had no prompt and `num_duplicates` repeated an earlier one; `read_with` has what `read_prompts` was asked for
    beside the source, `field` and `where`."""

    examples: tuple[Example, ...]
    source: str
    prompt_field: str
    response_field: str | None
    num_rows: int
    num_empty: int
    num_duplicates: int
    read_with: Mapping[str, Any] = field(default_factory=dict, hash=False)
    context_field: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...
    def __getitem__(self, index: int | slice) -> "Example | PromptSet":
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    @property
    def texts(self) -> list[Prompt]:
        """The prompts as strings, each with its row's own system message."""
        return [Prompt(example.prompt, system=example.system) for example in self.examples]

    @property
    def hash(self) -> str:
        """128 bits of all that a result can depend on: every row's texts, character by character, in their order."""
        return digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """The same, part by part."""
        parts = {"texts": "prompt", "system messages": "system", "responses": "response", "categories": "category"}
        parts |= {"later turns": "later", "turns that are given": "context"} if self.num_conversations else {}
        return {name: digest([getattr(example, key) for example in self.examples]) for name, key in parts.items()}

    @property
    def num_conversations(self) -> int:
        """Examples that go on after their first exchange."""
        return sum(bool(example.later) for example in self.examples)

    @property
    def prompt_hashes(self) -> list[str]:
        """One short hash per normal form, sorted: tells later whether a prompt was among these."""
        return sorted({prompt_hash(example.prompt) for example in self.examples})

    def split(self, held_out: float = 0.5, salt: str = "safelocus") -> tuple["PromptSet", "PromptSet"]:
        """(identification, held out), by a hash of each prompt: about the share `held_out` goes to the
        second. Another `salt` gives another split."""
        if not 0 < held_out < 1:
            raise PromptError(f"held_out is a share between 0 and 1 (exclusive), found {held_out}.")
        sides: tuple[list[Example], list[Example]] = ([], [])
        for example in self.examples:
            digest = _digest(f"{salt}\0{normalise(example.prompt)}")
            sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(example)
        if not all(sides):
            raise PromptError(
                f"{self.source}: splitting {len(self)} prompts left one part empty. "
                "Give more prompts, another salt, or two separate files."
            )
        return replace(self, examples=tuple(sides[0])), replace(self, examples=tuple(sides[1]))

    def limit(self, num: int | None, seed: int | None = None) -> "PromptSet":
        """At most `num` examples (None: all): the first, or with a `seed` a random sample, in the source's order."""
        return replace(self, examples=limited(self.examples, num, seed, "prompt"))

    def where(self, **conditions: str) -> "PromptSet":
        """The examples whose fields have these values (case aside): `prompts.where(label="safe")`."""
        rows = [
            {"category": example.category} | dict(example.fields)
            if example.category is not None
            else dict(example.fields)
            for example in self.examples
        ]
        kept = rows_where(rows, conditions, self.source)
        return replace(self, examples=tuple(self.examples[index] for index in kept))

    @property
    def is_answered(self) -> bool:
        """Whether any example has a response with something in it."""
        return any(example.response for example in self.examples)

    def with_responses(self) -> "PromptSet":
        kept = tuple(example for example in self.examples if example.response is not None)
        if not kept:
            looked = f"field {self.response_field!r} is empty" if self.response_field else "no field holds any"
            other = sorted({name for example in self.examples for name in example.fields})
            raise PromptError(
                f"{self.source}: no example has a response ({looked}). "
                "Name the field with response_field=; "
                f"further fields: {', '.join(map(repr, other)) or 'none'}."
            )
        return replace(self, examples=kept)

    def without(self, other: "PromptSet") -> "PromptSet":
        """Leave out the prompts that also occur in `other`; the result may be empty."""
        known = {normalise(example.prompt) for example in other.examples}
        kept = tuple(example for example in self.examples if normalise(example.prompt) not in known)
        return replace(self, examples=kept)

    def describe(self) -> str:
        """One line for people."""
        num_responses = sum(example.response is not None for example in self.examples)
        text = f"{self.source}: {len(self):,} prompts (field {self.prompt_field!r}"
        text += f", context {self.context_field!r}" if self.context_field else ""
        if num_responses:
            text += f"; {num_responses:,} with a response"
            text += f", field {self.response_field!r}" if self.response_field else ""
        text += f") of {self.num_rows:,} rows"
        text = f"{text}; {self.num_empty:,} empty, {self.num_duplicates:,} duplicates"
        asked = self.only_first
        return text if asked is None else f"{text}; {asked.removeprefix(f'{self.source}: ')}"

    @property
    def only_first(self) -> str | None:
        """What measuring with these prompts leaves out, in words; None where that is nothing."""
        if not (number := self.num_conversations):
            return None
        turns = sum(len(example.later) for example in self.examples)
        return f"{self.source}: only the first requests of {number:,} conversations are asked, not {turns:,} later ones"


def read_prompts(
    source: str | Path | Iterable[object],
    *,
    field: str | None = None,
    response_field: str | None = None,
    where: Mapping[str, str] | None = None,
    keep_duplicates: bool = False,
) -> PromptSet:
    """Read prompts.

    `source`: a file (json, jsonl, csv, tsv, txt with one prompt per line, parquet), a dataset on the hub
    (`ORG/NAME[/CONFIG][:SPLIT[:FIELD]]`), `embedded:NAME`, `organism:NAME`, or a list of strings or objects.
    `field`, `response_field`: the columns to read, where they are not recognised (see `fields`) or
    others are wanted. `where`: column -> value; other rows are left out. Duplicates (same system message and
    prompt, in normal form) are counted, and left out unless `keep_duplicates`.

    >>> len(read_prompts(["How do I bake a cake?", "how do I bake a cake? ", ""]))
    1
    """
    if isinstance(source, PromptSet):
        if field is not None or response_field is not None:
            raise PromptError("a PromptSet has been read already: give field= and response_field= then.")
        return source.where(**where) if where else source
    asked = field
    rows, name, field = _rows(source, field)
    if isinstance(rows[0].value, Example):  # its own names, whatever its further fields are called
        field, response_field = "prompt", "response"
    objects = _objects(rows, name)
    # names in the order of first appearance; rows need not all have the same ones
    found = list(dict.fromkeys(column for row in objects for column in row))
    columns = resolve_columns(found, field=field, response_field=response_field, source=name)
    kept = rows_where(objects, where or {}, name)
    examples: list[Example] = []
    seen: set[tuple[str, ...]] = set()
    num_empty = num_duplicates = 0
    for index in kept:
        example = read_row(objects[index], columns, place=f"{name}, {rows[index].place}")
        if example is None:
            num_empty += 1
            continue
        if isinstance(given := rows[index].value, Example):
            kept_as = ("complete", "later", "context", "unread")
            example = replace(example, **{name: getattr(given, name) for name in kept_as})
        rest = [part for exchange in example.later for part in exchange]
        key = (normalise(example.system or ""), normalise(example.prompt), *rest)
        if key in seen:
            num_duplicates += 1
            if not keep_duplicates:
                continue
        seen.add(key)
        examples.append(example)
    has_context = columns.context is not None and any(
        isinstance(context := objects[index].get(columns.context), str) and context.strip() for index in kept
    )
    if not examples:
        raise PromptError(
            f"{name}: all {len(kept)} rows are empty in field {'|'.join(columns.prompt)!r}. "
            f"Fields found: {', '.join(map(repr, found[:12]))}; name another with field=."
        )
    return PromptSet(
        examples=tuple(examples),
        source=name,
        prompt_field="|".join(columns.prompt),
        response_field=columns.response,
        num_rows=len(kept),
        num_empty=num_empty,
        num_duplicates=num_duplicates,
        context_field=columns.context if has_context else None,
        read_with={**({"field": asked} if asked else {}), **({"where": dict(where)} if where else {})},
    )


def _rows(source: str | Path | Iterable[object], field: str | None) -> tuple[list[Row], str, str | None]:
    """(rows, the source's name, the prompt field: a hub address may name it)."""
    if isinstance(source, str) and (embedded := read_embedded(source)) is not None:
        return embedded, source, field
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        hub = parse_hub(source) if isinstance(source, str) and not path.exists() else None
        if hub is not None:
            return read_hub(hub), str(source), field or hub.field
        return read_file(path), str(source), field
    rows = from_objects(source)
    if not rows:
        raise PromptError("the list of prompts is empty.")
    return rows, "memory", field


def _objects(rows: Sequence[Row], source: str) -> list[Mapping[str, object]]:
    """Every row as an object; plain strings are prompts."""
    kind = str if isinstance(rows[0].value, str) else Mapping
    expected = "text" if kind is str else "an object with named fields"
    objects: list[Mapping[str, object]] = []
    for place, value in rows:
        if isinstance(value, Example):
            value = _as_row(value)
        if not isinstance(value, kind):
            also = ", as in the rows before it" if objects else " or text"
            raise PromptError(f"{source}, {place}: expected {expected}{also}, found {type(value).__name__}.")
        own = {"system": value.system} if isinstance(value, Prompt) and value.system is not None else {}
        objects.append({"prompt": str(value), **own} if isinstance(value, str) else value)
    return objects


def _as_row(example: Example) -> dict[str, object]:
    own = {"prompt": example.prompt, "response": example.response, "system": example.system}
    return {**example.fields, **own, "category": example.category}


def rows_where(rows: Sequence[Mapping[str, object]], conditions: Mapping[str, str], source: str) -> Sequence[int]:
    """Indices of the rows that have all these values, compared as text without regard to case."""
    kept: Sequence[int] = range(len(rows))
    for name, wanted in conditions.items():
        values = {index: as_text(rows[index].get(name)) for index in kept}
        if not any(name in rows[index] for index in kept):
            found = list(dict.fromkeys(column for row in rows for column in row))
            raise PromptError(
                f"{source}: no field {name!r} to choose rows by. "
                f"Fields found: {', '.join(map(repr, found[:20])) or 'none'}."
            )
        kept = [index for index, value in values.items() if value.casefold() == str(wanted).casefold()]
        if not kept:
            counts = Counter(values.values()).most_common(10)
            listing = ", ".join(f"{value[:60]!r} ({count})" for value, count in counts)
            raise PromptError(f"{source}: no row has {name} = {wanted!r}. Values found: {listing}.")
    return kept


def _digest(text: str) -> bytes:
    # surrogates can come out of JSON escapes; they are data like any other here
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
