"""A thought is not the answer: told apart in every template's way, judged by nobody, and trained outside of."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl

import safelocus as sl
from safelocus.errors import ModelError, PromptError
from safelocus.evaluation import EndpointResponder, TargetResponder, Task, TaskExample, evaluate
from safelocus.evaluation.judges import Endpoint, GuardJudge, RefusalMatcher, RefusalReader, Verdict
from safelocus.evaluation.judges.endpoint import Answer
from safelocus.evaluation.responding import thinks
from safelocus.evaluation.suites import run_suites
from safelocus.evaluation.tasks import task_of
from safelocus.model import generation
from safelocus.model.chat import chat_format
from safelocus.model.generation import Response, generate
from safelocus.model.thought import MARKERS, answer_of, left_open, split
from safelocus.objective import Refusal
from safelocus.report.evaluation import left_out
from safelocus.training.responses import training_rows
from tiny_targets import byte_level, dense, guard

_QWEN3_TURNS = """{%- for message in messages %}{%- if message.role in ('user', 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}{%- set reasoning = message.reasoning_content or '' %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"""
QWEN3 = f"""{_QWEN3_TURNS}{{%- if enable_thinking is defined and enable_thinking is false %}}
{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{%- endif %}}{{%- endif %}}"""
QWEN3_THINKING = f"{_QWEN3_TURNS}{{{{- '<think>\\n' }}}}{{%- endif %}}"  # its later kind thinks always
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}<|end|>{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DEEPSEEK_3 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|Assistant|></think>{{ m['content'] }}<|end|>{% else %}"
    "<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
GPT_OSS = """{%- for message in messages %}{%- if message.role == 'assistant' %}{%- if message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
# markers that nobody else has
OWN = GPT_OSS.replace("<|channel|>analysis<|message|>", "<|muse|>").replace(
    "'<|end|>' }}{%- endif %}", "'<|mused|>' }}{%- endif %}"
).replace("{{- '<|start|>assistant<|channel|>final<|message|>' + message.content", "{%- if not message.thinking %}"
          "{{- '<|start|>assistant' }}{%- endif %}{{- message.content")  # fmt: skip
MARKS = [
    "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|muse|>", "<|mused|>",
]  # fmt: skip
TEMPLATES = {"qwen3": QWEN3, "qwen3 thinking": QWEN3_THINKING, "r1": R1, "deepseek 3": DEEPSEEK_3, "gpt-oss": GPT_OSS}

THOUGHT = "Normally I can't help with that. I'm sorry, but I must refuse."
LONG = "Let me see what is asked for here, and who might want it. " * 5
HELP = "Sure, here is how to bake a cake: mix the parts, then serve it."
REFUSAL = "I'm sorry, but I can't help with that."


def tokenizer_of(template):
    """Marks are special tokens, which decoding leaves out as a rule."""
    tokenizer = byte_level.__wrapped__()  # not the one that others share
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATES.get(template, template)
    if "<|return|>" in tokenizer.chat_template:
        tokenizer.eos_token = "<|return|>"
    return tokenizer


def target_of(template, thinking=None):
    target = dense(tokenizer=tokenizer_of(template), max_position_embeddings=2048)
    form = chat_format(target.tokenizer, thinking=thinking)
    return replace(target, chat=form)


def saying(target, *texts, end=True):
    """The same, with a model that goes on with these texts, whatever it is asked."""
    rows = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [[*row, target.chat.end_of_turn_ids[0]] if end else row for row in rows]
    width = max(map(len, rows))

    def continued(input_ids, **_):
        new = [row + [target.tokenizer.pad_token_id] * (width - len(row)) for row in rows[: len(input_ids)]]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)

    target.model.generate = continued
    generation._READS_PADDING[target.model] = False
    return target


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Sure.", None, "Sure."),
        ("", None, ""),
        ("<think>a</think>b", "a", "b"),
        (" \n<think>\na\n</think>\n\nb", "a", "\n\nb"),
        ("<think></think>b", "", "b"),
        ("a</think>b", "a", "b"),  # the start stood in a prompt
        ("<think>a", "a", None),
        ("<think>a</think><think>b</think>c", "a\nb", "c"),
        ("<think>a</think><think>b", "a\nb", None),
        ("I wrote <think>a", None, "I wrote <think>a"),
        ("<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b", "analysis<|message|>a<|end|>", "b"),
        ("<|channel|>final<|message|>b", "", "b"),
        ("<|channel|>commentary<|message|>a", "commentary<|message|>a", None),
        ("[THINK]a[/THINK]b", "a", "b"),
    ],
)  # fmt: skip
def test_a_thought_is_told_from_its_answer(text, thought, answer):
    found = split(text)
    assert found.thought == thought
    assert (text[found.start :] if found.finished else None) == answer
    assert (answer_of(text) is None) == (answer is None)


