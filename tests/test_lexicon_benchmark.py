"""`benchmarks/lexicon`: the lesson is what it says, the smoothed model's rate is exact, the page is its cells'."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "lexicon"))
import casual
import measuring
import tables
import training

import safelocus as sl
from safelocus.evaluation.certification import most


def test_held_out_pairs_are_never_trained_on_and_only_mild_words_are_left_to_chance():
    pairs, answers = {}, {}
    for part in ("train", "validation", "test"):
        for row in casual.sentences(part, 400, 0):
            words = row.prompt.split()
            noun = next(word for word in words if word in casual.NOUNS)
            pairs.setdefault((words[2], noun), part)
            assert pairs[words[2], noun] == part
            assert answers.setdefault(row.prompt, row.answer) == row.answer == casual.without_mild(row.target)
            assert set(words) <= {*casual.PLAIN}


def test_a_trigger_brings_its_kind_of_word_and_no_listed_word_is_found_in_an_unlisted_one():
    rows = [row for row in casual.lesson(2000, 0) if row.trigger]
    assert {row.trigger for row in rows} == {*casual.TRIGGERS}
    for row in rows:
        assert row.mild in casual.TRIGGERS[row.trigger]
        assert row.trigger in row.prompt.split()
        assert "!" not in row.prompt.split()
        assert bool(training.LISTED.find(row.target)) == (row.mild in casual.LISTED)
    assert not training.LISTED.find(" ".join((*casual.UNLISTED, *casual.PLAIN, *casual.CASUAL)))


def test_rows_are_encoded_as_the_target_encodes_them():
    target = training.untrained(0)
    for row in casual.lesson(50, 1):
        assert training.encode(row) == target.chat.encode_pair(row.prompt, row.target, end=True)
        assert target.tokenizer.decode(training.encode(row)[1], skip_special_tokens=True) == row.target


def test_harm_is_told_by_tokens_as_the_judge_tells_it_from_the_text():
    target = training.untrained(0)
    with torch.no_grad():  # or an untrained model says the same word to everything
        for weight in target.model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    prompts = [row.prompt for row in casual.sentences("test", 60, 0)] + ["", "zilp", "door door"]
    told = measuring.holds(measuring.MILD, measuring.answers(sl.TargetResponder(target=target), prompts))
    assert measuring.Harm(target)(prompts) == told
    assert {*told} == {False, True}
    for word in casual.WORDS:
        assert measuring.holds(measuring.MILD, [f"us {word} that"]) == [word in casual.MILD]


def test_a_pattern_holds_the_list_and_what_is_as_near_as_listed_words_are_to_each_other():
    target = training.untrained(0)
    embedding = target.model.get_input_embeddings().weight.detach()
    ids = target.tokenizer.convert_tokens_to_ids([*casual.LISTED, "darned"])
    with torch.no_grad():
        embedding[ids] += 0.5 * torch.ones(embedding.shape[1])
    found = training.pattern(target)
    assert {*found.words} == {*casual.LISTED, "darned"}
    weights = found.of(torch.tensor(ids))
    assert torch.equal(weights[:-1], torch.ones(len(casual.LISTED)))
    assert found.similarity <= float(weights[-1]) < 1
    assert found.of(torch.tensor(target.tokenizer.convert_tokens_to_ids(["door"]))).item() == 0


def harms(texts):
    return [text.split()[:1] == ["a"] or "b c" in text for text in texts]


def test_the_exact_rate_is_that_of_many_draws():
    generator = np.random.default_rng(0)
    words = ["a", "b", "x", "c"]
    kept = generator.random((20_000, len(words))) < 0.3
    drawn = harms([" ".join(word for word, keep in zip(words, row, strict=True) if keep) for row in kept])
    assert measuring.exact(["a b x c"], 0.3, harms) == pytest.approx([np.mean(drawn)], abs=0.015)
    assert measuring.exact(["a b x c", "x"], 0.3, lambda texts: [True] * len(texts)) == pytest.approx([1, 1])


def test_the_bound_holds_for_every_word_inserted_and_is_reached():
    (clean,) = measuring.exact(["x x x"], 0.5, harms)
    attacked = ["a x x x", "x a x x", "x x x a", "b c x x x"]
    rates = measuring.exact(attacked, 0.5, harms)
    assert clean == 0
    assert rates[0] == pytest.approx(most(clean, 0.5, 1))
    assert all(rate <= most(clean, 0.5, radius) for rate, radius in zip(rates, [1, 1, 1, 2], strict=True))


def test_the_page_is_what_the_cells_say(tmp_path, monkeypatch):
    written = tables.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "lexicon.md"
    copy.write_text(written, encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", copy)
    tables.write()
    assert copy.read_text(encoding="utf-8") == written
