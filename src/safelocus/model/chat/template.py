"""The text side of chat: plain templates filled in, chat templates rendered the same on every day.

Plain templates are the user's: {prompt} once, {system} perhaps. Chat templates come with the tokenizer, in
Jinja, and are asked through stand-ins (`PROMPT`, `SYSTEM`, `ANSWER`) where they put what.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Self

import jinja2

from safelocus.errors import ModelError, PromptError
from safelocus.model.chat.bounds import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "{system}\n\nUser: {prompt}\nAssistant: "
DATE = "26 Jul 2024"  # the one Llama 3.1's template falls back on

# The templates' clock, stopped. A macro, since values given to a template may only be plain data. The line
# break after it is eaten by the template engine, so the template itself is rendered as it stands.
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ format|replace('%d', '26')|replace('%m', '07')|replace('%b', 'Jul')|replace('%B', 'July')"
    "|replace('%Y', '2024')|replace('%y', '24')|replace('%A', 'Friday')|replace('%a', 'Fri')"
    "|replace('%H', '12')|replace('%M', '00')|replace('%S', '00') }}"
    "{%- endmacro %}\n"
)
_SWITCHES = ("enable_thinking", "thinking")  # Qwen; DeepSeek and Granite
_REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message, by which templates take a thought
_LAST_TAG = re.compile(r"(?:<[^<>]+>|\[[A-Z]+\]|◁[^◁▷]+▷)$")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

# Stand-ins for prompt, system message, thought and answer, to find where a template puts them
PROMPT, SYSTEM, THOUGHT, ANSWER = "probeprompt", "probesystem", "probethought", "probeanswer"


def decode_template(template: str) -> str:
    """Check a plain template and decode its escapes (`\\n`, `\\t`, `\\r`, `\\\\`).

    >>> decode_template(r"Q: {prompt}\\nA: ")
    'Q: {prompt}\\nA: '
    """
    template = re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], template)
    found = PLACEHOLDER.findall(template)
    if "{%" in template or "{{" in template:
        raise PromptError(
            f"the template {template[:60]!r} looks like Jinja; expected plain text with {{prompt}}. "
            "Set tokenizer.chat_template to use it."
        )
    if found.count("prompt") != 1 or found.count("system") > 1 or set(found) - {"prompt", "system"}:
        placeholders = ", ".join(f"{{{name}}}" for name in found) or "none"
        raise PromptError(
            f"the template {template[:60]!r}: expected {{prompt}} once and {{system}} at most once, "
            f"found placeholders: {placeholders}."
        )
    if "system" in found and found.index("system") > found.index("prompt"):
        raise PromptError(f"the template {template[:60]!r}: expected {{system}} before {{prompt}}.")
    return template


def check_chosen(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ModelError where a tokenizer has chat templates by name, and none that is meant where none is named."""
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict) and templates and "default" not in templates:
        raise ModelError(
            f"the tokenizer has no default among its chat templates, which are called {', '.join(sorted(templates))}. "
            "Save the one to use as chat_template.jinja beside tokenizer.json, or give a plain one (--template)."
        )


