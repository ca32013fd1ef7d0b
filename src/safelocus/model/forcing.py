"""Teacher forcing: one padded forward pass that yields logits at the positions asked for, and no others.

Input: token ids of prompts and responses. Output: logits [N, V] for the N response tokens of the
whole batch. Sequences are padded on the right, where causal attention cannot see the padding, so
neither the batch's size nor its order nor the tokenizer's padding side touches the result. The hidden
states are gathered at the N positions *before* the output projection: neither memory nor time is
spent on logits of prompt and padding tokens, which for a vocabulary of 128k are most of the cost.

Several responses to one prompt stand behind it in one row, so that the prompt is run once:

    prompt  response 1  response 2  ...       a token sees the prompt and, of its own response, what is before it;
    0 .. P  P ..        P ..                  its position is the one that it would have without the others

Not every architecture takes such a mask and such positions. Whether one does is tried out, once per length; one whose
state runs on from token to token (state-space models, linear attention, convolutions) does not, whatever a trial shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from safelocus import distributed

if TYPE_CHECKING:
    from safelocus.model.target import Target

# whatever a model says to a mask or to positions that it does not know
PACKING_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
_PACKS: WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()  # model -> what was tried with it


@dataclass(frozen=True, kw_only=True, eq=False)
class Forced:
    """Logits along given responses.

    Attributes:
        logits: [N, V], row n predicts `token[n]`; attached to the graph when gradients are on.
        token: [N] the response tokens, response after response.
        row: [N] which response of the batch each belongs to.
    """

    logits: Tensor
    token: Tensor
    row: Tensor

    def log_likelihood(self, num_rows: int) -> Tensor:
        """Total log-likelihood of each response, [num_rows], in fp32."""
        chosen = torch.log_softmax(self.logits.float(), dim=-1).gather(1, self.token[:, None])[:, 0]  # [N]
        return self.totals(chosen, num_rows)

    def totals(self, values: Tensor, num_rows: int) -> Tensor:
        """Sum of fp32 values [N] over the tokens of each response, [num_rows]."""
        return torch.zeros(num_rows, device=values.device).index_add(0, self.row, values)


def teacher_force(target: "Target", prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Forced:
    """Run `prompt + response` for every pair and return the logits that predict the response tokens.

    Args:
        target: model and tokenizer.
        prompts: B lists of prompt token ids, none empty.
        responses: B lists of response token ids; an empty one contributes no position.
    """
    device = target.device
    token = torch.tensor([t for response in responses for t in response], dtype=torch.long)
    lengths = torch.tensor([len(response) for response in responses])
    row = torch.repeat_interleave(torch.arange(len(responses)), lengths)
    within = torch.arange(len(row)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    if target.model.config.is_encoder_decoder:
        start = decoder_start(target.model.config)
        decoder, _ = pad([[start, *response[:-1]] for response in responses], target.tokenizer.pad_token_id, device)
        ids, mask = pad(prompts, target.tokenizer.pad_token_id, device)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
        width, position = decoder.shape[1], within
    else:
        # the last response token predicts nothing that is asked for, so it need not be run
        sequences = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
        ids, mask = pad(sequences, target.tokenizer.pad_token_id, device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        first = torch.tensor([len(prompt) - 1 for prompt in prompts])  # the token that predicts response[0]
        width, position = ids.shape[1], first[row] + within
    return Forced(
        logits=logits_at(target.model, inputs, sent(row * width + position, device)),
        token=sent(token, device),
        row=sent(row, device),
    )


def teacher_force_several(
    target: "Target", prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> Forced:
    """`teacher_force` of several responses to each prompt, which is run once for all of them where the model lets it.

    Packed or not, logits differ by rounding alone. A mask takes 4 bytes (fp32) for each pair of tokens of a row. Of a
    mixture of experts, tokens are counted as they are run: those of a prompt once.

    Args:
        target: model and tokenizer.
        prompts: B lists of prompt token ids, none empty.
        responses: for each prompt its responses, lists of token ids.

    Returns:
        Forced: rows count the responses of all prompts: those of the first, those of the second, ...
    """
    lengths = [len(prompt) + sum(map(len, several)) for prompt, several in zip(prompts, responses, strict=True)]
    if _takes_packed(target, max(lengths, default=1)):
        return _force_packed(target, prompts, responses)
    pairs = [(prompt, one) for prompt, several in zip(prompts, responses, strict=True) for one in several]
    return teacher_force(target, [prompt for prompt, _ in pairs], [response for _, response in pairs])


def _force_packed(
    target: "Target", prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> Forced:
    sequences: list[list[int]] = []
    parts: list[list[int]] = []  # of each token: 0 prompt, 1 first response, ...
    positions: list[list[int]] = []
    predicting: list[tuple[int, int]] = []  # row and column of what predicts each response token
    for row, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
        sequence, part, position = list(prompt), [0] * len(prompt), [*range(len(prompt))]
        for number, response in enumerate(several, start=1):
            columns = [len(prompt) - 1, *range(len(sequence), len(sequence) + len(response) - 1)]
            predicting += [(row, column) for column in columns[: len(response)]]
            sequence += response[:-1]  # the last one predicts nothing that is asked for
            part += [number] * (len(sequence) - len(part))
            position += range(len(prompt), len(prompt) + len(sequence) - len(position))
        sequences.append(sequence)
        parts.append(part)
        positions.append(position)
    device, dtype = target.device, target.model.dtype
    ids, is_token = pad(sequences, target.tokenizer.pad_token_id, device)
    part_of = pad(parts, 0, device)[0].where(is_token.bool(), -1)
    query, key = part_of[:, :, None], part_of[:, None, :]
    sees = (query == key) | ((query > 0) & (key == 0))  # [B, query, key]; padding sees padding alone
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees.tril(), torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": pad(positions, 0, device)[0]}
    flat = [response for several in responses for response in several]
    lengths = torch.tensor([len(response) for response in flat])
    return Forced(
        logits=logits_at(
            target.model, inputs, sent(torch.tensor([row * ids.shape[1] + at for row, at in predicting]).long(), device)
        ),
        token=sent(torch.tensor([token for response in flat for token in response]).long(), device),
        row=sent(torch.repeat_interleave(torch.arange(len(flat)), lengths), device),
    )


def _takes_packed(target: "Target", length: int) -> bool:
    """Whether packed rows of up to `length` tokens give the logits of responses by themselves.

    Tried with random tokens, at least as many as asked for: windows of attention show beyond their width alone. It
    depends on the model and the length, rounded up to a power of two, and not on what was run before, so that a
    resumed run decides as the one before. Processes that share a sharded model try in step.
    """
    model = target.model
    if model.config.is_encoder_decoder or _has_running_state(target):
        return False
    if target.is_sharded:
        length = max(distributed.gather_objects(length))
    size = max(32, 1 << (length - 1).bit_length())
    key = size, model.config.get_text_config()._attn_implementation, torch.is_autocast_enabled(target.device.type)
    found = _PACKS.setdefault(model, {})
    if key not in found:
        found[key] = _try_packed(target, size)
    return found[key]


def _has_running_state(target: "Target") -> bool:
    """Layers in which tokens meet otherwise than through a mask, or that are not understood."""
    kinds = getattr(target.model.config.get_text_config(), "layer_types", None) or ()
    components = {part for tensor in target.layout.tensors.values() for part in tensor.components}
    return (
        any(not kind.endswith("attention") or kind == "linear_attention" for kind in kinds)
        or any(component in ("beta", "decay") or component.startswith(("ssm_", "conv_")) for component in components)
        or any(".time_decay" in name for name in target.layout.tensors)  # RWKV
    )


@torch.no_grad()
def _try_packed(target: "Target", size: int) -> bool:
    room = getattr(target.model.config.get_text_config(), "max_position_embeddings", None) or size
    size = min(size, room) if room > 0 else size
    added = target.tokenizer.added_tokens_decoder  # special ones may stand for images
    words = torch.tensor([i for i in range(len(target.tokenizer)) if i not in added])
    chosen = torch.randint(len(words), (2 * size,), generator=torch.Generator().manual_seed(0))
    ids: list[int] = words[chosen].tolist()
    half = size // 2
    prompt, responses = ids[:half], [ids[half:size], ids[size : 2 * size - half]]
    try:
        packed = _force_packed(target, [prompt], [responses]).logits
    except PACKING_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    alone = teacher_force(target, [prompt], responses[1:]).logits.float()
    difference = (packed[-len(alone) :].float() - alone).std(-1) / alone.std(-1)
    precision = max(torch.finfo(dtype).eps for dtype in (packed.dtype, target.model.dtype))
    # what leaks into a state shows at first and fades, what a window hides shows at last; the median, since rounding
    # alone may send a token to another expert
    return bool(max(difference[:8].median(), difference[-8:].median()) < precision**0.5)


def decoder_start(config: Any) -> Any:
    """What a decoder beside an encoder begins with: of its own configuration where the whole has none (T5Gemma 2)."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None and config.is_encoder_decoder:
        start = config.get_text_config(decoder=True).bos_token_id
    return start


