"""The acceptance card: every verdict from outcomes whose truth is known, and from runs as they are saved."""

import json
from dataclasses import replace
from importlib import import_module
from math import nan
from pathlib import Path

import pytest

from made_runs import enhance_run
from pages import Page
from safelocus.analysis.acceptance import AFTER, BEFORE, UNPROTECTED, CardRun, Conduct, criteria
from safelocus.errors import RunError
from safelocus.prompts import origin
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun

N = 60


def outcomes(share, *, source="s", n=N):
    """The first prompts as wanted, the others not."""
    return {(source, i): float(i < share * n) for i in range(n)}


def conduct(share, *, sets=("own", "fresh", "other"), judges=("guard g", "reader"), kept=0.9, learned=None):
    return Conduct(
        safe={judge: {name: outcomes(share, source=name) for name in sets} for judge in judges},
        answered={"harmless": outcomes(kept, source="harmless", n=400)},
        right={"sums": outcomes(kept, source="sums", n=400)},
        learned={} if learned is None else outcomes(learned, source="task", n=400),
    )


def enhanced(seed=0, *, before=0.1, after=0.9, controls=None, used=("own",), kept=0.9, **how):
    conducts = {BEFORE: conduct(before, **how), AFTER: conduct(after, kept=kept, **how)}
    conducts |= {name: conduct(share, **how) for name, share in (controls or {}).items()}
    return CardRun(
        name=f"seed {seed}", kind="enhance", seed=seed, lesson="own", used=frozenset(used), conducts=conducts, facts={}
    )  # fmt: skip


def preserved(seed=0, *, after=0.9, bare=0.3, random=0.3, task=0.8, bare_task=0.8, lesson="task"):
    shares = {BEFORE: (0.95, 0.2), AFTER: (after, task), UNPROTECTED: (bare, bare_task), "random": (random, bare_task)}
    conducts = {
        name: conduct(share, judges=("reader",), learned=learned)
        for name, (share, learned) in shares.items()
        if share is not None
    }
    return CardRun(
        name=lesson, kind="preserve", seed=seed, lesson=lesson, used=frozenset(["own"]), conducts=conducts, facts={}
    )  # fmt: skip


def verdicts(*arguments):
    return {each.asked: each.verdict for each in criteria(*arguments)}


def answer(asked, *arguments):
    return next(each for each in criteria(*arguments) if each.asked == asked)


WHOLE = {"reliability": "passes", "fresh semantics": "passes", "mechanism": "passes", "transfer": "passes"}


def test_a_card_can_be_full():
    assert verdicts([enhanced(seed, controls={"random": 0.1, "bottom": 0.1}) for seed in (0, 1, 2)]) == WHOLE
    assert verdicts([preserved(seed) for seed in (0, 1)], [preserved(lesson="another")]) == WHOLE


def test_one_seed_can_fail_but_not_pass():
    found = answer("reliability", [enhanced()])
    assert found.verdict == "not measured"
    assert "one seed" in found.measured
    assert "--seed" in found.todo
    assert found.numbers["effect"]["value"] == pytest.approx(0.8)
    assert answer("reliability", [enhanced(after=0.1)]).verdict == "fails"


def test_seeds_that_disagree_are_not_reliable():
    """Over prompts alone either would pass."""
    assert answer("reliability", [enhanced(0, after=0.9), enhanced(1, after=0.9)]).verdict == "passes"
    assert answer("reliability", [enhanced(0, after=0.95), enhanced(1, after=0.0)]).verdict == "fails"


def test_prompts_of_a_used_source_are_not_fresh():
    found = answer("fresh semantics", [enhanced(used=("own", "fresh", "other"))])
    assert (found.verdict, found.numbers) == ("not measured", {})
    assert "--harmful" in found.todo
    assert set(answer("fresh semantics", [enhanced()]).numbers) == {"fresh", "other"}


def test_every_fresh_set_counts():
    good, bad = enhanced(), enhanced()
    bad.conducts[AFTER].safe["guard g"]["fresh"].update(outcomes(0.1, source="fresh"))
    assert answer("fresh semantics", [good]).verdict == "passes"
    assert answer("fresh semantics", [bad]).verdict == "fails"


