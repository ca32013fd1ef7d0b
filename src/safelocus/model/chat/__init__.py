"""From (system, prompt, response) to token ids, for targets with a chat template and for those without.

`ChatFormat.render` gives the text up to where the assistant starts to answer; `encode_prompt` its ids;
`encode_pair` the prompt's ids and the response's ids, apart.

**Why apart.** Tokenizers merge across the place where the answer starts (two line breaks into one token, for
example), so the ids of the whole text cannot always be cut there, and a cut after as many ids as the prompt
has is then off by one. A model that generates never sees such a merge: it is given the prompt's ids and
continues. So the response is tokenised by itself, *as a continuation*: together with the template's fixed
ending, whose ids are then taken off, since tokenizers with a dummy prefix would otherwise start every
response with a space. The ids of a response do not depend on the prompt.

**White space before the answer.** In "Assistant: " the last space belongs to the answer's first word for most
tokenizers ("\u2581Sure") and to the colon for some (":\u2581"). With the first kind, a prompt that ends in a
space is one the model never saw. `response_prefix` holds such a space: `render` leaves it out and
`encode_pair` puts it before the response. Generated text therefore starts with it: strip before reading.

**The same text every day.** Templates that print today's date get a fixed one (`DATE`), and thinking is
switched off where the template has a switch, unless asked for. `ChatFormat.notes` says what was done.

**Outside of thoughts.** A model that thinks is asked as its template asks it, perhaps with a thought already opened.
A response that is given (a training row, an opening) stands behind a thought that is closed, as the template writes
an empty one: `closing` leads there, and is the prompt's, so that nothing learns it. What the model writes itself is
told apart by `split`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from safelocus.errors import ModelError, PromptError
from safelocus.model.chat.template import (
    ANSWER,
    DATE,
    PLACEHOLDER,
    PLAIN_TEMPLATE,
    PROMPT,
    SYSTEM,
    ChatTemplate,
    check_chosen,
    decode_template,
    default_system,
    fill,
    messages_of,
)
from safelocus.model.chat.turn import Turn, way_out
from safelocus.model.thought import MARKERS, Markers, Split, left_open, split
from safelocus.run.identity import digest

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["PLAIN_TEMPLATE", "ChatFormat", "chat_format", "continuation"]

# Openings of answers, to see what tokenizers do with a space before them
_FIRST_WORDS = ("Sure", "I", "The", "Here", "Once", "No", "It", "A")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How one target is talked to; build it with `chat_format`."""

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False, compare=False)
    kind: Literal["chat", "plain"]
    template: str | None  # the plain template; None for the tokenizer's own chat template
    system: str | None
    system_role: bool  # False: a system message is folded in front of the user's message
    thinking: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    parts: tuple[str, ...] = ()  # roles whose messages the chat template takes as lists of parts alone
    opening: str = ""  # what the assistant's turn always starts with, beyond the generation prompt
    closing: str = ""  # what leads from there out of the thought, to a response that is given
    markers: tuple[Markers, ...] = MARKERS  # of thoughts
    opened: Markers | None = None  # of the thought that the prompt leaves open
    response_prefix: str = ""  # white space that belongs to the response's first token
    ending: str = ""  # the fixed text between prompt and response
    leading_ids: tuple[int, ...] = ()  # what the tokenizer itself puts first (BOS)
    trailing_ids: tuple[int, ...] = ()  # what it puts last (EOS), where an encoder reads the prompt alone
    end_of_turn_ids: tuple[int, ...] = ()  # ids that end the assistant's turn, the template's own first
    reads_apart: bool = False  # whether an encoder reads the prompt, and a decoder the response alone
    notes: tuple[str, ...] = ()

    def render(self, prompt: str, *, system: str | None = None, closed: bool = False) -> str:
        """The text up to where the assistant starts. `system` replaces the format's own ("" for none).

        A prompt that brings a system message (`prompts.Prompt`) is rendered with that. `closed`: up to where an answer
        that is given starts, which is outside of a thought. A prompt with a history needs a chat template.
        """
        for own in (getattr(prompt, "system", None), self.system):
            system = own if system is None else system
        messages = messages_of(prompt, system)
        if system and not self.system_role:
            _, first, *rest = messages
            messages, system = [{**first, "content": f"{system}\n\n{first['content']}"}, *rest], None
        if self.template is None:
            text = self.chat_template.apply(messages) + self.opening
        elif getattr(prompt, "history", ()):
            raise PromptError("a plain template shows no earlier turns; use a tokenizer with a chat template")
        else:
            text = fill(self.template, messages[-1]["content"], system)
        if closed or not self.closing:
            text = (text + self.closing).removesuffix(self.response_prefix)
        return text

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's own, with the options of this format."""
        return ChatTemplate(tokenizer=self.tokenizer, kwargs=self.template_kwargs, parts=self.parts)

    def encode_prompt(self, prompt: str, *, system: str | None = None, closed: bool = False) -> list[int]:
        """Ids of `render`, with the BOS token at most once."""
        ids = _ids(self.tokenizer, self.render(prompt, system=system, closed=closed))
        if self.kind == "plain":
            ids = [*self.leading_ids, *ids, *self.trailing_ids]
        # a plain template that spells BOS out, or a prompt that starts with it
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            del ids[0]
        return ids

    def encode_pair(
        self, prompt: str, response: str, *, system: str | None = None, end: bool = False
    ) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids), outside of a thought; their sum is what the model reads.

        A response that brings its thought along stands where the model would begin to think, if it is to. `end` adds
        the token that ends the turn, which training needs and scoring a truncated response does not.
        """
        ending, prefix = self.ending, self.response_prefix
        thinks = bool(self.closing) and split(response, markers=self.markers).thought is not None
        if thinks:
            ending, prefix = (ending + prefix).removesuffix(self.closing), ""
            if self.opened:
                response = response.strip().removeprefix(self.opened[0]).lstrip()
        if not response.startswith(tuple(" \n\t")):
            response = prefix + response if response else response
        ids = continuation(self.tokenizer, ending, response)
        if end:
            if not self.end_of_turn_ids:
                raise ModelError(
                    "the tokenizer has no token that ends a turn: expected an eos_token or one in the chat "
                    "template, found none. Set tokenizer.eos_token."
                )
            ids = [*ids, self.end_of_turn_ids[0]]
        return self.encode_prompt(prompt, system=system, closed=not thinks), ids

    def split(self, text: str) -> Split:
        """Tell thought and answer apart in what the model wrote, special tokens included."""
        return split(text, markers=self.markers, opened=self.opened)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Text by which a base model starts another user's turn; chat models have tokens for that."""
        if self.template is None:
            return ()
        before = PLACEHOLDER.sub("", self.template[: self.template.index("{prompt}")])
        marker = before.strip().rpartition("\n")[2]
        special = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        if marker.startswith(tuple(special)):
            return (marker,)
        return (f"\n{marker}",) if marker else ()

    def identity(self) -> dict[str, object]:
        """All that the token ids of a conversation depend on."""
        # the parts follow from the template
        form = {key: value for key, value in vars(self).items() if key not in ("tokenizer", "system", "parts", "notes")}
        template = None if self.template is not None else self.tokenizer.get_chat_template()
        return {
            "system prompt": self.system,
            "chat template": digest([form, template]),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    def to_json(self) -> dict[str, object]:
        """What provenance needs to render the same text again, as `chat_format` is given it."""
        return {
            "kind": self.kind,
            "template": None if self.template is None else self.template.replace("\\", r"\\"),
            "system": self.system,
            "thinking": self.thinking,
            # one of them may have the name of an option of `chat_format`, which says the same
            "template_kwargs": {name: value for name, value in self.template_kwargs.items() if name != "thinking"},
            "notes": list(self.notes),
        }


def chat_format(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    system: str | None = None,
    template: str | None = None,
    thinking: bool | None = None,
    generation_config: "GenerationConfig | None" = None,
    reads_apart: bool = False,
    **template_kwargs: Any,
) -> ChatFormat:
    """Find out how to talk to a target.

    A `template` given here is plain text with {prompt} and perhaps {system}, and takes precedence; `\\n` and
    `\\t` in it may be written as escapes. Otherwise the tokenizer's chat template is used, and
    `PLAIN_TEMPLATE` where it has none. `template_kwargs` go to the chat template. `thinking`: whether the model is to
    think; by default it does where the template has no switch and opens a thought. `generation_config` (the model's)
    contributes to `end_of_turn_ids`. `reads_apart`: whether the model has an encoder and a decoder.

    Raises:
        ModelError: the tokenizer has chat templates by name and no default.
        PromptError: options for a chat template without one; thinking is asked of a template that knows of none.
    """
    if template is None and getattr(tokenizer, "chat_template", None):
        check_chosen(tokenizer)
        form = _chat(tokenizer, system, thinking, generation_config, template_kwargs)
        return replace(form, reads_apart=reads_apart)
    if template_kwargs or thinking:
        raise PromptError(
            f"{', '.join([*template_kwargs, *['thinking'] * bool(thinking)])}: options for a chat template, but a "
            "plain template is in use. Leave them out, or use a tokenizer with a chat template."
        )
    template = decode_template(PLAIN_TEMPLATE if template is None else template)
    form = _plain(tokenizer, system, template, generation_config)
    return replace(form, reads_apart=True, trailing_ids=_added_ids(tokenizer)[1]) if reads_apart else form


def _plain(
    tokenizer: "PreTrainedTokenizerBase",
    system: str | None,
    template: str,
    generation_config: "GenerationConfig | None",
) -> ChatFormat:
    # After a colon or the prompt itself an answer starts with a space, written in the template or not
    if template.endswith((":", "{prompt}")):
        template += " "
    ending = template.rpartition("{prompt}")[2]
    opened, closing = left_open(ending), way_out(ending)
    shown = ending if opened is None else ending.partition(opened[0])[0]
    prefix = _response_prefix(tokenizer, ending + closing)
    notes = ["plain template: the tokenizer has no chat template, or another was asked for"]
    if prefix:
        notes.append("the space before the answer belongs to the response's first token")
    return ChatFormat(
        tokenizer=tokenizer,
        kind="plain",
        template=template,
        system=system,
        system_role="{system}" in template,
        opened=opened,
        closing=closing,
        response_prefix=prefix,
        ending=(ending + closing).removesuffix(prefix),
        leading_ids=_added_ids(tokenizer)[0],
        end_of_turn_ids=_end_ids(tokenizer, _turn_end(tokenizer, shown), generation_config),
        notes=tuple(notes),
    )


def _chat(
    tokenizer: "PreTrainedTokenizerBase",
    system: str | None,
    thinking: bool | None,
    generation_config: "GenerationConfig | None",
    template_kwargs: dict[str, Any],
) -> ChatFormat:
    source = tokenizer.get_chat_template()
    notes = []
    kwargs = dict(template_kwargs)
    chat_template = ChatTemplate.of(tokenizer, template_kwargs)
    switches = chat_template.switches()
    if thinking is None and any(switch in kwargs for switch in switches):
        thinking = any(kwargs.get(switch) for switch in switches)
    for switch in switches:
        notes.append(f"{switch}={kwargs.setdefault(switch, bool(thinking))} in the chat template")
    if "date_string" in source:
        kwargs.setdefault("date_string", DATE)
    if "date_string" in source or "strftime_now" in source:
        notes.append(f"the chat template's date is fixed: {kwargs.get('date_string', DATE)}")

    chat_template = replace(chat_template, kwargs=kwargs)
    if chat_template.parts:
        notes.append(f"the chat template takes messages as lists of parts: {', '.join(chat_template.parts)}")

    alone = chat_template.alone()
    with_system = chat_template.try_apply(messages_of(PROMPT, SYSTEM))
    # a template may also drop the system message without a word
    system_role = with_system is not None and SYSTEM in with_system
    if not system_role:
        notes.append("the chat template takes no system message: it is put before the user's")
    elif with_system is not None and (default := default_system(alone, with_system)):
        notes.append(f"without a system message the chat template adds its own: {default[:120]!r}")

    before, _, after = chat_template.answered().partition(ANSWER)
    turn = Turn.of(chat_template, alone=alone, before=before, switches=switches, thinking=thinking)
    notes += turn.notes
    ending = alone.rpartition(PROMPT)[2] + turn.opening + turn.closing
    prefix = _response_prefix(tokenizer, ending)
    return ChatFormat(
        tokenizer=tokenizer,
        kind="chat",
        template=None,
        system=system,
        system_role=system_role,
        thinking=turn.thinking,
        template_kwargs=kwargs,
        parts=chat_template.parts,
        opening=turn.opening,
        closing=turn.closing,
        markers=turn.markers,
        opened=turn.opened,
        response_prefix=prefix,
        ending=ending.removesuffix(prefix),
        leading_ids=_added_ids(tokenizer)[0],
        end_of_turn_ids=_end_ids(tokenizer, after, generation_config),
        notes=tuple(notes),
    )


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # verbose=False: whether a sequence is too long is for those who batch it to say
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except TypeError as error:
        raise PromptError(f"{text[:60]!r} is no text for a tokenizer: it holds halves of surrogate pairs") from error
    return ids


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of all that a text's token ids depend on."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest({key: part for key, part in vocabulary.items() if key not in ("truncation", "padding")})


def continuation(tokenizer: "PreTrainedTokenizerBase", ending: str, text: str) -> list[int]:
    """Ids of `text` as it follows `ending`, whose own ids stay as they are.

    Where the two merge (a response that starts with a line break), shorter contexts are tried, and `text`
    by itself at last.
    """
    if not text:
        return []
    for context in (f"a{ending}", "\n", "a", "."):
        head = _ids(tokenizer, context)
        joint = _ids(tokenizer, context + text)
        if joint[: len(head)] == head:
            return joint[len(head) :]
    return _ids(tokenizer, text)


def _response_prefix(tokenizer: "PreTrainedTokenizerBase", ending: str) -> str:
    """The spaces at the end of `ending` that the tokenizer joins to the word after them."""
    bare = ending.rstrip(" ")
    spaces = ending[len(bare) :]
    if not spaces:
        return ""
    joins = False
    with_spaces, without = _ids(tokenizer, f"a{ending}"), _ids(tokenizer, f"a{bare}")
    for word in _FIRST_WORDS:
        joint = _ids(tokenizer, f"a{ending}{word}")
        if joint[: len(without)] != without:
            return ""  # the space belongs to what stands before it
        joins = joins or joint[: len(with_spaces)] != with_spaces
    return spaces if joins else ""


def _added_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before a text by itself, and after it (which would end a prompt that is to go on)."""
    ids, bare = tokenizer("a", verbose=False)["input_ids"], _ids(tokenizer, "a")
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : (end := start + len(bare))] == bare:
            return tuple(ids[:start]), tuple(ids[end:])
    return (), ()


def _turn_end(tokenizer: "PreTrainedTokenizerBase", ending: str) -> str:
    """What ends the user's turn in a plain template, and so the assistant's: a special token right behind the prompt,
    if another follows. One alone begins the answer ("[/INST]")."""
    ids, marks = _ids(tokenizer, ending), tokenizer.added_tokens_decoder
    special = [token for token in ids if token in marks and marks[token].special]
    return marks[ids[0]].content if len(special) > 1 and ids[0] == special[0] else ""


def _end_ids(
    tokenizer: "PreTrainedTokenizerBase", after: str, generation_config: "GenerationConfig | None"
) -> tuple[int, ...]:
    """The first token of `after` (the text behind an answer) that is not ordinary text, then the declared
    ends. Some tokenizers declare an end of text only, and their models would talk past the end of turn."""
    marks = tokenizer.added_tokens_decoder
    added = [token for token in _ids(tokenizer, after) if token in marks and marks[token].content.strip()]
    # special ones first: line breaks and markup may be added tokens too
    ids = sorted(added, key=lambda token: not marks[token].special)[:1]
    declared: Sequence[int | None] = [tokenizer.eos_token_id]
    ends = getattr(generation_config, "eos_token_id", None)
    declared = [*declared, *(ends if isinstance(ends, list | tuple) else [ends])]
    if not all(token is None or isinstance(token, int) for token in declared):
        raise ModelError(f"the generation configuration has {ends!r} for eos_token_id; expected ids of tokens")
    return tuple(dict.fromkeys([*ids, *(token for token in declared if token is not None)]))
