"""Pictures of the docs exist, say in words what they show, are small and legible, and are what the scripts draw."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    (page, words, (page.parent / target).resolve())
    for page in PAGES
    for words, target in re.findall(r"!\[(.*?)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
]
DIAGRAMS = sorted(path.stem for path in IMAGES.glob("*.svg"))
MAX_BYTES = 150_000
LEGIBLE = 13  # pixels of letters


def test_every_linked_picture_exists_and_has_words():
    assert len(LINKED) > 10
    for page, words, file in LINKED:
        assert file.is_file(), f"{page.name}: {file}"
        assert words, f"{page.name}: {file.name} has no alternative text"
    in_concepts = [words for page, words, _ in LINKED if page.name == "concepts.md"]
    assert len(set(in_concepts)) == len(in_concepts)
    assert all(len(words) > 40 for words in in_concepts)


def test_every_picture_is_shown_and_small():
    files = sorted(IMAGES.iterdir())
    assert {file.resolve() for file in files} <= {file for _, _, file in LINKED}
    assert not [file.name for file in files if file.stat().st_size > MAX_BYTES]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_diagrams_are_legible_on_any_page(name):
    root = ElementTree.parse(IMAGES / f"{name}.svg").getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    kinds = [(element.tag.partition("}")[2], element) for element in root.iter()]
    ground = next(element for kind, element in kinds if kind == "rect")
    assert ground.attrib["fill"] == "white"  # of its own, so that a dark page does not swallow the ink
    assert float(ground.attrib["width"]) >= width - 1
    letters = [element for kind, element in kinds if kind == "text"]
    assert letters
    for element in letters:
        assert float(element.attrib["font-size"]) >= LEGIBLE
        assert 0 <= float(element.attrib["x"]) <= width
        assert 0 <= float(element.attrib["y"]) <= height
    assert not [element for kind, element in kinds if kind in ("script", "image", "foreignObject")]


def test_diagrams_are_what_the_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "build_diagrams.py"))
    assert sorted(script["DIAGRAMS"]) == DIAGRAMS
    for name, draw in script["DIAGRAMS"].items():
        committed = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
        assert draw().svg() == committed, f"{name}: run `make pictures`"


def test_measured_curves_are_those_of_the_results():
    """The picture of noise shows what docs/results/verify.md says of 1 % of the weights."""
    table = (ROOT / "docs" / "results" / "verify.md").read_text(encoding="utf-8").split("\n### ")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| 1 %")]
    assert len(rows) > 3
    assert {row[1] for row in rows} == {"top"}
    figure = runpy.run_path(str(ROOT / "docs" / "build_images.py"))["noise"]()
    refusal, utility = figure.axes
    top = next(line for line in refusal.lines if line.get_label() == "top")
    lost = next(line for line in utility.lines if line.get_label() == "top")
    assert list(top.get_xdata()) == list(lost.get_xdata()) == [float(row[0].split()[2]) for row in rows]
    assert list(top.get_ydata()) == [int(row[2].split()[0]) for row in rows]
    assert list(lost.get_ydata()) == [int(row[5].split()[0]) for row in rows]
