"""Colours: enrichment on a diverging log2 scale, the same in terminal, figure and page, and those of curves.

Blue is less than expected by size, orange more: a pair that is told apart with every common colour
blindness. Blue stays paler, because what is enriched is the news. On dark ground the scale starts dark
and brightens towards both ends.
"""

import math
from collections.abc import Iterable, Sequence

LIGHT = ("#3b78b5", "#6ea3d3", "#a5c9e6", "#d5e5f2", "#f6f5f2", "#fbd9b9", "#f2a264", "#d4641f", "#933a0a")
DARK = ("#5b95cc", "#45739f", "#345877", "#2b4056", "#2b2e35", "#5c4130", "#9c5a2d", "#de8038", "#ffbd8a")
UNROUTED_LIGHT = "#dcdcdc"  # an expert that was given no token: no statement, so no colour
UNROUTED_DARK = "#3c3f46"

# curves and marks, told apart with every common colour blindness; the page also varies their dashes and marks
SERIES_LIGHT = ("#c2571a", "#3b78b5", "#6b6b6b", "#2a8a5f", "#8a5fb0", "#b08a1e", "#c0487c", "#222222")
SERIES_DARK = ("#ff9d5c", "#7fb2e6", "#a8adb5", "#5cc79a", "#bf9be0", "#e0bd5a", "#f08fb6", "#e8e8e6")
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
