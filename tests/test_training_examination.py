"""What is measured with is never trained on."""

import pytest

import safelocus as sl
from safelocus.errors import PromptError
from safelocus.training.examination import Examination, check_apart, divide, split_task


def prompts(word, number=200):
    return sl.read_prompts([{"prompt": f"{word} {n}", "response": "no"} for n in range(number)])


def texts(*sets):
    return [text for part in sets if part is not None for text in part.texts]


def test_nothing_is_on_two_sides():
    data, harmless, task = prompts("poison"), prompts("cake"), sl.read_task("organism:utility")
    divided = divide(data, [harmless], tasks=[task], limit=10, look=5)
    looks, final = divided.validation, divided.examination
    everything = texts(divided.data, *divided.retained, final.harmful, final.harmless, looks.harmful, looks.harmless)
    assert len(everything) == len(set(everything))
    assert len(final.harmful) == len(final.harmless) == len(final.tasks[0]) == 10
    assert len(looks.harmful) == len(looks.harmless) == len(looks.tasks[0]) == 5
    questions = [{e.prompt for e in part.tasks[0]} for part in (looks, final)]
    assert not questions[0] & questions[1]
    assert [remark.partition(" prompts")[0] for remark in divided.remarks] == [
        f"measured with {len(data.split(0.25)[1])}",
        f"measured with {len(harmless.split(0.25)[1])}",
    ]
    assert divide(data, [harmless], tasks=[task], limit=10, look=5) == divided


def test_sets_of_their_own_stay_whole():
    data, held_out, harmless = prompts("poison"), prompts("bomb"), prompts("kite")
    divided = divide(data, harmful=held_out, harmless=harmless, validation=0)
    assert divided.data == data
    assert divided.examination.harmful == held_out
    assert divided.examination.harmless == harmless
    assert divided.validation is None
    assert divided.remarks == ("utility is not measured: no task was given (--task)",)
    looked = divide(data, [prompts("cake")], harmful=held_out, harmless=harmless)
    assert looked.validation is not None
    assert set(looked.validation.harmless.texts) <= set(harmless.texts)  # like what is measured with
    assert len(looked.retained[0]) == 200


def test_what_is_not_measured_is_said():
    unmeasured = divide(prompts("poison"), [prompts("cake")], over_refusal=False)
    assert unmeasured.examination.harmless is None
    assert unmeasured.retained == (prompts("cake"),)
    assert "over-refusal is not measured" in " ".join(unmeasured.remarks)
    remarks = " ".join(divide(prompts("poison")).remarks)
    assert "over-refusal is not measured" in remarks
    assert "utility is not measured" in remarks


def test_prompts_that_are_trained_on_are_refused():
    examination = Examination(harmful=prompts("poison", 8), harmless=prompts("cake", 4))
    assert check_apart(examination, [prompts("bomb")]) == []
    with pytest.raises(PromptError, match="8 of 200 prompts to train on or to choose by are also among those to"):
        check_apart(examination, [prompts("bomb"), prompts("poison")])
    (remark,) = check_apart(examination, [prompts("CAKE")], allow_seen=True)
    assert remark.startswith("4 of the prompts measured with were trained on or chosen by")


def test_questions_count_as_prompts_do():
    task = sl.read_task("organism:utility").limit(20)
    examination = Examination(harmful=prompts("poison", 8), tasks=(task,))
    trained = sl.read_prompts([example.prompt for example in task.examples[:5]])
    with pytest.raises(PromptError, match="5 of 5 prompts to train on or to choose by are also among those to measure"):
        check_apart(examination, [trained])
    with pytest.raises(PromptError, match="20 of 20 prompts"):
        check_apart(examination, [task])


def test_what_is_set_aside_is_trained_on_in_no_set():
    """A set that is named twice counts twice."""
    found = divide(prompts("poison"), [prompts("cake"), prompts("cake")])
    aside = {*found.examination.prompt_hashes, *found.validation.prompt_hashes}
    assert len(found.retained) == 2
    assert all(not aside & set(part.prompt_hashes) for part in found.retained)
    assert check_apart(found.examination, [found.data, *found.retained, *found.validation.parts]) == []


def test_too_few_questions():
    task = sl.read_task("organism:utility").limit(1)
    with pytest.raises(PromptError, match="left one part empty"):
        split_task(task, 0.1)
