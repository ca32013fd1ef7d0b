"""Requirements of a pipeline: read strictly, and held by the unfavourable end of the interval."""

import json

import pytest

from safelocus.errors import SafelocusError
from safelocus.evaluation.measures import Measure, proportion
from safelocus.evaluation.requirement import Requirement
from safelocus.report.measures import measures_in

EVALUATE = ["evaluate", "organism:dense", "-p", "organism:harmful-heldout", "--limit", "12", "--max-new-tokens", "32"]


@pytest.mark.parametrize("text", ["asr<=0.05", " asr <= 5e-2 ", "asr <=.05"])
def test_reading(text):
    assert str(Requirement.parse(text)) == "asr<=0.05"
    assert str(Requirement.parse("utility@my task>=0.5")) == "utility@my task>=0.5"
    assert str(Requirement.parse("perplexity<20")) == "perplexity<20"


@pytest.mark.parametrize(
    "text", ["asr", "", "asr=0.05", "asr==0.05", "<=0.05", "asr<=", "asr<=5%", "asr<=nan", "asr<=inf", "0.1<=asr<=0.2",
             "asr=<0.05", "asr<=0.05 refusal>=0.9"],
)  # fmt: skip
def test_what_is_no_requirement(text):
    with pytest.raises(SafelocusError, match="expected a measure"):
        Requirement.parse(text)


@pytest.mark.parametrize("text", ["asr<=5", "asr>=-0.1", "utility@sums>1.5"])
def test_a_share_is_no_percentage(text):
    with pytest.raises(SafelocusError, match="from 0 to 1"):
        Requirement.parse(text)


@pytest.mark.parametrize("comparison", ["<=", "<", ">=", ">"])
@pytest.mark.parametrize("hits", range(0, 41, 8))
@pytest.mark.parametrize("bound", [0.0, 0.05, 0.2, 0.5, 0.912, 1.0])
def test_it_is_met_where_the_whole_interval_holds_it(hits, bound, comparison):
    measure = proportion(hits, 40)
    holds = {"<=": lambda x: x <= bound, "<": lambda x: x < bound, ">=": lambda x: x >= bound, ">": lambda x: x > bound}
    steps = [measure.low + (measure.high - measure.low) * i / 50 for i in range(51)]
    expected = all(holds[comparison](min(max(step, measure.low), measure.high)) for step in steps)
    outcome = Requirement(measure="asr", comparison=comparison, bound=bound).judge({"asr": measure})
    assert outcome.met is expected
    assert ("NOT met" in str(outcome)) is not expected
    assert ("more prompts" in outcome.reason) is (holds[comparison](measure.value) and not expected)


def test_what_was_not_observed_meets_nothing():
    nothing = Measure(value=None, low=None, high=None, n=0)
    for found in ({}, {"asr": nothing}):
        assert not Requirement.parse("asr<=1").judge(found).met
    single = Measure(value=3.0, low=None, high=None, n=1)
    assert not Requirement.parse("perplexity<=9").judge({"perplexity": single}).met


def test_a_pipeline_stops_where_a_requirement_is_not_met(tmp_path, run):
    met, broken = ["--require", "asr<=0.9"], ["--require", "refusal>=0.99", "--require", "asr<0.01"]
    code, _, err = run(*EVALUATE, *met, "-o", tmp_path / "met")
    assert code == 0
    assert "requirement asr<=0.9 met: asr is 0.000 [0.000, 0.242] (n=12)" in err
    code, out, err = run(*EVALUATE, *met, *broken, "--json", "-o", tmp_path / "broken")
    assert code == 1
    assert "requirement refusal>=0.99 NOT met" in err
    assert "requirement asr<0.01 NOT met: asr is 0.000 [0.000, 0.242] (n=12), so it may be 0.242; more prompts" in err
    assert "asr<=0.9" not in err
    printed = json.loads(out)["requirements"]
    assert [each["met"] for each in printed] == [True, False, False]
    assert json.loads((tmp_path / "broken" / "requirements.json").read_text()) == printed
    assert (tmp_path / "broken" / "results.json").read_bytes() == (tmp_path / "met" / "results.json").read_bytes()
    assert "bug in safelocus" not in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--require", "asr<=5%"], "such as asr<=0.05"),
        (["--require", "asr<=5"], "from 0 to 1"),
        (["--require", "safety>=0.9"], "no measure 'safety'; expected one of asr, refusal, partial, incoherent"),
        (["--require", "over_refusal<=0.1"], "no measure 'over_refusal'"),
        (["--require", "asr@refusal<=0.1"], "no measure 'asr@refusal'"),
        (["--judge", "refusal", "--require", "partial<=0.1"], "no measure 'partial'"),
        (["--require", "utility@organism:utility>=0.1", "--task", "organism:utility"], "expected one of asr"),
    ],
)
def test_a_wrong_requirement_is_an_error_before_any_model_is_loaded(tmp_path, run, monkeypatch, more, message):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("safelocus.model.target.load", load)
    monkeypatch.setattr("safelocus.resources.Subject.load", load)
    code, _, err = run(*EVALUATE, *more, "-o", tmp_path / "run")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_every_measure_of_an_evaluation_can_be_required(tmp_path, run):
    """Those that are known before are those that come out."""
    rows = tmp_path / "sums.jsonl"
    rows.write_text(json.dumps({"question": "What is 2 + 2?", "answer": "4"}) + "\n")
    more = [
        "--judge", "guard:organism:guard", "--judge", "reader", "--harmless", "organism:harmless-heldout",
        "--task", "organism:utility", "--task", rows, "--perplexity", "organism:answers", "--kl-to", "organism:dense",
    ]  # fmt: skip
    code, _, err = run(*EVALUATE, *more, "--require", "nothing<=1", "-o", tmp_path / "run")
    assert code == 2
    expected = err.partition("expected one of ")[2].split(", ")
    assert run(*EVALUATE, *more, "--require", "asr@guard organism:guard<=1", "-o", tmp_path / "run")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sorted(measures_in(results)) == sorted(expected)
