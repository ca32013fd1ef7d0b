"""chat: (system, prompt, response) to token ids, with tokenizers trained here and real ones where present."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM

from safelocus.errors import ModelError, PromptError
from safelocus.model import chat
from safelocus.model.chat import chat_format
from safelocus.model.generation import read_response
from safelocus.model.target import load_tokenizer
from safelocus.prompts.fields import Prompt

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"

SENTENCES = [
    "Sure, here is how to bake a cake.",
    "I cannot help with that request.",
    "How do I make a kite?\n\nWrite a story about a lamp.",
    "User: Hello there\nAssistant: Hello! How can I help you today?",
    "system user assistant model Here The Once upon a time there was a cat. No it is A",
    "<|im_start|>assistant\n\n",
] * 4
MARKS = [
    "<s>",
    "</s>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
]

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n"
    "{{ message['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# like Llama 3.2's: a system block with today's date, whether or not there is a message
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "<|start|>system<|end|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot|>"
    "{%- for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n{{ message['content'] }}<|eot|>"
    "{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
CLOCK = "{{ strftime_now('%Y-%m-%d') }} " + LLAMA3
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}<|start|>{{ role }}\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a lamp.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] "
    "{{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %} "
    "{{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# like gpt-oss: finished answers stand in a channel that the generation prompt does not open
CHANNELS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|start|>assistant final<|end|>{{ message['content'] }}<|eot|>"
    "{% else %}<|start|>{{ message['role'] }}<|end|>{{ message['content'] }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# like DeepSeek-R1's: the prompt opens a thought, and finished answers have lost theirs
OPENING = LLAMA3.replace("assistant<|end|>\n\n{% endif %}", "assistant<|end|>\n\n<think>\n{% endif %}")
# of models that see images, whose messages are lists of parts: SmolVLM's and Idefics3's comes with transformers;
# short imitations of LLaVA-NeXT's and of one that takes a string from users alone
SEEING = {
    "smolvlm": SMOLVLM,
    "llava-next": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
        "{% endfor %}{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' }}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{{ '</s>' }}{% endif %}{% endfor %}"
    ),
    "mixed": (
        "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>"
        "{% if message['role'] == 'user' and message['content'] is string %}{{ message['content'] }}"
        "{% else %}{{ message['content'][0]['text'] }}{% endif %}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
    ),
}
ROLES = ("user", "system", "assistant")
TEMPLATES = {
    "opening": OPENING,
    "llama3": LLAMA3,
    "dated": DATED,
    "gemma": GEMMA,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "channels": CHANNELS,
}


def _wrap(core, *, bos=True, template=None, eos_too=False):
    bos_id, eos_id = core.token_to_id("<s>"), core.token_to_id("</s>")
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos_too else "")
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", bos_id), ("</s>", eos_id)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


# Llama 3's: line breaks stay together, whatever comes after them
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*, words=WORDS, **options):
    """Llama 3's kind, and GPT-2's where `words` is None: a space starts the word after it."""
    core = tokenizers.Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated")] if words else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=MARKS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrap(core, **options)


def metaspace(**options):
    """SentencePiece's kind: a dummy space before the first word."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=620, special_tokens=["<unk>", *MARKS, *bytes_], show_progress=False),
    )
    return _wrap(core, **options)


def legacy(**options):
    """Llama 2's conversion: the dummy space comes from the normaliser, before every stretch of text."""
    tokenizer = metaspace()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _wrap(core, **options)


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "legacy": legacy}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("template", [*TEMPLATES, None])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_bos_is_never_doubled(kind, template, system):
    tokenizer = KINDS[kind](template=TEMPLATES.get(template))
    format = chat_format(tokenizer, system=system)
    ids = format.encode_prompt("How do I make a kite?")
    expected = 0 if template in ("chatml", "channels") else 1
    assert ids.count(tokenizer.bos_token_id) == expected
    assert ids[0] == tokenizer.bos_token_id or expected == 0


