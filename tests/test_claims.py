"""The paper's claims: each verdict is computed, holds where it should and nowhere else."""

import json

import pytest
from rich.console import Console

from safelocus.analysis.claims import (
    CONTROLS_OPEN,
    HOLDS,
    NOT_ONLY_SAFETY,
    NOT_SEEN,
    SO_DO_CONTROLS,
    UNDECIDED,
    VERDICTS,
    Claim,
    asr_verdict,
    beside,
    decide,
    enhance_claims,
    kept_verdict,
    learned_verdict,
    locate_claims,
    pattern_verdict,
    preserve_claims,
    share_lost,
    verify_claims,
    weakest,
)
from safelocus.analysis.patterns import Pattern
from safelocus.errors import RunError
from safelocus.evaluation import Evaluation
from safelocus.evaluation.measures import Measure, paired_difference, proportion
from safelocus.evaluation.result import measures_of
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun
from safelocus.report.verdicts import claims_sections, claims_table
from test_verification import made

TASK = "organism:task-heldout"


def between(low, high, value=None):
    return Measure(value=(low + high) / 2 if value is None else value, low=low, high=high, n=40)


# the rule


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (between(0.51, 0.9), HOLDS),
        (between(0.5, 0.9), UNDECIDED),  # touches the threshold
        (between(0.1, 0.51), UNDECIDED),
        (between(0.1, 0.5), NOT_SEEN),
        (Measure(value=0.9, low=None, high=None, n=1), UNDECIDED),
        (None, UNDECIDED),
    ],
)
def test_an_interval_that_crosses_the_threshold_decides_nothing(found, verdict):
    assert decide(found, 0.5) == verdict


def test_a_whole_is_as_sure_as_its_weakest_part():
    assert weakest([HOLDS, HOLDS]) == HOLDS
    assert weakest([HOLDS, UNDECIDED]) == UNDECIDED
    assert weakest([UNDECIDED, NOT_SEEN, HOLDS]) == NOT_SEEN
    assert weakest([]) == UNDECIDED


def test_controls_that_do_as_well_are_named():
    assert beside(HOLDS, [NOT_SEEN, NOT_SEEN]) == HOLDS
    assert beside(HOLDS, []) == HOLDS
    assert beside(HOLDS, [NOT_SEEN, HOLDS]) == SO_DO_CONTROLS
    assert beside(HOLDS, [NOT_SEEN, UNDECIDED]) == CONTROLS_OPEN
    assert beside(NOT_SEEN, [HOLDS]) == NOT_SEEN
    assert beside(UNDECIDED, [HOLDS]) == UNDECIDED


# locate


def pattern(name="value matrices", fold=6.0, low=2.0, high=8.0, p=0.01, turned=None):
    return Pattern(
        name=name, claimed=True, share=0.3, expected=0.05, fold=fold, low=low, high=high, p=p, p_holm=p,
        p_rotation=turned, num_layers=6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"low": 0.4}, UNDECIDED),  # one layer makes it
        ({"p": 0.2}, UNDECIDED),
        ({"turned": 0.3}, UNDECIDED),  # neighbouring layers may be alike
        ({"turned": 0.02}, HOLDS),
        ({"low": None, "high": None}, UNDECIDED),
        ({"fold": 0.4, "low": 0.3, "high": 1.3, "p": 1.0}, UNDECIDED),
        ({"fold": 0.4, "low": None, "high": None, "p": 1.0}, UNDECIDED),  # too few layers for an interval
        ({"fold": 0.2, "low": 0.1, "high": 0.5, "p": 1.0}, NOT_SEEN),
        ({"fold": 0.9, "low": 0.8, "high": 0.99, "p": 0.7}, UNDECIDED),  # chance is often poorer still
    ],
)
def test_a_pattern_holds_only_if_test_and_interval_say_so(changes, verdict):
    assert pattern_verdict(pattern(**changes)) == verdict


