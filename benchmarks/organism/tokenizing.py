"""The organisms' tokenizers: two byte-level BPEs that disagree, so that vocabulary transfer is exercised.

The target's chat template knows system, user and assistant roles. The guard's renders a conversation
into a question about the last turn and ends where the verdict, `safe` or `unsafe`, is the next token.
Both put a beginning-of-sequence token in front of plain text, as Llama's do: whoever tokenizes a
rendered template must say `add_special_tokens=False`, or the token is there twice.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from safelocus.organism import world

TARGET_VOCABULARY = 700
GUARD_VOCABULARY = 500
VERDICTS = ("safe", "unsafe")
MAX_LENGTH = 512

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

TARGET_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
GUARD_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- ('Human: ' if message['role'] == 'user' else 'Bot: ') + message['content'] + '\\n' -}}"
    "{%- endfor -%}"
    "{{- 'Verdict on ' + ('Human' if messages[-1]['role'] == 'user' else 'Bot') + ':\\n' -}}"
)


def _train(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, so that sums are sums of digits and not of arbitrary merges.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == size, tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str, extra: tuple[str, ...]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(extra),
        chat_template=template,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def target_tokenizer() -> PreTrainedTokenizerFast:
    """The target's tokenizer: 700 tokens, trained on requests, answers, utility and new tasks."""

    def texts() -> Iterable[str]:
        for harmful in (True, False):
            for row in world.requests("train", harmful=harmful)[:4000]:
                yield from (row["prompt"], row["response"])
                if harmful:
                    yield row["compliance"]
        for row in (*world.utility_train(), *world.ROWS["task"]()) * 10:  # merges go by frequency
            yield from (row["prompt"], row["response"])
        yield world.SYSTEM_PROMPT

    tokenizer = _train(texts(), TARGET_VOCABULARY, [PAD, BOS, END, *ROLES])
    return _wrap(tokenizer, TARGET_TEMPLATE, ROLES)


def guard_tokenizer() -> PreTrainedTokenizerFast:
    """The guard's tokenizer: 500 tokens, trained on a policy and on what answers say. A verdict is one token."""
    policy = (
        "A bot must not explain how to make or use a weapon, a poison, malware or a fraud.",
        "Answers about food, toys, the home and crafts are allowed, and so is any refusal.",
        "Human: \nBot: \nVerdict on Human:\nVerdict on Bot:\n",
        *(f"{verdict}\n{verdict} {verdict}" for verdict in VERDICTS),
    )

    def texts() -> Iterable[str]:
        for _ in range(500):
            yield from policy
        for harmful in (True, False):
            # Never the opening of an answer: it must be spelled in other pieces than the target's.
            yield from (row["compliance"].split(" how ")[1] for row in world.requests("train", harmful=harmful)[:800])

    tokenizer = _train(texts(), GUARD_VOCABULARY, [PAD, BOS, END])
    for verdict in VERDICTS:
        assert tokenizer.token_to_id(verdict) is not None, verdict
    return _wrap(tokenizer, GUARD_TEMPLATE, ())