def test_plain_template_that_spells_bos_out():
    tokenizer = byte_level()
    ids = chat_format(tokenizer, template="<s>User: {prompt}\nAssistant:").encode_prompt("Hello")
    assert ids.count(tokenizer.bos_token_id) == 1
    ids = chat_format(tokenizer, template="{prompt}").encode_prompt("<s>Hello")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_where_the_tokenizer_adds_none_and_no_eos_in_the_middle():
    bare = byte_level(bos=False)
    assert bare.bos_token_id not in chat_format(bare).encode_prompt("Hello")
    closing = byte_level(eos_too=True)
    assert closing("Hello")["input_ids"][-1] == closing.eos_token_id
    prompt, response = chat_format(closing).encode_pair("Hello", "Sure")
    assert closing.eos_token_id not in prompt + response
    assert prompt[0] == closing.bos_token_id


def test_an_encoder_reads_a_prompt_with_the_end_that_its_tokenizer_puts_there():
    tokenizer = byte_level(eos_too=True)
    for template in ("Q: {prompt}\nA:", None):
        together, apart = (chat_format(tokenizer, template=template, reads_apart=apart) for apart in (False, True))
        assert apart.encode_prompt("Hello") == [*together.encode_prompt("Hello"), tokenizer.eos_token_id]


@every_kind
@pytest.mark.parametrize("template", ["llama3", "dated", "gemma", "chatml", "llama2", "channels"])
def test_a_pair_is_the_finished_conversation(kind, template):
    """Prompt and response ids together are the ids of the template's own rendering of the conversation."""
    tokenizer = KINDS[kind](template=TEMPLATES[template])
    format = chat_format(tokenizer)
    turns = [
        {"role": "user", "content": "How do I make a kite?"},
        {"role": "assistant", "content": "Sure, here is how."},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, date_string=chat_date(format))
    if template == "chatml":  # an empty thought is not part of this template's finished conversations
        whole = whole.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    end = whole.rindex("how.") + len("how.")
    expected = tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
    prompt, response = format.encode_pair("How do I make a kite?", "Sure, here is how.")
    assert prompt + response == expected
    assert prompt == format.encode_prompt("How do I make a kite?")
    assert tokenizer.decode(response).strip() == "Sure, here is how."


def chat_date(format):
    return format.template_kwargs.get("date_string", "")


@every_kind
def test_plain_pair_is_the_joint_tokenisation_with_an_exact_boundary(kind):
    tokenizer = KINDS[kind]()
    format = chat_format(tokenizer)
    prompt, response = format.encode_pair("Hello there", "Sure, here is how.")
    assert prompt + response == tokenizer("User: Hello there\nAssistant: Sure, here is how.")["input_ids"]
    # the space before the answer is the first word's
    assert format.response_prefix == " "
    assert format.render("Hello there") == "User: Hello there\nAssistant:"
    assert tokenizer.convert_ids_to_tokens(response[0])[0] in "Ġ▁"


@every_kind
@pytest.mark.parametrize("template", ["User: {prompt}\nAssistant:", "User: {prompt}\nAssistant: "])
def test_a_space_in_the_template_or_not_is_the_same(kind, template):
    tokenizer = KINDS[kind]()
    assert chat_format(tokenizer, template=template).encode_pair("Hello", "Sure") == chat_format(tokenizer).encode_pair(
        "Hello", "Sure"
    )


