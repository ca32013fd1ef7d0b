"""Guards as data: how to ask a guard about a response, and which tokens are its verdict.

A guard is a causal LM that judges a response safe or unsafe. Every family has its own input format,
its own place where the verdict is predicted and its own words for it; `guards.toml` describes them and
`read_preset` reads a description of your own (docs/guards.md). Three functions use a description:

    render             (prompt, response) -> the guard's input, split around the response
    verdict_token_ids  the first token of each verdict, as spelled in that very context
    find_preset        which description fits a model

Nothing here knows a token id: ids are found by tokenizing, since the same word is another token behind
a newline, a space or a special token.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from safelocus.errors import ModelError, PromptError
from safelocus.model.chat.template import ChatTemplate, check_chosen

Format = Literal["chat", "text"]
_SLOTS = ("{prompt}", "{response}")
_DESCRIBE = """\
Describe it in a TOML file and pass that (`--guard-description my.toml`, `Guard.load(..., description=...)`):
    name = "my-guard"
    format = "chat"             # the tokenizer's chat template, or
    add_generation_prompt = true
    # format = "text"           # an input of your own, with
    # text = "... {prompt} ... {response} ..."
    safe = ["safe"]             # what the guard writes at the verdict, leading space included
    unsafe = ["unsafe"]
docs/guards.md explains every key."""


@dataclass(frozen=True, kw_only=True)
class GuardPreset:
    """How one guard family is asked for its verdict on a response.

    Attributes:
        name: of the preset, for provenance.
        matches: patterns (fnmatch, lower case) for the last part of a hub id or folder name.
        template_contains: texts that, all found in a tokenizer's chat template, tell the family as well.
        format: "chat" renders [user, assistant] with the tokenizer's chat template; "text" fills `text`.
        text: the whole input with `{prompt}` and `{response}`, each exactly once; format "text" only.
        add_generation_prompt, template_options: passed to the chat template; format "chat" only.
        add_special_tokens: whether the tokenizer adds its own special tokens (BOS) to the rendered text.
        verdict_prefix: what the guard writes before the verdict; added unless the input ends with it.
        generate_until: let the guard write, greedily, up to and including this; the verdict is next.
        safe, unsafe: the verdicts as spelled there. Their first tokens must differ.
        source: what the description was taken from.
        note: what a user should know, unconfirmed details among it.
    """

    name: str
    format: Format
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    add_special_tokens: bool
    matches: tuple[str, ...] = ()
    template_contains: tuple[str, ...] = ()
    text: str | None = None
    add_generation_prompt: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    verdict_prefix: str = ""
    generate_until: str | None = None
    source: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A guard's input, `prefix + response + suffix`, up to its verdict or to where it starts writing.

    `response` is verbatim, so its characters are known: they start at `len(prefix)`.
    """

    prefix: str
    response: str
    suffix: str


# ---------------------------------------------------------------- finding and reading descriptions


@cache
def load_presets() -> Mapping[str, GuardPreset]:
    """The shipped presets by name.

    >>> load_presets()["wildguard"].generate_until
    'Harmful response:'
    """
    tables = tomllib.loads(resources.files("safelocus.objective").joinpath("guards.toml").read_text("utf-8"))
    presets = [_preset(table, f"guards.toml, guard {n}") for n, table in enumerate(tables["guard"], 1)]
    assert len({preset.name for preset in presets}) == len(presets)
    return {preset.name: preset for preset in presets}