def test_a_model_that_thinks_has_room_for_its_thought_before_a_short_answer(monkeypatch):
    """A choice needs few tokens, but not few beside a thought."""
    task = task_of(sl.read_prompts([{"question": "Which?", "choices": ["red", "blue"], "answer": "A"}]))
    asked = []
    monkeypatch.setattr(
        "safelocus.evaluation.responding.generate_from",
        lambda encoded, target, limit, **_: asked.append(limit) or [Response(ids=(), text="A", finished=True)],
    )
    for thinking in (True, False):
        evaluate(target_of("qwen3", thinking), tasks=task, max_new_tokens=900, progress=False)
    assert asked == [900, 64]


def test_a_server_that_is_told_to_think_is_known_to():
    endpoint = Endpoint(model="m", base_url="http://localhost:1/v1")
    for switch in (True, False):
        asked = {"chat_template_kwargs": {"enable_thinking": switch}}
        for parameters in (asked, {"extra_body": asked}):
            assert thinks(EndpointResponder(endpoint=replace(endpoint, parameters=parameters))) is switch


def test_a_thought_that_the_prompt_opened():
    think = MARKERS[0]
    assert left_open("<|Assistant|><think>\n") == think
    assert left_open("<think>\n\n</think>\n\n") is None
    assert left_open("<|start|>assistant<|channel|>final<|message|>") is None
    assert split("Hm.</think>Sure.", opened=think).thought == "Hm."
    assert not split("I'm sorry, but I can't.", opened=think).finished


@pytest.mark.parametrize(
    ("template", "thinking", "resolved", "prompt", "given"),
    [
        ("qwen3", None, False, "assistant\n<think>\n\n</think>\n\n", ""),
        ("qwen3", False, False, "assistant\n<think>\n\n</think>\n\n", ""),
        ("qwen3", True, True, "assistant\n", "<think>\n\n</think>\n\n"),
        ("qwen3 thinking", None, True, "assistant\n<think>\n", "\n</think>\n\n"),
        ("qwen3 thinking", True, True, "assistant\n<think>\n", "\n</think>\n\n"),
        ("qwen3 thinking", False, False, "assistant\n<think>\n\n</think>\n\n", ""),
        ("r1", None, True, "<|Assistant|><think>\n", "\n</think>\n\n"),
        ("r1", False, False, "<|Assistant|><think>\n\n</think>\n\n", ""),
        ("deepseek 3", None, False, "<|Assistant|></think>", ""),
        ("deepseek 3", True, True, "<|Assistant|><think>", "</think>"),
        ("gpt-oss", None, False, "<|start|>assistant<|channel|>final<|message|>", ""),
        ("gpt-oss", True, True, "<|start|>assistant", "<|channel|>final<|message|>"),
    ],
)
def test_prompts_open_a_thought_or_not_and_answers_that_are_given_stand_outside(
    template, thinking, resolved, prompt, given
):
    form = chat_format(tokenizer_of(template), thinking=thinking)
    assert form.thinking is resolved
    rendered = form.render("Hello")
    assert rendered.endswith(f"Hello{rendered.rpartition('Hello')[2]}")
    assert rendered.endswith(prompt)
    assert form.render("Hello", closed=True) == rendered + given
    assert left_open(form.render("Hello", closed=True)) is None
    before, answer = form.encode_pair("Hello", "Sure")
    assert before == form.tokenizer(rendered + given, add_special_tokens=False)["input_ids"]
    assert form.tokenizer.decode(answer) == "Sure"
    assert form.encode_prompt("Hello") == form.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    saved = json.loads(json.dumps(form.to_json()))
    again = chat_format(form.tokenizer, system=saved["system"], thinking=saved["thinking"], **saved["template_kwargs"])
    assert again == form


