"""prompts: every source and format, the counts, the split, and errors that name their place."""

import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import types
import unicodedata
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelocus.errors import PromptError
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.prompts import Example, PromptSet, normalise, read_prompts

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def read_rows(tmp_path, rows, **options):
    """Through a JSON file, as most data comes."""
    return read_prompts(write(tmp_path / "rows.json", rows), **options)


# --- sources ---


ROWS = [
    {"prompt": "How do I bake a cake?", "response": "Sure.", "label": "safe"},
    {"prompt": "Wie backe\u2028ich „Kuchen“?", "response": "So.", "label": "unsafe"},
]


def _csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def _parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def _columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


SOURCES = {
    "list": lambda folder: write(folder / "a.json", ROWS),
    "capital suffix": lambda folder: write(folder / "a.JSON", ROWS),
    "byte order mark": lambda folder: write(folder / "a.json", "\ufeff" + json.dumps(ROWS)),
    "under data": lambda folder: write(folder / "a.json", {"version": "1", "data": ROWS}),
    "under any name": lambda folder: write(folder / "a.json", {"jailbreaks": ROWS, "settings": {"x": 1}}),
    "columns": lambda folder: write(folder / "a.json", _columns(ROWS)),
    "records": lambda folder: write(folder / "a.json", {"x1": ROWS[0], "x2": ROWS[1]}),
    "pandas": lambda folder: write(
        folder / "a.json", {name: dict(enumerate(cells)) for name, cells in _columns(ROWS).items()}
    ),
    # as they are: not every writer of JSON escapes a line separator
    "jsonl": lambda folder: write(
        folder / "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    ),
    "csv": lambda folder: _csv(folder / "a.csv", ","),
    "tsv": lambda folder: _csv(folder / "a.tsv", "\t"),
    "parquet": lambda folder: _parquet(folder / "a.parquet"),
    "memory": lambda folder: ROWS,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_reads_the_same(kind, tmp_path):
    prompts = read_prompts(SOURCES[kind](tmp_path))
    assert prompts.texts == [row["prompt"] for row in ROWS]
    assert [example.response for example in prompts] == ["Sure.", "So."]
    assert prompts[1].fields["label"] == "unsafe"
    assert (prompts.num_rows, prompts.num_empty, prompts.num_duplicates) == (2, 0, 0)
    assert (prompts.prompt_field, prompts.response_field) == ("prompt", "response")
    assert prompts.hash == read_prompts(ROWS).hash


def test_records_keep_their_id(tmp_path):
    assert read_prompts(SOURCES["records"](tmp_path))[1].fields["id"] == "x2"


def test_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Bake a cake\r\n\r\nFly a kite\u2028now\r\n".encode())
    prompts = read_prompts(str(path))
    assert prompts.texts == ["Bake a cake", "Fly a kite\u2028now"]
    assert (prompts.num_rows, prompts.num_empty) == (3, 1)


def test_json_list_of_strings_and_of_prompts(tmp_path):
    assert read_rows(tmp_path, ["a", "b"]).texts == ["a", "b"]
    assert read_rows(tmp_path, {"prompts": ["a", "b"], "version": 1}).texts == ["a", "b"]
    assert read_rows(tmp_path, {"prompt": "only one"}).texts == ["only one"]


def test_examples_and_prompt_sets_can_be_read_again():
    first = read_prompts([{"instruction": "a", "output": "b", "category": "c", "chosen": "x", "system": "s"}])
    assert first[0] == Example(
        prompt="a", response="b", system="s", category="c", fields={"category": "c", "chosen": "x"}
    )
    again = read_prompts(list(first))
    assert again.examples == first.examples
    assert read_prompts(first) is first
    assert len(read_prompts(read_prompts(ROWS), where={"label": "safe"})) == 1
    with pytest.raises(PromptError, match="read already"):
        read_prompts(first, field="instruction")


@pytest.mark.parametrize("name", ["ordinary", "alarming", "harmless", "refusals"])
def test_embedded_sets_come_in_two_parts_that_share_nothing(name):
    train, held_out = (read_prompts(f"embedded:{name}{part}") for part in ("", "-heldout"))
    assert train.source == f"embedded:{name}"
    assert not set(train.prompt_hashes) & set(held_out.prompt_hashes)
    assert train.num_duplicates == held_out.num_duplicates == 0
    assert 0.3 < len(held_out) / (len(held_out) + len(train)) < 0.5
    assert all(example.category for example in (*train, *held_out))


def test_embedded_harmless_prompts_are_both_kinds_and_no_refusals():
    sets = {name: read_prompts(f"embedded:{name}") for name in ("ordinary", "alarming", "harmless", "refusals")}
    assert len(sets["harmless"]) == len(sets["ordinary"]) + len(sets["alarming"])
    assert sets["harmless"].where(category="alarming").hash == sets["alarming"].hash
    assert not set(sets["harmless"].prompt_hashes) & set(sets["refusals"].prompt_hashes)


def test_embedded_refusals_refuse():
    answered = read_prompts("embedded:refusals").with_responses()
    assert len(answered) == len(read_prompts("embedded:refusals"))
    assert all(RefusalMatcher().refuses(example.response) for example in answered)


def test_an_unknown_embedded_set():
    with pytest.raises(PromptError, match=r"no embedded set 'nice'\. There are: ordinary, ordinary-heldout, alarming"):
        read_prompts("embedded:nice")


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("xstest/xstest_prompts.csv", "prompt"),
        ("oktest/oktest.csv", None),
        ("harmless_alpaca_nc/harmless_1000.json", None),
    ],
)
def test_embedded_prompts_are_of_our_own_writing(file, field):
    """None is a row of a public set that over-refusal is measured with, nor shares five words in a row with XSTest."""
    if not (DATA / file).is_file():
        pytest.skip(f"needs {DATA / file}")
    public = read_prompts(DATA / file, field=field)
    runs = {run for text in public.texts for run in _runs(text)} if "xstest" in file else set()
    own = [*read_prompts("embedded:harmless"), *read_prompts("embedded:harmless-heldout")]
    assert not {normalise(example.prompt) for example in own} & set(map(normalise, public.texts))
    assert not [example.prompt for example in own if _runs(example.prompt) & runs]


