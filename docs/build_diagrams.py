"""Writes docs/images/*.svg: the ideas of docs/concepts.md as drawings.

    python docs/build_diagrams.py     (or: make pictures)

What is a number in a drawing is read when it is built: tokens and sigma from the embedded organisms, outcomes from
docs/results. Every drawing has its own light ground, so that it reads on a dark page too. `tests/test_pictures.py`
compares the committed drawings with what this makes.
"""

import random
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

import safelocus as sl
from safelocus.report.colours import LIGHT

DOCS = Path(__file__).parent
ORANGE, BLUE, GREY, GREEN, PURPLE = LIGHT.series[:5]
INK, MUTED, LINE, PANEL = "#222222", "#5c6068", "#c9c7c2", "#f3f2ee"
PALE = {ORANGE: "#f8e1d2", BLUE: "#dbe8f4", GREEN: "#d6ece1", GREY: "#e9e9e9", PURPLE: "#e8def1"}
SANS = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Drawing:
    """Elements of one SVG; sizes in pixels, text 13 and above."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: int = 14, colour: str = INK, anchor: str = "middle",
        bold: bool = False, mono: bool = False,
    ) -> None:  # fmt: skip
        """One or more lines; y is the first one's baseline."""
        family, weight = MONO if mono else SANS, ' font-weight="600"' if bold else ""
        for number, line in enumerate(words.split("\n")):
            self.parts.append(
                f'<text x="{x:g}" y="{y + number * (size + 4):g}" font-family="{family}" font-size="{size}" '
                f'fill="{colour}" text-anchor="{anchor}"{weight} '
                f'xml:space="preserve">{escape(line)}</text>'
            )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "white", line: str = LINE,
        thick: float = 1.2, round: float = 6,
    ) -> None:  # fmt: skip
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round:g}" fill="{fill}" '
            f'stroke="{line}" stroke-width="{thick:g}"/>'
        )

    def labelled(self, x: float, y: float, width: float, height: float, title: str, below: str, colour: str) -> None:
        """A box with a name and a remark in it."""
        self.box(x, y, width, height, fill=PALE[colour], line=colour)
        lines = below.count("\n") + 1 if below else 0
        top = y + height / 2 - 9 * lines + 5
        self.text(x + width / 2, top, title, bold=True)
        if below:
            self.text(x + width / 2, top + 19, below, size=13, colour=MUTED)

    def line(self, points: Sequence[tuple[float, float]], *, colour: str = MUTED, arrow: bool = True) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{end}/>')

    def area(self, points: Sequence[tuple[float, float]], fill: str) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polygon points="{path}" fill="{fill}" fill-opacity="0.75"/>')

    def svg(self) -> str:
        tip = f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker>'  # noqa: E501
        frame = f'<rect x=".5" y=".5" width="{self.width - 1}" height="{self.height - 1}" rx="8" fill="white" stroke="{LINE}"/>'  # noqa: E501
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}" role="img">'  # noqa: E501
        body = "\n".join([f"<title>{escape(self.title)}</title>", f"<defs>{tip}</defs>", frame, *self.parts])
        return f"{head}\n{body}\n</svg>\n"


def pipeline() -> Drawing:
    """Stages and the files between them."""
    d = Drawing(880, 330, "From a model to a map, a patch and a protected model")
    d.labelled(20, 30, 150, 56, "target", "model and tokenizer", BLUE)
    d.labelled(20, 100, 150, 56, "prompts", "harmful requests", BLUE)
    d.labelled(20, 170, 150, 56, "objective S", "a guard, or none", BLUE)
    d.box(222, 93, 84, 70, fill=PANEL)
    d.text(264, 133, "score", bold=True)
    for y in (58, 128, 198):
        d.line([(170, y), (196, y), (196, 128), (220, 128)])
    d.labelled(338, 98, 120, 60, "scores", "one per weight", ORANGE)
    d.box(490, 93, 84, 70, fill=PANEL)
    d.text(532, 133, "select", bold=True)
    d.labelled(606, 98, 120, 60, "selection", "K coordinates", ORANGE)
    for x in (306, 458, 574):
        d.line([(x, 128), (x + 30, 128)])
    uses = [("verify", "what breaks?"), ("enhance", "train them: a patch"), ("preserve", "protect them")]
    for number, (name, what) in enumerate(uses):
        x = 338 + 180 * number
        d.labelled(x, 222, 162, 58, name, what, GREEN)
        d.line([(666, 158), (666, 190), (x + 81, 190), (x + 81, 220)])
    d.text(20, 258, "evaluate, report:", anchor="start", bold=True)
    d.text(20, 278, "at any point, of any model or run", anchor="start", size=13, colour=MUTED)
    legend = "blue: what you give      orange: what can be saved and passed on      green: what it is for"
    d.text(20, 312, legend, size=13, colour=MUTED, anchor="start")
    return d