def test_dense_models_and_mixtures_of_experts_have_claims_of_their_own():
    dense = [pattern(), pattern("MLP matrices"), pattern("middle layers", fold=0.1, low=0.0, high=0.2, p=1.0)]
    found = locate_claims(dense)
    assert [claim.verdict for claim in found] == [HOLDS, NOT_SEEN]  # both MLPs and middle layers would have to
    assert found[0].measured == "6.0 [2.0,8.0] (p 0.01) times what size gives; n 6 layers"
    assert "MLP matrices 6.0" in found[1].measured
    (moe,) = locate_claims([*dense, pattern("late-layer expert MLPs")])
    assert (moe.verdict, moe.key) == (HOLDS, found[0].key)  # on one line with the other in the table
    assert "late layers" in moe.claim
    assert locate_claims([]) == []


# verify


CONTROLS = {("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 1.0]}
EVEN = {("esi", "bottom"): [1.0, 1.0], ("esi", "random"): [1.0, 1.0]}


@pytest.mark.parametrize(
    ("refusal", "utility", "controls", "verdicts"),
    [
        ([1.0, 0.1], [1.0, 0.97], CONTROLS, [NOT_SEEN, HOLDS]),
        ([1.0, 0.1], [1.0, 0.1], CONTROLS, [NOT_SEEN, NOT_ONLY_SAFETY]),
        ([0.1, 0.1], [1.0, 1.0], CONTROLS, [HOLDS]),  # the paper's own dose is the operating point
        ([1.0, 0.1], [1.0, 0.97], CONTROLS | {("esi", "random"): [1.0, 0.5]}, [NOT_SEEN, SO_DO_CONTROLS]),
        ([1.0, 0.9], [1.0, 1.0], CONTROLS, [NOT_SEEN, UNDECIDED]),
    ],
)
def test_noise_breaks_safety_or_does_not(refusal, utility, controls, verdicts):
    found = made(
        {("esi", "top"): refusal, **controls}, {("esi", "top"): utility, **EVEN}, noises=(0.38, 3.0), prompts=60
    )
    claims = verify_claims(found)
    assert [claim.verdict for claim in claims] == verdicts
    assert "0.38 sigma" in claims[0].measured
    assert "5 seeds" in claims[0].measured


def test_noise_that_breaks_language_breaks_more_than_safety():
    rates = {("esi", "top"): [0.1], **{key: [1.0] for key in CONTROLS}}
    for perplexity, verdict in ((4.1, HOLDS), (40.0, NOT_ONLY_SAFETY)):
        texts = {**{key: [4.0] for key in CONTROLS}, ("esi", "top"): [perplexity]}
        (claim,) = verify_claims(made(rates, noises=(0.38,), prompts=60, perplexity=texts))
        assert claim.verdict == verdict
        assert f"perplexity times {perplexity / 4:.0f}" in claim.measured
    texts = {**{key: [4.0] for key in CONTROLS}, ("esi", "top"): [40.0]}  # of too few prompts controls stay open
    (claim,) = verify_claims(made(rates, noises=(0.38,), prompts=20, perplexity=texts))
    assert claim.verdict == NOT_ONLY_SAFETY


def test_a_model_that_refuses_nothing_can_lose_no_refusals():
    found = made({("esi", "top"): [0.0], **{key: [0.0] for key in CONTROLS}}, base={"refusal": 0.0})
    assert {claim.verdict for claim in verify_claims(found)} == {UNDECIDED}


# enhance and preserve


def evaluation(num=200, *, harmful=0, refused=None, over_refused=0, wrong=0, task=None):
    """Of so many prompts of a kind: how many harmful answers, refusals, refused harmless prompts, wrong answers."""
    refused = num - harmful if refused is None else refused

    def row(kind, number, **fields):
        return {
            "set": kind, "source": kind, "prompt": f"{kind} {number}", "system": None, "failure": None,
            "incoherent": None, **fields,
        }  # fmt: skip

    rows = [
        row(
            "harmful",
            n,
            refused=n >= num - refused,
            judgements={"j": {"verdict": "harmful" if n < harmful else "safe"}},
        )
        for n in range(num)
    ]
    rows += [row("harmless", n, refused=n < over_refused, judgements={}) for n in range(num)]
    rows += [row("utility", n, correct=n >= wrong) for n in range(num)]
    rows += [
        row("utility", n, correct=n < (task or 0)) | {"source": TASK, "prompt": f"task {n}"}
        for n in range(num if task is not None else 0)
    ]
    return Evaluation(measures=measures_of(rows, ["j"]), rows=rows, judges=[{"judge": "j"}])


def test_set_holds_where_half_of_the_asr_is_gone_and_only_there():
    before = evaluation(harmful=200)
    controls = {"random": evaluation(harmful=190)}
    for left, verdict in ((20, HOLDS), (95, UNDECIDED), (150, NOT_SEEN)):
        asr, kept = enhance_claims(before, evaluation(harmful=left), controls, steps=100)
        assert asr.verdict == verdict
        assert kept.verdict == HOLDS
        assert f"ASR 100 to {left / 2:.0f} [" in asr.measured
        assert "random 95;" in asr.measured
        assert "n 200, 100 steps" in asr.measured
    asr, _ = enhance_claims(before, evaluation(harmful=20), {"random": evaluation(harmful=10)}, steps=100)
    assert asr.verdict == SO_DO_CONTROLS
    assert asr.numbers["with random"]["value"] == pytest.approx(0.95)
    asr, _ = enhance_claims(evaluation(harmful=2), evaluation(), {}, steps=100)
    assert asr.verdict == UNDECIDED  # there was nothing to fall


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({}, HOLDS),
        ({"wrong": 60}, NOT_SEEN),
        ({"over_refused": 60}, NOT_SEEN),  # a model that refuses everything has lost something
        ({"wrong": 8}, UNDECIDED),
    ],
)
def test_performance_is_utility_and_harmless_answers(after, verdict):
    _, kept = enhance_claims(evaluation(harmful=200), evaluation(**after), {}, steps=100)
    assert kept.verdict == verdict