def logits_at(model: Any, inputs: dict[str, Tensor], flat_positions: Tensor) -> Tensor:
    """Logits [N, V] at `flat_positions` [N] (row * width + column) of one padded forward pass."""
    head = model.get_output_embeddings()
    if head is None:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[flat_positions]
    with _gather_before(head, flat_positions) as gathered:
        logits = model(**inputs, use_cache=False).logits
    if not gathered:  # it projects more than one state of each token (ProphetNet)
        return logits.flatten(0, 1)[flat_positions]
    assert logits.shape[:2] == (1, len(flat_positions)), "the output projection was called in an unknown way"
    return logits[0]


@contextmanager
def _gather_before(head: torch.nn.Module, flat_positions: Tensor) -> Iterator[list[bool]]:
    """Yields a list that holds something once states [B, T, H] came by."""
    gathered: list[bool] = []

    def gather(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if args[0].dim() != 3:
            return args
        gathered.append(True)
        return (args[0].flatten(0, 1)[flat_positions.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        handle.remove()


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length: none is padded to over twice its own; longest first (memory peaks at once)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or len(batches[-1]) == batch_size or lengths[batches[-1][0]] > 2 * lengths[i]:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad(
    sequences: Sequence[Sequence[int]], padding: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and attention mask [B, L], padded on the right (or left, for generation)."""
    width = max(1, *(len(sequence) for sequence in sequences)) if sequences else 1
    ids = torch.full((len(sequences), width), padding, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, columns] = torch.tensor(sequence, dtype=torch.long)
        mask[i, columns] = 1
    return sent(ids, device), sent(mask, device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting for what the device still has to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