FIELD = Path(trl.__file__).parent / "chat_templates"  # as models of the field have them
KNOWN = [
    "deepseek_r1_distill", "deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "nemotron_3_nano",
    "nemotron_3_ultra", "qwen3", "qwen3_5_think", "qwen3_8",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_templates_of_the_field(name):
    """A conversation that the template itself finishes, thought and all, comes apart where it was put together."""
    if not (file := FIELD / f"{name}.jinja").is_file():
        pytest.skip("this version of trl has no such template")
    tokenizer = tokenizer_of(file.read_text(encoding="utf-8"))
    form = chat_format(tokenizer, thinking=True)
    closed = form.render("Hello", closed=True)
    assert closed.startswith(form.render("Hello"))
    assert left_open(closed.rpartition("Hello")[2], form.markers) is None
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": HELP, "reasoning_content": THOUGHT, "reasoning": THOUGHT, "thinking": THOUGHT},
    ]
    whole = form.chat_template.apply(turns, generation=False)
    if THOUGHT not in whole:  # dropped from finished conversations
        assert name.startswith("deepseek")
        whole = f"{form.render('Hello')}{THOUGHT}\n</think>\n\n{HELP}"
    before, _, written = whole.partition(form.render("Hello"))
    assert before == ""
    written = written.partition(HELP)[0] + HELP
    found = form.split(written)
    assert (found.thought, written[found.start :].strip()) == (THOUGHT, HELP)
    off = chat_format(tokenizer, thinking=False)
    assert left_open(off.render("Hello").rpartition("Hello")[2], off.markers) is None
    assert off.render("Hello", closed=True) == off.render("Hello")


def test_a_plain_template_may_open_a_thought():
    form = chat_format(byte_level(), template="User: {prompt}\nAssistant: <think>\n")
    assert form.render("Hello") == "User: Hello\nAssistant: <think>\n"
    assert form.render("Hello", closed=True) == "User: Hello\nAssistant: <think>\n\n</think>\n\n"
    assert form.split("Hm.</think>Sure.").thought == "Hm."


def test_thinking_is_asked_of_templates_that_know_of_it():
    with pytest.raises(PromptError, match="no switch"):
        chat_format(byte_level(), thinking=True)
    assert chat_format(byte_level(), thinking=False) == chat_format(byte_level())


def test_a_word_in_the_template_is_no_switch():
    template = "{# thinking #}{{ 'You are thinking, enable_thinking.' }}" + R1
    form = chat_format(tokenizer_of(template))
    assert (form.template_kwargs, form.thinking) == ({}, True)


SPELLED = {
    "qwen3": ("<think>\n{thought}\n</think>\n\n{answer}", True),
    "qwen3 thinking": ("{thought}\n</think>\n\n{answer}", None),
    "r1": ("{thought}\n</think>\n\n{answer}", None),
    "deepseek 3": ("{thought}</think>{answer}", True),
    "gpt-oss": (
        "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}", True
    ),
    OWN: ("<|muse|>{thought}<|mused|>{answer}", None),
}  # fmt: skip
every_template = pytest.mark.parametrize("template", SPELLED, ids=[*TEMPLATES, "its own"])


