"""Which column of a row is the prompt, which the response: the published formats as a table.

A row (one object of a JSON file, one line of a CSV file, ...) becomes an `Example` in two steps:
`resolve_columns` looks at the names found in the whole file and picks a `Format`; `read_row` then reads each
row by it. Names are compared without regard to case, so `Behavior` and `behavior` are one.

Context columns belong to the prompt: an Alpaca instruction is not complete without its `input`, nor a
contextual HarmBench behaviour without its `ContextString` (joined as in HarmBench's DirectRequest).

AdvBench's and JailbreakBench's `target` is an affirmative opening ("Sure, here is ...") for attacks to aim
at. It is not read as a response unless asked for, since tuning on it would teach compliance.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from safelocus.errors import PromptError

RESPONSES = ("response", "completion", "output", "answer")
CATEGORIES = (
    "category",
    "semanticcategory",
    "functionalcategory",
    "harm_category",
    "data_type",
    "type",
    "task",
)
SYSTEMS = ("system", "system_prompt")

# what the many dialects of chat data call the three roles and a turn's parts
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt, with what the file says about it.

    `fields` holds the row's other columns as text (numbers and lists as JSON), for filtering. `complete`: whether the
    response is whole; one that was cut is trained on without an end of turn.
    """

    prompt: str
    response: str | None = None
    system: str | None = None
    category: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    complete: bool = True


class Prompt(str):
    """A prompt with its row's own system message, which `ChatFormat` renders with it; else a string like any other.

    So whatever takes prompts as strings honours system messages, objectives of one's own included.

    >>> Prompt("Bake a cake", system="Be brief.").system
    'Be brief.'
    """

    __slots__ = ("system",)
    system: str | None

    def __new__(cls, text: str, *, system: str | None = None) -> Self:
        prompt = super().__new__(cls, text)
        prompt.system = system
        return prompt


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one published format names its columns (lower case; the first that is found counts)."""

    name: str
    prompt: tuple[str, ...]  # of these, the first that is not empty *in the row*
    requires: tuple[str, ...] = ()  # further columns without which it is not this format
    response: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    context_first: bool = False
    separator: str = "\n\n"  # between context and prompt
    category: tuple[str, ...] = CATEGORIES
    turns: bool = False  # the prompt column holds a list of turns, never plain text


# Order matters: the first format that fits is taken. JailbreakBench has a `Behavior` column too (a title, not
# a prompt), so `goal` stands before HarmBench; pairs stand before plain `prompt`.
FORMATS = (
    Format(name="chat messages", prompt=("messages",), turns=True),
    Format(name="ShareGPT", prompt=("conversations", "conversation"), turns=True),
    Format(
        name="WildJailbreak",
        prompt=("adversarial", "vanilla"),
        requires=("data_type",),  # in WildGuardMix `adversarial` is a flag
        response=("completion",),
        category=("data_type",),
    ),
    Format(name="AdvBench, JailbreakBench", prompt=("goal",)),
    Format(
        name="HarmBench",
        prompt=("behavior",),
        context=("contextstring",),
        context_first=True,
        separator="\n\n---\n\n",
        category=("semanticcategory", "functionalcategory", "category"),
    ),
    Format(name="StrongREJECT", prompt=("forbidden_prompt",), response=RESPONSES),
    Format(name="preference pairs", prompt=("prompt",), requires=("chosen",), response=("chosen",)),
    Format(
        name="Alpaca, Dolly",
        prompt=("instruction",),
        context=("input", "context"),
        response=("output", *RESPONSES),
    ),
    Format(name="prompt", prompt=("prompt",), response=RESPONSES),
    Format(name="question", prompt=("question",), response=("answer", "long_answer", *RESPONSES)),
    Format(name="query", prompt=("query",), response=RESPONSES),
    Format(name="input and output", prompt=("input",), requires=("output",), response=("output",)),
    Format(name="preference conversations", prompt=("chosen",), requires=("rejected",), turns=True),
    Format(name="turns", prompt=("turns",), turns=True),
    Format(name="request", prompt=("request",), response=RESPONSES),
    Format(name="text", prompt=("text",)),
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A format resolved to the names that one file really uses."""

    prompt: tuple[str, ...]
    response: str | None = None
    context: str | None = None
    context_first: bool = False
    separator: str = "\n\n"
    category: str | None = None
    system: str | None = None
    turns: bool = False

    @property
    def used(self) -> set[str]:
        """Names that do not go to `Example.fields`; the category stays there under its own name."""
        return {name for name in (*self.prompt, self.response, self.context, self.system) if name is not None}


class Turns(NamedTuple):
    system: str | None
    prompt: str
    response: str | None


