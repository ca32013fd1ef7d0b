"""How the assistant's turn begins, for chat templates that know of thoughts: inside of one, or outside.

    opening    what a prompt always ends in, beyond the template's own generation prompt
    closing    what leads on from there to an answer that is given; "" where that stands there already

A template tells by what it renders: with its switch on and off, for a finished conversation, and for one whose answer
brings its thought along. The way out of a thought is the empty one that it writes itself, or else the end marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from safelocus.errors import PromptError
from safelocus.model.chat.template import PROMPT, ChatTemplate
from safelocus.model.thought import MARKERS, Markers, left_open


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Of the fields of `ChatFormat` those that speak of thoughts."""

    thinking: bool
    opening: str
    closing: str
    markers: tuple[Markers, ...]
    opened: Markers | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, template: ChatTemplate, *, alone: str, before: str, switches: Sequence[str], thinking: bool | None
    ) -> Self:
        """From what a chat template renders.

        Args:
            alone: a prompt up to where the model writes.
            before: a finished conversation up to its answer.
            switches: variables by which the template is told whether to think.
            thinking: None where the template is to decide.
        """
        written = template.thought_markers(alone)
        own = [(written[0].strip(), written[1].strip())] if written else []
        markers = tuple(dict.fromkeys([*own, *MARKERS]))
        tail = alone.rpartition(PROMPT)[2]
        opened = left_open(tail, markers)
        # a space, gpt-oss's "final" channel, an empty thought
        way = before.removeprefix(alone) if before.startswith(alone) else ""
        if opened and not way.strip():
            way = way_out(tail, markers, written)
        if thinking and switches and not way.strip():
            off = template.alone(**dict.fromkeys(switches, False))
            way = off.removeprefix(alone) if off.startswith(alone) else way
        if thinking and not (switches or way.strip()):
            raise PromptError(
                "thinking is asked for, but the chat template has no switch for it (enable_thinking) and opens no "
                "thought. Leave it out: a thought that the model writes of itself is told from its answer all the same."
            )
        if thinking is None:
            thinking = opened is not None and not switches
        inside = thinking and bool(way.strip())
        notes = []
        if inside:
            notes.append(f"the model thinks; answers that are given stand behind a thought that is closed: {way!r}")
        if opened:
            begun = tail[tail.rfind(opened[0]) :]
            notes.append(f"the prompt ends in a thought, {begun!r}{'' if inside else ', which is closed'}")
        elif before and before != alone and alone.startswith(before):
            notes.append(f"the prompt ends in {alone[len(before) :]!r}, which finished answers do not have")
        return cls(
            thinking=thinking, opening="" if inside else way, closing=way if inside else "", markers=markers,
            opened=opened if inside else None, notes=tuple(notes),
        )  # fmt: skip


def way_out(ending: str, markers: Sequence[Markers] = MARKERS, written: Markers | None = None) -> str:
    """What closes the thought that `ending` leaves open, if any.

    Args:
        written: markers as the template writes them, with white space; else a line break before means one after.
    """
    opened = left_open(ending, markers)
    if opened is None:
        return ""
    if written and written[1].strip() == opened[1]:
        return written[1]
    return f"\n{opened[1]}\n\n" if ending.endswith("\n") else opened[1]
