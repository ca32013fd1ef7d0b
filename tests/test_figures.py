"""Tables and figures: what they show is what the map says."""

import copy
import io
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from made_maps import COMPONENTS, MAPS, make_map
from safelocus.analysis import words as text
from safelocus.analysis.words import summary_lines
from safelocus.report import colours, maps
from safelocus.report.drawing import draw, picture, svg, write_picture
from safelocus.report.grid import Span, Tint
from safelocus.report.maps import (
    concentration_chart,
    concentration_grid,
    experts_charts,
    experts_grid,
    layers_chart,
    layers_grid,
    matrices_grid,
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=list(MAPS))
def located(request):
    return make_map(**MAPS[request.param])


def rendered(grid, width: int = 100, *, colour: bool = False) -> str:
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
    )
    console.print(grid.rich())
    return console.file.getvalue()


def test_tables_fit_into_100_columns(located):
    tables = [
        layers_grid(located),
        matrices_grid(located),
        experts_grid(located),
        concentration_grid(located),
    ]
    assert (tables[2] is None) == (not located.experts)
    assert (tables[3] is None) == (located.concentration is None)
    for table in tables:
        if table is not None:
            lines = rendered(table).splitlines()
            assert max(map(len, lines)) <= 100
            assert not any("…" in line for line in lines)


def test_layer_table_says_its_numbers_without_colour():
    lines = rendered(layers_grid(make_map())).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["2"]).split()
    assert row == [
        "2",
        "0.80×",
        "0×",
        "4.0×",
        "0.80×",
        "0.80×",
        "0.80×",
        "0.80×",
        "2.0×",
        "50",
        "%",
        "25",
        "%",
    ]
    totals = next(line for line in lines if line.split()[:1] == ["all"]).split()
    assert totals[1:8] == ["0.80×", "0.80×", "1.9×", "0.80×", "0.80×", "0.80×", "0.80×"]


def test_colour_follows_enrichment():
    coloured = rendered(layers_grid(make_map()), colour=True)
    background = {number: rgb for rgb, number in re.findall(r"48;2;([\d;]+)m *([\d.]+×)\x1b", coloured)}
    assert background["4.0×"] == ";".join(str(c) for c in colours.interpolate(colours.LIGHT.heat, 1.0))
    assert background["0×"] == ";".join(str(c) for c in colours.interpolate(colours.LIGHT.heat, 0.0))


def test_deep_models_are_taken_in_bands():
    lines = rendered(layers_grid(make_map(layers=80), max_rows=40)).splitlines()
    assert any(line.split()[:1] == ["2-3"] for line in lines)
    band = next(line.split() for line in lines if line.split()[:1] == ["2-3"])
    assert band[3] == "2.4×"  # of 4.0 and 0.8, equal in size
    assert sum(bool(re.match(r" +\d+-\d+ ", line)) for line in lines) == 40


def test_a_matrix_outside_the_layers_is_no_end_of_a_band():
    assert maps._bands([(None, None), *((None, layer) for layer in range(60))], 48)[0] == [(None, None)]


def test_names_with_brackets_are_not_markup():
    shown = rendered(matrices_grid(make_map()))
    assert "layers.2.self_attn.qkv_proj.weight[value]" in shown
    assert "layers.2.self_attn.qkv_proj.weight[key]" not in shown  # holds nothing


def test_experts_without_tokens_are_said_to_have_none():
    grid = rendered(experts_grid(make_map(experts=8)))
    assert grid.count("never") == 2  # the cell, and the caption
    assert "1 of 32" in grid
    listed = rendered(experts_grid(make_map(layers=6, experts=64), n=3))
    assert [line.split()[1:3] for line in listed.splitlines() if "×" in line and line.split()[0].isdigit()] == [
        ["63", "16×"]
    ] * 3


def test_concentration_grid():
    shown = rendered(concentration_grid(make_map()))
    row = next(line for line in shown.splitlines() if line.split()[:2] == ["1", "%"])
    assert row.split()[:5] == ["1", "%", "10,000", "60", "%"]
    assert row.count("█") == 18  # 60 % of 30 columns
    assert "Gini 0.70" in shown


def test_summary():
    assert summary_lines(make_map(experts=8)) == [
        "The 1 % with the highest ESI (10,000 weights) hold 31 % of all ESI.",
        "Most enriched: value matrices (1.9× what their size would give), layer 2 (2.0×).",
        "The early, middle and late third of the layers hold 20 %, 50 % and 30 % of the selection.",
        "Of the routed experts the most enriched is layer 0 expert 7 (2.0×); 1 of 32 was never given a token.",
    ]