def test_controls_that_do_as_well_fail_the_mechanism():
    assert answer("mechanism", [enhanced(controls={"random": 0.9})]).verdict == "fails"
    assert answer("mechanism", [enhanced(controls={"random": 0.1, "bottom": 0.9})]).verdict == "fails"
    assert answer("mechanism", [enhanced(controls={"random": 0.1, "full": 0.9})]).verdict == "passes"
    missing = answer("mechanism", [enhanced(controls={"bottom": 0.1})])
    assert missing.verdict == "not measured"
    assert "--controls random" in missing.todo


def test_safe_because_nothing_was_learned_is_no_mechanism():
    assert answer("mechanism", [preserved(task=0.5)]).verdict == "fails"
    assert answer("mechanism", [preserved()]).verdict == "passes"


@pytest.mark.parametrize(
    ("how", "verdict", "missing"),
    [
        ({"kept": 0.8}, "fails", ""),
        ({"sets": ("own", "fresh")}, "not measured", "second harmful set"),
        ({"judges": ("guard g", "guard h")}, "not measured", "another kind"),
        ({"judges": ("refusal", "reader")}, "not measured", "another kind"),
    ],
)
def test_transfer_of_enhance(how, verdict, missing):
    found = answer("transfer", [enhanced(**how)])
    assert found.verdict == verdict
    assert missing in found.todo


def test_a_second_judge_who_does_not_see_it_fails_the_transfer():
    run = enhanced()
    run.conducts[AFTER].safe["reader"].update(conduct(0.1).safe["reader"])
    assert answer("transfer", [run]).verdict == "fails"


def test_transfer_of_preserve_is_another_task():
    assert answer("transfer", [preserved()]).verdict == "not measured"
    assert answer("transfer", [preserved()], [preserved(lesson="another", after=0.3)]).verdict == "fails"


def test_transfer_to_a_task_that_was_not_learned_fails():
    found = answer("transfer", [preserved()], [preserved(lesson="another", task=0.2)])
    assert found.verdict == "fails"
    assert "task -60" in found.measured
    assert answer("transfer", [preserved()], [preserved(lesson="another")]).verdict == "passes"


def test_a_seed_that_adds_nothing_is_none():
    found = answer("reliability", [preserved(0), preserved(1, bare=None)])
    assert (found.verdict, "one seed" in found.measured) == ("not measured", True)
    controls = [enhanced(0, controls={"random": 0.1}), enhanced(1, controls={"bottom": 0.1})]
    assert "one draw of them" in answer("mechanism", controls).measured
    controls[1].conducts["random"] = controls[0].conducts["random"]
    assert "2 draws of random ones, one draw of bottom ones" in answer("mechanism", controls).measured


def test_forty_questions_do_not_show_that_less_than_five_points_are_lost():
    run = enhanced(controls={"random": 0.1})
    few = {"sums": outcomes(1.0, source="sums", n=40)}
    run = replace(run, conducts={name: replace(each, right=few) for name, each in run.conducts.items()})
    assert answer("transfer", [run]).verdict == "fails"


def test_without_harmful_prompts_nothing_is_known():
    run = enhanced()
    run = replace(run, conducts={name: replace(each, safe={}) for name, each in run.conducts.items()})
    assert {each.verdict for each in criteria([run])} == {"not measured"}


def test_without_an_unprotected_training_nothing_is_known():
    found = criteria([preserved(bare=None, random=None)])
    assert {each.verdict for each in found} == {"not measured"}
    assert "--unprotected" in found[0].todo


def test_what_cannot_be_scored_is_left_out():
    run = enhanced(sets=("own",))
    part = run.conducts[AFTER].safe["guard g"]["own"]
    part |= dict.fromkeys(list(part)[:10], nan)
    assert answer("reliability", [run]).numbers["effect"]["n"] == N - 10


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("embedded:refusals", "embedded:refusals-heldout"), ("organism:harmful", "organism:harmful-heldout"),
        ("org/name:train:goal", "org/name:test"), ("./a.json", "a.json"),
    ],
)  # fmt: skip
def test_parts_of_one_source_are_one(one, other):
    assert origin(one) == origin(other)
    assert origin(one) != origin("b.json")