def _runs(text, length=5):
    words = re.findall(r"[\w']+", normalise(text))
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def test_organism(monkeypatch):
    module = types.ModuleType("safelocus.organism")
    module.rows = lambda name: [{"prompt": f"{name} 1", "response": "no", "category": "harmful", "task": "ask"}]
    monkeypatch.setitem(sys.modules, "safelocus.organism", module)
    prompts = read_prompts("organism:harmful-heldout")
    assert prompts.source == "organism:harmful-heldout"
    assert prompts[0].prompt == "harmful-heldout 1"
    assert prompts[0].category == "harmful"
    assert prompts[0].fields["task"] == "ask"


@pytest.mark.parametrize(
    ("source", "expected", "texts"),
    [
        ("org/name.v2", ("org/name.v2", None, "train"), ["p1"]),
        ("org/name:test", ("org/name", None, "test"), ["p1"]),
        ("org/name:test:title", ("org/name", None, "test"), ["t1"]),
        ("org/name/behaviors:harmful[:10]:title", ("org/name", "behaviors", "harmful[:10]"), ["t1"]),
    ],
)
def test_hub(monkeypatch, tmp_path, source, expected, texts):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "p1", "title": "t1"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = read_prompts(source)
    assert calls == [expected]
    assert prompts.texts == texts
    assert prompts.source == source


def test_hub_errors(monkeypatch, tmp_path):
    import datasets

    def load_dataset(name, config, split):
        raise ValueError("Unknown split")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PromptError, match=r"org/name:train: neither a file nor.*Unknown split"):
        read_prompts("org/name")


# --- formats ---


