"""Verification and stability on the page: every number is that of `results.json`."""

import json
from dataclasses import replace

import pytest

from pages import Page
from safelocus.analysis import words
from safelocus.evaluation.measures import proportion
from safelocus.report.grid import Span
from safelocus.report.page import sections_of, write_run_page
from safelocus.report.runs import ReportRun
from safelocus.scoring.comparison import Overlap
from safelocus.verification import Stability
from safelocus.verification.agreement import ScoreAgreement
from safelocus.verification.cells import Observation
from test_verification import made

NOISES = (1.0, 2.0)
RATES = {
    ("esi", "top"): [0.9, 0.2], ("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 0.97],
    ("snip", "top"): [0.95, 0.5], ("snip", "bottom"): [1.0, 1.0],
}  # fmt: skip
UTILITY = {key: [1.0, 0.8 if key[1] == "top" else 1.0] for key in RATES}


def close(row: dict, measure: dict) -> bool:
    return all(row[end] == pytest.approx(measure[end], abs=1e-5) for end in ("value", "low", "high", "n"))


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """(results.json, page, folder)"""
    folder = tmp_path_factory.mktemp("runs") / "verified"
    folder.mkdir()
    made(RATES, UTILITY, noises=NOISES, seeds=3, prompts=20).save(folder)
    assert write_run_page(folder, place=folder) == ["report.html", "curves.svg", "ranking-noise.svg", "curves-snip.svg"]
    return json.loads((folder / "results.json").read_text()), Page((folder / "report.html").read_text()), folder


def test_every_point_of_the_curves(verified):
    results, page, folder = verified
    (section,) = sections_of(ReportRun.read(folder))
    references = {chart.title: chart.reference for chart in section.parts[1].charts}
    of_first = [entry for entry in results["pooled"] if entry["scorer"] in ("esi", None)]
    assert len(of_first) == 3 * len(NOISES)
    for name, label in (("refusal", "Refusal"), ("utility", "Utility")):
        figure = page.figure(f"{label}, 10 weights (1 %)")
        rows = page.rows(figure["title"])
        assert len(rows) == len(of_first)
        assert references[figure["title"]] == pytest.approx(results["baseline"][name]["value"])
        for entry in of_first:
            at = (entry["selection"], f"{entry['noise']:g}")
            (row,) = [row for row in rows if (row["selection"], row["noise in sigma"]) == at]
            assert close(row, entry[name])
            assert row["cells"] == entry["num_cells"]


def test_scorers_are_ranked_as_in_the_file(verified):
    results, page, _ = verified
    ranking = results["rankings"]["noise"]
    assert {entry["scorer"] for entry in ranking} == {"esi", "snip"}
    for row in page.table("Levels at each scorer's own operating point"):
        scorer = next(entry["scorer"] for entry in ranking if words.method_label(entry["scorer"]) == row["scorer"])
        tops = [entry for entry in results["pooled"] if (entry["selection"], entry["scorer"]) == ("top", scorer)]
        levels = [tuple(Span(entry[name]).exact for name in ("refusal", "utility")) for entry in tops]
        assert (row["refusal"], row["utility"]) in levels
    first, second = (words.method_label(entry["scorer"]) for entry in ranking)
    table = page.words.partition("Scorers under noise: ")[2]
    assert table.index(first) < table.index(second)


def test_the_verdict_stands_there_whole(verified):
    results, page, _ = verified
    assert results["verdicts"]["noise"]["text"] in page.words


@pytest.mark.parametrize("states", [("top",), ("bottom", "random"), ("baseline", "top", "bottom", "random")])
def test_states_in_which_no_answer_can_be_scored(tmp_path, states):
    """A model may say nothing at all when it is disturbed, or even before."""
    found = made(RATES, UTILITY, noises=NOISES, seeds=2, prompts=8)

    def silent(observed):
        nothing = {name: proportion(0, 0) for name in observed.measures}
        return Observation(measures=nothing, outcomes=dict.fromkeys(observed.outcomes, "-" * 8))

    cells = [replace(c, observed=silent(c.observed)) if c.selection in states else c for c in found.cells]
    baseline = silent(found.baseline) if "baseline" in states else found.baseline
    replace(found, baseline=baseline, cells=cells).save(tmp_path)
    names = write_run_page(tmp_path, place=tmp_path)
    assert ("curves.svg" in names) == ("baseline" not in states)
    assert "undisturbed" in Page((tmp_path / "report.html").read_text()).words


def test_scorers_without_refusals_at_baseline_and_of_one_spelling(tmp_path):
    """A page of several scorers, though no refusal can be compared; each keeps its picture."""
    rates = {(scorer, "top"): [0.2] for scorer in ("esi", "runs/a b", "runs/a-b")} | {(None, "random"): [1.0]}
    found = made(rates, rates, seeds=2, prompts=8)
    found.save(tmp_path)
    names = write_run_page(tmp_path, place=tmp_path)
    assert {"curves-runs-a-b.svg", "curves-runs-a-b-2.svg"} <= set(names)
    nothing = {**found.baseline.measures, "refusal": proportion(0, 0)}
    outcomes = {**found.baseline.outcomes, "refusal": "-" * 8}
    replace(found, baseline=Observation(measures=nothing, outcomes=outcomes)).save(tmp_path)
    write_run_page(tmp_path, place=tmp_path)
    for cell in found.cells:
        cell.observed.outcomes["utility"] = "-" * 8
    replace(found).save(tmp_path)
    write_run_page(tmp_path, place=tmp_path)
    words_of = Page((tmp_path / "report.html").read_text()).words
    assert "right answers can no longer be told" in words_of
    assert f"{words.UNKNOWN} %" not in words_of


def test_stability(tmp_path):
    def agreement(a: str, both: int, rho: float) -> ScoreAgreement:
        overlap = Overlap.of(10_000, 100, 100, both)
        return ScoreAgreement(kind="prompts", a=a, b="second half", ratio=0.01, overlap=overlap, rho=rho)

    found = Stability(agreements=[agreement("first", 40, 0.5), agreement("again", 20, 0.4)], provenance={"model": "m"})
    found.save(tmp_path)
    write_run_page(tmp_path, place=tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    (known,) = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert known["num_pairs"] == 2
    assert f"{known['iou']:.3f} ({known['lowest']:.3f} to {known['highest']:.3f})" in page.words
