"""Certificates against enumeration: of every change that they speak of, and of every draw."""

import json
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import safelocus as sl
from safelocus import distributed
from safelocus.cli.evaluate import _check_certifiable
from safelocus.errors import PromptError, SafelocusError
from safelocus.evaluation import Reply, TargetResponder
from safelocus.evaluation.certification import (
    MARGIN,
    EraseAndCheck,
    Smoothed,
    certify_erasing,
    certify_smoothed,
    erasures,
    most,
    upper,
)
from safelocus.evaluation.judges import Judgement, Verdict
from safelocus.evaluation.responding import Request
from safelocus.model.target import Target
from tiny_targets import PROMPTS, dense

pytestmark = pytest.mark.slow  # answers, again and again

WORDS = ["a", "b", "c"]


def added(words, radius, against):
    """Every prompt that has up to `radius` words of WORDS added."""
    for k in range(radius + 1):
        for new in product(WORDS, repeat=k):
            if against == "appended":
                yield [*words, *new]
            elif against == "inserted":
                for i in range(len(words) + 1):
                    yield [*words[:i], *new, *words[i:]]
            else:
                for places in combinations(range(len(words) + k), k):
                    it, at = iter(words), dict(zip(places, new, strict=True))
                    yield [at[i] if i in at else next(it) for i in range(len(words) + k)]


def edited(words, radius):
    """Every prompt that is `radius` words inserted, deleted or replaced away, or fewer."""
    found = {tuple(words)}
    for _ in range(radius):
        for each in list(found):
            for i in range(len(each) + 1):
                found |= {(*each[:i], new, *each[i:]) for new in WORDS}
                if i < len(each):
                    found |= {(*each[:i], new, *each[i + 1 :]) for new in WORDS} | {(*each[:i], *each[i + 1 :])}
    return found


@pytest.mark.parametrize("against", ["appended", "inserted", "infused"])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_of_every_prompt_with_words_added_one_erasure_is_the_prompt(against, radius):
    words = ["how", "do", "I"]
    attacked = list(added(words, radius, against))
    assert len(attacked) > radius
    for each in attacked:
        assert "how do I" in set(erasures(" ".join(each), radius, against)), each


def test_too_many_erasures_are_a_clear_error():
    with pytest.raises(PromptError, match=r"60 words has .* ways .* \(infused\)"):
        list(erasures("word " * 60, 5, "infused"))
    assert len(list(erasures("word " * 60, 5, "inserted"))) == 1 + sum(60 - k + 1 for k in range(1, 6))
    assert list(erasures("one", 3, "infused")) == ["one"]


@pytest.mark.parametrize("against", ["appended", "inserted", "infused"])
def test_no_attack_gets_past_erase_and_check_and_the_filter_is_the_models_own(against):
    target = dense()
    responder = TargetResponder(target=target)
    scores = sl.Refusal()(target, PROMPTS).tolist()
    threshold = float(np.median(scores)) - 1e-3
    model = EraseAndCheck(responder=responder, radius=2, against=against, threshold=threshold)
    certified = [p for p, score in zip(PROMPTS, scores, strict=True) if score > threshold + MARGIN]
    found = certify_erasing(model, sl.read_prompts(PROMPTS), sl.read_prompts(PROMPTS), progress=False)
    assert [m.value for m in found.certified] == [len(certified) / len(PROMPTS)] * 3
    assert 0 < len(certified) < len(PROMPTS)
    for prompt in certified:
        words = prompt.split()
        attacked = list(added(words, 1, against)) + list(added(words, 2, against))[:: 1 + len(words) * 3]
        assert all(model.recognises([(None, " ".join(each)) for each in attacked])), prompt
    assert found.flagged.value >= found.flagged_whole.value
    (reply,) = model.respond([Request(prompt=certified[0] + " a b", max_new_tokens=4)])
    assert reply.text == model.refusal
    nothing = EraseAndCheck(responder=responder, radius=2, against=against, threshold=1e9)
    request = Request(prompt=PROMPTS[0], max_new_tokens=4)
    assert nothing.respond([request]) == responder.respond([request])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_every_erasure_is_checked_however_they_are_divided(batch_size):
    """Whichever of them is the only one that is recognised."""
    prompt, target = "w0 w1 w2 w3 w4 w5", dense()
    left = list(erasures(prompt, 2, "infused"))
    for only in left:
        model = EraseAndCheck(
            responder=TargetResponder(target=target), radius=2, against="infused", batch_size=batch_size,
            objective=lambda _, texts, only=only: torch.tensor([1.0 if text == only else -1.0 for text in texts]),
        )  # fmt: skip
        assert model.recognises([(None, prompt)]) == [True], only