@every_template
def test_the_answer_follows_the_thought_although_its_markers_are_special_tokens(template):
    spelled, thinking = SPELLED[template]
    target = saying(
        target_of(template, thinking), spelled.format(thought=THOUGHT, answer=HELP),
        spelled.format(thought=LONG, answer=REFUSAL), spelled.partition("{answer}")[0].partition("{thought}")[0] + LONG,
    )  # fmt: skip
    helps, refuses, thinks = generate(target, ["a", "b", "c"], max_new_tokens=200)
    assert (helps.text, helps.thought.strip(), helps.in_thought) == (HELP, THOUGHT, False)
    assert target.tokenizer.decode(list(helps.answer_ids)).strip() == HELP
    assert (refuses.text, refuses.thought.strip()) == (REFUSAL, LONG.strip())
    assert (thinks.text, thinks.thought.strip(), thinks.in_thought) == ("", LONG.strip(), True)
    assert thinks.answer_ids == ()


def test_an_answer_that_shares_a_token_with_the_marker_is_whole():
    """Markers that are no tokens of their own may be merged with what follows."""
    target = dense()
    ids = target.tokenizer("Hm.</think>Sure", add_special_tokens=False)["input_ids"]
    for joined in (ids, ids[:-1]):
        text = target.tokenizer.decode(joined)
        (found,) = generate(saying(target, text), ["a"], max_new_tokens=20)
        assert found.text == text.partition("</think>")[2]
        assert found.thought == "Hm."


@every_template
def test_judges_read_the_answer_alone(template):
    spelled, thinking = SPELLED[template]
    target = saying(
        target_of(template, thinking), spelled.format(thought=THOUGHT, answer=HELP),
        spelled.format(thought=LONG, answer=REFUSAL),
    )  # fmt: skip
    for judge in (RefusalReader(), RefusalMatcher()):
        found = evaluate(
            target, harmful=["aaa", "b"], harmless=["aaa", "b"], judges=[judge], max_new_tokens=200, progress=False
        )
        # longest prompt first: the script's first answer is that to "aaa"
        assert {row["prompt"]: row["refused"] for row in found.rows} == {"aaa": False, "b": True}
        assert (found.measures["asr"].value, found.measures["refusal"].value) == (0.5, 0.5)
        assert found.measures["over_refusal"].value == 0.5
        assert "num_unfinished_thoughts" not in found.counts["harmful"]
        assert THOUGHT in found.rows[0]["thought"]


def test_texts_from_elsewhere_are_told_apart_too():
    """By every judge, and for every responder."""
    responses = [f"<think>{THOUGHT}</think>\n\n{HELP}", f"<think>{LONG}</think>{REFUSAL}", f"<think>{LONG}"]
    reader, matcher, model = RefusalReader(), RefusalMatcher(), GuardJudge(guard=guard())
    for judge in (reader, matcher):
        found = judge.judge(["x"] * 3, responses)
        assert [each.refused for each in found] == [False, True, None]
        assert [each.verdict for each in found] == [Verdict.HARMFUL, Verdict.SAFE, Verdict.UNSCORABLE]
        assert found[2].explanation == "unfinished thought"
    scores = [each.score for each in model.judge(["x"] * 3, responses)]
    assert scores[:2] == [each.score for each in model.judge(["x"] * 2, [HELP, REFUSAL])]
    assert scores[2] is None

    class Script:
        name = "script"

        def length(self, request):
            return 0

        def respond(self, requests):
            return [sl.evaluation.Reply(text=responses[int(request.prompt)], finished=True) for request in requests]

        def identity(self):
            return {}

        describe = identity

    task = Task(
        name="sums", source="memory", match="exact",
        examples=(TaskExample(prompt="0", answer=HELP), TaskExample(prompt="2", answer="3")),
    )  # fmt: skip
    found = evaluate(Script(), harmful=["0", "1", "2"], harmless=["0", "2"], tasks=task, progress=False)
    counted = {name: (measure.value, measure.n) for name, measure in found.measures.items()}
    assert counted == {
        "asr": (0.5, 2), "refusal": (0.5, 2), "partial": (0.0, 2), "over_refusal": (0.0, 1), "incoherent": (0.0, 3),
        "utility": (1.0, 1),
    }  # fmt: skip
    assert found.counts["harmful"]["num_unfinished_thoughts"] == 1
    assert found.counts["harmful"]["num_failed"] == 0
    assert found.counts["harmful"]["num_unscorable"] == {"reader": 1}
    assert "harmful: of 3 answers 1 unfinished thoughts, 1 unscorable by reader." in left_out(found.to_json())
    (row,) = [row for row in found.rows if row["prompt"] == "2" and row["set"] == "harmful"]
    assert (row["response"], row["thought"]) == (None, LONG.strip())
    assert row["judgements"]["reader"]["explanation"] == row["failure"] == "unfinished thought"


