"""Tables and figures: what they show is what the map says."""

import io
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from made_maps import COMPONENTS, MAPS, make_map
from safelocus.report import colours, text
from safelocus.report.figures import DPI, component_figure, concentration_figure, expert_figure, save_png
from safelocus.report.tables import (
    concentration_table,
    experts_table,
    layer_component_table,
    summary_lines,
    top_matrices_table,
)


@pytest.fixture(params=list(MAPS))
def located(request):
    return make_map(**MAPS[request.param])


def rendered(renderable, width: int = 100, *, colour: bool = False) -> str:
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
    )
    console.print(renderable)
    return console.file.getvalue()


def test_tables_fit_into_100_columns(located):
    tables = [
        layer_component_table(located),
        top_matrices_table(located),
        experts_table(located),
        concentration_table(located),
    ]
    assert (tables[2] is None) == (not located.experts)
    assert (tables[3] is None) == (located.concentration is None)
    for table in tables:
        if table is not None:
            lines = rendered(table).splitlines()
            assert max(map(len, lines)) <= 100
            assert not any("…" in line for line in lines)


def test_layer_table_says_its_numbers_without_colour():
    lines = rendered(layer_component_table(make_map())).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["2"]).split()
    assert row == [
        "2",
        "0.80x",
        "0x",
        "4.0x",
        "0.80x",
        "0.80x",
        "0.80x",
        "0.80x",
        "2.0x",
        "50",
        "%",
        "25",
        "%",
    ]
    totals = next(line for line in lines if line.split()[:1] == ["all"]).split()
    assert totals[1:8] == ["0.80x", "0.80x", "1.9x", "0.80x", "0.80x", "0.80x", "0.80x"]


def test_colour_follows_enrichment():
    coloured = rendered(layer_component_table(make_map()), colour=True)
    background = {number: rgb for rgb, number in re.findall(r"48;2;([\d;]+)m *([\d.]+x)\x1b", coloured)}
    assert background["4.0x"] == ";".join(str(c) for c in colours.interpolate(colours.LIGHT, 1.0))
    assert background["0x"] == ";".join(str(c) for c in colours.interpolate(colours.LIGHT, 0.0))


def test_deep_models_are_taken_in_bands():
    lines = rendered(layer_component_table(make_map(layers=80), max_rows=40)).splitlines()
    assert any(line.split()[:1] == ["2-3"] for line in lines)
    band = next(line.split() for line in lines if line.split()[:1] == ["2-3"])
    assert band[3] == "2.4x"  # of 4.0 and 0.8, equal in size
    assert sum(bool(re.match(r" +\d+-\d+ ", line)) for line in lines) == 40


def test_names_with_brackets_are_not_markup():
    shown = rendered(top_matrices_table(make_map()))
    assert "layers.2.self_attn.qkv_proj.weight[value]" in shown
    assert "layers.2.self_attn.qkv_proj.weight[key]" not in shown  # holds nothing


def test_experts_without_tokens_are_said_to_have_none():
    grid = rendered(experts_table(make_map(experts=8)))
    assert grid.count("never") == 2  # the cell, and the caption
    assert "1 of 32" in grid
    listed = rendered(experts_table(make_map(layers=6, experts=64), n=3))
    assert [line.split()[1:3] for line in listed.splitlines() if "x" in line and line.split()[0].isdigit()] == [
        ["63", "16x"]
    ] * 3


def test_concentration_table():
    shown = rendered(concentration_table(make_map()))
    row = next(line for line in shown.splitlines() if line.split()[:2] == ["1", "%"])
    assert row.split()[:5] == ["1", "%", "10,000", "60", "%"]
    assert row.count("█") == 18  # 60 % of 30 columns
    assert "Gini 0.70" in shown


