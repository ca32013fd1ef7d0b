"""Verification: interventions, intervals over seeds and prompts, cells, verdicts, ranking, stability."""

import dataclasses
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch
from scipy import stats

import safelocus as sl
from safelocus.analysis.claims import HOLDS, NOT_ONLY_SAFETY, UNDECIDED, verify_claims
from safelocus.errors import PromptError, RunError, SafelocusError, SelectionError
from safelocus.evaluation.judges import GuardJudge, RefusalMatcher
from safelocus.evaluation.measures import Measure, paired_difference, proportion
from safelocus.report.verification import (
    _brief,
    curves_charts,
    ranking_chart,
    ranking_grid,
    settings_grid,
    stability_grid,
)
from safelocus.run.files import seal
from safelocus.scoring.run import sigma
from safelocus.selection.sparse import gather
from safelocus.verification import Cell, Noise, Setting, Transplant, Verification, Zero, intervening
from safelocus.verification import run as verifying
from safelocus.verification.cells import Observation
from safelocus.verification.interventions import make_interventions, normals
from safelocus.verification.plan import random_selection
from safelocus.verification.pooling import difference, level
from safelocus.verification.verdict import effect_of
from tiny_targets import PROMPTS, dense, moe


@pytest.fixture(scope="module")
def tiny():
    target = dense()
    return target, sl.score(target, PROMPTS[:3], objective=sl.Refusal(), progress=False)


HELD_OUT = sl.read_prompts(["what is a fox?", "who is the dog?", "over the lazy dog", "how naive"])
QUICK = {"prompts": HELD_OUT, "batch_size": 8, "max_new_tokens": 6, "progress": False}


# interventions


@pytest.mark.parametrize("make", [dense, moe])
def test_noise_is_scaled_by_each_matrix(make):
    target = make()
    selection = random_selection(target, 4000, seed=0)
    before = gather(target.model, selection)
    with intervening(target, selection, Noise(2.5), seed=3):
        after = gather(target.model, selection)
    for name, index in selection.coordinates.items():
        layout = target.layout.tensors[name]
        scale = sigma(layout, target.model.get_parameter(name).detach())[layout.matrix_of(index)]
        expected = before[name] + 2.5 * scale * normals(name, index, 3)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)


def test_normals_are_normal_and_belong_to_their_weight():
    index = torch.arange(200_000)
    drawn = normals("a", index, 0)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    some = torch.tensor([17, 4, 199_999])
    assert torch.equal(normals("a", some, 0), drawn[some])  # in any order, in any selection
    for other in (normals("a", index, 1), normals("b", index, 0)):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.01
    assert normals("a", torch.tensor([2**40]), 0).isfinite().all()


def test_zero_and_transplant():
    target, other = dense(0), dense(1)
    selection = random_selection(target, 500, seed=0)
    with intervening(target, selection, Zero()):
        assert all(bool((v == 0).all()) for v in gather(target.model, selection).values())
    theirs = gather(other.model, selection)
    with intervening(target, selection, Transplant(other.model)):
        found = gather(target.model, selection)
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    with (
        pytest.raises(SelectionError, match="shape"),
        intervening(target, selection, Transplant(dense(intermediate_size=40).model)),
    ):
        pass


@pytest.mark.parametrize(
    ("names", "noises", "message"),
    [
        (("noise",), (), "--noise"),
        (("transplant",), (1,), "--transplant-from"),
        (("shake",), (1,), "shake"),
        ((), (1,), "no intervention"),
    ],
)
def test_interventions_that_cannot_be_made(names, noises, message):
    with pytest.raises(SafelocusError, match=message):
        make_interventions(names, noises)


@pytest.mark.parametrize("noise", [0, -1, math.nan, math.inf])
def test_a_noise_is_a_positive_number(noise):
    with pytest.raises(SafelocusError, match="noise"):
        Noise(noise)


# intervals


@pytest.mark.parametrize(("seed_effect", "prompt_effect"), [(0.0, 0.0), (1.5, 0.0), (0.0, 2.0), (1.0, 1.0)])
def test_intervals_cover_the_truth(seed_effect, prompt_effect):
    """95 % intervals over 5 seeds x 40 prompts; independence of all entries would give far fewer."""
    generator = np.random.default_rng(0)

    def rate(seeds, prompts):
        shape = (seeds, prompts)
        logits = seed_effect * generator.standard_normal(shape[0])[:, None]
        return 1 / (1 + np.exp(-(logits + prompt_effect * generator.standard_normal(shape[1])[None] - 0.5)))

    truth = rate(3000, 1000).mean()
    hits = naive = 0
    for _ in range(300):
        outcomes = (generator.random((5, 40)) < rate(5, 40)).astype(float)
        found = level(outcomes)
        hits += found.low <= truth <= found.high
        independent = proportion(int(outcomes.sum()), outcomes.size)
        naive += independent.low <= truth <= independent.high
    assert hits >= 0.9 * 300
    if seed_effect or prompt_effect:
        assert naive < 0.85 * 300


