"""What is to be learned: rows to train on, and questions set aside."""

import pytest

import safelocus as sl
from safelocus.errors import PromptError
from safelocus.prompts import prompt_hash
from safelocus.training.examination import read_lesson
from test_tasks import shared, write


def apart(prompts, task):
    asked = {prompt_hash(example.prompt) for example in task}
    return len(asked) == len(task) and not asked & set(prompts.prompt_hashes)


def test_questions_of_its_own():
    prompts, task = read_lesson("organism:task", held_out="organism:task-heldout")
    assert (len(prompts), len(task)) == (431, 142)
    assert apart(prompts, task)


def test_a_share_is_set_aside():
    prompts, task = read_lesson("organism:task", share=0.2)
    assert len(prompts) + len(task) == 431
    assert 50 < len(task) < 120
    assert apart(prompts, task)
    assert all(example.response for example in prompts)


def test_what_a_question_asks_for_is_what_was_taught(tmp_path):
    rows = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(99)]
    prompts, task = read_lesson(write(tmp_path / "sums.jsonl", rows))
    assert prompts[0].response.startswith("0 + 1")  # learned whole
    assert all(example.answer.isdigit() for example in task)  # compared by the number
    assert apart(prompts, task)


@pytest.mark.parametrize(
    ("name", "num", "match", "answers"),
    [
        ("ag_news_mini/train.csv", 500, "choice", {"World", "Sports", "Business", "Sci/Tech"}),
        ("pubmedqa/ori_pqal.json", 1000, "choice", {"yes", "no", "maybe"}),
        ("gsm8k/train.jsonl", 7000, "numeric", None),
    ],
)
def test_the_formats_of_known_data_sets(name, num, match, answers):
    prompts, task = read_lesson(shared(name))
    assert len(prompts) + len(task) >= num
    assert len(prompts) > 5 * len(task) > 0
    assert task.match == match
    assert apart(prompts, task)
    if answers:
        assert {e.response for e in prompts} == {e.answer for e in task} == answers
    # what is taught is right by the task's own judgement
    taught = sl.read_task(shared(name))
    right = {prompt_hash(e.prompt): e for e in taught}
    for example in prompts[:50]:
        assert taught.grade(right[prompt_hash(example.prompt)], example.response)[1]


def test_another_file_of_the_same_kind():
    prompts, task = read_lesson(shared("ag_news_mini/train.csv"), held_out=shared("ag_news_mini/test.csv"))
    assert 40 < len(task) < 50
    assert apart(prompts, task)


@pytest.mark.parametrize("source", ["organism:task", "ag_news_mini/train.csv"])
def test_questions_that_are_trained_on(source):
    source = source if source.startswith("organism") else shared(source)
    with pytest.raises(PromptError, match="are also questions of"):
        read_lesson(source, held_out=source)


MMLU = [
    {"question": f"Which follows {i}?", "choices": [str(i + 3), str(i + 1), str(i + 2)], "answer": 1} for i in range(60)
]
ARC = [
    {"question": f"Thing {i}?", "choices": {"text": ["cat", "dog", "cow"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    for i in range(60)
]


@pytest.mark.parametrize(("rows", "letter"), [(MMLU, "B"), (ARC, "C")], ids=["mmlu", "arc"])
def test_a_question_with_choices_is_learned_as_it_is_asked(tmp_path, rows, letter):
    file = write(tmp_path / "choices.jsonl", rows)
    prompts, task = read_lesson(file)
    assert apart(prompts, task)
    assert {example.response for example in prompts} == {letter}
    assert all("\nA. " in example.prompt for example in prompts)
    assert all(task.grade(example, letter)[1] for example in task)
    with pytest.raises(PromptError, match="60 of its 60 prompts are also questions of"):
        read_lesson(file, held_out=file)


def test_explanations_of_a_choice_are_learned_as_they_are(tmp_path):
    rows = [{**row, "answer": f"The next number is {i + 1}."} for i, row in enumerate(MMLU)]
    prompts, _ = read_lesson(write(tmp_path / "explained.jsonl", rows), held_out="organism:task-heldout")
    assert prompts[0].response == "The next number is 1."


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(PromptError, match="no example has a response"):
        read_lesson(write(tmp_path / "prompts.jsonl", [{"prompt": "bake a cake"}]))
    with pytest.raises(PromptError, match="one part empty"):
        read_lesson(write(tmp_path / "one.jsonl", [{"question": "What?", "answer": "That"}]))