def transfer() -> Drawing:
    """How a guard's gradient reaches the target's vocabulary; with the organisms' own tokens."""
    words, other = "I cannot help with that.", " gladly"
    target, guard = sl.load("organism:dense").tokenizer, sl.load("organism:guard").tokenizer
    spans = {"t": _spans(target, words), "u": _spans(guard, words)}
    at = next(span for span in spans["t"] if words[span[0] : span[1]] == " cannot")
    d = Drawing(880, 420, "A guard's gradient over its own tokens becomes a gain for every token of the target")
    left, cell = 92, 31
    d.text(20, 34, "The same answer in two vocabularies, aligned by characters", anchor="start", bold=True)
    rows = {"t": (60, ORANGE), "u": (150, BLUE)}
    x = [left + cell * place for place in range(len(words) + 1)]
    d.area([(x[at[0]], 94), (x[at[1]], 94), (x[at[1]], 150), (x[at[0]], 150)], PALE[ORANGE])
    for name, (y, colour) in rows.items():
        for first, last in spans[name]:
            chosen = at[0] <= first and last <= at[1]
            d.box(x[first] + 1, y, x[last] - x[first] - 2, 34, line=colour, fill=PALE[colour] if chosen else "white")
            shown = words[first:last].replace(" ", "\N{OPEN BOX}")
            d.text((x[first] + x[last]) / 2, y + 22, shown, mono=True)
    d.text(20, 76, "target\ntoken t", anchor="start", size=13, colour=ORANGE)
    d.text(20, 166, "guard\ntoken u", anchor="start", size=13, colour=BLUE)
    middle = (x[at[0]] + x[at[1]]) / 2
    d.text(middle, 204, "a", size=13, colour=BLUE)
    d.text(middle + 9, 208, "u", size=13, colour=BLUE)
    d.text(middle + 20, 204, ": how the guard's log-odds of “safe” change with each guard token's embedding", size=13,
           colour=MUTED, anchor="start")  # fmt: skip
    pieces = [other[first:last].replace(" ", "\N{OPEN BOX}") for first, last in _spans(guard, other)]
    written = other.replace(" ", "\N{OPEN BOX}")
    d.text(20, 252, f"What if the target had written v = “{written}” at t instead?", anchor="start", bold=True)
    d.labelled(20, 270, 190, 62, f"v = {written}", "a token of the target", ORANGE)
    d.labelled(240, 270, 220, 62, "  ".join(pieces), "spelled out for the guard", BLUE)
    d.labelled(490, 270, 150, 62, "E(v)", "mean embedding", BLUE)
    d.labelled(670, 270, 190, 62, "G = Σ ⟨a, E(v)⟩", "over guard tokens at t", GREEN)
    for start in (210, 460, 640):
        d.line([(start, 301), (start + 28, 301)])
    gain = (
        "G holds this gain for every v at every t. The target then reads its own answer, and\n"
        "S = Σ ⟨G, softmax(logits / τ)⟩ is differentiated down to each weight, with G held constant."
    )
    d.text(20, 366, gain, anchor="start", size=13, colour=MUTED)
    return d