def test_levels_at_the_ends_keep_a_width():
    found = level(np.ones((5, 40)))
    assert (found.value, found.high, found.n) == (1.0, 1.0, 200)
    assert 0.85 < found.low < 0.95  # as for 40 prompts, not for 200
    unknown = level(np.full((2, 3), np.nan))
    assert (unknown.value, unknown.n) == (None, 0)


def test_difference_is_paired_by_prompt():
    generator = np.random.default_rng(1)
    base = (generator.random(60) < 0.5).astype(float)
    first, second = np.tile(base, (5, 1)), np.tile(base, (5, 1))
    first[:, :6] = 1 - first[:, :6]
    paired = difference(first, second)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    shuffled = difference(first, second[:, generator.permutation(60)])
    assert paired.high - paired.low < 0.6 * (shuffled.high - shuffled.low)
    none = difference(second, second)
    assert none.value == 0
    assert none.high == pytest.approx(-none.low)
    assert 0.02 < none.high < 0.05  # not of zero width
    assert difference(first, second, level=0.999).high > paired.high


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_rare_losses_are_seldom_taken_for_none(seeds):
    """Of prompts that are lost at 5 %, whatever the seed, "less than 5 % are lost" is said in one sample of 40."""
    generator, num, wrong = np.random.default_rng(0), 300, 0
    for prompts in (40, 100):
        for _ in range(num):
            lost = np.tile(generator.random(prompts) < 0.05, (seeds, 1)).astype(float)
            wrong += difference(-lost).low > -0.05
    assert wrong <= 0.025 * 2 * num


@pytest.mark.parametrize("lost", [0, 1, 20, 39, 40])
def test_one_seed_has_newcombes_interval(lost):
    first, second = np.ones((1, 40)), np.array([[0.0] * lost + [1.0] * (40 - lost)])
    known = paired_difference([True] * 40, [bool(x) for x in second[0]])
    for found in (difference(second, first), difference(second - first)):
        assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.03)  # Student's quantile


def test_seeds_are_paired_by_their_number():
    """One side lacks the first seed, the other the second."""
    first, second = (
        np.repeat([[seed] for seed in seeds], 20, axis=1) for seeds in ([np.nan, 0, 1, 1, 0], [1, np.nan, 1, 1, 0])
    )
    found, whole = (difference(a, b, paired="seeds") for a, b in ((first, second), (first[2:], second[2:])))
    unpaired = difference(first, second[:4], paired="seeds")
    assert found.high - found.low < 0.5 * (unpaired.high - unpaired.low)
    assert whole.value == 0


def test_difference_leaves_unscorable_prompts_out():
    first, second = np.array([[1, 1, np.nan, 0.0]]), np.array([[0, 1, 1, np.nan]])
    assert difference(first, second).value == pytest.approx(1 / 2)  # of the two that both sides have
    assert difference(np.tile(first, (2, 1)), np.tile(second, (2, 1))).value == pytest.approx(1 / 2)
    assert difference(np.array([[np.nan]])).value is None


# cells


def test_cells_and_their_controls(tiny):
    target, scores = tiny
    found = sl.verify(target, scores, noises=(1.0, 5.0), ratios=(0.01, 0.02), seeds=3, random_draws=2, **QUICK)
    for ratio in (0.01, 0.02):
        for noise in (1.0, 5.0):
            cells = [c for c in found.cells if (c.setting.ratio, c.setting.noise) == (ratio, noise)]
            assert {c.setting.k for c in cells} == {scores.select(ratio).k}  # all of equal size
            count = {which: sum(c.selection == which for c in cells) for which in ("top", "bottom", "random")}
            assert count == {"top": 3, "bottom": 3, "random": 6}
            assert {c.draw for c in cells if c.selection == "random"} == set(range(6))
            assert {c.seed for c in cells} == {0, 1, 2}
    assert len({cell.key for cell in found.cells}) == len(found.cells) == 48
    values = found.to_json()
    json.dumps(values, allow_nan=False)
    assert {"baseline", "cells", "verdicts", "rankings", "pooled"} <= set(values)
    expected = {"selection", "scorer", "ratio", "k", "intervention", "noise", "seed", "draw"}
    assert expected | {"asr", "refusal", "partial", "incoherent"} == set(values["cells"][0])
    assert set(values["cells"][0]["refusal"]) == {"value", "low", "high", "n"}


def test_a_cell_is_what_a_model_with_those_weights_does(tiny):
    """Against weights changed by hand, and evaluated alone."""
    target, scores = tiny
    found = sl.verify(target, scores, noises=(8.0,), seeds=2, selections=("top",), **QUICK)
    changed = dense()
    for name, index in scores.select(0.01).coordinates.items():
        weight, layout = changed.model.get_parameter(name), target.layout.tensors[name]
        scale = sigma(layout, weight.detach())[layout.matrix_of(index)]
        with torch.no_grad():
            weight.view(-1)[index] += 8.0 * scale * normals(name, index, 1)
    alone = sl.evaluate(changed, harmful=HELD_OUT, batch_size=8, max_new_tokens=6, progress=False)
    assert found.cells[1].seed == 1
    assert found.cells[1].observed.measures == alone.measures