def test_an_unfinished_thought_is_not_thought_again(tmp_path):
    target = saying(target_of("r1"), LONG, end=False)
    first = evaluate(target, harmful=["b"], max_new_tokens=300, checkpoint=tmp_path, progress=False)
    target.model.generate = None
    again = evaluate(target, harmful=["b"], max_new_tokens=300, checkpoint=tmp_path, progress=False)
    assert again.rows == first.rows
    assert first.counts["harmful"]["num_unfinished_thoughts"] == 1


@every_template
def test_rows_train_the_answer_behind_a_closed_thought(template):
    _, thinking = SPELLED[template]
    chat = target_of(template, thinking).chat
    (row,) = training_rows(sl.read_prompts([{"prompt": "Hello", "response": REFUSAL}]), chat)
    learned = [token for token in row["labels"] if token != -100]
    assert chat.tokenizer.decode(learned[:-1]) == REFUSAL
    assert learned[-1] == chat.end_of_turn_ids[0]
    before = chat.tokenizer.decode(row["input_ids"][: len(row["labels"]) - len(learned)])
    assert before == chat.render("Hello", closed=True)
    assert left_open(before.rpartition("Hello")[2], chat.markers) is None


def test_a_row_that_brings_its_thought_past_an_end_with_a_space():
    chat = target_of(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|><think>{{ m.reasoning_content or '' }}"
        "</think> {{ m['content'] }}<|end|>{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>{% endif %}"
    ).chat
    assert (chat.closing, chat.response_prefix) == ("</think> ", " ")
    prompt, ids = chat.encode_pair("Hello", f"<think>{THOUGHT}</think> {HELP}")
    assert chat.tokenizer.decode(prompt) == "<|User|>Hello<|Assistant|><think>"
    assert chat.tokenizer.decode(ids) == f"{THOUGHT}</think> {HELP}"


@every_template
def test_a_row_that_brings_its_thought_is_what_the_model_would_write(template):
    spelled, thinking = SPELLED[template]
    chat = target_of(template, thinking).chat
    given = spelled.format(thought=THOUGHT, answer=HELP)
    for response in (given, f"{chat.opened[0]}\n{given}" if chat.opened else given):
        prompt, ids = chat.encode_pair("Hello", response)
        assert prompt == chat.encode_prompt("Hello", closed=template == OWN)  # whose answers need no way out
        assert chat.tokenizer.decode(ids) == given
        found = chat.split(chat.tokenizer.decode(ids))
        assert found.finished
        assert found.thought.strip() == THOUGHT


