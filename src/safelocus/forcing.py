"""Teacher forcing: one padded forward pass that yields logits at the positions asked for, and no others.

Input: token ids of prompts and responses. Output: logits [N, V] for the N response tokens of the
whole batch. Sequences are padded on the right, where causal attention cannot see the padding, so
neither the batch's size nor its order nor the tokenizer's padding side touches the result. The hidden
states are gathered at the N positions *before* the output projection: neither memory nor time is
spent on logits of prompt and padding tokens, which for a vocabulary of 128k are most of the cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safelocus.target import Target


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
        return torch.zeros(num_rows, device=chosen.device).index_add(0, self.row, chosen)


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
        start = target.model.config.decoder_start_token_id
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


def logits_at(model: Any, inputs: dict[str, Tensor], flat_positions: Tensor) -> Tensor:
    """Logits [N, V] at `flat_positions` [N] (row * width + column) of one padded forward pass."""
    head = model.get_output_embeddings()
    if head is None:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[flat_positions]
    with _gather_before(head, flat_positions):
        logits = model(**inputs, use_cache=False).logits
    assert logits.shape[:2] == (1, len(flat_positions)), "the output projection was called in an unknown way"
    return logits[0]


@contextmanager
def _gather_before(head: torch.nn.Module, flat_positions: Tensor) -> Iterator[None]:
    def gather(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[flat_positions.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


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