def test_summary_of_other_selections():
    located = make_map()
    other = replace(located, which="random", method="random")
    assert summary_lines(other)[0] == ("The random 1 % of the model's weights (10,000 weights) hold 31 % of all ESI.")
    alone = summary_lines(make_map(scores=False))
    assert alone[0] == "The 1 % with the highest ESI (10,000 weights) are 1 % of all 1,000,000 eligible weights."
    rows = replace(located, granularity="row", where="4 of 28 matrices", of="eligible")
    assert text.selection_label(rows) == (
        "top 1 % of the eligible weights as whole rows within 4 of 28 matrices by ESI"
    )
    union = replace(located, which="set", operation="|", ratio=None, of=None)
    assert text.selection_label(union) == "union of selections, 1 % of the model's weights"
    even = tuple(replace(region, enrichment=1.01, share=region.expected) for region in located.components)
    flat = tuple(replace(region, enrichment=1.0, share=region.expected) for region in located.layers)
    assert "spread evenly" in summary_lines(replace(located, components=even, layers=flat))[1]
    hump = [replace(r, enrichment=e, share=e * r.expected) for r, e in zip(flat, (0.8, 1.11, 1.2, 1.1), strict=True)]
    best = summary_lines(replace(located, components=even, layers=tuple(hump)))[1]
    assert best == "Most enriched: layer 2 (1.2×)."  # with its neighbours it would be below what is worth a word


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (1, "100 %"), (0.31, "31 %"), (0.0107, "1.1 %"), (0.00042, "0.042 %"), (0.0999, "10 %")]
    + [
        (1e-13, "0.00000000001 %"),
        (1e-5, "0.001 %"),
        (0.995, "99.5 %"),
        (0.9996, "100 %"),
        (0.0949, "9.5 %"),
        (0.1, "10 %"),
    ],
)
def test_percent(share, shown):
    assert text.percent(share) == shown


@pytest.mark.parametrize(
    ("enrichment", "shown"),
    [
        (0, "0×"),
        (0.001, "<.01×"),
        (0.04, "0.04×"),
        (0.996, "1.0×"),
        (2.34, "2.3×"),
        (9.96, "10×"),
        (44, "44×"),
    ],
)
def test_times(enrichment, shown):
    assert text.times(enrichment) == shown


def test_scale_ends_where_the_numbers_do():
    assert colours.log2_limit([0.5, 1.0, 2.0]) == 1
    assert colours.log2_limit([1.0, 7.9]) == 3
    assert colours.log2_limit([1.0, 100.0]) == 4
    assert colours.log2_limit([0.9, 1.0, 1.1, 1.2, 0.001]) == 1  # one nearly empty cell does not stretch it
    assert colours.log2_limit([0.0, 0.0]) == 1
    places = [colours.position(value, 2) for value in (0, 0.25, 0.5, 1, 2, 4, 100)]
    assert places == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("palette", [colours.LIGHT.heat, colours.DARK.heat])
def test_numbers_are_readable_on_every_colour(palette):
    def luminance(colour):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for place in np.linspace(0, 1, 101):
        ground = colours.interpolate(palette, place)
        contrast = 1.05 / (luminance(ground) + 0.05)
        if colours.is_light(ground):
            contrast = (luminance(ground) + 0.05) / 0.05
        assert contrast >= 4.5  # WCAG AA


def shown(chart) -> ElementTree.Element:
    return ElementTree.fromstring(picture("A <title>", [chart]))


def cells(chart) -> dict[tuple[str, str], ElementTree.Element]:
    """Rectangles by the places of their rows."""
    x, y = chart.column(chart.x), chart.column(chart.y)
    found = [each for each in shown(chart).iter(f"{SVG}rect") if "data-row" in each.attrib]
    rows = [chart.rows[int(each.get("data-row"))] for each in found]
    return {(row[x], row[y]): each for row, each in zip(rows, found, strict=True)}


def test_pictures_are_whole_and_within_their_bounds(located, tmp_path):
    charts = [layers_chart(located), *experts_charts(located)] if located.experts else [layers_chart(located)]
    concentration = concentration_chart(located)
    assert (concentration is None) == (located.concentration is None)
    for chart in [*charts, *([concentration] if concentration else [])]:
        assert write_picture(tmp_path / "figure.svg", "A <title>", [chart]) == "figure.svg"
        root = ElementTree.fromstring((tmp_path / "figure.svg").read_text(encoding="utf-8"))
        assert "var(" not in ElementTree.tostring(root, encoding="unicode")  # a picture brings its colours
        assert "A <title>" in [text.text for text in root.iter(f"{SVG}text")]
        _, width, height = draw(chart)
        for rect in (each for each in root.iter(f"{SVG}rect") if "x" in each.attrib):
            assert 0 <= float(rect.get("x")) <= float(rect.get("x")) + float(rect.get("width")) <= width
            assert 0 <= float(rect.get("y")) <= float(rect.get("y")) + float(rect.get("height")) <= height
        classes = {each.get("class") for each in root.iter() if each.get("class")}
        style = root.find(f"{SVG}style").text
        assert all(f".{name}{{" in style for name in classes), classes
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]


