"""Batched deterministic generation: prompts in, responses out, in the order given.

Greedy by default (paper: greedy, 256 new tokens for identification). The model's own generation
settings (temperature, penalties, beams, ...) are deliberately not used: they would differ between models. `as_used`
keeps them out, since `generate` of transformers takes from them whatever it is not given.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from safelocus.errors import ModelError, NumericalError, PromptError
from safelocus.model.autocast import many_passes
from safelocus.model.forcing import decoder_start, pad

if TYPE_CHECKING:
    from safelocus.model.target import Target


_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


NO_NUMBER = "made of NaN or infinity, which the model computed on the way"
_ROUNDING = 0.1  # of the logits' standard deviation: bf16 stays below 0.03, padding that is read changes them by 0.4
_READS_PADDING: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # model -> what `_reads_padding` found
LOOK_AT_WEIGHTS = "are its weights finite (`safelocus inspect`), and is its dtype (--dtype) wide enough?"


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a target answered.

    Attributes:
        ids: token ids, without the token that ended the turn.
        text: of the answer, which follows the thought; special tokens left out.
        finished: whether the turn ended by itself, rather than at the limit of new tokens.
        thought: None where there is none.
        num_thought: tokens of the thought and its markers, before the answer's.
        in_thought: whether the thought did not end, so that there is no answer.
        is_number: false where the model computed NaN or infinity on the way: then the text says nothing.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool
    thought: str | None = None
    num_thought: int = 0
    in_thought: bool = False
    is_number: bool = True

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.num_thought :]


def generate(target: "Target", prompts: Sequence[str], *, max_new_tokens: int = 256) -> list[Response]:
    """Greedy responses to `prompts`, as one padded batch.

    Raises:
        PromptError: a prompt leaves no room for the answer within the model's positions.
        NumericalError: the model computed NaN or infinity on the way to a response.
    """
    found = generate_from([target.chat.encode_prompt(prompt) for prompt in prompts], target, max_new_tokens)
    if without := sum(not response.is_number for response in found):
        raise NumericalError(f"{without} of {len(found)} responses of {target.name} are {NO_NUMBER}; {LOOK_AT_WEIGHTS}")
    return found


@torch.no_grad()
def generate_from(
    encoded: Sequence[Sequence[int]], target: "Target", max_new_tokens: int, *, never: Sequence[Sequence[int]] = ()
) -> list[Response]:
    """`generate`, for prompts that are token ids already; what rests on NaN or infinity is marked, and no error.

    never: sequences of tokens that do not come; the likeliest other token comes in place of their last one.
    """
    longest = max(len(tokens) for tokens in encoded)
    if longest > (room := longest_prompt(target, max_new_tokens)):
        raise PromptError(
            f"a prompt has {longest} tokens, but the model has room for {room} beside {max_new_tokens} new ones; "
            "leave such prompts out, or generate fewer new tokens"
        )
    by_length: dict[int, list[int]] = {}
    for row, tokens in enumerate(encoded):
        by_length.setdefault(len(tokens), []).append(row)
    # processes that share a model try in step, whatever their prompts
    if (len(by_length) > 1 or target.is_sharded) and _reads_padding(target):
        if target.is_sharded:
            raise ModelError(f"{target.name}: its answers depend on the padding of a batch; leave out --shard")
        found: dict[int, Response] = {}
        for rows in by_length.values():
            alike = generate_from([encoded[row] for row in rows], target, max_new_tokens, never=never)
            found |= zip(rows, alike, strict=True)
        return [found[row] for row in range(len(encoded))]
    ends = target.chat.end_of_turn_ids
    padding = target.tokenizer.pad_token_id
    # an encoder sees both sides, a decoder must end where the response begins
    ids, mask = pad(encoded, padding, target.device, left=not target.model.config.is_encoder_decoder)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=list(ends) or None,
        bos_token_id=target.tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(target.model.config),
        stop_strings=list(target.chat.stop_strings) or None,
        bad_words_ids=[list(ids) for ids in never] or None,
    )
    finite = Finite()
    with as_used(target.model), many_passes(target.autocast):
        output = target.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            tokenizer=target.tokenizer,
            logits_processor=LogitsProcessorList([finite]),
            # a sharded model computes only with all processes: those whose answers are done go on until all are
            synced_gpus=target.is_sharded or None,
        )
    skip = 1 if target.model.config.is_encoder_decoder else ids.shape[1]
    responses = [read_response(target, row) for row in output[:, skip:].tolist()]
    return [
        replace(each, is_number=is_number) for each, is_number in zip(responses, finite.of(len(output)), strict=True)
    ]


def _reads_padding(target: "Target") -> bool:
    """Whether what is padded into a batch changes answers: state runs through it in RWKV and RecurrentGemma.

    Tried with short texts, once for each model.
    """
    if target.model not in _READS_PADDING:
        added, padding = target.tokenizer.added_tokens_decoder, target.tokenizer.pad_token_id
        words = list(islice((i for i in range(len(target.tokenizer)) if i not in added), 16))
        texts = [words[i : i + 2] for i in range(len(words) - 2)]  # short: what runs through a state fades with tokens
        left = not target.model.config.is_encoder_decoder
        bare = _next_logits(target, *pad(texts, padding, target.device))
        padded = _next_logits(target, *pad([words, *texts[1:]], padding, target.device, left=left))
        difference = ((padded - bare).std(-1) / bare.std(-1))[1:]
        # the median, since rounding alone may send a token to another expert
        _READS_PADDING[target.model] = bool(difference.median() > _ROUNDING)
    return _READS_PADDING[target.model]


def _next_logits(target: "Target", ids: Tensor, mask: Tensor) -> Tensor:
    """As generation computes them, [B, V] in fp32."""
    settings = GenerationConfig(
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=target.tokenizer.pad_token_id,
        decoder_start_token_id=decoder_start(target.model.config),
        output_logits=True,
        return_dict_in_generate=True,
    )
    with as_used(target.model), many_passes(target.autocast):
        output = target.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    logits: Tensor = output.logits[0].float()
    return logits


class Finite(LogitsProcessor):
    """Which rows of a batch have had finite logits at every token; the greatest of NaN and a number is NaN."""

    rows: Any = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows = scores.amax(dim=-1).isfinite() & self.rows
        return scores

    def of(self, num_rows: int) -> list[bool]:
        found: list[bool] = torch.as_tensor(self.rows).expand(num_rows).tolist()
        return found


@contextmanager
def as_used(model: Any) -> Iterator[None]:
    """Within: the model is as it is used, not as a trainer leaves it. Afterwards: as it was.

    In training mode there is dropout and, where activations are checkpointed, none of the cache that generation relies
    on, so that answers are nonsense and nothing says so. Where routers' logits are put out, a mixture of experts would
    compute its balancing loss at every generated token, and fail. Of the model's own generation settings only which
    token has which role remains.
    """
    was_training, config = model.training, model.config.get_text_config()
    routers = getattr(config, "output_router_logits", None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # whose settings PEFT's wrapper shows
    settings = getattr(base, "generation_config", None)
    try:
        model.eval()
        if settings is not None:
            base.generation_config = GenerationConfig(**{role: getattr(settings, role, None) for role in _ROLES})
        if routers:
            config.output_router_logits = False
        yield
    finally:
        model.train(was_training)
        if settings is not None:
            base.generation_config = settings
        if routers:
            config.output_router_logits = True


def longest_prompt(target: "Target", max_new_tokens: int) -> int:
    """How many tokens a prompt may have so that `max_new_tokens` still fit the model's positions."""
    return room_for_prompt(target.model.config, max_new_tokens)