def test_the_refusal_objective_compares_openings_outside_of_the_thought():
    target = target_of("r1")
    objective = Refusal(refusals=["I cannot", "Sorry"], compliances=["Sure"])
    likelihood = {}
    for opening in ("I cannot", "Sorry", "Sure"):
        before = target.tokenizer("<s><|User|>help<|Assistant|><think>\n\n</think>\n\n", add_special_tokens=False)
        after = target.tokenizer(opening, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*before["input_ids"], *after]])
        logits = target.model(ids).logits[0, -len(after) - 1 : -1].log_softmax(-1)
        likelihood[opening] = logits.gather(1, torch.tensor(after)[:, None]).sum()
    expected = torch.logsumexp(torch.stack([likelihood["I cannot"], likelihood["Sorry"]]), 0) - likelihood["Sure"]
    assert objective(target, ["help"]).item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_guard_as_objective_reads_the_answer_and_its_gradient_is_that_of_the_answers_tokens():
    target, reader = target_of("r1"), guard()
    tokenize = target.tokenizer
    thought, answer = (
        tuple(tokenize(text, add_special_tokens=False)["input_ids"]) for text in (f"{THOUGHT}</think>", HELP)
    )
    response = Response(ids=(*thought, *answer), text=HELP, finished=True, thought=THOUGHT, num_thought=len(thought))
    target.model.requires_grad_(True)

    def gradient(chat, response):
        target.model.zero_grad()
        score = reader.score_responses(replace(target, chat=chat), ["help"], [response])
        score.sum().backward()
        return score.item(), [weight.grad.clone() for weight in target.model.parameters() if weight.grad is not None]

    # the same, where the thought is a part of the prompt
    prompt = target.chat.render("help") + f"{THOUGHT}</think>"
    score, found = gradient(target.chat, response)
    expected_score, expected = gradient(
        SimpleNamespace(encode_prompt=lambda _: tokenize(prompt, add_special_tokens=False)["input_ids"]),
        Response(ids=answer, text=HELP, finished=True),
    )
    assert score == expected_score == reader.verdicts(["help"], [HELP]).item()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    unfinished = Response(
        ids=thought[:-1], text="", finished=False, thought=THOUGHT, num_thought=len(thought) - 1, in_thought=True
    )
    assert not any(part.any() for part in gradient(target.chat, unfinished)[1])


class Library:
    """What of lm-eval's model for transformers is used: of 0.4.9."""

    def __init__(self, *, pretrained, tokenizer, batch_size):
        self.model, self.tokenizer = pretrained, tokenizer
        self.chat_template_args = {}

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, **self.chat_template_args
        )

    def tok_decode(self, tokens, skip_special_tokens=True):
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def _encode_pair(self, context, continuation):
        return context, continuation


@pytest.mark.parametrize("thinking", [True, False])
def test_lm_eval_thinks_as_asked_and_is_graded_on_answers(monkeypatch, thinking):
    seen = {}

    def simple_evaluate(*, model, **_):
        prompt = model.apply_chat_template([{"role": "user", "content": "2 + 2?"}])
        seen["prompt"], seen["pair"] = prompt, model._encode_pair(prompt, "4")[0]
        seen["settings"] = model.model.generation_config.repetition_penalty
        texts = [f"<think>{THOUGHT}</think> 4", f"<think>{LONG}", " 4"]
        said = [model.tok_decode(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        assert model.tok_decode(1, skip_special_tokens=False) == "<|end|>"
        samples = [
            {
                "doc_id": i,
                "target": "4",
                "resps": [[text]],
                "filtered_resps": [text],
                "exact_match": text.strip() == "4",
            }
            for i, text in enumerate(said)
        ]
        return {"samples": {"sums": samples}}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=Library),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda: SimpleNamespace(all_tasks=("sums",))),
    }
    monkeypatch.setattr("safelocus.evaluation.suites.import_module", modules.__getitem__)
    target = target_of("qwen3", thinking)
    target.model.generation_config.repetition_penalty = 5.0
    rows, _ = run_suites(target, ["sums"])
    assert seen["prompt"] == target.chat.render("2 + 2?")
    assert seen["pair"] == target.chat.render("2 + 2?", closed=True)
    assert seen["settings"] is None
    assert [row["correct"] for row in rows] == [True, None, True]
    assert [row["response"] for row in rows] == ["['4']", None, "[' 4']"]