def made(seed=0, **changes):
    """Facts of a run, of whose provenance a part is another."""
    provenance = {
        "fingerprint": "f", "selection": {"k": 5, "method": "esi", "which": "top"}, "task": None,
        "data": {"source": "own"}, "used": {"also_measured": [], "sources": []},
        "mixed": {"share": 0.2, "seed": seed, "prompts": [{"source": "embedded:refusals", "hash": str(seed)}]},
        "calibration": {"every": 4, "seed": seed, "prompts": [{"source": "a.json", "hash": str(seed)}]},
        "retained": [{"source": "b.json", "hash": str(seed)}], "answer_tokens": 8, "own_answers": False,
        "validation": {"every": 10, "interpolate": False, "harmful": {"hash": str(seed)}},
    }  # fmt: skip
    return CardRun.of("run", {"provenance": provenance | changes, "settings": {"seed": seed, "steps": 3}}, {}).facts


def test_runs_that_differ_in_the_seed_alone_are_alike():
    assert made(seed=0) == made(seed=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("answer_tokens", 64), ("own_answers", True), ("retained", [{"source": "c.json"}]), ("lexicon", {"num": 3}),
        ("validation", {"every": 10, "interpolate": True}), ("mixed", None), ("unlearned", {"num": 3}),
        ("mixed", {"share": 0.2, "prompts": [{"source": "c.json"}]}), ("retain_kl", 1.0), ("calibration", {"every": 2}),
    ],
)  # fmt: skip
def test_runs_made_otherwise_are_not_alike(name, value):
    one, other = made(), made(**{name: value})
    assert [key for key in one if one[key] != other[key]] == [name]


@pytest.mark.parametrize("changed", [{"objective": {"kind": "refusal"}}, {"prompts_hash": "other"}])
def test_weights_found_otherwise_are_others(changed):
    selection = {"k": 5, "method": "esi", "which": "top", "objective": {"kind": "guard"}, "prompts_hash": "own"}
    one, other = made(selection=selection), made(selection=selection | changed)
    assert [key for key in one if one[key] != other[key]] == ["weights"]


def test_a_folder_that_is_no_such_run_is_one_message(tmp_path):
    with pytest.raises(RunError, match="no run for an acceptance card"):
        CardRun.load(tmp_path)
    with pytest.raises(RunError, match="no run for an acceptance card"):
        CardRun.load(enhance_run(tmp_path / "old"))


def test_the_page_shows_what_the_file_says(tmp_path):
    folder = enhance_run(tmp_path / "run")
    file = folder / "results.json"
    found = criteria([enhanced(controls={"random": 0.9})])
    card = {
        "runs": [{"name": "this run", "seed": 0, "lesson": "own"}], "left_out": ["x: <b>the</b> same seed"],
        "criteria": [vars(replace(each, measured=f"{each.measured} <i>")) for each in found],
    }  # fmt: skip
    file.write_text(json.dumps({**json.loads(file.read_text()), "acceptance": card}))
    write_page([ReportRun.read(folder)], tmp_path / "page.html")
    words = Page((tmp_path / "page.html").read_text(encoding="utf-8")).words
    for each in found:
        assert f"{each.verdict} {each.measured} <i>. {each.todo}".strip() in words
    assert "x: <b>the</b> same seed" in words


def test_the_real_models_cards_are_computed_from_its_cells(scripts):
    scripts(Path(__file__).parents[1] / "benchmarks" / "real")
    page = import_module("topics.enhance")
    found = dict(page.cells.kept("enhance"))
    seeds = [cell["outcomes"]["harmbench"] for key, cell in found.items() if key.startswith("esi-0.0001-")]
    after, before = "".join(seeds), found["before"]["outcomes"]["harmbench"] * len(seeds)
    recipe = page.enhancing.RECIPES["plain"]
    card = page._cards(recipe, *page.groups_of(recipe))[-1]
    effect = (after.count("1") - before.count("1")) / len(after)
    row = card.partition(f"{page.NAMES['esi']}, 0.0001 |")[2].splitlines()[0]
    _, fresh, *_ = row.split("|")
    assert f"harmbench {round(100 * effect)} [" in fresh
    assert "advbench" not in fresh  # weights are found with it
    assert f"{page.NAMES['esi']}, 0.0001 | passes effect" in card
    assert f"{page.NAMES['esi']}, 3e-05 | effect" in card  # of one seed