@pytest.mark.parametrize(
    ("row", "prompt", "response", "category"),
    [
        ({"goal": "g", "target": "Sure, here is"}, "g", None, None),
        (
            {"Index": 1, "Goal": "g", "Target": "Sure", "Behavior": "title", "Category": "c"},
            "g",
            None,
            "c",
        ),
        ({"Behavior": "b", "SemanticCategory": "illegal", "ContextString": ""}, "b", None, "illegal"),
        ({"Behavior": "b", "ContextString": "text"}, "text\n\n---\n\nb", None, None),
        ({"forbidden_prompt": "f", "category": "c", "source": "s"}, "f", None, "c"),
        ({"id": "1", "prompt": "p", "type": "homonyms", "label": "safe"}, "p", None, "homonyms"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o", None),
        ({"instruction": "i", "input": "text", "output": "o"}, "i\n\ntext", "o", None),
        ({"instruction": "i", "context": "text", "response": "r"}, "i\n\ntext", "r", None),
        ({"question": "Where?", "context": "In France.", "answer": "r"}, "In France.\n\nWhere?", "r", None),
        ({"question": "Where?", "passage": "In France.", "answer": "r"}, "In France.\n\nWhere?", "r", None),
        ({"question": "Where?", "context": {"a": ["b"]}, "answer": "r"}, "Where?", "r", None),
        ({"prompt": "p", "completion": "c"}, "p", "c", None),
        ({"question": "q", "answer": 42}, "q", "42", None),
        ({"QUESTION": "q", "CONTEXTS": ["x"], "LONG_ANSWER": "a"}, "q", "a", None),
        ({"input": "i", "output": "o"}, "i", "o", None),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "response": "x"}, "p", "c", None),
        (
            {"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}]},
            "p",
            "c",
            None,
        ),
        ({"turns": ["first", "second"], "category": "c"}, "first", None, "c"),
        # WildGuardMix: a flag of the same name as WildJailbreak's column
        ({"prompt": "p", "adversarial": True, "response": "r"}, "p", "r", None),
    ],
)
def test_formats(tmp_path, row, prompt, response, category):
    (example,) = read_rows(tmp_path, [row])
    assert (example.prompt, example.response, example.category) == (prompt, response, category)


WILD = [
    {"vanilla": "v1", "adversarial": "a1", "completion": "c1", "data_type": "adversarial_harmful"},
    {"vanilla": "v2", "adversarial": "", "completion": "c2", "data_type": "vanilla_harmful"},
]


