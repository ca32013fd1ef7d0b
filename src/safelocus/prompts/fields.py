"""Which column of a row is the prompt, which the response: the published formats as a table.

A row (one object of a JSON file, one line of a CSV file, ...) becomes an `Example` in two steps:
`resolve_columns` looks at the names found in the whole file and picks a `Format`; `read_row` then reads each
row by it. Names are compared without regard to case, so `Behavior` and `behavior` are one.

Context columns belong to the prompt: an Alpaca instruction is not complete without its `input`, nor a
contextual HarmBench behaviour without its `ContextString` (joined as in HarmBench's DirectRequest), nor a question
about a text without that text.

AdvBench's and JailbreakBench's `target` is an affirmative opening ("Sure, here is ...") for attacks to aim
at. It is not read as a response unless asked for, since tuning on it would teach compliance.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from safelocus.errors import PromptError, some

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
_CALLS = ("tool_calls", "function_call")  # a turn that says nothing
_HALF = re.compile("[\ud800-\udfff]")  # JSON's escapes can bring one; no tokenizer takes it


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt, with what the file says about it.

    `fields` holds the row's other columns as text (numbers and lists as JSON), for filtering. `complete`: whether the
    response is whole; one that was cut is trained on without an end of turn. A conversation goes on in `later`
    (request, response); of all its exchanges the first `context` are given and not learned, and `unread` turns of an
    assistant have no place in them (they answer a tool, or nobody).
    """

    prompt: str
    response: str | None = None
    system: str | None = None
    category: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    complete: bool = True
    later: tuple[tuple[str, str], ...] = ()
    context: int = 0
    unread: int = 0


class Prompt(str):
    """A prompt with its row's own system message, which `ChatFormat` renders with it; else a string like any other.

    So whatever takes prompts as strings honours system messages, objectives of one's own included. `history`: exchanges
    (request, response) before it, for chat templates.

    >>> Prompt("Bake a cake", system="Be brief.").system
    'Be brief.'
    """

    __slots__ = ("history", "system")
    history: tuple[tuple[str, str], ...]
    system: str | None

    def __new__(cls, text: str, *, system: str | None = None, history: tuple[tuple[str, str], ...] = ()) -> Self:
        prompt = super().__new__(cls, text)
        prompt.system, prompt.history = system, history
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
    text_context: bool = False  # a context that is no text is not read here (PubMedQA's is its task reader's)
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
    Format(
        name="question",
        prompt=("question",),
        context=("context", "passage"),
        context_first=True,
        text_context=True,
        response=("answer", "answerkey", "long_answer", *RESPONSES),
    ),
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

    format: Format
    prompt: tuple[str, ...]
    response: str | None
    context: str | None
    category: str | None
    system: str | None

    @property
    def used(self) -> set[str]:
        """Names that do not go to `Example.fields`; the category stays there under its own name."""
        return {name for name in (*self.prompt, self.response, self.context, self.system) if name is not None}


class Turns(NamedTuple):
    """A conversation: its first exchange, those that follow, and how many answers have no place in them."""

    system: str | None
    prompt: str
    response: str | None
    later: tuple[tuple[str, str], ...] = ()
    unread: int = 0


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
        format=format,
        prompt=prompt,
        response=response_field or first(format.response),
        context=first(format.context),
        category=first((*format.category, *CATEGORIES)),
        system=first(SYSTEMS),
    )