def room_for_prompt(config: Any, max_new_tokens: int) -> int:
    """`longest_prompt`, of a model's configuration."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's
    if positions is None:  # positions are relative, or rotary without a stated limit
        return sys.maxsize
    if config.is_encoder_decoder:  # the decoder has as many for the answer
        return int(positions) if max_new_tokens <= positions else 0
    return int(positions) - max_new_tokens


def read_response(target: "Target", ids: list[int]) -> Response:
    """What generated ids say, up to the end of the turn: the thought, if any, and the answer."""
    ends = target.chat.end_of_turn_ids
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    finished = length < len(ids)
    marked = _decode(target, ids[:length], markers=True)  # what opens a turn or a thought may be special tokens
    beyond = 0  # characters of a last token that holds the beginning of what follows the turn
    # a base model has no token that ends a turn: it goes on to write the user's next one
    for stop in target.chat.stop_strings:
        if (position := marked.find(stop)) >= 0:
            finished = True
            while length and len(_decode(target, ids[: length - 1], markers=True)) >= position:
                length -= 1
            beyond = len(_decode(target, ids[:length], markers=True)) - position
            marked = marked[:position]
    ids = ids[:length]
    found = target.chat.split(marked)
    number = 0
    if found.thought is not None:
        number = bisect_left(range(length), found.start, key=lambda n: len(_decode(target, ids[:n], markers=True)))
    # a last token of the end marker may hold the answer's first characters
    text = _decode(target, ids[:number], markers=True)[found.start :] + _decode(target, ids[number:])
    text = text[: max(len(text) - beyond, 0)].strip()
    if found.thought is None:
        return Response(ids=tuple(ids), text=text, finished=finished)
    return Response(
        ids=tuple(ids), text=text, finished=finished, thought=found.thought, num_thought=number,
        in_thought=not found.finished,
    )  # fmt: skip


def _decode(target: "Target", ids: list[int], *, markers: bool = False) -> str:
    return str(target.tokenizer.decode(ids, skip_special_tokens=not markers))