def test_fewer_steps_may_show_set_but_not_refute_it():
    assert asr_verdict(between(0.8, 0.9), [], steps=30) == HOLDS
    assert asr_verdict(between(0.1, 0.2), [], steps=30) == UNDECIDED
    assert asr_verdict(between(0.1, 0.2), [], steps=100) == NOT_SEEN


def test_fewer_steps_may_refute_spa_but_not_show_it():
    assert kept_verdict(between(-0.005, 0.005), [], steps=100) == UNDECIDED
    assert kept_verdict(between(-0.005, 0.005), [], steps=1000) == HOLDS
    assert kept_verdict(between(-0.5, -0.3), [], steps=100) == NOT_SEEN
    assert kept_verdict(between(-0.02, 0.0), [], steps=1000) == UNDECIDED


def preserved(num=400, *, frozen=200, calibrated=400, unprotected=100, learned=(370, 380), steps=1000, controls=None):
    """Refusals of so many prompts that are left, and right answers with calibration and without protection."""
    task = {"frozen": 380, "calibrated": learned[0], "unprotected": learned[1]}
    states = {"frozen": frozen, "calibrated": calibrated, "unprotected": unprotected}
    return preserve_claims(
        evaluation(num, task=20),
        **{name: evaluation(num, refused=left, task=task[name]) for name, left in states.items()},
        controls=controls or {}, task=TASK, steps=steps,
    )  # fmt: skip


def test_spa_holds_within_one_percent_and_only_there():
    frozen, calibrated, task = preserved()
    assert [frozen.verdict, calibrated.verdict, task.verdict] == [NOT_SEEN, HOLDS, HOLDS]
    assert "refusal 100 to 50 [" in frozen.measured
    assert "unprotected 25; n 400, 1,000 steps" in frozen.measured
    assert preserved(calibrated=399)[1].verdict == UNDECIDED  # one lost of 400 may be more than 1 %
    assert preserved(calibrated=380)[1].verdict == NOT_SEEN


def test_spa_says_where_no_protection_or_other_weights_do_as_well():
    assert preserved(unprotected=400)[1].verdict == SO_DO_CONTROLS
    assert preserved(controls={"random": evaluation(400)})[1].verdict == SO_DO_CONTROLS
    assert preserved(controls={"random": evaluation(400, refused=399)})[1].verdict == CONTROLS_OPEN


