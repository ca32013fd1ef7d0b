"""Where a thought ends and the answer begins, in text whose markers are still there.

    start thought end answer        without `start` where the prompt has opened the thought already

Reasoning is not the answer: it may weigh a refusal before it complies, and the reverse. This is the one place where
the two are told apart, for models in this process (by `ChatFormat.split`, with the markers of their templates), for
servers, and for texts that come from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Markers = tuple[str, str]
UNFINISHED = "unfinished thought"  # why there is no answer

# Of models whose templates do not say how a thought is written, and of texts that come without a template. The one of
# gpt-oss starts with any channel, and ends where the last one begins.
MARKERS: tuple[Markers, ...] = (
    ("<think>", "</think>"),
    ("<|channel|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("◁think▷", "◁/think▷"),
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A text in two.

    Attributes:
        thought: None where there is none.
        start: where the answer begins; the length of the text where the thought did not end.
        finished: whether it did.
    """

    thought: str | None
    start: int
    finished: bool = True


def split(text: str, *, markers: Sequence[Markers] = MARKERS, opened: Markers | None = None) -> Split:
    """Tell a thought (several, one after another) from the answer behind it.

    An end without a start, as of a server that writes the start into the prompt, ends a thought too.

    Args:
        opened: markers of the thought that the prompt has opened.

    Example:
        >>> text = "<think>Normally I can't help.</think>Sure, here is how."
        >>> text[split(text).start :]
        'Sure, here is how.'
    """
    thoughts: list[str] = []
    begun = [opened] if opened else [pair for pair in markers if _ends_first(text, pair)]
    at = 0
    while True:
        lead = len(text) - len(text[at:].lstrip())
        begun = begun or [pair for pair in markers if text.startswith(pair[0], lead)]
        if not begun:
            break
        skipped = max((len(start) for start, _ in begun if text.startswith(start, lead)), default=0)
        ends = [(found + len(end), found) for _, end in begun if (found := text.find(end, lead)) >= 0]
        if not ends:
            return Split(thought=_joined([*thoughts, text[lead + skipped :]]), start=len(text), finished=False)
        at, found = min(ends)
        thoughts.append(text[lead + skipped : found])
        begun = []
    return Split(thought=_joined(thoughts), start=at)


def answer_of(text: str) -> str | None:
    """What follows the thought, all of `text` where there is none; None where it did not end."""
    found = split(text)
    if found.thought is None:
        return text
    return text[found.start :].lstrip() if found.finished else None


def left_open(text: str, markers: Sequence[Markers] = MARKERS) -> Markers | None:
    """The markers of the thought in which `text` breaks off, as a prompt that opens one does."""
    open_at = [(text.rfind(pair[0]), pair) for pair in markers if text.rfind(pair[0]) > text.rfind(pair[1])]
    return max(open_at)[1] if open_at else None


def _ends_first(text: str, pair: Markers) -> bool:
    start, end = pair
    found = text.find(end)
    return found >= 0 and text.find(start, 0, found + len(end)) in (-1, found)


def _joined(thoughts: list[str]) -> str | None:
    """Those that say something, each on its own line; None where there is no thought at all."""
    return "\n".join(said for each in thoughts if (said := each.strip())) if thoughts else None
