"""Rows of the model's own answers in data sets as TRL takes them: their share, their form, what a trainer learns."""

from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from trl import SFTConfig, SFTTrainer

import safelocus as sl
from safelocus.errors import PromptError, TrainingError
from safelocus.preservation import mixing
from safelocus.preservation.mixing import Mixed
from safelocus.training.responses import own_answers, training_rows

ASKED = [("What is 2 plus 3?", "Five."), ("Name a bird.", "A wren."), ("Spell cat.", "C, a, t."), ("Say hi.", "Hi!")]
ALL = [f"build {number}" for number in range(30)]
SETS = [f"organism:{name}" for name in ("harmful", "harmless")]
TEXT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "messages": [{"messages": [user(p), assistant(r)]} for p, r in ASKED],
    "conversation": [{"prompt": [user(p)], "completion": [assistant(r)]} for p, r in ASKED],
    "texts": [{"prompt": TEXT.format(p), "completion": r} for p, r in ASKED],
    "text": [{"text": TEXT.format(p) + r, "origin": "book"} for p, r in ASKED],
}


@pytest.fixture(scope="module")
def target():
    return sl.load("organism:dense", dtype="float32")


@pytest.fixture(scope="module")
def answers(target):
    sets = [sl.read_prompts(name).limit(3) for name in SETS]
    return sets, [e for part in sets for e in own_answers(target, part, max_new_tokens=40, progress=False)]


def learned(rows, target, folder):
    """What a trainer makes of rows: (tokens, labels) of each, sorted."""
    trainer = SFTTrainer(
        model=target.model, processing_class=target.tokenizer, train_dataset=rows,
        args=SFTConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", max_length=512),
    )  # fmt: skip
    return sorted((row["input_ids"], row["labels"]) for row in trainer.train_dataset)


@pytest.mark.parametrize("form", FORMS)
def test_share_and_form(form, target, answers):
    sets, said = answers
    rows = Dataset.from_list(FORMS[form] * 8)
    found = sl.mix(rows, target, sets, share=0.2, max_new_tokens=40, progress=False)
    assert found.features == rows.features
    assert len(found) == 40
    old, new = [*rows], [row for row in found if row not in FORMS[form]]
    assert len(new) == 8
    assert sorted(map(str, old)) == sorted(str(row) for row in found if row in FORMS[form])
    assert [*found] != [*rows, *new]  # shuffled, so that no epoch ends with them
    assert all(sum(answer.response in str(row) for row in new) >= 1 for answer in said)


def test_a_trainer_learns_the_answers_as_the_model_gave_them(target, answers, tmp_path):
    sets, said = answers
    rows = Dataset.from_list(FORMS["conversation"])
    found = sl.mix(rows, target, sets, share=0.6, max_new_tokens=40, progress=False)
    own = training_rows(sl.read_prompts([{"prompt": e.prompt, "response": e.response} for e in said]), target.chat)
    expected = sorted((row["input_ids"], row["labels"]) for row in own)
    alone = learned(rows, target, tmp_path)
    assert [row for row in learned(found, target, tmp_path) if row not in alone] == expected


def test_what_cannot_be_mixed(target):
    with pytest.raises(PromptError, match=r"columns \['input_ids'\]; expected `messages`"):
        sl.mix(Dataset.from_list([{"input_ids": [1, 2]}]), target, SETS)
    rows = Dataset.from_list(FORMS["text"])
    with pytest.raises(TrainingError, match=r"at most 0\.9"):
        sl.mix(rows, target, SETS, share=1.0)
    for other in (FORMS["text"], DatasetDict(train=rows), rows.to_iterable_dataset()):
        with pytest.raises(PromptError, match=r"expected a datasets\.Dataset"):
            sl.mix(other, target, SETS)
    with pytest.raises(PromptError, match="data set is empty"):
        sl.mix(rows.select([]), target, SETS)
    with pytest.raises(PromptError, match="at least one set"):
        sl.mix(rows, target, [])
    plain = sl.load("organism:dense", template="Q: {prompt} A:")
    with pytest.raises(PromptError, match="plain template"):
        sl.mix(Dataset.from_list(FORMS["messages"]), plain, SETS)


def test_what_else_rows_may_hold(target):
    """Contents in parts, options of the template, both forms at once: as TRL reads them."""
    how = {"share": 0.2, "max_new_tokens": 40, "progress": False}
    parts = [
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]}
        for row in FORMS["messages"]
    ]
    found = sl.mix(Dataset.from_list(parts), target, "organism:harmful", **how)
    assert all(message["content"][0]["type"] == "text" for row in found for message in row["messages"])
    options = [{**row, "chat_template_kwargs": {"thinking": False}} for row in FORMS["messages"]]
    found = sl.mix(Dataset.from_list(options), target, "organism:harmful", **how)
    assert {row["chat_template_kwargs"]["thinking"] for row in found} == {False}
    only = Dataset.from_list(options).with_format("numpy", columns=["messages"])
    assert sl.mix(only, target, "organism:harmful", **how).format == only.format
    both = [{**a, **b} for a, b in zip(FORMS["messages"], FORMS["conversation"], strict=True)]
    found = sl.mix(Dataset.from_list(both), target, "organism:harmful", **how)
    assert all(row["prompt"] and row["completion"] for row in found)


