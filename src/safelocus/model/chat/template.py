"""The text side of chat: plain templates filled in, chat templates rendered the same on every day.

Plain templates are the user's: {prompt} once, {system} perhaps. Chat templates come with the tokenizer, in
Jinja, and are asked through stand-ins (`PROMPT`, `SYSTEM`, `ANSWER`) where they put what.
"""

import re
from collections.abc import Mapping
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

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


def apply(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    kwargs: Mapping[str, Any],
    *,
    generation: bool = True,
) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _STOPPED_CLOCK + template
    with bounded(template):
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation, **kwargs
        )
    assert isinstance(text, str)
    return text


def try_apply(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    kwargs: Mapping[str, Any],
    *,
    generation: bool = True,
) -> str | None:
    """None where the template refuses these messages."""
    try:
        return apply(tokenizer, messages, kwargs, generation=generation)
    except jinja2.TemplateError:
        return None


def render_alone(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> str:
    """A lone user's message, which every chat template has to take."""
    try:
        text = apply(tokenizer, messages_of(PROMPT, None), kwargs)
    except jinja2.TemplateError as error:
        raise ModelError(
            f"the tokenizer's chat template fails on a single user message: {error}. "
            "Give a plain template instead (template='User: {prompt}\\nAssistant: ')."
        ) from error
    if text.count(PROMPT) != 1:
        raise ModelError(
            f"the tokenizer's chat template shows the user's message {text.count(PROMPT)} times, "
            "expected once. Give a plain template instead (template='User: {prompt}\\nAssistant: ')."
        )
    return text


def default_system(alone: str, with_system: str) -> str:
    """The message that stands, without a system message, where one would; mostly none."""
    start, _, end = with_system.partition(PROMPT)[0].partition(SYSTEM)
    head = alone.partition(PROMPT)[0]
    framed = head.startswith(start) and head.endswith(end) and len(head) > len(start) + len(end)
    return head[len(start) : len(head) - len(end)].strip() if framed and end else ""


def switches(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> list[str]:
    """Variables by which a chat template is told whether to think: those that change a prompt."""

    def prompt(**switch: bool) -> str | None:
        return try_apply(tokenizer, messages_of(PROMPT, None), {**kwargs, **switch})

    named = [name for name in _SWITCHES if name in tokenizer.get_chat_template()]
    return [name for name in named if prompt(**{name: True}) != prompt(**{name: False})]


def render_answered(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any], **fields: str) -> str:
    """A finished conversation; "" where the template takes none. `fields`: of the answer's message."""
    answered: list[dict[str, str]] = [
        *messages_of(PROMPT, None), {"role": "assistant", "content": ANSWER, **fields},
    ]  # fmt: skip
    return try_apply(tokenizer, answered, kwargs, generation=False) or ""


def thought_markers(
    tokenizer: "PreTrainedTokenizerBase", alone: str, kwargs: Mapping[str, Any]
) -> tuple[str, str] | None:
    """What a chat template writes before and after a thought that it is given; with the white space after it.

    Args:
        alone: a prompt up to where the model writes.
    """
    source = tokenizer.get_chat_template()
    for field in _REASONING:
        if field not in source:
            continue
        head, found, rest = render_answered(tokenizer, kwargs, **{field: THOUGHT}).partition(THOUGHT)
        end, answered, _ = rest.partition(ANSWER)
        start = head[len(commonprefix([head, alone])) :]  # noqa: RUF071 (characters, not paths)
        tag = _LAST_TAG.search(head.rstrip())
        if tag and tag[0].endswith(start.strip()):  # the prompt has it too, or its beginning
            start = tag[0]
        if found and answered and start.strip() and end.strip():
            return start, end
    return None