def test_the_model_comes_back_bit_for_bit(tiny):
    target, scores = tiny
    before = target.fingerprint()
    sl.verify(
        target, scores, interventions=("noise", "zero", "transplant"), noises=(3.0,), seeds=2, transplant_from=dense(1),
        **QUICK,
    )  # fmt: skip
    assert target.fingerprint() == before


def test_stopped_within_a_cell_the_model_comes_back_and_the_run_resumes(tiny, tmp_path, monkeypatch):
    target, scores = tiny
    before = target.fingerprint()
    options = {"noises": (2.0, 4.0), "seeds": 2, **QUICK}
    whole = sl.verify(target, scores, **options)
    real, calls = verifying.evaluate, []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == 5:  # the baseline and three cells are done; the weights are disturbed
            assert target.fingerprint() != before
            raise RuntimeError
        return real(*arguments, **named)

    monkeypatch.setattr(verifying, "evaluate", stopped)
    with pytest.raises(RuntimeError):
        sl.verify(target, scores, checkpoint=tmp_path / "c", **options)
    assert target.fingerprint() == before
    file = tmp_path / "c" / "cells.jsonl"
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as opened:
        opened.write('{"key": "cut sho')  # as a crash would leave it
    calls[:] = [1] * 10
    resumed = sl.verify(target, scores, checkpoint=tmp_path / "c", **options)
    assert len(calls) == 10 + 1 + len(whole.cells) - 3  # the baseline again, and what was missing
    assert resumed.to_json() == whole.to_json()


def test_weights_that_do_not_come_back_are_an_error(tiny, monkeypatch):
    target, scores = dense(), tiny[1]
    real = verifying.evaluate

    def meddling(*arguments, **named):
        with torch.no_grad():
            target.model.lm_head.weight[0, 0] += 1
        return real(*arguments, **named)

    monkeypatch.setattr(verifying, "evaluate", meddling)
    with pytest.raises(RunError, match=r"lm_head\.weight"):
        sl.verify(target, scores, noises=(1.0,), seeds=1, **QUICK)


def test_prompts_that_were_scored_with_are_refused(tiny):
    target, scores = tiny
    seen = sl.read_prompts([PROMPTS[1].upper(), *HELD_OUT.texts])
    with pytest.raises(PromptError, match="1 of 5 prompts were used"):
        sl.verify(target, scores, **{**QUICK, "prompts": seen})
    found = sl.verify(target, scores, noises=(1.0,), seeds=1, allow_seen=True, **{**QUICK, "prompts": seen})
    assert "1 of 5" in found.notes[0]
    provenance = dataclasses.replace(scores.provenance, extra={})
    silent = dataclasses.replace(scores, provenance=provenance)
    found = sl.verify(target, silent, noises=(1.0,), seeds=1, **{**QUICK, "prompts": seen})
    assert "do not say" in found.notes[0]


def test_scores_of_another_model_are_refused(tiny):
    _, scores = tiny
    with pytest.raises(SelectionError, match="--allow-mismatch"):
        sl.verify(dense(5), scores, noises=(1.0,), seeds=1, **QUICK)
    found = sl.verify(dense(5), scores, noises=(1.0,), seeds=1, allow_mismatch=True, **QUICK)
    assert "another model" in found.notes[0]


def test_scores_fit_the_model_in_a_wider_dtype():
    target = dense()
    target.model.to(torch.bfloat16)
    scores = sl.score(target, PROMPTS[:2], objective=sl.Refusal(), progress=False)
    target.model.float()
    assert not sl.verify(target, scores, noises=(1.0,), seeds=1, selections=("top",), **QUICK).notes


def test_a_selection_has_random_controls_and_no_bottom(tiny):
    target, scores = tiny
    selection = scores.select(0.02, granularity="row")
    found = sl.verify(target, {"rows": selection}, noises=(1.0,), seeds=2, **QUICK)
    assert [(c.selection, c.scorer) for c in found.cells] == [("top", "rows")] * 2 + [("random", None)] * 2
    assert {c.setting.k for c in found.cells} == {selection.k}
    assert found.settings[0].ratio is None
    assert f"{selection.k:,} weights" in str(found.settings[0])


def test_random_selections_are_eligible_and_of_exact_size():
    target = moe()
    a, b = random_selection(target, 3000, seed=0), random_selection(target, 3000, seed=1)
    assert a.k == b.k == 3000
    assert a.iou(b) < 0.2
    assert set(a.coordinates) <= set(target.layout.eligible_tensors)


def test_saved_and_loaded(tiny, tmp_path):
    target, scores = tiny
    found = sl.verify(target, scores, noises=(1.0,), interventions=("noise", "zero"), seeds=2, **QUICK)
    found.save(tmp_path)
    assert (
        Verification.load(tmp_path).to_json() == found.to_json() == json.loads((tmp_path / "results.json").read_text())
    )
    (tmp_path / "cells.jsonl").write_text("")
    with pytest.raises(RunError, match="changed since"):
        Verification.load(tmp_path)
    seal(tmp_path)
    with pytest.raises(RunError, match="damaged"):
        Verification.load(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match="expected a run of `verify`"):
        Verification.load(tmp_path)