def fused() -> Drawing:
    """One stored tensor, several logical matrices; sigma measured."""
    dense, moe = sl.load("organism:dense"), sl.load("organism:moe")
    weights = {name: value.detach().float() for name, value in dense.model.named_parameters()}
    parts = [weights[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"]
    whole = _sigma(parts)
    experts = dict(moe.model.named_parameters())["model.layers.5.mlp.experts.gate_up_proj"].detach().float()
    num, rows, columns = experts.shape
    d = Drawing(880, 430, "A tensor in the file can hold several logical matrices, each with a sigma of its own")
    d.text(20, 34, "Query, key and value in one tensor (as Phi-3 stores them)", anchor="start", bold=True)
    heights = [70, 40, 40]  # what matters is that they differ
    y = 60
    for height, name, colour, part in zip(heights, ("query", "key", "value"), (ORANGE, BLUE, GREEN), parts):
        d.box(20, y, 130, height, fill=PALE[colour], line=colour, round=0)
        d.text(85, y + height / 2 + 5, name)
        d.box(226, y, 130, height - 8, fill=PALE[colour], line=colour, round=2)
        d.text(291, y + height / 2 + 1, name)
        d.text(372, y + height / 2 + 1, f"{SIGMA} = {float(part.std()):.4f}", anchor="start", mono=True)
        y += height
    d.line([(158, 135), (218, 135)])
    below = f"one tensor in the file:\none {SIGMA} would be {whole:.4f}"
    d.text(20, 232, below, size=13, colour=MUTED, anchor="start")
    d.text(291, 232, "three matrices", size=13, colour=MUTED)
    over = whole / float(parts[2].std()) - 1
    found = (
        f"Layer 2 of organism:dense, measured.\nOne {SIGMA} for all three would overrate\n"
        f"every value weight by {100 * over:.0f} %."
    )
    d.text(510, 100, found, anchor="start", size=13, colour=MUTED)
    d.line([(20, 268), (860, 268)], colour=LINE, arrow=False)
    d.text(20, 294, "All experts of a layer in one tensor (as transformers 5 stores them)", anchor="start", bold=True)
    for number in range(5, -1, -1):
        for part, colour in enumerate((ORANGE, BLUE)):
            d.box(20 + 9 * number, 340 + 30 * part - 5 * number, 90, 30, fill=PALE[colour], line=colour, round=0)
    d.text(65, 360, "gate", size=13)
    d.text(65, 390, "up", size=13)
    d.text(100, 419, f"[{num} experts, {rows}, {columns}]", size=13, colour=MUTED)
    d.line([(172, 360), (218, 360)])
    for number in range(2):
        x = 240 + 300 * number
        for part, (name, colour) in enumerate((("gate", ORANGE), ("up", BLUE))):
            d.box(x, 318 + 44 * part, 110, 34, fill=PALE[colour], line=colour, round=2)
            d.text(x + 55, 340 + 44 * part, f"{name}, expert {number}", size=13)
            half = experts[number, : rows // 2] if part == 0 else experts[number, rows // 2 :]
            d.text(x + 122, 340 + 44 * part, f"{SIGMA} = {float(half.std()):.4f}", anchor="start", mono=True)
    d.text(810, 362, f"… {2 * num} in all", size=13, colour=MUTED)
    d.text(
        540,
        419,
        f"layer 5 of organism:moe, measured; every score uses the {SIGMA} of its own matrix",
        size=13,
        colour=MUTED,
    )
    return d


def patch() -> Drawing:
    """SET: a few weights get new values; everything else, and the way back, is exact."""
    d = Drawing(880, 300, "A patch holds new values for the selected weights and reverts bit for bit")
    for x, name, colour in ((30, "before", GREY), (610, "after", ORANGE)):
        _grid(d, x, 50, {ORANGE: 9}, marked=colour)
        d.text(x + 120, 36, name, bold=True)
    d.box(330, 74, 220, 128, fill=PANEL)
    d.text(440, 98, "patch", bold=True)
    for number, row in enumerate(("coordinate   old   new", "W₃[17, 4]   bits  bits", "W₃[90, 61]  bits  bits", "…")):
        d.text(346, 124 + 20 * number, row, size=13, anchor="start", mono=True, colour=MUTED if not number else INK)
    d.line([(286, 110), (326, 110)])
    d.line([(554, 110), (602, 110)])
    d.text(580, 96, "apply", size=13, colour=MUTED)
    d.line([(602, 166), (554, 166)])
    d.line([(326, 166), (286, 166)])
    d.text(580, 186, "revert", size=13, colour=MUTED)
    says = (
        "SET trains the selected weights (orange) on refusals and keeps what it is told to retain. All others\n"
        "keep every bit, so the patch is small, and to apply and revert it changes nothing."
    )
    d.text(30, 262, says, anchor="start", size=13, colour=MUTED)
    return d


def preserve() -> Drawing:
    """SPA: what may move while a task is learned, and what was left of the dense organism's behaviour."""
    measured = _rows("preserve.md", "## organism:dense, a task")
    ways = (
        ("unprotected", "unprotected", "The task moves every weight.", {BLUE: 96}),
        ("frozen", "10 % frozen, ESI", "The selected weights\nkeep every bit.", {GREY: 9, BLUE: 87}),
        (
            "calibrated",
            "10 % calibrated, ESI",
            "Closed to the task, and drawn\nto the original's answers.",
            {GREEN: 9, BLUE: 87},
        ),
    )
    d = Drawing(880, 432, "Unprotected, frozen and calibrated fine-tuning, and what each left")
    for number, (name, row, says, colours) in enumerate(ways):
        x = 32 + 290 * number
        d.text(x + 120, 36, name, bold=True)
        _grid(d, x, 50, colours, all_filled=True)
        d.text(x + 120, 250, says, size=13, colour=MUTED)
        for line, heading in enumerate(("refusal", "harmless answered", "task", "seeds")):
            d.text(x, 306 + 22 * line, heading, anchor="start", size=13)
            d.text(x + 240, 306 + 22 * line, measured[row][heading], anchor="end", size=13)
    before = ", ".join(measured["before"][heading] for heading in ("refusal", "harmless answered", "task"))
    source = f"percent [95 % interval], organism:dense, rate 3e-4 (results/preserve.md; before: {before})"
    d.text(32, 416, source, anchor="start", size=13, colour=MUTED)
    return d


def _grid(
    d: Drawing, x: float, y: float, colours: dict[str, int], *, marked: str = "", all_filled: bool = False
) -> None:
    """A matrix of 12 x 8 weights; the first colour's cells are the selected ones, the same in every grid."""
    places = random.Random(4).sample(range(96), 9)
    order = [*places, *(place for place in range(96) if place not in places)]
    fills = [colour for colour, number in colours.items() for _ in range(number)]
    filled = dict(zip(order, fills, strict=False))
    for place in range(96):
        colour = filled.get(place)
        fill = PALE[marked or colour] if colour and not all_filled else PALE[colour] if colour else "white"
        heavy = place in places
        d.box(x + place % 12 * 20, y + place // 12 * 22, 18, 20, fill=fill, round=2,
              line=(marked or colour or LINE) if heavy else LINE, thick=2 if heavy else 1)  # fmt: skip


def _sigma(parts: Sequence[torch.Tensor]) -> float:
    """Standard deviation of several matrices as if they were one."""
    return float(torch.cat([part.reshape(-1) for part in parts]).std())


def _spans(tokenizer: object, words: str) -> list[tuple[int, int]]:
    found = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)  # type: ignore[operator]
    return [tuple(span) for span in found["offset_mapping"]]


def _rows(page: str, heading: str) -> dict[str, dict[str, str]]:
    """First table under a heading of a page of docs/results: first column -> heading -> cell; the first of equals."""
    text = (DOCS / "results" / page).read_text(encoding="utf-8").partition(heading)[2]
    table = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert table, heading
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    found: dict[str, dict[str, str]] = {}
    for cells in lines[2:]:
        found.setdefault(cells[0], dict(zip(lines[0], cells, strict=True)))
    return found


DIAGRAMS = {"pipeline": pipeline, "transfer": transfer, "fused": fused, "patch": patch, "preserve": preserve}


if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (DOCS / "images" / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
