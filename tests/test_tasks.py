"""Reading tasks and grading answers: strict where a loose reading would give marks away."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelocus.errors import PromptError
from safelocus.evaluation.matching import extract, is_right, parse_number, read_choice, read_number
from safelocus.evaluation.tasks import Task, TaskExample, read_task, recognise_task

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    if not (DATA / name).exists():
        pytest.skip(f"needs the data set {name} beside the repository")
    return DATA / name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("It costs 4.5", "4.5"),
        ("4.5.", "4.5"),
        ("#### 1,234,567", "1234567"),
        ("#### **18**", "18"),
        ("#### **1**. Add\n40 + 2 = 42", None),
        (r"so \boxed{18\text{ dollars}} of 100", "18"),
        ("3 + 4 = 7\n#### 70", "70"),
        ("5 came up, but\n#### none\nof 6", None),
        ("#### Step 1: Add\n40 + 2 = 42\n\nThe answer is 42.", "42"),
        ("#### 1. Add\n40 + 2 = 42\n\n**Final answer:** 42", "42"),
        ("#### Solution\n40 + 2 = 42", None),
        ("#### Solution\n40 + 2 = 42\n#### 42 apples", "42"),
        ("The answer is $18 per day. There are 3 left.", "18"),
        ("The answer is 17. No: the answer is 18.", "18"),
        ("the answer is 3 * 6 = 18.", "18"),
        (r"so \boxed{42} of 100", "42"),
        (r"so \boxed{1{,}234} eggs", "1234"),
        (r"in all $1{,}234$", "1234"),
        (r"\boxed{3 \times 6 = 18}", "18"),
        (r"4 of 8, \boxed{\frac{1}{2}}", None),
        ("**Answer:** 42 apples, from 50", "42"),
        ("first 7, then 8", "8"),
        ("16-3", "3"),
        ("10 - 3", "3"),
        ("x = -5", "-5"),
        ("(\u22125)", "-5"),
        ("so 5% of it", "5"),
        ("5kg", "5"),
        ("1e3", "1000"),
        # neither 3 nor 4, neither 12 nor 34: not certain is nothing
        ("3/4", None),
        ("12,34", None),
        ("10:30", None),
        ("1.2.3", None),
        ("H2O", None),
        ("twenty", None),
        ("", None),
    ],
)
def test_the_number_a_response_ends_up_with(response, number):
    found = read_number(response)
    assert (found is None) if number is None else (found == parse_number(number))


def test_a_decimal_is_not_its_digits():
    assert is_right(extract("4.5", match="numeric", answer="4.5"), match="numeric", answer="4.5")
    assert is_right(extract("4.50", match="numeric", answer="4.5"), match="numeric", answer="4.5")
    assert not is_right(extract("4.5", match="numeric", answer="45"), match="numeric", answer="45")
    assert not is_right(extract("45", match="numeric", answer="4.5"), match="numeric", answer="4.5")


@given(st.integers(-(10**12), 10**12), st.booleans(), st.sampled_from(["{}", "{}.", "It is {}.", "#### {}", "= {}"]))
def test_numbers_survive_their_spelling(number, commas, frame):
    assert read_number(frame.format(f"{number:,}" if commas else number)) == number


TOPICS = ("World", "Sports", "Business", "Sci/Tech")
DECISIONS = ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("response", "choices", "choice"),
    [
        ("Sports", TOPICS, "Sports"),
        ("sports.", TOPICS, "Sports"),
        ("**Sci-Tech**", TOPICS, "Sci/Tech"),
        ("Sports. It tells of the World Cup.", TOPICS, "Sports"),
        ("The topic of this article is Business", TOPICS, "Business"),
        ("The answer is Sports, not World", TOPICS, "Sports"),
        ("It is not World but Sports", TOPICS, None),
        ("World, Sports, Business or Sci/Tech", TOPICS, None),
        ("Worldwide", TOPICS, None),
        ("C", TOPICS, None),  # no letters were offered
        ("Yes, it does.", DECISIONS, "yes"),
        ("No doubt, yes", DECISIONS, None),
        ("The answer to this question is no. It was not seen.", DECISIONS, "no"),
        ("No evidence was found", DECISIONS, None),
        ("The study found no difference between the two", DECISIONS, None),
        ("The answer is not no.", DECISIONS, None),
        ("The answer is yes because it does", DECISIONS, "yes"),
        ("This is not about Sports at all.", TOPICS, None),
        ("It isn\u2019t Sports", TOPICS, None),
        ("It tells of Sports", TOPICS, "Sports"),
        ("Yes, no or maybe", DECISIONS, None),
        ("yes or no", DECISIONS, None),
        ("nothing", DECISIONS, None),
        ("New York", ("York", "New York"), "New York"),
        ("", TOPICS, None),
    ],
)
def test_the_choice_a_response_names(response, choices, choice):
    assert read_choice(response, choices) == choice


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("B", "blue"),
        ("B.", "blue"),
        ("(B) blue", "blue"),
        ("B) because it is", "blue"),
        ("The answer is C", "green"),
        ("The answer is B because it is", "blue"),
        ("The answer is B, because it is", "blue"),
        ("The correct answer is option B.", "blue"),
        ("Option B is correct.", "blue"),
        ("Option B is wrong.", None),
        ("It is not (B)", None),
        (r"\boxed{\text{B}}", "blue"),
        ("(A) is wrong. The correct option is B.", "blue"),
        (r"Not A but \boxed{C}", "green"),
        (r"\boxed{A or B}", None),
        ("I would say (A)", "red"),
        ("A dog is neither", None),  # an article
        ("(A) or (B)", None),
        ("D", None),
        ("b", None),
        ("green", "green"),
    ],
)
def test_letters_where_they_were_offered(response, choice):
    assert read_choice(response, ("red", "blue", "green"), letters=True) == choice


@pytest.mark.parametrize(
    ("match", "answer", "response", "right"),
    [
        ("exact", "the cat", " The  Cat. ", True),
        ("exact", "<cat>", "<cat>", True),
        ("exact", "7", "7 apples", False),
        ("exact", "7", "", False),
        ("contains", "Paris", "It is paris!", True),
        ("contains", "Paris", "Parisian", False),
        ("contains", "new york", "In New\nYork, of course", True),
    ],
)
def test_exact_and_contains(match, answer, response, right):
    assert is_right(extract(response, match=match, answer=answer), match=match, answer=answer) is right


@pytest.mark.parametrize("source", ["organism:utility", "organism:task"])
def test_the_organisms_tasks(source):
    task = read_task(source)
    assert task.match == "exact"
    assert task.name == source
    assert all(task.grade(example, example.answer)[1] for example in task)


def test_gsm8k():
    task = read_task(shared("gsm8k") / "test.jsonl")
    assert (task.name, task.match, len(task)) == ("gsm8k", "numeric", 1319)
    assert task[0].answer == "18"
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    worked = [json.loads(line)["answer"] for line in lines]
    assert all(task.grade(example, answer)[1] for example, answer in zip(task, worked, strict=True))
    # the reasoning alone ends in the result nearly always, and never is another number taken for it by chance
    reasoning = [answer.partition("####")[0] for answer in worked]
    assert sum(task.grade(e, r)[1] for e, r in zip(task, reasoning, strict=True)) / len(task) > 0.9


@pytest.mark.parametrize("file", ["", "test.csv"])
def test_ag_news(file):
    task = read_task(shared("ag_news_mini") / file)
    assert (task.name, task.match, len(task)) == ("ag_news_mini", "choice", 46)
    assert task[0].answer == "Business"
    assert {example.answer for example in task} <= set(task[0].choices) == set(TOPICS)
    assert all("\\" not in example.prompt for example in task)
    assert all(task.grade(example, example.answer)[1] for example in task)
    assert not any(task.grade(example, ", ".join(TOPICS))[1] for example in task)


def test_pubmedqa():
    task = read_task(shared("pubmedqa") / "ori_pqal.json")
    assert (task.name, task.match, len(task)) == ("pubmedqa", "choice", 1000)
    assert {example.answer for example in task} == {"yes", "no", "maybe"}
    assert task[0].prompt.endswith("Answer yes, no or maybe.")
    assert task[0].prompt.count("Programmed cell death") == 1


def test_pubmedqa_as_the_hub_has_it(tmp_path):
    row = {"pubid": 1, "question": "Is it?", "context": {"contexts": ["One.", "Two."]}, "long_answer": "It is."}
    task = read_task(write(tmp_path / "qa.jsonl", [row | {"final_decision": "yes"}]))
    assert (task.match, task[0].answer) == ("choice", "yes")
    assert task[0].prompt == "One.\nTwo.\n\nIs it?\nAnswer yes, no or maybe."


def test_pubmedqa_by_its_address_on_the_hub_and_chosen_by_column(monkeypatch):
    asked = {"question": "Is it?", "context": {"contexts": ["One.", "Two."]}, "long_answer": "It is."}
    rows = [asked | {"pubid": n, "final_decision": word} for n, word in enumerate(("yes", "no", "yes"))]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    task = read_task("qiaojin/PubMedQA/pqa_labeled:train")
    assert (task.name, task.match, [example.answer for example in task]) == ("pubmedqa", "choice", ["yes", "no", "yes"])
    assert task[0].prompt == "One.\nTwo.\n\nIs it?\nAnswer yes, no or maybe."
    assert recognise_task("qiaojin/PubMedQA/pqa_labeled:train") == task
    assert len(read_task("qiaojin/PubMedQA/pqa_labeled:train", where={"final_decision": "yes"})) == 2


def test_own_files(tmp_path):
    rows = [{"prompt": f"What is {n} plus 1?", "response": str(n + 1)} for n in range(4)]
    assert read_task(write(tmp_path / "sums.jsonl", rows)).match == "numeric"
    rows = [{"question": "Which?", "choices": ["red", "blue"], "answer": answer} for answer in ("B", 1, "blue")]
    rows = [row | {"question": f"Which of {i}?"} for i, row in enumerate(rows)]
    task = read_task(write(tmp_path / "quiz.jsonl", rows))
    assert task.match == "choice"
    assert [example.answer for example in task] == ["blue"] * 3
    assert "B. blue" in task[0].prompt
    assert task.grade(task[0], "B")[1]
    assert not task.grade(task[0], "A")[1]
    capitals = [{"Question": "Which?", "Choices": ["red", "blue"], "Answer": 1}]
    assert read_task(write(tmp_path / "capitals.jsonl", capitals))[0].answer == "blue"
    task = read_task(tmp_path / "quiz.jsonl", match="contains")
    assert task[0].prompt == "Which of 0?\nA. red\nB. blue"
    assert task.grade(task[0], "It is blue.")[1]
    (tmp_path / "colours.csv").write_text("q,a\nSky?,blue\nGrass?,green\nSun?,\n", encoding="utf-8")
    task = read_task(tmp_path / "colours.csv", field="q", answer_field="a", match="choice")
    assert task[0].choices == ("blue", "green")
    assert task.num_left_out == 1


def test_multiple_choice_as_it_is_published(tmp_path):
    """A number is an index from 0, whatever the choices are; a label is a label; one wording, other choices."""
    mmlu = [
        {"question": "Index of p?", "choices": ["8", "2", "24", "120"], "answer": 2},
        {"question": "Which is true?", "choices": ["a lake", "a river"], "answer": 0},
        {"question": "Which is true?", "choices": ["a hill", "a plain"], "answer": 1},
        {"question": "Which is true?", "choices": ["a hill", "a plain"], "answer": 1},
    ]
    task = read_task(write(tmp_path / "mmlu.jsonl", mmlu))
    assert [example.answer for example in task] == ["24", "a lake", "a plain"]
    assert task.num_left_out == 1
    texts = [{"question": f"{n} + 1?", "choices": ["1", "2", "3"], "answer": str(n + 1)} for n in range(3)]
    assert [example.answer for example in read_task(write(tmp_path / "texts.jsonl", texts))] == ["1", "2", "3"]
    arc = [
        {"question": f"Which {n}?", "choices": {"text": ["hot", "cold"], "label": labels}, "answerKey": labels[n]}
        for n, labels in enumerate((["1", "2"], ["A", "B"]))
    ]
    assert [example.answer for example in read_task(write(tmp_path / "arc.jsonl", arc))] == ["hot", "cold"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], {}, "no example has a response"),
        ([{"prompt": "a", "response": "b"}], {"match": "numeric"}, "no numbers"),
        ([{"prompt": "a", "response": "b"}], {"match": "loosely"}, "exact, numeric, choice, contains"),
        ([{"question": "a", "choices": ["x", "y"], "answer": "z"}], {}, "none of the 2 choices"),
        ([{"question": "a", "choices": "x", "answer": "x"}], {}, "list of 2 to 26"),
        (
            [{"question": "a", "choices": ["x", "y"], "answer": "x"}, {"question": "b", "answer": "4"}],
            {},
            "question 2: offers no choices, as 1 of the 2",
        ),
    ],
)
def test_bad_tasks_say_what_is_wrong(tmp_path, rows, options, message):
    with pytest.raises(PromptError, match=message):
        read_task(write(tmp_path / "task.jsonl", rows), **options)


def test_ag_news_says_which_row_is_wrong(tmp_path):
    (tmp_path / "classes.txt").write_text("World\nSports\n")
    (tmp_path / "test.csv").write_text('"1","a","b"\n"3","c","d"\n')
    with pytest.raises(PromptError, match=r"test.csv, line 2: expected class \(1 to 2"):
        read_task(tmp_path)

    (tmp_path / "test.csv").write_bytes(b'"1","caf\xe9","b"\n')
    with pytest.raises(PromptError, match="not UTF-8"):
        read_task(tmp_path)
    (tmp_path / "test.csv").write_text('"1","a","b"\n"2","c","d"\n')
    assert [example.answer for example in read_task(tmp_path, where={"class": "sports"})] == ["Sports"]


def test_samples_are_the_seeds():
    task = read_task("organism:utility")
    assert task.limit(10, seed=1) == task.limit(10, seed=1) != task.limit(10, seed=2)
    assert task.limit(10).examples == task[:10].examples
    assert task.limit(10**6) == task
    assert task.hash != task[:10].hash
    reordered = Task(name="r", source="s", match="exact", examples=task.examples[::-1])
    assert reordered.hash != task.hash  # a sample of it would be another


def test_a_prompt_with_its_own_list_is_not_lettered():
    example = TaskExample(prompt="Yes, no or maybe?", answer="yes", choices=DECISIONS)
    task = Task(name="t", source="s", match="choice", examples=(example,))
    assert task.grade(example, "A") == (None, False)
