"""Tasks of lm-eval with that library itself, where it is installed; tests/test_evaluation.py has a stand-in."""

import json

import pytest

from safelocus.evaluation.suites import run_suites
from test_chat import SEEING
from tiny_targets import dense

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'safelocus[lm-eval]'")

QUESTIONS = [("one and one", "two"), ("two and two", "four"), ("three and one", "four")]
# a task of each kind: choice by likelihood, and free text
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["two", "four"],
        "doc_to_target": "{{ ['two', 'four'].index(answer) }}",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}

TEMPLATES = {
    **SEEING,
    "no system message": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The tiny tasks beside lm-eval's own, without a hub."""
    from lm_eval import tasks as registry

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        whole = {"task": name, **data, "doc_to_text": "{{question}}", **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))
    own = registry.TaskManager
    monkeypatch.setattr(registry, "TaskManager", lambda: own(include_path=str(tmp_path), include_defaults=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_every_document_becomes_a_row(tasks, monkeypatch, template, system):
    from lm_eval.models import huggingface

    target = dense()
    if template is not None:
        monkeypatch.setattr(target.tokenizer, "chat_template", TEMPLATES[template])
    target = type(target).of(target.model, target.tokenizer, system=system)
    read = []
    own = huggingface.HFLM.tok_batch_encode
    monkeypatch.setattr(
        huggingface.HFLM,
        "tok_batch_encode",
        lambda self, texts, **more: (read.extend(texts), own(self, texts, **more))[1],
    )
    rows, described = run_suites(target, ["tiny_choice", "tiny_text:2"], batch_size=2, seed=0)
    assert [(each["name"], each["metric"], each["few_shot"]) for each in described] == [
        ("tiny_choice", "acc", 0), ("tiny_text", "exact_match", 0),
    ]  # fmt: skip
    assert [row["source"] for row in rows] == ["lm-eval:tiny_choice"] * 3 + ["lm-eval:tiny_text"] * 2
    assert [row["answer"] for row in rows] == ["0", "1", "1"] + ["two", "four"]
    assert all(isinstance(row["correct"], bool) for row in rows)
    assert sorted(read) == sorted(target.chat.render(question) for question, _ in QUESTIONS[:2])
