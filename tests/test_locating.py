"""Scores for controls: those of the selection's own run, or made anew as they were; an error where that cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import safelocus as sl
from safelocus.cli import locating
from safelocus.cli.sources import guard_among
from safelocus.errors import ModelError, PromptError, SafelocusError
from safelocus.evaluation.judges import GuardJudge, RefusalMatcher
from safelocus.model.target import Target
from safelocus.objective import Guard, remake
from safelocus.objective.presets import read_preset
from tiny_targets import PROMPTS, dense, guard

SETTINGS = {"dtype": "float32", "max_new_tokens": 4, "tau": 0.3, "gumbel_seed": None, "transfer": "automatic"}
OPENINGS = {"refusals": ("no",), "compliances": ("Sure", "is how")}


def told(system=None):
    target = dense()
    return Target.of(target.model, target.tokenizer, name=target.name, system=system)


@pytest.fixture
def made(tmp_path):
    """(scores that are not of the defaults, the file of a selection from them)."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:3]))
    prompts = sl.read_prompts(tmp_path / "prompts.json")
    how = {"objective": sl.Refusal(**OPENINGS), "batch_size": 2, "progress": False}
    scores = sl.score(told("Be kind."), prompts, **how)
    scores.select(0.05).save(tmp_path / "selection.safetensors")
    return scores, tmp_path / "selection.safetensors"


def like(file, method="esi", **how):
    provenance = sl.Selection.load(file).provenance
    return locating.score_like(told(), method, provenance, beside=file, progress=False, **how)


def same(first, second):
    return all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_the_scores_beside_a_selection_are_taken(made, monkeypatch):
    scores, file = made
    scores.save(file.parent / "scores")
    with monkeypatch.context() as patched:
        patched.setattr("safelocus.scoring.run.score", mock.Mock(side_effect=AssertionError("scored again")))
        assert same(like(file), scores)
    assert like(file, "magnitude").provenance.method == "magnitude"


def test_scores_of_another_run_beside_it_are_not(made):
    scores, file = made
    other = sl.score(told(), sl.read_prompts(PROMPTS[3:]), objective=sl.Refusal(), progress=False)
    other.save(file.parent / "scores")
    assert same(like(file), scores)


def test_without_them_they_are_made_as_they_were(made):
    """With the objective's openings, the chat format and the batch size of then, whatever they are now."""
    scores, file = made
    assert same(like(file), scores)
    located = locating.locate(told(), selection=file, progress=False)
    bottom = located.control(told(), "bottom")
    assert bottom.iou(scores.select(0.05, which="bottom")) == 1
    snip = sl.score(
        told("Be kind."), sl.read_prompts(PROMPTS[:3]), objective=sl.Refusal(**OPENINGS), method="snip", batch_size=2,
        progress=False,
    )  # fmt: skip
    assert same(located.scores("snip"), snip)


def test_prompts_that_have_changed(made):
    _, file = made
    (file.parent / "prompts.json").write_text(json.dumps([PROMPTS[0].upper(), *PROMPTS[1:3]]))
    with pytest.raises(PromptError, match="not all there as they were"):
        like(file)


def test_prompts_in_memory_and_objectives_of_ones_own(made, tmp_path):
    scores = sl.score(told(), PROMPTS[:2], objective=sl.Refusal(), progress=False)
    with pytest.raises(SafelocusError, match="do not say with which prompts"):
        locating.score_like(told(), "esi", scores.provenance, beside=tmp_path, progress=False)

    def mine(target, prompts):
        return sl.Refusal()(target, prompts)

    prompts = sl.read_prompts(made[1].parent / "prompts.json")
    scores = sl.score(told(), prompts, objective=mine, progress=False)
    for find in (
        lambda: locating.score_like(told(), "snip", scores.provenance, beside=tmp_path, progress=False),
        lambda: locating.check_like("snip", scores.provenance, tmp_path),
    ):
        with pytest.raises(ModelError, match="'callable' cannot be made anew"):
            find()
    locating.check_like("magnitude", scores.provenance, tmp_path)  # needs none


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "lexicon", "name": "moved.txt", "similarity": 1, "max_new_tokens": 4}, "moved.txt"),
        ({"kind": "refusal", "refusals": ["no"]}, "'compliances' is not recorded"),
        ({"kind": "classifier", "name": "nowhere"}, "'dtype' is not recorded"),
        ({"kind": "guard", **SETTINGS, "name": "./nowhere"}, "does not exist"),
        ({"kind": "guard", **SETTINGS, "name": "organism:dense"}, "neither its name nor its chat template"),
        ({"kind": "classifier", **SETTINGS, "name": "./nowhere", "unsafe": 1}, "does not exist"),
    ],
)
def test_a_control_that_cannot_be_made_is_refused_before_the_training(made, objective, message):
    scores, file = made
    provenance = replace(scores.provenance, objective=objective)
    with pytest.raises(SafelocusError, match=message):
        locating.check_like("snip", provenance, file)