# verdicts, on outcomes made by hand


def made(refusal, utility=None, *, base=None, seeds=5, prompts=40, noises=(1.0,), perplexity=None):
    """Cells with given rates: {(scorer, selection): one rate per noise}; outcomes are drawn, not exact.

    perplexity: {(scorer, selection): one per noise}, before 4; a seed has a hundredth more than the one before it.
    """
    generator = np.random.default_rng(0)

    def observed(rates):
        outcomes = {
            name: "".join("01"[int(x)] for x in generator.random(prompts) < rate) for name, rate in rates.items()
        }
        measures = {name: proportion(text.count("1"), prompts) for name, text in outcomes.items()}
        return Observation(measures=measures, outcomes=outcomes)

    cells = []
    for (scorer, selection), rates in refusal.items():
        for place, noise in enumerate(noises):
            for seed in range(seeds):
                values = {"refusal": rates[place]}
                if utility is not None:
                    values["utility"] = utility[scorer, selection][place]
                seen = observed(values)
                if perplexity is not None:
                    seen.measures["perplexity"] = surprised(perplexity[scorer, selection][place] * 1.01**seed)
                cells.append(
                    Cell(
                        selection=selection, scorer=scorer if selection != "random" else None,
                        setting=Setting(ratio=0.01, k=10, intervention="noise", noise=noise), seed=seed,
                        draw=seed if selection == "random" else None, observed=seen,
                    )
                )  # fmt: skip
    base = {"refusal": 1.0} | ({} if utility is None else {"utility": 1.0}) if base is None else base
    before = observed(base)
    if perplexity is not None:
        before.measures["perplexity"] = surprised(4.0)
    return Verification(baseline=before, cells=cells, provenance={"model": "made"})


def surprised(perplexity):
    return Measure(value=perplexity, low=perplexity / 2, high=perplexity * 2, n=10)