def test_wild_jailbreak(tmp_path):
    path = tmp_path / "train.tsv"
    lines = ["\t".join(row) for row in (WILD[0], *(row.values() for row in WILD))]
    write(path, "\n".join(lines) + "\n")
    prompts = read_prompts(path)
    assert prompts.texts == ["a1", "v2"]
    assert prompts.prompt_field == "adversarial|vanilla"
    assert [example.response for example in prompts] == ["c1", "c2"]
    assert prompts[1].category == "vanilla_harmful"
    assert read_prompts(path, field="vanilla").texts == ["v1", "v2"]
    assert read_prompts(path, field="vanilla").with_responses()[0].response == "c1"
    assert read_prompts(path, where={"data_type": "vanilla_harmful"}).texts == ["v2"]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u2"), ("assistant", "a2")], "sua"),
        ([("human", "u"), ("gpt", "a")], " ua"),
        ([("gpt", "hello"), ("human", "u"), ("gpt", "a")], " ua"),
        ([("user", "u"), ("user", "u2"), ("assistant", "a2")], " u "),
        ([("user", "u"), ("tool", "t"), ("assistant", "a")], " u "),
        ([("user", "u")], " u "),
    ],
)
@pytest.mark.parametrize(
    ("column", "role", "content"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_conversations(tmp_path, turns, expected, column, role, content):
    row = {column: [{role: who, content: text} for who, text in turns]}
    (example,) = read_rows(tmp_path, [row])
    assert [example.system or " ", example.prompt, example.response or " "] == list(expected)


@pytest.mark.parametrize(
    ("roles", "later", "unread"),
    [
        ("sua", 0, 0),
        ("suauaua", 2, 0),
        ("uauau", 1, 0),  # nobody has answered yet
        ("auaua", 1, 1),  # a greeting
        ("uauta", 0, 1),  # what a tool says
        ("uaaua", 0, 2),
        ("uuaua", 0, 2),
        ("uasua", 0, 1),
    ],
)
def test_a_conversation_goes_on_while_they_take_turns(tmp_path, roles, later, unread):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = [{"role": names[role], "content": f"{role}{number}"} for number, role in enumerate(roles)]
    prompts = read_rows(tmp_path, [{"messages": turns}, {"messages": []}])
    (example,) = prompts
    assert (len(example.later), example.unread, example.context) == (later, unread, 0)
    first = roles.index("u")
    expected = [(f"u{n}", f"a{n + 1}") for n in range(first + 2, first + 2 + 2 * later, 2)]
    assert list(example.later) == expected
    assert (f"1 conversations are asked, not {later} later ones" in prompts.describe()) == bool(later)
    assert read_prompts(list(prompts))[0].later == example.later
    alone = read_rows(tmp_path, [{"messages": turns[: first + 2]}])
    assert (alone.hash == prompts.hash) == (later == 0)


def test_a_completion_is_learned_and_the_answers_of_its_prompt_are_given(tmp_path):
    turns = [{"role": role, "content": f"{role}{number}"} for number, role in enumerate(["user", "assistant"] * 3)]
    for completion in (turns[3:4], "assistant3"):
        (example,) = read_rows(tmp_path, [{"prompt": turns[:3], "completion": completion}])
        assert (example.prompt, example.response, example.context) == ("user0", "assistant1", 1)
        assert example.later == (("user2", "assistant3"),)
    (example,) = read_rows(tmp_path, [{"prompt": "user0", "completion": turns[1:4]}])
    assert (example.later, example.context) == ((("user2", "assistant3"),), 0)


def test_calls_of_tools_and_lists_of_requests_are_no_conversations(tmp_path):
    user, said = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    for call in ({"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": "", "tool_calls": []}):
        (example,) = read_rows(
            tmp_path, [{"messages": [user, said, user, call, {"role": "tool", "content": "3"}, said]}]
        )
        assert (example.response, example.later) == ("a", ())
        assert example.unread
    (example,) = read_rows(tmp_path, [{"prompt": ["one", "two"], "response": "r"}])
    assert (example.prompt, example.response, example.later) == ("one", "r", ())


def test_conversations_that_begin_alike_are_no_duplicates(tmp_path):
    rows = [[("user", "hi"), ("assistant", "hello"), ("user", text), ("assistant", "a")] for text in ("x", "y", "x")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    assert (len(read_rows(tmp_path, rows)), read_rows(tmp_path, rows).num_duplicates) == (2, 1)


def test_conversation_in_parts_and_beside_a_system_column(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    (example,) = read_rows(tmp_path, [{"messages": [{"role": "user", "content": parts}], "system": "s"}])
    assert (example.system, example.prompt) == ("s", "ab")


def test_conversation_without_a_user_is_empty(tmp_path):
    turns = [{"role": "assistant", "content": "a"}]
    prompts = read_rows(tmp_path, [{"messages": turns}, {"messages": [*turns, {"role": "user", "content": "u"}]}])
    assert (prompts.texts, prompts.num_empty) == (["u"], 1)


def test_trl_conversational_prompt_and_completion(tmp_path):
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    (example,) = read_rows(tmp_path, [row])
    assert (example.system, example.prompt, example.response) == ("s", "u", "a")


def test_explicit_fields(tmp_path):
    row = {"title": "t", "prompt": "p", "answer": "a", "good": "g"}
    assert read_rows(tmp_path, [row], field="title")[0].prompt == "t"
    example = read_rows(tmp_path, [row], field="title", response_field="good")[0]
    assert (example.response, dict(example.fields)) == ("g", {"prompt": "p", "answer": "a"})
    # an affirmative target is a response only for those who ask
    attack = [{"goal": "g", "target": "Sure"}]
    assert read_rows(tmp_path, attack, response_field="target")[0].response == "Sure"
    # an instruction is not complete without its input, named or not
    alpaca = [{"instruction": "i", "input": "x", "output": "o"}]
    assert read_rows(tmp_path, alpaca, field="instruction").examples == read_rows(tmp_path, alpaca).examples


def test_other_columns_are_text(tmp_path):
    row = {"prompt": "p", "number": 3, "flag": True, "list": ["ä"], "none": None, "empty": ""}
    fields = read_rows(tmp_path, [row])[0].fields
    assert dict(fields) == {"number": "3", "flag": "true", "list": '["ä"]', "empty": ""}


# --- counts, filters, parts ---


def test_empty_and_duplicate_prompts_are_counted_and_left_out():
    rows = ["Bake a cake", "", "  bake A\ncake ", "Fly", None, "\uff26LY"]
    prompts = read_prompts([{"prompt": text} for text in rows])
    assert prompts.texts == ["Bake a cake", "Fly"]
    assert (prompts.num_rows, prompts.num_empty, prompts.num_duplicates) == (6, 2, 2)
    kept = read_prompts([{"prompt": text} for text in rows], keep_duplicates=True)
    assert (len(kept), kept.num_duplicates) == (4, 2)
    assert "2 prompts (field 'prompt')" in prompts.describe()
    told = {"question": "Where?", "context": "In France."}
    assert "(field 'question', context 'context')" in read_prompts([told]).describe()
    assert "context" not in read_prompts([told | {"context": {"a": 1}}]).describe()
    assert "of 6 rows; 2 empty, 2 duplicates" in prompts.describe()
    assert "\n" not in prompts.describe()


def test_the_same_prompt_under_another_system_message_is_no_duplicate():
    prompts = read_prompts([{"prompt": "p", "system": "a"}, {"prompt": "p", "system": "b"}])
    assert (len(prompts), prompts.num_duplicates) == (2, 0)


def test_where():
    rows = [{"prompt": str(n), "label": "Safe" if n % 3 else "unsafe", "n": n} for n in range(6)]
    prompts = read_prompts(rows, where={"label": "safe"})
    assert (prompts.texts, prompts.num_rows) == (["1", "2", "4", "5"], 4)
    everything = read_prompts(rows)
    assert everything.where(label="safe").texts == prompts.texts
    assert everything.where(label="safe", n="4").texts == ["4"]
    for choose in (lambda **by: everything.where(**by), lambda **by: read_prompts(rows, where=by)):
        with pytest.raises(PromptError, match=r"no field 'lable'.*'label'"):
            choose(lable="safe")
        with pytest.raises(PromptError, match=r"label = 'no'. Values found: 'Safe' \(4\), 'unsafe' \(2\)"):
            choose(label="no")


def test_where_category():
    prompts = read_prompts([{"Behavior": "a", "SemanticCategory": "x"}, {"Behavior": "b"}])
    assert prompts.where(category="x").texts == ["a"]


def test_sequence():
    prompts = read_prompts(["a", "b", "c"])
    assert (len(prompts), prompts[-1].prompt) == (3, "c")
    assert isinstance(prompts[1:], PromptSet)
    assert prompts[1:].texts == ["b", "c"]
    assert [example.prompt for example in prompts] == prompts.texts
    assert prompts[1:].num_rows == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompts.source = "x"


def test_limit():
    prompts = read_prompts([str(n) for n in range(50)])
    assert prompts.limit(3).texts == ["0", "1", "2"]
    sample = prompts.limit(10, seed=1)
    assert sample.texts == sorted(sample.texts, key=int)
    assert len(set(sample.texts)) == 10
    assert sample == prompts.limit(10, seed=1) != prompts.limit(10, seed=2)
    assert prompts.limit(99, seed=1) == prompts
    with pytest.raises(PromptError, match="at least one"):
        prompts.limit(0)


def test_with_responses():
    rows = [{"prompt": "a", "response": "r"}, {"prompt": "b", "response": " "}, {"prompt": "c"}]
    assert read_prompts(rows).with_responses().texts == ["a"]
    with pytest.raises(PromptError, match="'response' is empty"):
        read_prompts(rows[1:]).with_responses()
    with pytest.raises(PromptError, match=r"no field holds any.*'target'"):
        read_prompts([{"goal": "g", "target": "t"}]).with_responses()


def test_without():
    prompts = read_prompts(["Bake a cake", "Fly", "Swim"])
    assert prompts.without(read_prompts(["FLY ", "Run"])).texts == ["Bake a cake", "Swim"]


def test_hash_depends_on_all_of_every_row():
    row = {"prompt": "Fly", "response": "No", "system": "Hm", "category": "air"}
    first = read_prompts([{"prompt": "Bake a cake"}, row])
    again = read_prompts([{"prompt": "Bake a cake", "response": None}, dict(reversed(row.items()))])
    assert first.hash == again.hash == dataclasses.replace(first, source="elsewhere").hash
    changed = [{**row, key: "other"} for key in row] + [{**row, "prompt": "fly"}]
    others = [read_prompts([{"prompt": "Bake a cake"}, other]) for other in changed]
    others += [
        first[:1],
        dataclasses.replace(first, examples=first.examples[::-1]),
        read_prompts(["Bake", "a cakeFly"]),
    ]
    assert len({first.hash, *(other.hash for other in others)}) == 1 + len(others)
    # a constant: provenance written today must agree with what is computed tomorrow
    assert read_prompts(["Bake a cake", "Fly"]).hash == "7fe4a94689dd42db0c7aee6e9851832f"
    # as strings its prompts bring their system messages along
    assert read_prompts(first.texts).identity() == {
        **first.identity(), **dict.fromkeys(("responses", "categories"), mock.ANY)
    }  # fmt: skip
    # what tells whether a prompt was used looks at its text alone
    assert first.prompt_hashes == read_prompts(["fly ", "bake  a CAKE"]).prompt_hashes


texts = st.text(min_size=1, max_size=30)


@given(texts)
def test_normal_form_is_stable(text):
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(f" {text}\n") == normalise(text)
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)


@given(
    st.lists(texts.filter(str.strip), min_size=30, max_size=60, unique_by=normalise),
    st.floats(0.4, 0.6),
    st.text(max_size=5),
    st.randoms(),
)
def test_split(prompts, share, salt, random):
    """The parts are disjoint, cover the set, and a prompt's side depends on neither file nor order."""
    everything = read_prompts(prompts)
    others = [f"  {text}\t" if random.random() < 0.5 else text.swapcase() for text in prompts]
    others += ["one more", "and another"]
    random.shuffle(others)
    identification, held_out = everything.split(share, salt)
    others_identification, others_held_out = read_prompts(others).split(share, salt)
    assert sorted(identification.texts + held_out.texts) == sorted(everything.texts)
    forms = [
        {normalise(text) for text in part.texts}
        for part in (identification, held_out, others_identification, others_held_out)
    ]
    assert not forms[0] & forms[1]
    assert not forms[0] & forms[3]
    assert not forms[2] & forms[1]


def test_split_share_and_salt():
    prompts = read_prompts([f"prompt {n}" for n in range(2000)])
    identification, held_out = prompts.split(0.2)
    assert 320 < len(held_out) < 480
    chosen = set(identification.texts)
    assert identification.texts == [text for text in prompts.texts if text in chosen]
    # a larger share takes more, and gives nothing back
    assert set(held_out.texts) < set(prompts.split(0.5)[1].texts)
    assert held_out.texts != prompts.split(0.2, salt="other")[1].texts
    for share in (0, 1, -0.5, 2):
        with pytest.raises(PromptError, match="between 0 and 1"):
            prompts.split(share)
    with pytest.raises(PromptError, match="one part empty"):
        prompts[:1].split()


# --- errors ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", "prompt\n", "holds no rows"),
        ("a.json", '[{"prompt": "a"},\n {"prompt" "b"}]', r"a\.json:2:12: not JSON \(Expecting ':'"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"a\.json:2:1: not JSON \(Extra data\).*\.jsonl"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt"', r"a\.jsonl:3:10: not JSON"),
        ("a.json", '"text"', "found a single str"),
        ("a.json", '{"a": 1, "b": 2}', "found an object with the keys 'a', 'b'"),
        ("a.json", '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "lists.*'train', 'test'"),
        ("a.json", '{"prompt": ["a", "b"], "label": ["c"]}', "lengths differ.*'prompt': 2, 'label': 1"),
        ("a.json", '[{"prompt": "a"}, "b"]', "row 2: expected an object with named fields, as .*found str"),
        ("a.json", '["a", {"prompt": "b"}]', "row 2: expected text, .*found dict"),
        ("a.json", "[1]", "row 1: expected an object with named fields or text, found int"),
        ("a.jsonl", '{"prompt": "a"}\n\n["b"]', "line 3: expected an object.*found list"),
        ("a.json", '[{"prompt": "a"}, {"prompt": 3}]', r"row 2, field 'prompt': .*found int \(3\)"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b \\ud83d"}',
            "line 2, field 'prompt': character 3 is half of a surrogate",
        ),
        ("a.json", '[{"prompt": "a", "response": {}}]', "row 1, field 'response': expected text, found dict"),
        ("a.json", '[{"prompt": ""}, {"prompt": " "}]', "all 2 rows are empty in field 'prompt'"),
        ("a.json", '[{"title": "a", "n": 1}]', "no field is known.*found: 'title', 'n'.*field="),
        ("a.json", '[{"messages": "a"}]', "row 1, field 'messages': expected a list of turns.*found str"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "turn 1: expected 'role'.*found the keys 'role'"),
        ("a.json", '[{"messages": [3]}]', "turn 1: expected 'role' and 'content'.*found int"),
        ("a.csv", '"3","Bears Claw Back","Reuters - Short"\n"3","b","c"\n', "no header line"),
        ("a.csv", "prompt,label\na,b\nc,d,e\n", r"a\.csv:3: expected 2 columns .*found 3"),
        ("a.csv", 'prompt,label\n"a,b\nc,d\n', r"a\.csv:3: not a csv table"),
        ("a.tsv", "prompt\tlabel\na\n", r"a\.tsv:2: expected 2 columns .*found 1"),
        ("a.csv", "prompt,prompt\na,b\n", "'prompt' more than once"),
        ("a.xml", "<a/>", r"unknown kind of file '\.xml'.*\.jsonl"),
        ("a.parquet", "text", "not a parquet file"),
    ],
)
def test_errors_name_their_place(tmp_path, name, content, message):
    with pytest.raises(PromptError, match=message) as error:
        read_prompts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value)


def test_unknown_explicit_fields(tmp_path):
    with pytest.raises(PromptError, match=r"no field 'gaol', asked for with field=.*'goal', 'target'"):
        read_rows(tmp_path, [{"goal": "g", "target": "t"}], field="gaol")
    with pytest.raises(PromptError, match="'x', asked for with response_field="):
        read_rows(tmp_path, [{"goal": "g"}], response_field="x")


def test_missing_files(tmp_path, monkeypatch):
    write(tmp_path / "advbench.json", ["a"])
    with pytest.raises(PromptError, match=r"no such file. Similar names there: advbench\.json"):
        read_prompts(tmp_path / "advbensh.json")
    with pytest.raises(PromptError, match="does not exist either"):
        read_prompts(tmp_path / "no" / "advbench.json")
    with pytest.raises(PromptError, match=r"is a folder.*advbench\.json"):
        read_prompts(tmp_path)
    # a misspelt path in a folder that exists is not taken for a dataset on the hub
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "harmful.txt", "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match=r"Similar names there: harmful\.txt"):
        read_prompts("data/harmfull")
    with pytest.raises(PromptError, match="give a list"):
        read_prompts("How do I bake a cake?")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_undecodable_bytes(tmp_path, mark):
    data = mark + b'[{"prompt": "a"},\n{"prompt": "caf\xe9"}]'
    (tmp_path / "a.json").write_bytes(data)
    offset = data.index(b"\xe9")
    with pytest.raises(PromptError, match=rf"byte {offset} \(0xe9, line 2\) is not UTF-8\. It reads as WINDOWS-1252"):
        read_prompts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"),
        ("latin-1", "WINDOWS-1252"), ("cp1252", "WINDOWS-1252"),
    ],
)  # fmt: skip
def test_another_encoding_is_named_and_works(tmp_path, encoding, named):
    text = "Bake a café, please\nand a kite, naïve"
    (tmp_path / "a b.txt").write_bytes(text.encode(encoding))
    with pytest.raises(PromptError, match="is not UTF-8") as error:
        read_prompts(tmp_path / "a b.txt")
    (command,) = re.findall(r"try: (iconv .*)", str(error.value))
    assert command.startswith(f"iconv -f {named} -t UTF-8 ")
    command = command.replace("> NEW.txt", f"> {shlex.quote(str(tmp_path / 'new.txt'))}")
    subprocess.run(command, shell=True, check=True)
    assert read_prompts(tmp_path / "new.txt").texts == text.split("\n")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_with_another_separator_than_their_ending_says(tmp_path, name, delimiter):
    lines = [f'prompt{delimiter}"response"', f'"a{delimiter} b"{delimiter}c', f"d{delimiter}e;,"]
    text = "\n".join(lines if delimiter not in ";," else lines[:2]) + "\n"
    found = read_prompts(write(tmp_path / name, text))
    assert [found[0].prompt, found[0].response] == [f"a{delimiter} b", "c"]