def resolve_columns(
    found: Sequence[str], *, field: str | None = None, response_field: str | None = None, source: str
) -> Columns:
    """Decide which of the columns `found` in `source` hold prompt, response, context, category and system.

    An explicit `field` takes the place of the format's prompt column; context and response of a format that
    knows this column still belong to it.
    """
    for option, name in (("field", field), ("response_field", response_field)):
        if name is not None and name not in found:
            raise PromptError(
                f"{source}: no field {name!r}, asked for with {option}=. Fields found: {_listing(found)}."
            )
    actual = {name.casefold(): name for name in reversed(found)}  # the first of two spellings wins

    def first(names: Sequence[str]) -> str | None:
        return next((actual[name] for name in names if name in actual and actual[name] != field), None)

    def fits(format: Format) -> bool:
        if not all(name in actual for name in format.requires):
            return False
        if field is not None:
            return field.casefold() in format.prompt
        return any(name in actual for name in format.prompt)

    format = next(filter(fits, FORMATS), None)
    if format is None:
        if field is None:
            raise PromptError(_no_usable_field(found, source))
        format = Format(name="named by the user", prompt=(field,), response=RESPONSES)
    prompt = (field,) if field is not None else tuple(actual[name] for name in format.prompt if name in actual)
    return Columns(
        prompt=prompt,
        response=response_field or first(format.response),
        context=first(format.context),
        context_first=format.context_first,
        separator=format.separator,
        category=first((*format.category, *CATEGORIES)),
        system=first(SYSTEMS),
        turns=format.turns,
    )


def read_row(row: Mapping[str, object], columns: Columns, *, place: str) -> Example | None:
    """Read one row; None where its prompt is empty. `place` ("file.json, row 3") opens error messages."""
    system = _text(row.get(columns.system), f"{place}, field {columns.system!r}") if columns.system else None
    prompt, response = "", None
    for name in columns.prompt:
        where = f"{place}, field {name!r}"
        value = row.get(name)
        if isinstance(value, list | tuple):
            turns = read_turns(value, where)
            prompt, response = turns.prompt, turns.response
            system = turns.system or system
        elif columns.turns and value is not None:
            raise PromptError(
                f"{where}: expected a list of turns such as {{'role': 'user', 'content': '...'}}, "
                f"found {type(value).__name__}."
            )
        else:
            prompt = _text(value, where)
        if prompt.strip():
            break
    else:
        return None
    if columns.context:
        context = _text(row.get(columns.context), f"{place}, field {columns.context!r}")
        if context.strip():
            parts = (context, prompt) if columns.context_first else (prompt, context)
            prompt = columns.separator.join(parts)
    if columns.response:
        response = _response(row.get(columns.response), f"{place}, field {columns.response!r}")
    used = columns.used
    category = as_text(row.get(columns.category)) if columns.category else ""
    return Example(
        prompt=prompt,
        response=response if response and response.strip() else None,
        system=system if system and system.strip() else None,
        category=category or None,
        fields={name: as_text(value) for name, value in row.items() if name not in used and value is not None},
    )


def read_turns(turns: Sequence[object], place: str) -> Turns:
    """The first user's turn, the system message before it, and the assistant's turn right after it.

    Later turns are left out. A list of plain strings is read as the user's turns (SORRY-Bench, MT-Bench).
    """
    if turns and all(isinstance(turn, str) for turn in turns):
        return Turns(None, str(turns[0]), None)
    system, prompt, response = None, None, None
    for number, turn in enumerate(turns, start=1):
        role, content = _turn(turn, f"{place}, turn {number}")
        if prompt is not None:
            response = content if role == "assistant" else None
            break
        if role == "system" and system is None:
            system = content
        elif role == "user":
            prompt = content
    return Turns(system, prompt or "", response)


def as_text(value: object) -> str:
    """Any cell as text: None is empty, text is itself, the rest is JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _turn(turn: object, place: str) -> tuple[str | None, str]:
    """(role, content); the role is None for those that are none of the three (tools, for example)."""
    role_key = content_key = None
    if isinstance(turn, Mapping):
        role_key = next((key for key in ROLE_KEYS if key in turn), None)
        content_key = next((key for key in CONTENT_KEYS if key in turn), None)
    if not isinstance(turn, Mapping) or role_key is None or content_key is None:
        found = f"the keys {_listing(list(turn))}" if isinstance(turn, Mapping) else type(turn).__name__
        raise PromptError(f"{place}: expected 'role' and 'content' (or 'from' and 'value'), found {found}.")
    content = turn[content_key]
    if isinstance(content, list):  # content in parts; only text has a place here
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    return ROLES.get(str(turn[role_key]).casefold()), _text(content, place)


def _text(value: object, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(
            f"{place}: expected text, found {type(value).__name__} ({as_text(value)[:60]}). "
            "Choose another field with field=, or turn the values into text."
        )
    return value


def _response(value: object, place: str) -> str:
    if isinstance(value, list | tuple):  # conversational: the assistant's first turn
        turns = [_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(value, start=1)]
        return next((content for role, content in turns if role == "assistant"), "")
    # an answer may well be a number
    return as_text(value) if isinstance(value, int | float) else _text(value, place)


def _no_usable_field(found: Sequence[str], source: str) -> str:
    message = (
        f"{source}: no field is known to hold prompts. Fields found: {_listing(found)}. "
        "Name the one to use with field=."
    )
    if any(len(name) > 40 or name.strip().isdigit() for name in found):
        message += (
            " These look like a row of data: if the file has no header line, add one (for example: label,title,prompt)."
        )
    return message


def _listing(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, each at most 60 characters."""
    shown = [repr(name if len(name) <= 60 else name[:57] + "...") for name in map(str, names[:limit])]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(shown) or "none") + more