CONTROLS = {("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 0.98]}


@pytest.mark.parametrize(
    ("refusal", "utility", "kind", "words"),
    [
        ([0.9, 0.2], [1.0, 0.95], "specific", "the damage is specific"),
        ([0.9, 0.2], [0.6, 0.2], "general", "the damage is general"),
        ([0.9, 0.6], [0.6, 0.0], "general", "Utility suffers more than refusals"),
        ([1.0, 0.99], [1.0, 1.0], "none", "no contrast"),
        ([0.9, 0.2], None, "unclear", "Utility was not measured"),
    ],
)
def test_verdicts(refusal, utility, kind, words):
    controls = (
        None if utility is None else {("esi", "top"): utility, ("esi", "bottom"): [1, 1], ("esi", "random"): [1, 1]}
    )
    found = made({("esi", "top"): refusal, **CONTROLS}, controls, noises=(1.0, 3.0))
    assert found.verdict.kind == kind
    assert words in found.verdict.text
    assert "Of 2 settings" in found.verdict.text
    assert f"{found.verdict.effect.fall.value:.2f}" in found.verdict.text
    if kind != "none":
        assert found.verdict.effect.beyond_random.low > 0


@pytest.mark.parametrize(
    ("refusal", "utility", "words"),
    [
        ([0.9, 0.2], None, "That is more than chance, but no controls were disturbed"),
        ([1.0, 1.0], None, "That may be chance, but no controls were disturbed"),
        ([0.9, 0.2], [1.0, 0.95], "Refusals suffer more than twice as much as utility"),
    ],
)
def test_without_controls_a_verdict_says_what_it_knows(refusal, utility, words):
    found = made({("esi", "top"): refusal}, utility and {("esi", "top"): utility}, noises=(1.0, 3.0))
    assert found.verdict.kind == "unclear"
    assert words in found.verdict.text
    assert "Of 2 settings this is the one at which most refusals are lost" in found.verdict.text
    assert not [word for word in ("clear contrast", "against two controls", "far more") if word in found.verdict.text]


def test_random_weights_of_one_size_are_disturbed_once_whatever_they_are_beside():
    target = dense()
    first, second = (random_selection(target, 50, seed=seed) for seed in (5, 6))
    found = sl.verify(target, {"a": first, "b": second}, noises=(1.0,), seeds=3, **QUICK)
    random = [cell.key for cell in found.cells if cell.selection == "random"]
    assert len(random) == len(set(random)) == 3
    assert found.pool("random", None, found.settings[0]).num_cells == 3


@pytest.mark.parametrize(("numbers", "kind", "words"), [
    ([9.0, 9.0], "general", "no number, or 2.25 times and more, what it was"),
    ([4.0], "unclear", "no number, or 1 times and more, what it was"),
    ([], "general", "no number, whatever the seed, beside what it was"),
])  # fmt: skip
def test_a_perplexity_that_is_no_number_counts_as_broken(numbers, kind, words):
    perplexity = {("esi", "top"): [9.0], ("esi", "bottom"): [4.0], ("esi", "random"): [4.2]}
    found = made({("esi", "top"): [0.2], ("esi", "bottom"): [1], ("esi", "random"): [1]}, perplexity=perplexity)
    top = [cell for cell in found.cells if cell.selection == "top"]
    for number, cell in enumerate(top):
        value = numbers[number] if number < len(numbers) else None
        cell.observed.measures["perplexity"] = Measure(value=value, low=value, high=value, n=10 if value else 0)
    assert found.verdict.kind == kind
    assert found.verdict.effect.perplexity.value is None
    assert words in found.verdict.text
    assert "no number" in settings_grid(found).rows[1]
    (claim,) = verify_claims(found)
    assert "perplexity no number" in claim.measured
    assert claim.verdict == (NOT_ONLY_SAFETY if kind == "general" else HOLDS)


def test_answers_to_tasks_that_cannot_be_scored_do_not_make_damage_specific():
    rates = {("esi", "top"): [0.1], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    found = made(rates, {key: [1.0] for key in rates})
    assert found.verdict.kind == "specific"
    for cell in found.cells:
        if cell.selection == "top":
            cell.observed.outcomes["utility"] = "-" * 28 + "1" * 12
    verdict = dataclasses.replace(found).verdict
    assert (verdict.kind, verdict.effect.unscored_utility) == ("unclear", 0.7)
    assert "70 % of the answers to tasks under it could not be scored" in verdict.text
    assert "twice as much" not in verdict.text


def test_no_more_is_lost_than_was_there():
    """The baseline is that of the prompts that could be scored."""
    rates = {("esi", "top"): [0.0], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    found = made(rates, {key: [1.0] for key in rates})
    for state in (found.baseline, *(cell.observed for cell in found.cells)):
        disturbed = state.outcomes["refusal"] == "0" * 40
        state.outcomes["refusal"] = "0" * 20 + "-" * 15 + "0" * 5 if disturbed else "1" * 20 + "0" * 20
    found.baseline.measures["refusal"] = proportion(20, 40)
    effect = found.verdict.effect
    assert effect.fall.value == 0.8
    assert effect.net.value == pytest.approx(1)
    assert "from 0.80 to 0.00" in found.verdict.text


def test_answers_that_cannot_be_scored_are_no_missing_contrast():
    found = made({("esi", "top"): [0.2], ("esi", "bottom"): [1], ("esi", "random"): [1]})
    for cell in found.cells:
        if cell.selection == "top":
            cell.observed.outcomes["refusal"] = "-" * 40
    assert found.verdict.kind == "unclear"
    assert "no answer under the top selection by esi could be scored" in found.verdict.text


def test_few_questions_do_not_make_damage_specific():
    """What one of them that changed sides would leave counts in the units of what is compared."""
    rates = {("esi", "top"): [0.4], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    found = made(rates, {key: [1.0] for key in rates})
    assert found.verdict.kind == "specific"
    few = made(rates)
    for state in (few.baseline, *(cell.observed for cell in few.cells)):
        state.outcomes["utility"] = "11110000"
        state.measures["utility"] = proportion(4, 8)
    margin = few.verdict.effect.margin
    assert margin.value == pytest.approx(few.verdict.effect.fall.value)
    assert margin.value - margin.low > 2 * 2 / (8 + 2)  # Student's quantile is above 2
    # it is not shown to be general either: none of the few was lost
    assert few.verdict.kind == "unclear"
    assert "more questions would tell" in few.verdict.text
    assert "damage is" not in few.verdict.text
    (claim,) = verify_claims(few)
    assert claim.verdict == HOLDS
    assert "Refusals rest on these weights; whether" in _brief(few, few.verdict)


def test_the_margin_widens_with_the_number_of_settings():
    rates = {("esi", "top"): [0.4, 0.4], ("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 1.0]}
    utility = {("esi", "top"): [0.8, 0.8], ("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 1.0]}
    found = made(rates, utility, noises=(1.0, 3.0))
    one, many = (effect_of(found, "esi", found.settings[0], num_looks=number) for number in (1, 8))
    assert many.margin.value == one.margin.value
    assert many.margin.low < one.margin.low
    assert many.net.value == one.net.value
    assert many.net.low < one.net.low
    assert many.to_json()["margin"] == many.margin.to_json()


def test_what_is_not_shown_is_not_said_on_the_page():
    """Nor in the verdict: without controls, without a contrast, and where half of the answers could not be scored."""
    rates = {("esi", "top"): [0.2], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    alone = made({("esi", "top"): [0.2]}, {("esi", "top"): [1.0]})
    no_contrast = made({**rates, ("esi", "top"): [1.0]}, {key: [0.5] for key in rates})
    unscored = made(rates, {key: [1.0] for key in rates})
    for cell in unscored.cells:
        if cell.selection == "top":
            refusals = cell.observed.outcomes["refusal"]
            cell.observed.outcomes["refusal"] = "-" * (len(refusals) - 4) + refusals[-4:]
    for found, kind in ((alone, "unclear"), (no_contrast, "none"), (unscored, "unclear")):
        assert found.verdict.kind == kind
        assert "damage is" not in found.verdict.text
        assert _brief(found, found.verdict).startswith("Nothing shows that refusals rest on these weights")
    assert "90 % of the answers under it could not be scored, and do not count. So few" in unscored.verdict.text


def test_a_setting_without_numbers_does_not_hide_one_with_some():
    rates = {("esi", "top"): [1.0, 1.0], ("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [0.98, 1.0]}
    found = made(rates, {key: [1.0, 1.0] for key in rates}, noises=(1.0, 3.0))
    for cell in found.cells:
        if cell.selection == "top" and cell.setting.noise == 3.0:
            cell.observed.outcomes["refusal"] = "-" * len(cell.observed.outcomes["refusal"])
            cell.observed.outcomes["utility"] = "-" * len(cell.observed.outcomes["utility"])
    assert found.verdict.effect.setting.noise == 1.0
    assert found.verdict.kind == "none"


def half_scored(found, noise):
    """The same, where only few answers under the top selection could be scored at this strength."""
    for cell in found.cells:
        if cell.selection == "top" and cell.setting.noise == noise:
            refusals = cell.observed.outcomes["refusal"]
            cell.observed.outcomes["refusal"] = "-" * 24 + refusals[24:]
    return found


def test_a_setting_of_which_little_is_known_hides_no_other_and_shows_nothing():
    rates = {("esi", "top"): [0.4, 0.0], ("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 1.0]}
    utility = {key: [1.0, 1.0] for key in rates}
    found = half_scored(made(rates, utility, noises=(1.0, 3.0)), 3.0)
    assert (found.verdict.effect.setting.noise, found.verdict.kind) == (1.0, "specific")
    alone = {key: values[1:] for key, values in rates.items()}
    ruined = half_scored(made(alone, {**{key: [1.0] for key in alone}, ("esi", "top"): [0.1]}, noises=(3.0,)), 3.0)
    assert ruined.verdict.kind == "unclear"
    assert "more questions" not in ruined.verdict.text
    (claim,) = verify_claims(ruined)
    assert claim.verdict == UNDECIDED
    same = {**rates, ("esi", "top"): [1.0, 1.0]}
    none = half_scored(half_scored(made(same, utility, noises=(1.0, 3.0)), 1.0), 3.0)
    assert "at none could enough answers be scored" in none.verdict.text
    quiet = half_scored(made({**rates, ("esi", "top"): [1.0, 0.0]}, utility, noises=(1.0, 3.0)), 3.0)
    assert (quiet.verdict.effect.setting.noise, quiet.verdict.kind) == (1.0, "none")
    assert "1 at which too few answers could be scored left out, this one was taken by rule: none" in quiet.verdict.text


def test_interventions_of_one_name_are_refused_and_of_one_strength_made_once():
    target = dense()
    selection = random_selection(target, 50, seed=5)
    found = sl.verify(target, selection, noises=(1.0, 1.0), seeds=2, **{**QUICK, "prompts": HELD_OUT.texts})
    assert len([cell for cell in found.cells if cell.selection == "top"]) == 2
    with pytest.raises(SelectionError, match="two interventions are called 'zero'"):
        sl.verify(target, selection, interventions=("zero", "zero"), **QUICK)


def test_utility_that_has_nothing_to_lose_says_nothing():
    rates = {("esi", "top"): [0.0], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    found = made(rates, {key: [0.0] for key in rates}, base={"refusal": 1.0, "utility": 0.0})
    assert found.verdict.kind == "unclear"
    assert "Utility has nothing to lose" in found.verdict.text
    (claim,) = verify_claims(found)
    assert claim.verdict == HOLDS


@pytest.mark.parametrize(("after", "kind"), [(4.4, "unclear"), (7.9, "unclear"), (8.1, "general"), (300.0, "general")])
def test_where_language_breaks_the_damage_is_general(after, kind):
    """More than twice the perplexity, in every cell."""
    perplexity = {("esi", "top"): [after], ("esi", "bottom"): [4.0], ("esi", "random"): [4.2]}
    found = made({("esi", "top"): [0.2], ("esi", "bottom"): [1], ("esi", "random"): [1]}, perplexity=perplexity)
    effect = found.verdict.effect
    assert found.verdict.kind == kind
    ratios = [after / 4 * 1.01**seed for seed in range(5)]
    assert effect.perplexity.value == pytest.approx(stats.gmean(ratios))
    assert (effect.perplexity.low, effect.perplexity.high) == pytest.approx((ratios[0], ratios[-1]))
    assert effect.random_perplexity.value == pytest.approx(1.05 * 1.01**2)
    assert ("what breaks is language" in found.verdict.text) == (kind == "general")
    assert f"{effect.perplexity.value:.3g} times [" in found.verdict.text
    assert f"{effect.perplexity.value:.3g} times" in settings_grid(found).rows[1]
    shown = settings_grid(found)
    assert "perplexity" in shown.headings
    assert "4.00" in shown.rows[0]
    assert found.to_json()["verdicts"]["noise"]["operating_point"]["perplexity"]["value"] == effect.perplexity.value


def test_refusals_alone_are_not_lost_where_language_breaks_too():
    """Right answers to a few easy questions may survive what texts do not."""
    rates = {("esi", "top"): [0.2], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    utility = {key: [1.0] for key in rates}
    assert made(rates, utility).verdict.kind == "specific"
    found = made(rates, utility, perplexity={**{key: [4.0] for key in rates}, ("esi", "top"): [40.0]})
    assert found.verdict.kind == "general"
    assert "the damage is specific" not in found.verdict.text


def test_total_destruction_is_not_specific():
    """Everything is lost, but of utility there was less to lose."""
    rates = {("esi", "top"): [0.0], ("esi", "bottom"): [1.0], ("esi", "random"): [1.0]}
    utility = {("esi", "top"): [0.0], ("esi", "bottom"): [0.7], ("esi", "random"): [0.7]}
    found = made(rates, utility, base={"refusal": 1.0, "utility": 0.7}, prompts=80)
    assert found.verdict.effect.utility_fall.value < found.verdict.effect.fall.value - 0.2
    assert found.verdict.effect.net.value == pytest.approx(0, abs=1e-9)
    assert found.verdict.kind == "general"


def test_a_model_that_does_not_refuse_is_untestable():
    found = made({("esi", "top"): [0.0], ("esi", "random"): [0.0]}, base={"refusal": 0.0})
    assert found.verdict.kind == "untestable"
    assert "no refusals to lose" in found.verdict.text


def test_the_mildest_of_equally_balanced_settings_is_taken():
    rates = {("esi", "top"): [0.3, 0.0], ("esi", "bottom"): [1, 1], ("esi", "random"): [1, 1]}
    found = made(rates, {**rates, ("esi", "top"): [0.3, 0.0]}, noises=(2.0, 4.0))
    assert found.verdict.effect.setting.noise == 2.0


def test_contrasts_widen_with_the_number_of_settings():
    rates = {("esi", "top"): [0.5] * 8, ("esi", "bottom"): [1] * 8, ("esi", "random"): [1] * 8}
    one = made({key: value[:1] for key, value in rates.items()}).verdict.effect
    many = made(rates, noises=tuple(map(float, range(1, 9)))).verdict
    assert many.num_settings == 8
    assert (
        many.effect.beyond_random.high - many.effect.beyond_random.low > one.beyond_random.high - one.beyond_random.low
    )


def test_ranking_puts_safety_per_utility_first_and_no_contrast_last():
    refusal = {("broad", "top"): [0.2], ("narrow", "top"): [0.5], ("idle", "top"): [1.0], (None, "random"): [1.0]}
    utility = {("broad", "top"): [0.0], ("narrow", "top"): [0.9], ("idle", "top"): [1.0], (None, "random"): [1.0]}
    found = made(refusal, utility)
    ranks = found.rankings["noise"]
    assert [r.scorer for r in ranks] == ["narrow", "broad", "idle"]
    assert [r.has_contrast for r in ranks] == [True, True, False]
    narrow, broad, idle = ranks
    assert broad.low < broad.per_utility < broad.high < narrow.per_utility
    assert narrow.per_utility == pytest.approx(narrow.mean_fall / narrow.mean_utility_fall)
    assert idle.per_utility is None
    grid = ranking_grid(found, "noise")
    assert [row[0] for row in grid.rows] == ["narrow", "broad", "idle"]
    assert grid.markdown().count("\n") >= 5
    chart = ranking_chart(found, "noise")
    assert {row[0] for row in chart.rows} == {"as much as utility", "narrow", "broad", "idle"}
    assert ("narrow", pytest.approx(0.085), pytest.approx(0.515)) in chart.rows


def test_a_seed_without_numbers_does_not_make_a_scorer_keep_utility():
    refusal = {("good", "top"): [0.2], ("breaker", "top"): [0.0], (None, "random"): [1.0]}
    found = made(refusal, {("good", "top"): [0.9], ("breaker", "top"): [0.0], (None, "random"): [1.0]}, seeds=3)
    for cell in found.cells:
        if (cell.scorer, cell.seed) == ("breaker", 2):
            cell.observed.outcomes.update(refusal="-" * 40, utility="-" * 40)
    good, breaker = found.rankings["noise"]
    assert (good.scorer, breaker.keeps_utility) == ("good", False)
    assert (breaker.low, breaker.per_utility, breaker.high) == (1, 1, 1)
    assert "utility kept" not in ranking_grid(found, "noise").rows[1]


def test_tables_and_curves(tiny):
    target, scores = tiny
    found = sl.verify(target, scores, noises=(1.0, 2.0), interventions=("noise", "zero"), seeds=2, **QUICK)
    grid = settings_grid(found)
    assert grid.rows[0][0] == "baseline"
    assert len(grid.rows) == 1 + 3 * 3
    assert len(grid.rich().rows) == len(grid.rows)
    assert all(len(row) == len(grid.headings) for row in grid.rows)
    refusal = [chart for chart in curves_charts(found, found.scorers[0]) if chart.title.startswith("Refusal")]
    assert [len(chart.rows) for chart in refusal] == [3 * 2, 3]  # per selection a line for noise and a point for zero
    assert ranking_chart(found, "noise") is None


# stability


def test_stability(tmp_path):
    from tiny_targets import guard

    target = dense()
    prompts = sl.read_prompts([*PROMPTS, *HELD_OUT.texts, "yet another", "fox and cake"])
    found = sl.stability(
        target, prompts, objectives={"guard": guard(), "refusal": sl.Refusal()}, ratios=(0.01, 0.1), splits=2, seeds=3,
        progress=False,
    )  # fmt: skip
    kinds = {kind: [a for a in found.agreements if a.kind == kind] for kind in ("prompts", "seeds", "objectives")}
    assert {kind: len(agreements) for kind, agreements in kinds.items()} == {"prompts": 4, "seeds": 6, "objectives": 2}
    for agreement in found.agreements:
        assert (
            agreement.overlap.num_a
            == agreement.overlap.num_b
            == math.floor(agreement.ratio * target.layout.num_weights)
        )
        assert agreement.overlap.expected_iou < agreement.overlap.iou <= 1
    assert len(stability_grid(found).rows) == len(found.summary()) == 6
    found.save(tmp_path)
    assert sl.Stability.load(tmp_path).to_json() == found.to_json()


def test_stability_says_what_it_cannot_vary():
    found = sl.stability(
        dense(),
        sl.read_prompts(PROMPTS),
        objectives={"refusal": sl.Refusal()},
        ratios=(0.05,),
        splits=1,
        progress=False,
    )
    assert "same scores for every seed" in found.notes[0]
    with pytest.raises(PromptError, match="halved"):
        sl.stability(dense(), sl.read_prompts(PROMPTS[:1]), objectives={"refusal": sl.Refusal()}, progress=False)


def test_stability_refuses_before_it_scores_and_keeps_no_more_than_two(tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def load(folder, load=sl.Scores.load):
        alive.add(scores := load(folder))
        most.append(len(alive))
        return scores

    monkeypatch.setattr(sl.Scores, "load", load)
    how = {"objectives": {"refusal": sl.Refusal()}, "progress": False, "checkpoint": tmp_path}
    for wrong, said in (({"splits": 0}, "nothing to compare"), ({"ratios": (1, 3)}, "outside|ratio")):
        with pytest.raises(SelectionError, match=said):
            sl.stability(dense(), PROMPTS, **how, **wrong)
    assert not list(tmp_path.iterdir())
    for ratios in ((0.01,), (0.01, 0.02)):  # of the same scores
        found = sl.stability(dense(), PROMPTS, splits=2, ratios=ratios, **how)
        assert len(found.agreements) == 2 * len(ratios)
    assert len(most) == 8
    assert max(most) <= 2


# the claim itself, on both organisms; tests/test_demo.py asserts the same of the quick demo's fewer prompts


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_esi_breaks_refusals_far_beyond_controls(name):
    target = sl.load(f"organism:{name}", dtype="float32")
    guard = sl.Guard.load("organism:guard", dtype="float32", max_new_tokens=32)
    scores = sl.score(
        target, sl.read_prompts("organism:harmful").limit(64, seed=0), objective=guard, batch_size=32, progress=False
    )
    before = target.fingerprint()
    common = {
        "prompts": sl.read_prompts("organism:harmful-heldout").limit(32, seed=0),
        "harmless": sl.read_prompts("organism:harmless-heldout").limit(16, seed=0),
        "tasks": sl.read_task("organism:utility").limit(32, seed=0),
        "judges": (GuardJudge(guard=guard, batch_size=64), RefusalMatcher()),
        "batch_size": 64, "max_new_tokens": 32, "progress": False,
    }  # fmt: skip
    noise = sl.verify(target, scores, noises=(2.0, 3.0), seeds=5, **common)
    effect = noise.verdict.effect
    top, random, bottom = (
        noise.pool(s, "esi", effect.setting).measures["refusal"] for s in ("top", "random", "bottom")
    )
    assert top.high < min(random.low, bottom.low)
    draws = [
        c.observed.measures["refusal"] for c in noise.cells if c.selection == "random" and c.setting == effect.setting
    ]
    assert len(draws) == 5
    assert all(top.high < draw.low for draw in draws)
    # noise is blunt: the verdict must not hide that utility falls with it
    assert noise.verdict.kind == "general"
    # the unaligned twin's values are not: refusals go, utility stays
    twin = sl.load(f"organism:{name}-unaligned", dtype="float32")
    swap = sl.verify(
        target, scores, ratios=(0.2,), interventions=("transplant",), transplant_from=twin, seeds=5, **common
    )
    assert swap.verdict.kind == "specific"
    assert swap.verdict.effect.beyond_random.low > 0.2
    assert target.fingerprint() == before


def test_measures_without_observations_stay_unknown():
    base = Observation(measures={"asr": Measure(value=None, low=None, high=None, n=0)}, outcomes={"asr": "--"})
    assert Verification(baseline=base, cells=[]).measure_names == []
