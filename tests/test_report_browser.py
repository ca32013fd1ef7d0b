"""The page in a real browser: charts are drawn, cells open, files are downloaded, and nothing else happens."""

import json
from dataclasses import replace

import pytest

import chromium
from chromium import Chromium
from made_maps import make_map
from made_runs import enhance_run, map_run, preserve_run, score_run
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.installed() is None, reason="no Chromium here: apt-get install chromium"),
]
DRAWN = "document.documentElement.dataset.drawn"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Maps of a dense and a mixture-of-experts model (real selections), an enhancement and a preservation."""
    folder = tmp_path_factory.mktemp("runs")
    folders = [
        score_run(folder / "dense", "dense"), score_run(folder / "moe", "moe"), enhance_run(folder / "enhance"),
        preserve_run(folder / "preserve"),
    ]  # fmt: skip
    (folder / "enhance" / "selection.safetensors").write_bytes((folder / "moe" / "selection.safetensors").read_bytes())
    path = folder / "page.html"
    write_page([ReportRun.read(each) for each in folders], path, responses=True)
    return path


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


def opened(browser: Chromium, page) -> None:
    browser.open(page)
    browser.wait(DRAWN)


def quiet(browser: Chromium, page) -> None:
    """No error, no warning, and no request but for the page itself."""
    assert browser.problems == []
    assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == {page.resolve().as_uri()}


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_every_chart_is_drawn(page, width, dark):
    with Chromium(width=width, dark=dark) as browser:
        opened(browser, page)
        figures = browser.evaluate("document.querySelectorAll('figure.chart').length")
        assert figures >= 20
        assert browser.evaluate(
            "[...document.querySelectorAll('figure.chart')].every(figure => figure.querySelector('svg [data-row]'))"
        )
        assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing runs over the side
        luminance = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(luminance) < 128) == dark
        quiet(browser, page)


def filled(page) -> tuple[int, int, str]:
    """(layer, row of the heatmap, component) of a cell that holds selected weights, not the first one."""
    cells = json.loads((page.parent / "dense" / "results.json").read_text())["maps"]["tiny"]["cells"]
    components = ["query", "key", "value", "output", "gate", "up", "down"]
    found = next(c for c in cells if c["num_selected"] and c["layer"] > 0 and c["component"] in ("gate", "up", "down"))
    return found["layer"], components.index(found["component"]), found["component"]


def cell(browser: Chromium, column: int, row: int) -> tuple[float, float]:
    """Where a cell of the first heatmap is on the screen."""
    return browser.evaluate(
        f"""(() => {{
            const cell = document.querySelector('.drawn[data-opens] [data-at="{column},{row}"]');
            cell.scrollIntoView({{block: "center", behavior: "instant"}});
            const at = () => {{
                const box = cell.getBoundingClientRect();
                return [box.left + box.width / 2, box.top + box.height / 3];
            }};
            // scrolling is told of with the next frame
            return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(at()))));
        }})()"""
    )


def test_a_click_opens_the_matrix(browser, page):
    opened(browser, page)
    layer, row, component = filled(page)
    browser.click(*cell(browser, layer, row))
    name = f"model.layers.{layer}.mlp.{component}_proj.weight"
    browser.wait(f"document.querySelector('.which').textContent.startsWith('{name}:')", 10)
    assert browser.evaluate("document.querySelectorAll('.matrices svg rect').length > 1")
    quiet(browser, page)


def test_arrow_keys_and_enter_open_it_too(browser, page):
    opened(browser, page)
    browser.evaluate("document.querySelector('.drawn[data-opens]').focus()")
    layer, row, component = filled(page)
    for key in ["ArrowRight"] * (layer + 1) + ["ArrowDown"] * row:  # the first press goes to the first cell
        browser.press(key)
    spoken = browser.evaluate("document.getElementById('spoken').textContent")
    assert spoken.startswith(f"layer: {layer}, component: {component}, enrichment: ")
    browser.press("Enter")
    name = f"model.layers.{layer}.mlp.{component}_proj.weight"
    browser.wait(f"document.querySelector('.which').textContent.startsWith('{name}:')", 10)
    quiet(browser, page)


def test_arrow_keys_step_over_what_a_layer_lacks(browser, tmp_path):
    located = make_map()
    lacking = {(0, "query"), (1, "key")}
    cells = tuple(each for each in located.cells if (each.layer, each.component) not in lacking)
    page = tmp_path / "page.html"
    write_page([ReportRun.read(map_run(tmp_path / "run", [("tiny", replace(located, cells=cells))]))], page)
    opened(browser, page)
    browser.evaluate("document.querySelector('.drawn[data-opens]').focus()")
    for key, layer in (("ArrowUp", 0), ("ArrowRight", 2), ("ArrowLeft", 0)):
        browser.press(key)
        spoken = browser.evaluate("document.getElementById('spoken').textContent")
        assert spoken.startswith(f"layer: {layer}, component: key")
    quiet(browser, page)


def test_a_matrix_is_chosen_from_lists(browser, page):
    opened(browser, page)
    browser.evaluate(
        """(() => {
            const form = document.querySelectorAll(".matrices form")[1];
            form.elements.layer.value = "1";
            form.elements.layer.dispatchEvent(new Event("change", {bubbles: true}));
            form.elements.component.value = "down";
            form.elements.component.dispatchEvent(new Event("change", {bubbles: true}));
        })()"""
    )
    said = browser.evaluate("document.querySelectorAll('.which')[1].textContent")
    assert said.startswith("model.layers.1.mlp.experts.down_proj[")
    quiet(browser, page)


def downloaded(browser: Chromium, number: int):
    files = []
    for _ in range(200):
        files = [file for file in browser.downloads.iterdir() if not file.name.endswith(".crdownload")]
        if len(files) >= number and all(file.stat().st_size for file in files):
            return sorted(files)
        browser.evaluate("new Promise(done => setTimeout(done, 50))")
    raise AssertionError(f"{number} files should have come; found {files}")


def test_numbers_and_pictures_are_downloaded(browser, page):
    opened(browser, page)
    browser.evaluate(
        "[...document.querySelectorAll('#run-1 .under')[0].querySelectorAll('button')].forEach(b => b.click())"
    )
    names = {file.suffix: file for file in downloaded(browser, 3)}
    assert {file.stem for file in names.values()} == {"dense-tiny-enrichment-by-layer-and-component"}
    lines = names[".csv"].read_text(encoding="utf-8-sig").splitlines()
    assert (
        lines[0] == "layer,component,enrichment,share of selection,share of weights,selected,weights,share of all ESI"
    )
    assert len(lines) == 1 + 4 * 7 + 4 + 7
    assert names[".png"].read_bytes().startswith(b"\x89PNG")
    assert "Enrichment by layer and component" in names[".svg"].read_text(encoding="utf-8")
    quiet(browser, page)


def test_the_switch_changes_colours(browser, page):
    opened(browser, page)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = browser.evaluate(ground)
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(ground) != before
    browser.wait(DRAWN)
    quiet(browser, page)


def test_responses_stay_folded_and_stay_text(browser, page):
    opened(browser, page)
    assert not browser.evaluate("document.querySelector('details.responses').open")
    assert browser.evaluate("document.querySelectorAll('.answer').length") == 0
    browser.evaluate("document.querySelector('details.responses').open = true")
    browser.wait("document.querySelectorAll('.answer').length > 0")
    assert browser.evaluate("document.querySelectorAll('.answer').length") == 20  # the rest on request
    assert browser.evaluate("document.querySelector('.answer blockquote').textContent").startswith("Sure <script>")
    assert browser.evaluate("document.querySelectorAll('.answer script, .answer img').length") == 0
    browser.evaluate("document.querySelector('.more').click()")
    assert browser.evaluate("document.querySelectorAll('.answer').length") == 40
    quiet(browser, page)


def test_strangers_names_stay_text_in_charts(browser, tmp_path):
    attack = "<img src=x onerror=alert(1)><b>bold</b>"
    rows = [(attack, replace(make_map(experts=4), model=attack)), ("other", make_map())]
    page = tmp_path / "page.html"
    write_page([ReportRun.read(map_run(tmp_path / "run", rows))], page)
    opened(browser, page)
    assert browser.evaluate("document.querySelectorAll('main img, main b:not(.mind b)').length") == 0
    assert attack in browser.evaluate("document.querySelector('#comparison svg').textContent")
    browser.evaluate("document.querySelector('.under details').open = true")
    browser.wait("document.querySelector('.under details table') !== null")
    assert attack in browser.evaluate("document.querySelector('.under details table').textContent")
    quiet(browser, page)


def test_a_cell_under_the_pointer_says_its_numbers(browser, page):
    opened(browser, page)
    layer, row, component = filled(page)
    x, y = cell(browser, layer, row)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.wait("!document.getElementById('tip').hidden", 10)
    said = browser.evaluate("document.getElementById('tip').textContent").splitlines()
    assert said[:2] == [f"layer: {layer}", f"component: {component}"]
    assert any(line.startswith("selected: ") for line in said)
    quiet(browser, page)


def test_hover_and_csv_show_the_numbers_of_the_file(browser, page):
    opened(browser, page)
    results = json.loads((page.parent / "moe" / "results.json").read_text())["maps"]["tiny"]
    table = browser.evaluate("charts.find(c => c.spec.title === 'Routed experts').spec.table")
    columns = list(table["columns"])
    for row, region in zip(table["rows"], results["experts"], strict=True):
        values = dict(zip(columns, row, strict=True))
        assert (values["layer"], values["expert"]) == (str(region["layer"]), str(region["expert"]))
        assert values["enrichment"] == pytest.approx(region["enrichment"], rel=1e-5)
        assert values["tokens"] == region["tokens"]


def test_a_spreadsheet_takes_no_cell_for_a_formula(browser, page):
    opened(browser, page)
    table = {"columns": {"name": "text", "n": "number"}, "rows": [["=HYPERLINK(1)", -3], ["@x", 0.5], ["-2+3", None]]}
    lines = browser.evaluate(f"csv({json.dumps(table)})").lstrip("\ufeff").split("\r\n")
    assert lines == ["name,n", "'=HYPERLINK(1),-3", "'@x,0.5", "'-2+3,", ""]