def test_summary():
    assert summary_lines(make_map(experts=8)) == [
        "The 1 % with the highest ESI (10,000 weights) hold 31 % of all ESI.",
        "Most enriched: value matrices (1.9x what their size would give), layer 2 (2.0x).",
        "The early, middle and late third of the layers hold 20 %, 50 % and 30 % of the selection.",
        "Of the routed experts the most enriched is layer 0 expert 7 (2.0x); 1 of 32 was never given a token.",
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


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (1, "100 %"), (0.31, "31 %"), (0.0107, "1.1 %"), (0.00042, "0.042 %"), (0.0999, "10 %")]
    + [(1e-5, "0.001 %"), (0.995, "99.5 %"), (0.9996, "100 %"), (0.0949, "9.5 %"), (0.1, "10 %")],
)
def test_percent(share, shown):
    assert text.percent(share) == shown


@pytest.mark.parametrize(
    ("enrichment", "shown"),
    [
        (0, "0x"),
        (0.001, "<.01x"),
        (0.04, "0.04x"),
        (0.996, "1.0x"),
        (2.34, "2.3x"),
        (9.96, "10x"),
        (44, "44x"),
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


@pytest.mark.parametrize("palette", [colours.LIGHT, colours.DARK])
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


def test_figures_decode_at_their_size(located, tmp_path):
    figures = [component_figure(located), expert_figure(located), concentration_figure(located)]
    assert (figures[1] is None) == (not located.experts)
    assert (figures[2] is None) == (located.concentration is None)
    for figure in figures:
        if figure is not None:
            save_png(figure, tmp_path / "figure.png")
            pixels = imread(tmp_path / "figure.png")
            width, height = figure.get_size_inches()
            assert pixels.shape[:2] == pytest.approx((height * DPI, width * DPI), abs=1)
            assert np.unique(pixels[..., 0]).size > 20  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_component_figure_shows_numbers_and_title():
    figure = component_figure(make_map())
    (axes, _) = figure.axes
    numbers = [shown.get_text() for shown in axes.texts]
    assert len(numbers) == 7 * 4 + 7 + 4  # cells and both totals
    assert numbers.count("4.0") == 1
    assert numbers.count("0") == 4
    assert figure.get_suptitle() == "tiny: top 1 % of the model's weights by ESI"
    assert [label.get_text() for label in axes.get_yticklabels()] == [*COMPONENTS, "all"]
    crowded = component_figure(make_map(layers=80)).axes[0]
    assert not [shown for shown in crowded.texts if shown.get_position()[0] < 80]  # no room but in the totals


def test_figure_colours_are_the_maps():
    figure = component_figure(make_map())
    cells = figure.axes[0].collections[0].get_array()
    assert cells.shape == (7, 4)
    assert cells[2, 2] == pytest.approx(2.0)  # log2 of 4
    assert cells[1].tolist() == [-2.0] * 4  # nothing selected: the lower end of the scale
    assert cells[0, 0] == pytest.approx(math.log2(0.8))


def test_expert_figure_leaves_unrouted_experts_open():
    figure = expert_figure(make_map(experts=8))
    enrichment, tokens = (axes.collections[0].get_array() for axes in figure.axes[:2])
    assert np.argwhere(enrichment.mask).tolist() == [[3, 1]]  # expert 3, layer 1
    assert np.argwhere(tokens.mask).tolist() == [[3, 1]]
    assert tokens[7, 0] == pytest.approx(math.log2(80 / 45))
    assert "(grey: 1 of 32 was never given a token)" in figure.get_suptitle()


def test_concentration_figure_goes_through_the_points():
    axes = concentration_figure(make_map()).axes[0]
    equal, observed, selection = axes.lines
    assert observed.get_ydata().tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert equal.get_ydata().tolist() == equal.get_xdata().tolist()
    assert (selection.get_xdata()[0], selection.get_ydata()[0]) == (0.01, 0.31)


def test_same_map_same_png(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(component_figure(make_map()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_failed_save_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "map.png"
    path.write_bytes(b"earlier")
    figure = component_figure(make_map())

    def break_off(file, **_):
        file.write_bytes(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_png(figure, path)
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"earlier"]


def test_figures_need_no_global_state():
    code = "import sys, safelocus.report.figures; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