def test_a_space_that_belongs_to_the_colon_stays_in_the_prompt():
    """Also where a longer token spans colon, space and the start of some answers."""
    letters = ["<s>", "</s>", "<unk>", "▁", *"\n:abcdefghijklmnopqrstuvwxyzAEHINOQSTU"]
    merges = [(":", "▁"), (":▁", "N")]
    vocabulary = {token: number for number, token in enumerate([*letters, ":▁", ":▁N"])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = _wrap(core)
    format = chat_format(tokenizer, template="Q: {prompt}\nA:")
    assert format.response_prefix == ""
    prompt, response = format.encode_pair("x", "Sure")
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == ":▁"
    assert tokenizer.convert_ids_to_tokens(response) == list("Sure")
    assert tokenizer.convert_ids_to_tokens(format.encode_pair("x", "No")[1]) == list("No")


def test_a_response_with_its_own_space_gets_no_second_one():
    format = chat_format(byte_level())
    assert format.encode_pair("Hello", " Sure") == format.encode_pair("Hello", "Sure")
    assert format.encode_pair("Hello", "")[1] == []


def test_a_response_that_would_merge_with_the_prompt_leaves_the_prompt_alone():
    tokenizer = byte_level(template=GEMMA)
    merged = tokenizer("a\n\n", add_special_tokens=False)["input_ids"]
    assert len(merged) == 2, "the tokenizer should have a token for two line breaks"
    prompt, response = chat_format(tokenizer).encode_pair("Hello", "\nSure")
    assert prompt == chat_format(tokenizer).encode_prompt("Hello")
    assert tokenizer.decode(response) == "\nSure"
    assert tokenizer.decode(prompt + response).endswith("<|start|>model\n\nSure")


def test_an_ending_that_reads_otherwise_with_an_answer_behind_it():
    """GPT-2's words: two line breaks are one token at the end of a text, and two before a word. A generating
    model is given the one token, so a pair has it too."""
    tokenizer = byte_level(words=None, template=LLAMA3)
    format = chat_format(tokenizer)
    prompt, response = format.encode_pair("Hello", "Sure, here.")
    assert prompt == tokenizer(format.render("Hello"), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(prompt + response) == format.render("Hello") + "Sure, here."
    joint = tokenizer(format.render("Hello") + "Sure, here.", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt, "otherwise this test shows nothing"
    assert response == joint[-len(response) :]


@every_kind
def test_a_continuation_has_no_dummy_space(kind):
    tokenizer = KINDS[kind](template=CHATML)
    _, response = chat_format(tokenizer).encode_pair("Hello", "\n\nSure")
    assert tokenizer.convert_ids_to_tokens(response)[0][0] != "▁"


@given(prompt=st.text(max_size=40), response=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_text_survives_the_byte_level_round_trip(prompt, response):
    prompt, response = ("".join(c for c in text if not 0xD800 <= ord(c) < 0xE000) for text in (prompt, response))
    tokenizer, format = _round_trip()
    prompt_ids, response_ids = format.encode_pair(prompt, response)
    assert tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False) == "<s>" + format.render(prompt)
    text = tokenizer.decode(response_ids, clean_up_tokenization_spaces=False)
    assert text in (response, " " + response)


def _round_trip(cache=[]):  # noqa: B006 (one tokenizer for all examples)
    if not cache:
        tokenizer = byte_level()
        cache.append((tokenizer, chat_format(tokenizer)))
    return cache[0]


def test_the_same_response_has_the_same_ids_after_any_prompt():
    format = chat_format(metaspace(template=LLAMA3))
    responses = {tuple(format.encode_pair(prompt, "Sure, here.")[1]) for prompt in ("Hello", "", "x\n", "a: ")}
    assert len(responses) == 1


def parted(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


@every_kind
@pytest.mark.parametrize("template", SEEING)
def test_messages_as_lists_of_parts(kind, template):
    """Requests, system messages, exchanges before and responses: as the template shows them in parts."""
    tokenizer = KINDS[kind](template=SEEING[template])
    form = chat_format(tokenizer)
    assert form.parts == (ROLES[1:] if template == "mixed" else ROLES)
    assert form.system_role
    prompt = Prompt("How do I make a kite?", system="Be kind.", history=(("Hello there", "Hello! How are you?"),))
    turns = [
        parted("system", "Be kind."), parted("user", "Hello there"), parted("assistant", "Hello! How are you?"),
        parted("user", "How do I make a kite?"),
    ]  # fmt: skip
    own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert form.render(prompt) == (own + form.opening).removesuffix(form.response_prefix)
    turns.append(parted("assistant", "Sure, here is how."))
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    end = whole.rindex("how.") + len("how.")
    asked, response = form.encode_pair(prompt, "Sure, here is how.")
    assert asked + response == tokenizer(whole[:end], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_messages_are_strings_where_they_show(template):
    assert chat_format(byte_level(template=TEMPLATES.get(template))).parts == ()


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_the_processors_chat_template_is_found(tmp_path, file):
    """Where older models that see images have it."""
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / file).write_text(json.dumps({"chat_template": SEEING["llava-next"]}))
    assert chat_format(load_tokenizer(tmp_path)).render("Hello") == "[INST] Hello [/INST]"
    (tmp_path / file).write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_system_role():
    format = chat_format(byte_level(template=LLAMA3), system="Be kind.")
    assert format.system_role
    assert format.render("Hello").startswith("<s><|start|>system<|end|>\n\nBe kind.<|eot|><|start|>user")
    assert "Be kind." not in format.render("Hello", system="")
    assert "Be brief." in format.render("Hello", system="Be brief.")


def test_a_refused_system_message_is_folded():
    format = chat_format(byte_level(template=GEMMA), system="Be kind.")
    assert not format.system_role
    assert format.render("Hello") == "<s><|start|>user\nBe kind.\n\nHello<|end|>\n<|start|>model\n"
    assert any("no system message" in note for note in format.notes)


def test_a_silently_dropped_system_message_is_folded():
    format = chat_format(byte_level(template=LLAMA2), system="Be kind.")
    assert not format.system_role
    assert format.render("Hello") == "<s>[INST] Be kind.\n\nHello [/INST]"
    assert format.response_prefix == " "


def test_a_default_system_message_is_noted():
    notes = chat_format(byte_level(template=CHATML)).notes
    assert any("You are a lamp." in note for note in notes)
    for template in (LLAMA3, DATED, GEMMA, LLAMA2):
        assert not any("adds its own" in note for note in chat_format(byte_level(template=template)).notes)


def test_dates_are_fixed():
    format = chat_format(byte_level(template=DATED))
    assert "Today Date: 26 Jul 2024\n" in format.render("Hello")
    assert any("date is fixed" in note for note in format.notes)
    other = chat_format(byte_level(template=DATED), date_string="01 Jan 2025")
    assert "Today Date: 01 Jan 2025\n" in other.render("Hello")
    assert chat_format(byte_level(template=CLOCK)).render("Hello").startswith("2024-07-26 <s>")


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  "])
def test_the_stopped_clock_changes_nothing_else(start):
    template = start + "{% if true %}x {{ '' if messages else strftime_now('%Y') }}{% endif %}\n" + LLAMA3
    tokenizer = byte_level(template=template)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat_format(tokenizer).render("Hello") == own


def test_thinking_is_off_unless_asked_for():
    tokenizer = byte_level(template=CHATML)
    assert chat_format(tokenizer).render("Hello").endswith("assistant\n<think>\n\n</think>\n\n")
    thinking = chat_format(tokenizer, thinking=True)
    assert thinking.template_kwargs == {"enable_thinking": True}
    assert thinking.render("Hello").endswith("<|im_start|>assistant\n")
    assert chat_format(tokenizer, enable_thinking=True).render("Hello") == thinking.render("Hello")


def test_thinking_is_one_switch_under_two_names():
    """DeepSeek's template takes either name, and the shorter one wins."""
    switch = "{% if not thinking is defined %}{% set thinking = enable_thinking %}{% endif %}"
    end = "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    tokenizer = byte_level(template=switch + LLAMA3.removesuffix("{% endif %}") + end)
    assert chat_format(tokenizer).render("Hello").endswith("</think>")
    for options in ({"enable_thinking": True}, {"thinking": True}):
        assert chat_format(tokenizer, **options).render("Hello").endswith("<think>")


def test_the_answers_channel_is_opened():
    tokenizer = byte_level(template=CHANNELS)
    assert chat_format(tokenizer).render("Hello").endswith("<|start|>assistant final<|end|>")
    assert chat_format(tokenizer, thinking=True).render("Hello").endswith("<|start|>assistant")


def test_a_thought_in_the_generation_prompt_is_noted():
    format = chat_format(byte_level(template=OPENING))
    assert any("'<think>\\n'" in note for note in format.notes)


@pytest.mark.parametrize(
    ("template", "mark"),
    [("llama3", "<|eot|>"), ("gemma", "<|end|>"), ("chatml", "<|im_end|>"), ("llama2", "</s>")],
)
def test_end_of_turn(template, mark):
    tokenizer = byte_level(template=TEMPLATES[template])
    format = chat_format(tokenizer)
    expected = dict.fromkeys([tokenizer.convert_tokens_to_ids(mark), tokenizer.eos_token_id])
    assert format.end_of_turn_ids == tuple(expected)
    assert format.encode_pair("Hello", "Sure", end=True)[1][-1] == tokenizer.convert_tokens_to_ids(mark)
    assert format.encode_pair("Hello", "Sure", end=True)[1][:-1] == format.encode_pair("Hello", "Sure")[1]


def test_end_of_turn_from_the_generation_config():
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    assert chat_format(tokenizer).end_of_turn_ids == (eos,)
    several = GenerationConfig(eos_token_id=[7, eos])
    assert chat_format(tokenizer, generation_config=several).end_of_turn_ids == (eos, 7)
    single = GenerationConfig(eos_token_id=9)
    assert chat_format(tokenizer, generation_config=single).end_of_turn_ids == (eos, 9)


def test_no_end_of_turn_is_an_error_only_when_wanted():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    format = chat_format(tokenizer)
    assert format.encode_pair("Hello", "Sure")[1]
    with pytest.raises(ModelError, match="eos_token"):
        format.encode_pair("Hello", "Sure", end=True)


def test_plain_template():
    format = chat_format(byte_level(), template=r"{system}\n\nQ: {prompt}\n\tA:")
    assert format.kind == "plain"
    assert format.render("Hello") == "Q: Hello\n\tA:"
    assert format.render("Hello", system="Be kind.") == "Be kind.\n\nQ: Hello\n\tA:"
    assert format.stop_strings == ("\nQ:",)
    folded = chat_format(byte_level(), template="Q: {prompt} A.", system="Be kind.")
    assert folded.render("Hello") == "Q: Be kind.\n\nHello A."


def test_a_base_model_is_stopped_where_the_users_next_turn_begins():
    alpaca = "Below is an instruction.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    for template, stop in (
        (alpaca, "\n### Instruction:"),
        ("{system}\n\nUser: {prompt}\nAssistant: ", "\nUser:"),
        ("Be kind.\n{system}\nQ: {prompt}\nA:", "\nQ:"),
    ):
        assert chat_format(byte_level(), template=template).stop_strings == (stop,)
    assert chat_format(byte_level(), template="{prompt}\n").stop_strings == ()


IM = r"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "mark"),
    [
        (IM, "<|im_end|>"),
        (r"<|start|>user<|end|>\n\n{prompt}<|eot|><|start|>assistant<|end|>\n\n", "<|eot|>"),
        (r"{prompt}<|im_end|>", "</s>"),  # begins the answer, as [/INST] does
        (r"<|start|>{prompt}<|end|><think>\n", "</s>"),
        (r"Q: {prompt}\nA:", "</s>"),
    ],
)
def test_a_plain_template_that_spells_the_end_of_the_turn(template, mark):
    tokenizer = byte_level()
    format = chat_format(tokenizer, template=template)
    assert format.encode_pair("Hello", "Sure", end=True)[1][-1] == tokenizer.convert_tokens_to_ids(mark)
    assert format.end_of_turn_ids[-1] == tokenizer.eos_token_id


def test_the_next_turn_is_not_read_where_special_tokens_begin_it():
    tokenizer = byte_level()
    format = chat_format(tokenizer, template=r"<|start|>user: {prompt}\n<|start|>assistant: ")
    assert format.stop_strings == ("<|start|>user:",)
    ids = tokenizer("Sure, here.\n<|start|>user: another", add_special_tokens=False)["input_ids"]
    response = read_response(SimpleNamespace(tokenizer=tokenizer, chat=format), ids)
    assert (response.text, response.finished) == ("Sure, here.", True)
    format = chat_format(tokenizer, template=IM)
    ids = tokenizer("Sure.<|im_end|>\n<|im_start|>user\nanother", add_special_tokens=False)["input_ids"]
    response = read_response(SimpleNamespace(tokenizer=tokenizer, chat=format), ids)
    assert (response.text, response.finished) == ("Sure.", True)


def test_what_was_said_before_stays_where_a_system_message_is_folded():
    prompt = Prompt("third", system="Be kind.", history=(("first", "second"),))
    assert chat_format(byte_level(template=GEMMA)).render(prompt) == (
        "<s><|start|>user\nBe kind.\n\nfirst<|end|>\n<|start|>model\nsecond<|end|>\n"
        "<|start|>user\nthird<|end|>\n<|start|>model\n"
    )
    with pytest.raises(PromptError, match="a plain template shows no earlier turns"):
        chat_format(byte_level()).render(prompt)


def test_escapes_are_decoded_once():
    format = chat_format(byte_level(), template=r"Q: {prompt}\\n\tA:")
    assert format.render("hi") == "Q: hi\\n\tA:"
    assert chat_format(byte_level(), template=format.to_json()["template"]) == format


def test_braces_in_prompts_are_text():
    format = chat_format(byte_level(), system="{prompt}")
    assert format.render("{system} {x}") == "{prompt}\n\nUser: {system} {x}\nAssistant:"
    format = chat_format(byte_level(template=LLAMA3))
    assert "{{ 7 * 7 }}" in format.render("{{ 7 * 7 }}")


def test_a_given_template_takes_precedence():
    format = chat_format(byte_level(template=LLAMA3), template="Q: {prompt}\nA: ")
    assert format.kind == "plain"
    assert format.render("Hello") == "Q: Hello\nA:"
    assert format.encode_prompt("Hello").count(format.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("User:", "placeholders: none"),
        ("", "placeholders: none"),
        ("{prompt} {prompt}", "once"),
        ("{prompt} {response}", r"\{response\}"),
        ("{prompt} {system}", "before"),
        ("{% for m in messages %}{{ m }}{% endfor %}", "Jinja"),
    ],
)
def test_bad_plain_templates(template, message):
    with pytest.raises(PromptError, match=message):
        chat_format(byte_level(), template=template)


def test_options_for_a_chat_template_need_one():
    with pytest.raises(PromptError, match="enable_thinking"):
        chat_format(byte_level(), enable_thinking=False)
    with pytest.raises(PromptError, match="thinking"):
        chat_format(byte_level(), thinking=True)


def test_broken_chat_templates():
    with pytest.raises(ModelError, match="never"):
        chat_format(byte_level(template="{{ raise_exception('never') }}"))
    with pytest.raises(ModelError, match="0 times"):
        chat_format(byte_level(template="Hello"))


def test_several_named_chat_templates():
    tokenizer = byte_level(template={"default": LLAMA3, "tool_use": "Hello"})
    assert chat_format(tokenizer).render("Hello").endswith("<|start|>assistant<|end|>\n\n")


@pytest.mark.parametrize(
    ("template", "thinking"), [("dated", False), ("channels", False), ("channels", True), ("opening", None)]
)
def test_to_json_holds_what_rendering_needs(template, thinking):
    tokenizer = byte_level(template=TEMPLATES[template])
    format = chat_format(tokenizer, system="Be kind.", thinking=thinking)
    saved = json.loads(json.dumps(format.to_json()))
    options = {name: saved[name] for name in ("system", "template", "thinking")}
    assert chat_format(tokenizer, **options, **saved["template_kwargs"]) == format


def test_to_json_of_a_plain_format():
    format = chat_format(byte_level(), template="Q: {prompt}\\nA: ")
    assert chat_format(byte_level(), template=format.to_json()["template"]) == format


def _real(name):
    if not (MODELS / name).is_dir():
        pytest.skip(f"needs the model {name} in {MODELS.parent.name}/{MODELS.name}")
    return AutoTokenizer.from_pretrained(MODELS / name)


@pytest.mark.parametrize(("name", "prefix"), [("stories260K-hf", " "), ("tinystories-656k", "")])
def test_real_base_models(name, prefix):
    """The one joins a space to the word after it, the other to the word before."""
    tokenizer = _real(name)
    format = chat_format(tokenizer)
    assert format.kind == "plain"
    assert format.response_prefix == prefix
    prompt, response = format.encode_pair("Tell me a story.", "Once upon a time")
    text = "User: Tell me a story.\nAssistant: Once upon a time"
    assert prompt + response == tokenizer(text)["input_ids"]
    assert (prompt + response).count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(response).strip() == "Once upon a time"
    assert format.end_of_turn_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(("name", "end"), [("stories260K-hf", ""), ("tinystories-656k", " ")])
def test_real_raw_continuation(name, end):
    """With the bare prompt as template, a pair is a text cut in two, even inside a token that spans words."""
    tokenizer = _real(name)
    prompt, response = chat_format(tokenizer, template="{prompt}").encode_pair("Once upon", "a time")
    assert prompt == tokenizer("Once upon" + end)["input_ids"]
    assert tokenizer.decode(prompt + response) == tokenizer.decode(tokenizer("Once upon a time")["input_ids"])


def test_default_template_is_valid():
    assert chat_format(byte_level()).template == chat.PLAIN_TEMPLATE