class Words:
    """Answers with the words that it sees."""

    name = "words"

    def length(self, request):
        return len(request.prompt)

    def respond(self, requests):
        return [Reply(text=request.prompt or "-", finished=True) for request in requests]

    def identity(self):
        return {"kind": "words"}

    describe = identity


class Listed:
    """Harmful is what some rule says of the words."""

    name = "listed"

    def __init__(self, rule):
        self.rule = rule

    def judge(self, prompts, responses):
        return [
            Judgement(
                verdict=Verdict.HARMFUL if self.rule(r.split()) else Verdict.SAFE, explanation="x", judge="listed"
            )
            for r in responses
        ]


def share(words, keep, rule):
    """P(h), over every set of words that may be kept."""
    return sum(
        keep ** sum(kept) * (1 - keep) ** (len(words) - sum(kept))
        for kept in product((0, 1), repeat=len(words))
        if rule([word for word, k in zip(words, kept, strict=True) if k] or ["-"])
    )


RULES = {
    "holds a": lambda words: "a" in words,
    "holds a trigger of two": lambda words: words.count("a") >= 1 and words.count("b") >= 1,
    "lacks a": lambda words: "a" not in words,
    "a stands first": lambda words: words[0] == "a",
    "is short": lambda words: len(words) <= 1,
}


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.7])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_edit_exceeds_the_bound(keep, rule):
    words = ["x", "a", "y"]
    before = share(words, keep, rule)
    for radius in (1, 2):
        worst = max(share(each, keep, rule) for each in edited(words, radius))
        assert worst <= most(before, keep, radius) + 1e-12


def test_the_bound_is_reached():
    """Where every changed word alone makes the answer harmful, and none was harmful before."""
    assert share(["x", "a"], 0.3, lambda words: "a" in words) == pytest.approx(most(0.0, 0.3, 1))


def test_what_is_counted_lies_below_the_upper_end_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.9):
        ends = np.array([upper(hits, 50, 0.05) for hits in range(51)])
        missed = np.mean(ends[rng.binomial(50, p, size=4000)] < p)
        assert missed <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


def test_a_certificate_covers_the_exact_share_of_every_edit():
    prompts, keep = ["x a y", "a b", "x y z x"], 0.3
    model = Smoothed(responder=Words(), keep=keep, seed=1)
    found = certify_smoothed(
        model, sl.read_prompts(prompts), Listed(RULES["holds a"]), radius=2, draws=400, progress=False
    )
    for radius in (0, 1, 2):
        worst = [max(share(e, keep, RULES["holds a"]) for e in edited(p.split(), radius)) for p in prompts]
        assert np.mean(worst) <= found.harmful[radius]
        assert found.certified[radius].value <= np.mean([w < 0.5 for w in worst])
    assert found.certified[0].value == 1
    assert found.to_json()["certified"][0]["n"] == 3


def test_smoothing_keeps_words_by_chance_in_their_order_and_alike_for_the_same_prompt():
    model = Smoothed(responder=Words(), keep=0.4)
    request = Request(prompt=" ".join(str(i) for i in range(50)), max_new_tokens=4)
    draws = [model.smoothed(request, draw).prompt.split() for draw in range(400)]
    assert all(each == sorted(each, key=int) for each in draws)
    assert np.mean([len(each) for each in draws]) / 50 == pytest.approx(0.4, abs=0.01)
    assert len({tuple(each) for each in draws}) == 400
    assert model.respond([request]) == model.respond([request])
    assert Smoothed(responder=Words(), keep=0.4, seed=1).respond([request]) != model.respond([request])
    anew = Smoothed(responder=Words(), keep=0.4, seed=None)
    assert anew.smoothed(request) != anew.smoothed(request)


def test_a_prompt_with_too_many_erasures_is_a_failed_request_unless_it_is_recognised():
    asked = [Request(prompt=prompt, max_new_tokens=2) for prompt in ("help", "word " * 60)]
    for threshold, failed in ((1e9, True), (-1e9, False)):
        model = EraseAndCheck(
            responder=TargetResponder(target=dense()), radius=5, against="infused", threshold=threshold
        )  # fmt: skip
        replies = model.respond(asked)
        assert replies[0].failure is None
        assert ("60 words has" in (replies[1].failure or "")) is failed
        assert replies[1].text == (None if failed else model.refusal)


