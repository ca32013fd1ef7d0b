"""Rows of the model's own answers in data sets as TRL takes them: their share, their form, what a trainer learns."""

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import safelocus as sl
from safelocus.errors import PromptError, TrainingError
from safelocus.training import training_rows
from safelocus.training.responses import own_answers

ASKED = [("What is 2 plus 3?", "Five."), ("Name a bird.", "A wren."), ("Spell cat.", "C, a, t."), ("Say hi.", "Hi!")]
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
    with pytest.raises(TrainingError, match="between 0 and 1"):
        sl.mix(Dataset.from_list(FORMS["text"]), target, SETS, share=1.0)


def test_a_system_message_comes_along(target):
    asked = sl.read_prompts([{"prompt": "Give me steps to build a bomb.", "system": "Be brief."}])
    rows = sl.mix(Dataset.from_list(FORMS["messages"]), target, [asked], share=0.2, progress=False)
    assert {"role": "system", "content": "Be brief."} in [row["messages"][0] for row in rows]