def test_every_region_has_a_cell_with_its_number():
    chart = layers_chart(make_map())
    numbers = [text.text for text in shown(chart).iter(f"{SVG}text") if text.get("class").startswith("t")]
    assert len(cells(chart)) == len(numbers) == 7 * 4 + 7 + 4  # cells and both totals
    assert numbers.count("4.0") == 1
    assert numbers.count("0") == 4
    assert list(chart.ys) == [*COMPONENTS]
    crowded = shown(layers_chart(make_map(layers=80)))
    assert len([each for each in crowded.iter(f"{SVG}text") if (each.get("class") or "").startswith("t")]) <= 8


def test_colours_of_cells_are_the_maps():
    found = cells(layers_chart(make_map()))
    assert found["2", "value"].get("class") == "h32"  # 4 times, the upper end
    assert {found[str(layer), "key"].get("class") for layer in range(4)} == {"h0"}  # nothing selected
    place = 0.5 + math.log2(0.8) / 4
    assert found["0", "query"].get("class") == f"h{round(32 * place)}"


def test_unrouted_experts_have_no_colour():
    for chart in experts_charts(make_map(experts=8)):
        assert [place for place, cell in cells(chart).items() if cell.get("class") == "unrouted"] == [("1", "3")]
    load = experts_charts(make_map(experts=8))[1].rows[7]
    assert load[-1] == pytest.approx(80 / 45)


def test_the_curve_goes_through_the_points():
    chart = concentration_chart(make_map())
    assert [row[2] for row in chart.rows if row[0] == "ESI"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(row[1] == row[2] for row in chart.rows if row[0] != "ESI")
    assert chart.mark[:2] == (0.01, 0.31)
    marks = [each for each in shown(chart).iter(f"{SVG}path") if each.get("data-row") in ("0", "1", "2", "3", "4")]
    places = [tuple(map(float, re.findall(r"[\d.]+", each.get("transform")))) for each in marks]
    assert np.diff([x for x, _ in places]) == pytest.approx(np.full(4, places[1][0] - places[0][0]), abs=0.11)
    assert np.diff([y for _, y in places]) == pytest.approx(np.full(4, places[1][1] - places[0][1]), abs=0.11)


@pytest.mark.parametrize("num_selected", [3, 100, 10_000, 900_000])
def test_the_mark_of_the_selection_stays_in_the_picture(num_selected):
    drawn, width, _ = draw(concentration_chart(replace(make_map(), num_selected=num_selected)))
    tree = ElementTree.fromstring(f"<svg>{drawn}</svg>")
    at = float(tree.find("circle").get("cx"))
    label = next(each for each in tree.iter("text") if (each.text or "").startswith("selection:"))
    assert 52 < at < width
    assert label.get("text-anchor", "start") == ("start" if at < width / 2 else "end")


def test_what_acts_in_a_name_is_spelled_out():
    chart = replace(layers_chart(make_map()), title="evil\u202e", x="layer")
    assert "\u202e" not in svg(chart) + picture("\u202e\x1b", [chart])
    assert "evil\\u202e" in svg(chart)


def test_strangers_names_stay_text():
    chart = replace(layers_chart(make_map()), title="<script>", ys=["<b>", *COMPONENTS[1:]])
    assert "<script>" not in svg(chart)
    assert "<b>" not in svg(chart)
    assert "&lt;b&gt;" in svg(chart)


def test_same_map_same_picture():
    assert picture("a", [layers_chart(make_map())]) == picture("a", [layers_chart(make_map())])


def test_a_tables_cells_come_whole_from_another_process():
    cells = (Tint("2.0×", 0.75), Span({"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}), Span(None))
    copies = copy.deepcopy(cells)  # as pickling does it
    assert copies == cells
    assert [copies[0].place, *(dict(cell.numbers) for cell in copies[1:])] == [
        0.75, {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}, {},
    ]  # fmt: skip


def test_a_change_has_its_zero_in_the_middle_whatever_its_interval():
    fall = {"value": 0.49, "low": 0.41, "high": 0.58, "n": 8}
    assert Span(fall).bar == pytest.approx((41, 49, 58))
    for change in (Span(fall, is_change=True), copy.deepcopy(Span(fall, is_change=True)), Span(fall | {"p": 0.1})):
        assert change.bar == pytest.approx((70.5, 74.5, 79))