def read_row(row: Mapping[str, object], columns: Columns, *, place: str) -> Example | None:
    """Read one row; None where its prompt is empty. `place` ("file.json, row 3") opens error messages."""
    system = _text(row.get(columns.system), f"{place}, field {columns.system!r}") if columns.system else None
    answer = row.get(columns.response) if columns.response else None
    answered_at = f"{place}, field {columns.response!r}"
    turns, given = Turns(None, "", None), 0
    for name in columns.prompt:
        where = f"{place}, field {name!r}"
        value = row.get(name)
        if isinstance(value, list | tuple):
            turns, given = _conversation(value, answer, where, answered_at)
        elif columns.format.turns and value is not None:
            raise PromptError(
                f"{where}: expected a list of turns such as {{'role': 'user', 'content': '...'}}, "
                f"found {type(value).__name__}."
            )
        else:
            asked = {"role": "user", "content": _text(value, where)}
            turns, given = _conversation([asked], answer, where, answered_at)
        if turns.prompt.strip():
            break
    else:
        return None
    prompt, system = turns.prompt, turns.system or system
    used, given_context = columns.used, row.get(columns.context) if columns.context else None
    if columns.format.text_context and given_context is not None and not isinstance(given_context, str):
        used, given_context = used - {columns.context}, None
    if (context := _text(given_context, f"{place}, field {columns.context!r}")).strip():
        parts = (context, prompt) if columns.format.context_first else (prompt, context)
        prompt = columns.format.separator.join(parts)
    category = as_text(row.get(columns.category)) if columns.category else ""
    return Example(
        prompt=prompt,
        response=turns.response if turns.response and turns.response.strip() else None,
        system=system if system and system.strip() else None,
        category=category or None,
        fields={name: as_text(value) for name, value in row.items() if name not in used and value is not None},
        later=turns.later,
        context=given,
        unread=turns.unread,
    )


def read_turns(turns: Sequence[object], place: str) -> Turns:
    """The system message, the first user's turn, the assistant's right after it, and so on while they take turns.

    A list of plain strings is read as the user's turns, of which the first counts (SORRY-Bench, MT-Bench).
    """
    if turns and all(isinstance(turn, str) for turn in turns):
        return Turns(None, str(turns[0]), None)
    read = [_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(turns, start=1)]
    start = next((number for number, (role, _) in enumerate(read) if role == "user"), len(read))
    system = next((content for role, content in read[:start] if role == "system"), None)
    exchanges = []
    for (role, request), (answering, response) in zip(read[start::2], read[start + 1 :: 2], strict=False):
        if (role, answering) != ("user", "assistant") or not response.strip():
            break
        exchanges.append((request, response))
    unread = sum(role == "assistant" for role, _ in read) - len(exchanges)
    prompt, answer = exchanges[0] if exchanges else (read[start][1] if start < len(read) else "", None)
    return Turns(system, prompt, answer, tuple(exchanges[1:]), unread)


def _conversation(prompt: Sequence[object], answer: object, place: str, answered_at: str) -> tuple[Turns, int]:
    """A prompt that is a list of turns and the response to it, if any; and how many responses the prompt holds itself.

    Those are given, not learned: as TRL trains completions.
    """
    turns = read_turns(prompt, place)
    if not (response := "" if answer is None else _response(answer, answered_at)):
        return turns, 0
    given = 0 if turns.response is None else 1 + len(turns.later)
    if all(isinstance(turn, str) for turn in prompt):
        return turns._replace(response=response), 0
    further = answer if isinstance(answer, list | tuple) else ()
    if not further or _turn(further[0], f"{answered_at}, turn 1")[0] != "assistant":
        further = ({"role": "assistant", "content": response},)
    whole = read_turns([*prompt, *further], place)
    if whole.response is None or len(whole.later) < given:  # it does not follow the prompt's last turn
        return turns._replace(response=response), 0
    return whole, given


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
        if role_key is not None and content_key is None and any(key in turn for key in _CALLS):
            return None, ""
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
    if half := _HALF.search(value):
        raise PromptError(
            f"{place}: character {half.start() + 1} is half of a surrogate pair, which is no text: "
            "it was cut within a character. Cut it elsewhere, or leave the row out."
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


def _listing(names: Sequence[str]) -> str:
    """Names for a message, each at most 60 characters."""
    return some([repr(name if len(name) <= 60 else name[:57] + "...") for name in map(str, names)], 12) or "none"