def read_preset(path: Path) -> GuardPreset:
    """Read a guard's description from a TOML file with the keys of `GuardPreset`.

    Raises:
        ModelError: no such file, not TOML, or a key that is missing, unknown or of the wrong kind.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot read the guard's description: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: the guard's description is not TOML: {error}.\n{_DESCRIBE}") from error
    return _preset(table, str(path))


def find_preset(model_name_or_path: str, tokenizer: Any) -> GuardPreset:
    """The shipped preset for a model, by its name, else by its tokenizer's chat template.

    Only the last part of a path or hub id counts, or the hub id in a path of the hub's cache
    (`models--org--name/snapshots/...`): the folder a guard lies in says nothing about it.

    Raises:
        ModelError: no preset fits, or several do; the message lists them and shows how to describe one.
    """
    presets = load_presets().values()
    for name in _names(model_name_or_path):
        for preset in presets:
            if any(fnmatchcase(name, pattern) for pattern in preset.matches):
                return preset
    template = str(getattr(tokenizer, "chat_template", None) or "")
    found = [p for p in presets if p.template_contains and all(mark in template for mark in p.template_contains)]
    if len(found) == 1:
        return found[0]
    reason = (
        f"its chat template fits several presets ({', '.join(p.name for p in found)})"
        if found
        else "neither its name nor its chat template fits a known guard"
    )
    known = "\n".join(f"    {p.name:<22}{', '.join(p.matches)}" for p in presets)
    raise ModelError(f"{model_name_or_path}: {reason}. Known guards:\n{known}\n{_DESCRIBE}")


def _names(model_name_or_path: str) -> Iterable[str]:
    parts = [part for part in model_name_or_path.lower().replace("\\", "/").split("/") if part]
    yield from parts[-1:]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        yield parts[-3].rsplit("--", 1)[-1]


def _preset(table: Mapping[str, Any], where: str) -> GuardPreset:
    known = {f.name: f for f in fields(GuardPreset)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"{where}: unknown key {key!r}; expected one of {', '.join(known)}.{hint}")
    values = {key: _value(where, key, value) for key, value in table.items()}
    # A chat template writes the special tokens itself; a literal text leaves them to the tokenizer.
    values.setdefault("add_special_tokens", values.get("format") == "text")
    for key, about in known.items():
        if key not in values and about.default is MISSING and about.default_factory is MISSING:
            raise ModelError(f"{where}: key {key!r} is missing; found {', '.join(table) or 'no keys'}.\n{_DESCRIBE}")
    preset = GuardPreset(**values)

    if both := set(preset.safe) & set(preset.unsafe):
        raise ModelError(
            f"{where}: {sorted(both)[0]!r} is both in 'safe' and in 'unsafe'; expected different verdicts."
        )
    if preset.format == "text":
        for slot in _SLOTS:
            if (found := (preset.text or "").count(slot)) != 1:
                raise ModelError(f"{where}: key 'text': expected {slot} exactly once, found it {found} times.")
    for key in ("text",) if preset.format == "chat" else ("add_generation_prompt", "template_options"):
        if key in values:
            raise ModelError(
                f"{where}: key {key!r} has no meaning with format = {preset.format!r}; "
                f"expected format = {'text' if key == 'text' else 'chat'!r}, or leave the key out."
            )
    return preset


def _value(where: str, key: str, value: Any) -> Any:
    """Check one key's kind; lists become tuples."""

    def wrong(expected: str) -> ModelError:
        return ModelError(f"{where}: key {key!r}: expected {expected}, found {value!r} ({type(value).__name__}).")

    if key in ("matches", "template_contains", "safe", "unsafe"):
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise wrong("a list of non-empty strings")
        return tuple(v.lower() for v in value) if key == "matches" else tuple(value)
    if key in ("add_generation_prompt", "add_special_tokens"):
        if not isinstance(value, bool):
            raise wrong("true or false")
    elif key == "template_options":
        if not isinstance(value, dict):
            raise wrong("a table")
    elif not isinstance(value, str):
        raise wrong("a string")
    elif key == "format" and value not in get_args(Format):
        raise wrong(" or ".join(repr(v) for v in get_args(Format)))
    elif key in ("name", "text", "generate_until") and not value:
        raise wrong("a non-empty string")
    return value


# ---------------------------------------------------------------- a conversation as the guard sees it


def render(tokenizer: Any, preset: GuardPreset, prompt: str, response: str) -> Rendered:
    """Write a request and the response to it as the guard's input.

    A chat template may trim and rearrange what it is given, so the response's place is found by
    rendering a marker instead of it; the response is then put there verbatim. The prompt goes through
    the template as it is.

    Args:
        prompt: the user's request; must not be empty.
        response: what the assistant answered; may be empty.

    Raises:
        ModelError: no chat template, or one that leaves out, repeats or alters prompt or response.
        PromptError: the prompt is empty.
    """
    if not prompt.strip():
        raise PromptError("A guard judges a response to a request, and the prompt is empty. Expected text.")
    if preset.format == "text":
        prefix, suffix = _fill(preset, prompt)
    else:
        prefix, suffix = _render_chat(tokenizer, preset, prompt)
    bos = getattr(tokenizer, "bos_token", None)
    if preset.add_special_tokens and bos:
        prefix = prefix.removeprefix(bos)  # copies of a template differ in this; there must be exactly one
    if not suffix.endswith(preset.verdict_prefix):
        suffix += preset.verdict_prefix
    return Rendered(prefix=prefix, response=response, suffix=suffix)


