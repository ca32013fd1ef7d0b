"""Colours: enrichment on a diverging log2 scale, the same in terminal, picture and page, and those of curves.

Blue is less than expected by size, orange more: a pair that is told apart with every common colour
blindness. Blue stays paler, because what is enriched is the news. On dark ground the scale starts dark
and brightens towards both ends.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEVELS = 32  # steps of the scale, as drawn by page and picture


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a page or a picture.

    Attributes:
        paper, panel, ink, muted, line, accent: of grounds, text and rules.
        unrouted: of an expert that was given no token: no statement, so no colour of the scale.
        heat: the scale, from depleted to enriched.
        series: of curves and marks, told apart with every common colour blindness; dashes and marks vary too.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    line: str
    accent: str
    unrouted: str
    heat: tuple[str, ...]
    series: tuple[str, ...]

    @property
    def style(self) -> str:
        """CSS of everything in a chart, and of tinted cells."""
        rules = [
            f".ink{{fill:{self.ink}}}.muted{{fill:{self.muted}}}.rule{{stroke:{self.line}}}.mark{{stroke:{self.muted}}}"
            f".paper{{fill:{self.paper}}}.unrouted{{fill:{self.unrouted}}}"
        ]
        for number in range(LEVELS + 1):
            ground = interpolate(self.heat, number / LEVELS)
            colour, ink = f"rgb{ground}".replace(" ", ""), "#111" if is_light(ground) else "#fff"
            rules.append(f".h{number}{{fill:{colour};background:{colour};color:{ink}}}.t{number}{{fill:{ink}}}")
        rules += [f".s{number}{{color:{colour}}}" for number, colour in enumerate(self.series)]
        return "".join(rules)


LIGHT = Theme(
    paper="#ffffff", panel="#f7f6f3", ink="#1d1f23", muted="#5c6068", line="#e3e1dc", accent="#b4511a",
    unrouted="#dcdcdc",
    heat=("#3b78b5", "#6ea3d3", "#a5c9e6", "#d5e5f2", "#f6f5f2", "#fbd9b9", "#f2a264", "#d4641f", "#933a0a"),
    series=("#c2571a", "#3b78b5", "#6b6b6b", "#2a8a5f", "#8a5fb0", "#b08a1e", "#c0487c", "#222222"),
)  # fmt: skip
DARK = Theme(
    paper="#16181c", panel="#1e2126", ink="#e8e8e6", muted="#a0a6ae", line="#33373e", accent="#ff9d5c",
    unrouted="#3c3f46",
    heat=("#5b95cc", "#45739f", "#345877", "#2b4056", "#2b2e35", "#5c4130", "#9c5a2d", "#de8038", "#ffbd8a"),
    series=("#ff9d5c", "#7fb2e6", "#a8adb5", "#5cc79a", "#bf9be0", "#e0bd5a", "#f08fb6", "#e8e8e6"),
)  # fmt: skip
ROLES = {"top": 0, "bottom": 1, "random": 2}  # the colour of a selection, wherever it is drawn

Rgb = tuple[int, int, int]


def log2_limit(enrichments: Iterable[float]) -> int:
    """Where a scale in log2 should end: a whole number of doublings from 1 to 4.

    All that is enriched fits; a few almost empty cells do not stretch the scale.
    """
    logs = sorted(math.log2(value) for value in enrichments if value > 0)
    if not logs:
        return 1
    sizes = sorted(abs(value) for value in logs)
    typical = sizes[int(0.75 * (len(sizes) - 1))]
    return min(4, max(1, math.ceil(max(logs[-1], typical) - 0.05)))


def position(enrichment: float, limit: float) -> float:
    """Place of an enrichment on the scale: 0 (depleted), 0.5 (as expected), 1 (enriched)."""
    if enrichment <= 0:
        return 0.0
    return min(1.0, max(0.0, 0.5 + math.log2(enrichment) / (2 * limit)))


def level(place: float) -> int:
    """Which of the scale's `LEVELS` + 1 colours stands at a place from 0 to 1."""
    return round(place * LEVELS)


def interpolate(colours: Sequence[str], at: float) -> Rgb:
    """The colour at a place from 0 to 1 along evenly spaced colours."""
    place = at * (len(colours) - 1)
    low = min(int(place), len(colours) - 2)
    part = place - low
    first, second = _rgb(colours[low]), _rgb(colours[low + 1])
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second))
    return red, green, blue


def is_light(colour: Rgb) -> bool:
    """Whether black text reads better than white on a colour (contrast ratio of WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (luminance + 0.05) ** 2 > 0.05 * 1.05


def _rgb(colour: str) -> Rgb:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