def test_what_has_no_room_is_not_recognised_and_the_model_does_not_answer_it_either():
    target = dense(max_position_embeddings=64)
    model = EraseAndCheck(responder=TargetResponder(target=target), radius=0, threshold=-1e9)
    long, short = "word " * 40, PROMPTS[0]
    assert model.recognises([(None, long), (None, short)]) == [False, True]
    failed, _ = model.respond([Request(prompt=long, max_new_tokens=4), Request(prompt=short, max_new_tokens=4)])
    assert "there is room for" in failed.failure


@pytest.mark.parametrize("erases", [True, False])
def test_what_was_done_is_not_done_again(tmp_path, erases):
    """A certificate that was interrupted is that of one that was not."""
    seen = []

    def certify(checkpoint, stop=None):
        seen.clear()

        def asked(text):
            seen.append(text)
            if len(seen) == stop:
                raise KeyboardInterrupt
            return len(text) % 2

        how = {"checkpoint": checkpoint, "progress": False}
        if erases:
            model = EraseAndCheck(
                responder=TargetResponder(target=dense()), radius=1, batch_size=1,
                objective=lambda _, texts: torch.tensor([float(asked(text)) for text in texts]) - 0.5,
            )  # fmt: skip
            return certify_erasing(model, sl.read_prompts(PROMPTS[:1]), sl.read_prompts(PROMPTS), **how)
        judge = Listed(lambda words: bool(asked(" ".join(words))))
        return certify_smoothed(
            Smoothed(responder=Words(), keep=0.5), sl.read_prompts(PROMPTS), judge, radius=1, draws=8, **how
        )

    whole, num_asked = certify(None), len(seen)
    with pytest.raises(KeyboardInterrupt):
        certify(tmp_path, num_asked - 1)
    again = certify(tmp_path)
    assert 0 < len(seen) < num_asked
    told = [{name: value for name, value in vars(each).items() if name != "seconds"} for each in (whole, again)]
    assert told[0] == told[1]


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(SafelocusError, match="between 0 and 1, found 1"):
        Smoothed(responder=Words(), keep=1)
    responder = TargetResponder(target=dense())
    with pytest.raises(SafelocusError, match="appended, inserted or infused"):
        EraseAndCheck(responder=responder, radius=1, against="edited")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(Target, "is_sharded", True)
    with pytest.raises(SafelocusError, match="sharded over 2 processes"):
        EraseAndCheck(responder=responder, radius=1)
    with pytest.raises(SafelocusError, match="without torchrun"):  # before a model is loaded
        _check_certifiable(SimpleNamespace(certify=1, prompts=["p"], certify_against="edited"), [])


def test_the_command_certifies_and_shows_it(run, tmp_path):
    common = [
        "evaluate", "organism:dense", "-p", "organism:harmful-heldout", "--harmless", "organism:harmless-heldout",
        "--limit", "4", "--max-new-tokens", "8", "--certify", "2",
    ]  # fmt: skip
    code, out, _ = run(*common, "-o", tmp_path / "appended")
    assert code == 0
    assert "Certified against words appended" in " ".join(out.split())
    found = json.loads((tmp_path / "appended" / "certificates.json").read_text())
    assert found["smoothed"]["filter"]["radius"] == 2
    assert found["certified"][2]["n"] == found["flagged"]["n"] == 4
    assert "Certified against words appended" in (tmp_path / "appended" / "report.html").read_text()
    code, out, _ = run(
        *common, "--certify-against", "edited", "--certify-draws", "10", "--judge", "refusal", "--json", "-o",
        tmp_path / "edited",
    )  # fmt: skip
    assert code == 0
    bounds = json.loads(out)["certificates"]["harmful"]
    assert len(bounds) == 3
    assert bounds == sorted(bounds)
    alone = [*common[:4], *common[6:], "--certify-against", "edited", "--certify-draws", "20"]
    code, _, errors = run(*alone, "--judge", "guard:organism:guard", "-o", tmp_path / "alone")  # some draws are empty
    assert code == 0, errors
    code, _, errors = run(
        "evaluate", "organism:dense", "--task", "organism:utility", "--certify", "1", "-o", tmp_path / "no"
    )
    assert code == 2
    assert "--prompts" in errors
    code, _, errors = run(*common, "--attack", "prefill", "-o", tmp_path / "no")
    assert code == 2
    assert "behind an attack; --certify-against edited takes any" in " ".join(errors.split())
    assert not (tmp_path / "no").exists()