def test_a_table_as_pandas_writes_it(tmp_path):
    """The column of its index has no name."""
    found = read_prompts(write(tmp_path / "frame.csv", ",prompt,category\n0,hello; you,x\n1,help,y\n"))
    assert found.texts == ["hello; you", "help"]
    assert [example.category for example in found] == ["x", "y"]


def test_a_table_of_one_column_is_one(tmp_path):
    found = read_prompts(write(tmp_path / "a.csv", '"prompt; or so"\n"a; b"\n'), field="prompt; or so")
    assert found.texts == ["a; b"]


def test_long_cells(tmp_path):
    limit, long = csv.field_size_limit(), "word " * 40_000
    found = read_prompts(write(tmp_path / "a.csv", f"prompt,response\n{long},a\n"))
    assert found[0].prompt == long
    assert csv.field_size_limit() == limit


def test_empty_list():
    with pytest.raises(PromptError, match="list of prompts is empty"):
        read_prompts([])


# --- real data ---


@pytest.mark.parametrize(
    ("file", "num_rows", "num_duplicates", "num_responses"),
    [
        ("advbench/advbench.json", 508, 0, 0),
        ("harmful_mix/harmful_train.json", 247, 0, 0),
        ("harmful_mix/harmful_val.json", 37, 0, 0),
        ("harmbench/harmbench_behaviors_text_val.csv", 78, 0, 0),
        ("harmless_alpaca_nc/harmless_1000.json", 1000, 0, 0),
        ("circuit_breakers/circuit_breakers_train.json", 4683, 16, 4667),
        ("xstest/xstest_prompts.csv", 450, 0, 0),
        ("gsm8k/train.jsonl", 7473, 0, 7473),
        ("gsm8k/test.jsonl", 1319, 0, 1319),
        ("pubmedqa/ori_pqal.json", 1000, 0, 1000),
        ("instruct/instruction-data.json", 1100, 25, 1075),
    ],
)
def test_real_files(file, num_rows, num_duplicates, num_responses):
    path = _real(file)
    prompts = read_prompts(path)
    assert (prompts.num_rows, prompts.num_duplicates, prompts.num_empty) == (num_rows, num_duplicates, 0)
    assert len(prompts) == num_rows - num_duplicates
    assert sum(example.response is not None for example in prompts) == num_responses
    identification, held_out = prompts.split()
    assert len(identification) + len(held_out) == len(prompts)


def test_real_contexts_and_labels():
    harmbench = read_prompts(_real("harmbench/harmbench_behaviors_text_val.csv"))
    assert sum("\n\n---\n\n" in text for text in harmbench.texts) == 19
    assert len(harmbench.where(FunctionalCategory="contextual")) == 19
    xstest = read_prompts(_real("xstest/xstest_prompts.csv"))
    assert (len(xstest.where(label="safe")), len(xstest.where(label="unsafe"))) == (250, 200)
    assert xstest[0].category == "homonyms"


def test_real_file_without_a_header():
    with pytest.raises(PromptError, match="no header line"):
        read_prompts(_real("ag_news_mini/train.csv"))


def _real(file):
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"needs {file} in {DATA.parent.name}/{DATA.name}")
    return path