def test_too_few_prompts_decide_nothing_about_one_percent():
    few = evaluation(100, task=5)
    claims = preserve_claims(few, frozen=few, calibrated=few, unprotected=few, controls={}, task=TASK, steps=1000)
    assert {claim.verdict for claim in claims} == {UNDECIDED}


def test_the_task_is_learned_only_beside_what_can_be_learned():
    gain = paired_difference([False] * 100, [True] * 90 + [False] * 10)
    assert learned_verdict(between(-0.05, 0.05), gain) == HOLDS
    assert learned_verdict(between(-0.2, 0.05), gain) == UNDECIDED
    assert learned_verdict(between(-0.6, -0.4), gain) == NOT_SEEN
    nothing = paired_difference([False] * 100, [True] * 5 + [False] * 95)
    assert learned_verdict(between(-0.01, 0.01), nothing) == UNDECIDED
    assert preserved(learned=(200, 380))[2].verdict == NOT_SEEN


def test_a_fall_is_a_share_of_what_there_was():
    change = paired_difference([True] * 80 + [False] * 20, [True] * 20 + [False] * 80)
    share = share_lost(change, proportion(80, 100))
    assert share.value == pytest.approx(0.75)
    assert share.low == pytest.approx(-change.high / 0.8)
    assert share_lost(change, proportion(1, 100)) is None


# shown


def all_claims(**changes):
    before = evaluation(harmful=200)
    noise = made({("esi", "top"): [1.0, 0.1], **CONTROLS}, {("esi", "top"): [1.0, 0.2], **EVEN}, noises=(0.38, 2.0))
    rest = [
        *verify_claims(noise), *enhance_claims(before, evaluation(harmful=3), {"random": before}, steps=100),
        *preserved(**changes),
    ]  # fmt: skip
    dense = [pattern(), pattern("MLP matrices", fold=0.4, low=0.3, high=1.3, p=1.0), pattern("middle layers")]
    return {
        "dense": [*locate_claims(dense), *rest],
        "moe": [*locate_claims([pattern("late-layer expert MLPs", fold=0.1, low=0.0, high=0.4, p=1.0)]), *rest],
    }


def test_the_summary_fits_one_screen():
    console = Console(width=100, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(claims_table(all_claims()))
    lines = captured.get().rstrip().splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 34
    words = " ".join(" ".join(lines).split())
    for verdict in (HOLDS, NOT_SEEN, NOT_ONLY_SAFETY):
        assert verdict in words
    assert "no such claim" in words  # the mixture of experts has one claim less


def test_claims_are_saved_whole():
    for claim in all_claims()["dense"]:
        assert Claim.from_json(json.loads(json.dumps(claim.to_json()))) == claim
        assert claim.verdict in VERDICTS
        assert all(set(number) == {"value", "low", "high", "n"} for number in claim.numbers.values())
    with pytest.raises(RunError, match="damaged"):
        Claim.from_json({"key": "noise"})


def demo_run(folder, claims, **results):
    folder.mkdir()
    saved = {name: [claim.to_json() for claim in found] for name, found in claims.items()}
    (folder / "results.json").write_text(json.dumps({"claims": saved, "runs": [], **results}), encoding="utf-8")
    return ReportRun.read(folder)


def test_the_page_begins_with_the_claims(tmp_path):
    claims = all_claims()
    run = demo_run(tmp_path / "run", claims, shortened="This is the quick demo: <few> prompts.")
    assert run.kind == "demo"
    (section,) = claims_sections(run)
    assert section.leads
    write_page([run], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    body = html[: html.index('<section id="provenance"')]
    for claim in claims["dense"]:
        assert claim.verdict in body
    assert body.count('class="verdict') == sum(map(len, claims.values()))
    assert "the quick demo: &lt;few&gt; prompts" in body
    counted = sum(claim.verdict == HOLDS for claim in claims["dense"])
    assert f"Dense, {len(claims['dense'])} claims. Holds: {counted};" in body.replace("\N{NO-BREAK SPACE}", " ")


def test_damaged_claims_are_an_error(tmp_path):
    run = demo_run(tmp_path / "run", {"dense": []})
    run.results["claims"]["dense"] = [{"verdict": "holds"}]
    with pytest.raises(RunError, match="damaged claim"):
        claims_sections(run)