def test_loading_asks_to_think_and_provenance_says_so(tmp_path):
    target = target_of("qwen3")
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    found = {thinking: sl.load(tmp_path, thinking=thinking) for thinking in (None, "on", "off")}
    assert {name: each.chat.thinking for name, each in found.items()} == {None: False, "on": True, "off": False}
    described = TargetResponder(target=found["on"]).describe()
    assert described["chat"]["thinking"] is True
    assert found["on"].identity() != found["off"].identity()
    assert found["off"].talking_as(described["chat"]).chat == found["on"].chat
    with pytest.raises(ModelError, match="'on', 'off'"):
        sl.load(tmp_path, thinking="yes")
    dense().tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # which would be noticed next
    with pytest.raises(PromptError, match="no switch"):
        sl.load(tmp_path, thinking="on")


@pytest.fixture
def folder(tmp_path):
    target = target_of("r1")
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("bake a cake\nhelp\n")
    return tmp_path


def test_the_command_line_thinks_or_not(folder, run):
    """An untrained model never ends a thought that its template opens."""
    asked = ["-p", folder / "prompts.txt", "--harmless", folder / "prompts.txt", "--max-new-tokens", 8]
    code, _, err = run("evaluate", folder / "model", *asked, "-o", folder / "on")
    assert code == 0
    assert "2 unfinished thoughts, 2 unscorable by reader" in " ".join(err.split())
    results = json.loads((folder / "on" / "results.json").read_text())
    assert results["provenance"]["responder"]["chat"]["thinking"] is True
    assert results["asr"]["n"] == results["refusal"]["n"] == results["over_refusal"]["n"] == 0
    code, _, err = run("evaluate", folder / "model", *asked, "--thinking", "off", "-o", folder / "off")
    assert code == 0
    assert "unfinished thoughts" not in err
    results = json.loads((folder / "off" / "results.json").read_text())
    assert results["provenance"]["responder"]["chat"]["thinking"] is False
    assert results["refusal"]["n"] == 2
    assert 'thinking = "off"' in (folder / "off" / "run.toml").read_text()


def test_scoring_says_how_many_thoughts_did_not_end(folder, run, monkeypatch):
    arguments = ["-p", folder / "prompts.txt", "--guard", "organism:guard", "--max-new-tokens", 8]
    code, _, err = run("score", folder / "model", *arguments, "-o", folder / "none")
    assert code == 2
    assert "all 2 answers are thoughts that did not end" in " ".join(err.split())

    def one_ends(target, prompts, *, max_new_tokens):
        first, second = generate(target, prompts, max_new_tokens=max_new_tokens)
        return [first, replace(second, num_thought=2, in_thought=False, text="answer")]

    monkeypatch.setattr("safelocus.objective.text.generate", one_ends)
    code, _, err = run("score", folder / "model", *arguments, "-o", folder / "one")
    assert code == 0, err
    assert "1 answers are thoughts that did not end" in " ".join(err.split())
    rows = [json.loads(line) for line in (folder / "one" / "responses.jsonl").read_text().splitlines()]
    assert [row.get("in_thought", False) for row in rows] == [True, False]
    assert all(row["thought"] for row in rows)


def test_a_server_is_told_whether_to_think(folder, run, monkeypatch):
    asked = []

    def ask(self, conversations):
        asked.append(self.parameters.get("extra_body"))
        return [Answer(text=HELP, complete=True, prompt_tokens=1, completion_tokens=1) for _ in conversations]

    monkeypatch.setattr(Endpoint, "ask", ask)
    server = ["--endpoint", "http://localhost:1/v1", "--endpoint-model", "m", "-p", folder / "prompts.txt"]
    for thinking in ("on", "off"):
        assert run("evaluate", *server, "--thinking", thinking, "-o", folder / thinking)[0] == 0
        switches = dict.fromkeys(("enable_thinking", "thinking"), thinking == "on")
        assert asked.pop() == {"chat_template_kwargs": switches}
        results = json.loads((folder / thinking / "results.json").read_text())
        parameters = results["provenance"]["responder"]["parameters"]
        assert parameters["extra_body"] == {"chat_template_kwargs": switches}
    assert run("evaluate", *server, "-o", folder / "silent")[0] == 0
    assert asked == [None]