def test_a_guard_is_read_as_the_run_of_its_scores_says(made):
    scores, file = made
    described = {"kind": "guard", **SETTINGS, "name": "organism:guard"}
    provenance = replace(scores.provenance, objective=described)
    locating.check_like("snip", provenance, file)
    (file.parent / "run.toml").write_text('command = "score"\nguard_description = "moved.toml"\n')
    assert locating.description_of(file.parent / "scores") == locating.description_of(file) == Path("moved.toml")
    with pytest.raises(ModelError, match=r"moved.toml: cannot read"):
        locating.check_like("snip", provenance, file)
    own = file.parent / "own.toml"
    own.write_text('name = "own"\nformat = "chat"\nsafe = ["safe"]\nunsafe = ["unsafe"]\n')
    locating.check_like("snip", provenance, file, guard="organism:guard", guard_description=own)


@pytest.mark.parametrize("openings", [True, False])
def test_prompts_without_room_are_left_out_alike(tmp_path, openings):
    """By an opening's tokens, or by those of an answer; `find` scores what is left."""
    target = dense(max_position_embeddings=64)
    (tmp_path / "p.json").write_text(json.dumps([*PROMPTS[:2], "word " * 40]))
    how = {"refusal": True} if openings else {"lexicon": tmp_path / "words.txt"}
    (tmp_path / "words.txt").write_text("bomb\n")
    located = locating.locate(
        target, prompts=str(tmp_path / "p.json"), ratio=0.01, max_new_tokens=4, progress=False, **how
    )
    assert located.selection.provenance.num_prompts == 2


def test_a_guard_is_made_anew_with_all_its_settings(monkeypatch):
    judge = guard(tau=0.7, gumbel_seed=5, variant="index", max_new_tokens=7)
    loaded = mock.Mock(side_effect=lambda name, **how: mock.Mock(how=how))
    monkeypatch.setattr(Guard, "load", loaded)
    how = remake(judge.describe(), device="cpu").how
    assert how == {
        "description": None, "dtype": "float32", "max_new_tokens": 7, "tau": 0.7, "gumbel_seed": 5, "variant": "index",
        "device": "cpu",
    }  # fmt: skip
    again = remake({**judge.describe(), "tau": 0.2}, reader=judge)
    assert (again.model, again.tau, judge.tau) == (judge.model, 0.2, 0.7)
    assert remake({**judge.describe(), "name": "another"}, reader=judge, device="cpu").how == how  # loaded
    described = judge.describe()
    del described["tau"]
    with pytest.raises(ModelError, match="'tau' is not recorded"):
        remake(described)


def test_a_guard_that_judges_finds_too_if_it_is_read_in_the_same_way(tmp_path):
    judging = guard()
    judges = [RefusalMatcher(), GuardJudge(guard=judging)]
    assert guard_among(judges, judging.name, None) is judging
    assert guard_among(judges, "another", None) is None
    (own := tmp_path / "own.toml").write_text('name = "mine"\nformat = "chat"\nsafe = ["safe"]\nunsafe = ["unsafe"]\n')
    assert guard_among(judges, judging.name, own) is None
    assert guard_among([GuardJudge(guard=replace(judging, preset=read_preset(own)))], judging.name, own) is not None