def _fill(preset: GuardPreset, prompt: str) -> tuple[str, str]:
    assert preset.text is not None
    # Split before filling in: a prompt that speaks of "{response}" stays as it is.
    before, after = preset.text.split("{response}")
    if "{prompt}" in before:
        return prompt.join(before.split("{prompt}")), after
    return before, prompt.join(after.split("{prompt}"))


def _render_chat(tokenizer: Any, preset: GuardPreset, prompt: str) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"preset {preset.name!r} uses the tokenizer's chat template and this tokenizer has none; "
            'expected a guard\'s tokenizer, or a description with format = "text" (docs/guards.md).'
        )
    check_chosen(tokenizer)
    asked, answered = _marker("Request", prompt), _marker("Answer", prompt)
    problems = []
    # Some templates take a message as a string and some as a list of parts; those for parts silently
    # render a string as nothing at all (Llama Guard 3 1B).
    for kind, parts in (("strings", ()), ("lists of parts", ("user", "assistant"))):
        template = ChatTemplate(tokenizer=tokenizer, kwargs=preset.template_options, parts=parts)
        conversations = (
            [{"role": "user", "content": request}, {"role": "assistant", "content": answered}]
            for request in (asked, prompt)
        )
        try:
            marked, rendered = (template.apply(c, generation=preset.add_generation_prompt) for c in conversations)
        except TemplateError as error:
            problems.append(f"with messages as {kind} it fails: {error}")
            continue
        if asked in marked and marked.count(answered) == 1:
            prefix, suffix = rendered.split(answered)
            return prefix, suffix
        problems.append(
            f"with messages as {kind} it shows the request {marked.count(asked)} times and the response "
            f"{marked.count(answered)} times"
        )
    raise ModelError(
        f"preset {preset.name!r}: the tokenizer's chat template must show the request and, exactly once, the "
        f"response; {'; '.join(problems)}. Is this a guard's tokenizer? If so, describe the guard with "
        'format = "text" (docs/guards.md).'
    )


def _marker(word: str, prompt: str) -> str:
    """A word that trimming and escaping leave alone and changes of case do not; never part of the prompt."""
    number = 0
    while (marker := f"Safelocus{word}{number}Marker") in prompt:
        number += 1
    return marker


# ---------------------------------------------------------------- the verdict's tokens


def verdict_token_ids(tokenizer: Any, preset: GuardPreset, context: str) -> tuple[list[int], list[int]]:
    """The token each verdict begins with behind `context`: (safe ids, unsafe ids), without repeats.

    A verdict of several tokens counts by its first: "unsafe" as `un` + `safe` is as good as one token.

    Args:
        context: the rendered input up to the verdict, generated lines included.

    Raises:
        ModelError: a verdict has no token of its own, is unknown to the vocabulary, or a safe and an
            unsafe one begin alike.
    """
    ids = {v: _first_token(tokenizer, preset, context, v) for v in (*preset.safe, *preset.unsafe)}
    for safe in preset.safe:
        for unsafe in preset.unsafe:
            if ids[safe] == ids[unsafe]:
                token = tokenizer.convert_ids_to_tokens(ids[safe])
                raise ModelError(
                    f"preset {preset.name!r}: safe verdict {safe!r} and unsafe verdict {unsafe!r} both begin "
                    f"with token {token!r} ({ids[safe]}) there, which does not tell them apart. Move what "
                    "they share (often a space) to the end of 'verdict_prefix' or 'generate_until'."
                )
    safe_ids, unsafe_ids = (list(dict.fromkeys(ids[v] for v in side)) for side in (preset.safe, preset.unsafe))
    return safe_ids, unsafe_ids


def _first_token(tokenizer: Any, preset: GuardPreset, context: str, verdict: str) -> int:
    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rest: list[int] = []
    # Written together, the verdict may be merged with the end of the context ("]" + "safe" -> "]s", "afe").
    # The guard cannot do that, it continues the context's own tokens; behind a line break nothing merges.
    for before in (context, "\n"):
        head, both = tokenize(before), tokenize(before + verdict)
        if both[: len(head)] == head:
            rest = both[len(head) :]
            break
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not rest or rest[0] == unknown:
        what = "is unknown to the guard's vocabulary" if rest else "has no token of its own"
        raise ModelError(
            f"preset {preset.name!r}: verdict {verdict!r} {what} behind {context[-20:]!r}. Is this the right "
            "preset for this guard? If not, describe the guard (docs/guards.md)."
        )
    return rest[0]