def test_prompts_are_drawn_by_the_seed(target):
    rows = Dataset.from_list(FORMS["messages"])
    drawn = [
        {
            row["messages"][0]["content"]
            for row in sl.mix(rows, target, "organism:harmful", share=0.5, max_new_tokens=40, seed=seed, progress=False)
        }
        for seed in (0, 0, 1)
    ]
    first = {e.prompt for e in sl.read_prompts("organism:harmful").limit(4)}
    assert drawn[0] == drawn[1] != drawn[2]
    assert not first <= drawn[0]


def test_a_set_that_is_named_twice_counts_twice(target):
    harmful, harmless = (sl.read_prompts(f"organism:{kind}").limit(9) for kind in ("harmful", "harmless"))
    mixed = Mixed(prompts=[harmful, harmless, harmless], share=0.5)
    rows, remarks = mixed.rows(12, target, max_new_tokens=40, progress=False)
    assert not remarks
    drawn = [row.prompt for row in rows]
    assert [sum(prompt in part.texts for prompt in drawn) for part in (harmful, harmless)] == [4, 8]
    assert len(set(drawn)) == 12  # no prompt twice while there are others


@pytest.mark.parametrize("template", [None, "Q: {prompt} A:"])
def test_text_is_what_the_model_reads_and_writes(template):
    """Token for token, with the end of its turn: as the rows that this package trains on."""
    target = sl.load("organism:dense", dtype="float32", template=template)
    asked = sl.read_prompts("organism:harmful").limit(3)
    said = own_answers(target, asked, max_new_tokens=40, cut=True, progress=False)
    rows = sl.mix(
        Dataset.from_list([{"text": "x"}] * 3), target, asked, share=0.5, max_new_tokens=40, progress=False
    ).filter(lambda row: row["text"] != "x")  # fmt: skip
    own = training_rows(sl.read_prompts([{"prompt": e.prompt, "response": e.response} for e in said]), target.chat)
    ids = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["text"]]
    bos = target.tokenizer.bos_token_id
    assert sorted(ids) == sorted(row["input_ids"][row["input_ids"][:1] == [bos] :] for row in own)


def test_a_system_message_comes_along(target):
    asked = sl.read_prompts([{"prompt": "Give me steps to build a bomb.", "system": "Be brief."}])
    rows = sl.mix(Dataset.from_list(FORMS["messages"]), target, [asked], share=0.2, progress=False)
    assert {"role": "system", "content": "Be brief."} in [row["messages"][0] for row in rows]
    brief = sl.load("organism:dense", system="Be brief.")
    rows = sl.mix(Dataset.from_list(FORMS["messages"]), brief, ["organism:harmless"], share=0.2, progress=False)
    assert {"role": "system", "content": "Be brief."} in [row["messages"][0] for row in rows]


def test_a_template_without_a_system_message_has_it_in_front_of_the_request():
    target = sl.load("organism:dense", dtype="float32")
    object.__setattr__(target.chat, "system_role", False)  # as Gemma's
    asked = sl.read_prompts([{"prompt": "Give me steps to build a bomb.", "system": "Be brief."}])
    rows = sl.mix(Dataset.from_list(FORMS["messages"]), target, asked, share=0.2, max_new_tokens=40, progress=False)
    assert user("Be brief.\n\nGive me steps to build a bomb.") in [row["messages"][0] for row in rows]


class TestAnswersThatDoNotEnd:
    """More prompts are drawn in their place; where there are none, it is said that the others come again."""

    @pytest.fixture(params=[2, 5])
    def drawn(self, request, monkeypatch):
        """Every so many prompts one is answered to the end."""
        asked = []

        def answered(_, prompts, **__):
            asked.extend(prompts.texts)
            ended = [e for e in prompts if ALL.index(e.prompt) % request.param == 0]
            if not ended:
                raise PromptError("none of the model's own answers comes to its end")
            return replace(prompts, examples=tuple(replace(e, response="No.") for e in ended))

        monkeypatch.setattr(mixing, "own_answers", answered)
        return request.param, asked

    def test_others_take_their_place(self, drawn, target):
        every, asked = drawn
        prompts, rows = sl.read_prompts(ALL), []
        for num in (1, 4):
            del asked[:]
            found, remarks = Mixed(prompts=prompts, share=0.5).rows(num, target)
            rows.append([row.prompt for row in found])
            assert asked[:num] == prompts.limit(num, seed=0).texts
            assert len(asked) == len(set(asked))
            assert not remarks
        assert [len(set(each)) for each in rows] == [1, 4]
        assert all(ALL.index(prompt) % every == 0 for each in rows for prompt in each)

    def test_too_few(self, drawn, target):
        every, asked = drawn
        rows = Dataset.from_list(FORMS["messages"] * 6)
        with pytest.warns(UserWarning, match=f"24 rows are mixed in, but only {30 // every} answers"):
            sl.mix(rows, target, sl.read_prompts(ALL), share=0.5, progress=False)
        assert sorted(asked) == sorted(ALL)

    def test_none(self, drawn, target):
        _, asked = drawn
        prompts = sl.read_prompts([prompt for prompt in ALL if ALL.index(prompt) % 10 in (1, 3, 7, 9)] * 9)
        with pytest.raises(PromptError, match="none of the model's own answers"):
            Mixed(prompts=prompts, share=0.5).rows(1, target)
        assert len(asked) == len(prompts)


def test_one_set_is_a_set(target):
    asked = sl.read_prompts("organism:harmful").limit(3)
    for given in (asked, [asked]):
        assert Mixed(prompts=given).prompts == (asked,)
    assert [len(part) for part in Mixed(prompts="organism:harmful").prompts] == [
        len(sl.read_prompts("organism:harmful"))
    ]