def messages_of(prompt: str, system: str | None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    for request, response in getattr(prompt, "history", ()):
        turns += [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
    return [*turns, {"role": "user", "content": prompt}]


def fill(template: str, prompt: str, system: str | None) -> str:
    if not system:  # with the white space that sets it apart
        template = re.sub(r"\{system\}\s*", "", template)
    values = {"prompt": prompt, "system": system or ""}
    # one pass, so that braces in prompts stay what they are
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's own chat template, with what it is always given.

    Attributes:
        kwargs: its options.
        parts: roles whose messages it takes as lists of parts alone, `[{"type": "text", "text": ...}]`, as those of
            models that see images may (Idefics3, SmolVLM, LLaVA-NeXT); a string shows nothing there.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: Mapping[str, Any]
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> Self:
        """With the form that each role's messages have to have, by a trial."""
        template = cls(tokenizer=tokenizer, kwargs=kwargs)
        for role, text in (("user", PROMPT), ("system", SYSTEM), ("assistant", ANSWER)):
            parted = replace(template, parts=(*template.parts, role))
            if not template._shows(role, text) and parted._shows(role, text):
                template = parted
        return template

    def _shows(self, role: str, text: str) -> bool:
        messages = messages_of(PROMPT, SYSTEM if role == "system" else None)
        if role == "assistant":
            messages.append({"role": role, "content": text})
        shown = self.try_apply(messages, generation=False) or ""
        return shown.count(text) == 1 and str(_as_parts(text)) not in shown  # or the list as it is written in Python

    def shaped(self, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
        """Messages in the form that the template takes."""
        return [
            {**message, "content": _as_parts(message["content"])} if message["role"] in self.parts else message
            for message in messages
        ]

    def apply(self, messages: list[dict[str, str]], *, generation: bool = True, **more: Any) -> str:
        """The text of a conversation; `more` options go over `kwargs`."""
        source = self.tokenizer.get_chat_template()
        if "strftime_now" in source:
            source = _STOPPED_CLOCK + source
        with bounded(source):
            text = self.tokenizer.apply_chat_template(
                self.shaped(messages), chat_template=source, tokenize=False, add_generation_prompt=generation,
                **{**self.kwargs, **more},
            )  # fmt: skip
        assert isinstance(text, str)
        return text

    def try_apply(self, messages: list[dict[str, str]], *, generation: bool = True, **more: Any) -> str | None:
        """None where the template refuses these messages."""
        try:
            return self.apply(messages, generation=generation, **more)
        except jinja2.TemplateError:
            return None

    def alone(self, **more: Any) -> str:
        """A lone user's message, which every chat template has to take."""
        instead = "Give a plain template instead (template='User: {prompt}\\nAssistant: ')."
        try:
            text = self.apply(messages_of(PROMPT, None), **more)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the tokenizer's chat template fails on a single user message: {error}. {instead}"
            ) from error
        if text.count(PROMPT) != 1:
            raise ModelError(
                f"the tokenizer's chat template shows the user's message {text.count(PROMPT)} times, expected once, "
                f"as a string or as a list of parts. {instead}"
            )
        return text

    def answered(self, **fields: str) -> str:
        """A finished conversation; "" where the template takes none. `fields`: of the answer's message."""
        answer = {"role": "assistant", "content": ANSWER, **fields}
        return self.try_apply([*messages_of(PROMPT, None), answer], generation=False) or ""

    def switches(self) -> list[str]:
        """Variables by which a template is told whether to think: those that change a prompt."""

        def prompt(**switch: bool) -> str | None:
            return self.try_apply(messages_of(PROMPT, None), **switch)

        named = [name for name in _SWITCHES if name in self.tokenizer.get_chat_template()]
        return [name for name in named if prompt(**{name: True}) != prompt(**{name: False})]

    def thought_markers(self, alone: str) -> tuple[str, str] | None:
        """What it writes before and after a thought that it is given; with the white space after it.

        Args:
            alone: a prompt up to where the model writes.
        """
        source = self.tokenizer.get_chat_template()
        for field in _REASONING:
            if field not in source:
                continue
            head, found, rest = self.answered(**{field: THOUGHT}).partition(THOUGHT)
            end, answered, _ = rest.partition(ANSWER)
            start = head[len(commonprefix([head, alone])) :]  # noqa: RUF071 (characters, not paths)
            tag = _LAST_TAG.search(head.rstrip())
            if tag and tag[0].endswith(start.strip()):  # the prompt has it too, or its beginning
                start = tag[0]
            if found and answered and start.strip() and end.strip():
                return start, end
        return None


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def default_system(alone: str, with_system: str) -> str:
    """The message that stands, without a system message, where one would; mostly none."""
    start, _, end = with_system.partition(PROMPT)[0].partition(SYSTEM)
    head = alone.partition(PROMPT)[0]
    framed = head.startswith(start) and head.endswith(end) and len(head) > len(start) + len(end)
    return head[len(start) : len(head) - len(end)].strip() if framed and end else ""
