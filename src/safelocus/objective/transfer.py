"""From a guard's gradient on its own input embeddings to a gradient on the target's logits.

The guard reads text, so its score has no derivative in the target's weights. It has one in its own
input embeddings: a_u [d] for each guard token u of the response. This module turns those into
G [N, V], the gain in the guard's score if target token v stood at response position t:

    G_t[v] = sum over guard tokens u aligned with t of  <a_u, E(v)>          (DESIGN: vocabulary transfer)

and then into the gradient with respect to the target's logits z of the relaxed score
sum_t <G_t, softmax(z_t / tau)>, with G constant:

    dS/dz_t = p_t * (G_t - <G_t, p_t>) / tau

Three variants of G:
  identity   the vocabularies agree: E(v) is the guard's own embedding and u = t. Exact.
  character  target token v is spelled out and re-tokenized by the guard; E(v) is the mean of those
             tokens' embeddings; u and t are aligned by the characters they cover.
  index      the published code's way: each guard token's gain is spread evenly over its pieces in
             the target's vocabulary, and position u is taken for position t. Kept for comparison.

Memory: the maps between vocabularies are ragged lists of ids (a few per token), never V x V, and
everything of width V is made in chunks of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from safelocus.errors import ModelError
from safelocus.model.forcing import sent
from safelocus.objective.spelling import join, spell_vocabulary

Variant = Literal["identity", "character", "index"]
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class GuardReading:
    """How a guard (or classifier) read a batch of responses.

    Attributes:
        score: [B] its log-odds of safe, fp32; higher is safer.
        gradients: per response, [U, d] gradient of its score in the embeddings of the guard tokens
            that cover the response.
        spans: per response, the character span in the response of each of those U tokens.
        unread: numbers of the responses on which it came to no verdict; their score and gradients are zero.
    """

    score: Tensor
    gradients: list[Tensor]
    spans: list[list[tuple[int, int]]]
    unread: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """A ragged map from each token of one vocabulary to tokens of another: ids[offsets[v]:offsets[v+1]].

    `has_any`: [tokens] whether a token has any; `places`: which do. (A mask as an index would wait for the device.)
    """

    ids: Tensor
    offsets: Tensor
    has_any: Tensor
    places: Tensor


class Transfer:
    """Carries gradients from one guard's embeddings to one target's vocabulary.

    Args:
        target_tokenizer, guard_tokenizer: fast tokenizers.
        guard_embedding: the guard's input embedding module (called, so that scaled embeddings count).
        target_vocabulary: V, the width of the target's logits (may exceed the tokenizer's length).
        variant: see the module's text; None takes identity where the vocabularies agree, else character.

    Raises:
        ModelError: an unknown variant, or identity where the vocabularies differ.
    """

    def __init__(
        self,
        target_tokenizer: Any,
        guard_tokenizer: Any,
        guard_embedding: torch.nn.Module,
        *,
        target_vocabulary: int,
        variant: Variant | None = None,
    ) -> None:
        if variant not in (None, *get_args(Variant)):
            raise ModelError(f"the transfer {variant!r} is unknown; expected one of {', '.join(get_args(Variant))}")
        agree = same_vocabulary(target_tokenizer, guard_tokenizer)
        if variant == "identity" and not agree:
            raise ModelError(
                "the transfer 'identity' needs a guard with the target's own vocabulary, and this one's differs; take "
                "'character', or leave it out"
            )
        self.variant: Variant = variant or ("identity" if agree else "character")
        self.target_vocabulary = target_vocabulary
        self.embedding = guard_embedding
        self.spelled = spell_vocabulary(target_tokenizer)
        device = next(guard_embedding.parameters()).device
        if self.variant == "character":
            self._pieces = _pieces_of(target_tokenizer, self.spelled, guard_tokenizer, device)
        elif self.variant == "index":
            self._pieces = _pieces_of(guard_tokenizer, spell_vocabulary(guard_tokenizer), target_tokenizer, device)

    def response_text(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Text of a response and each target token's character span in it, outer white space trimmed."""
        text, spans = join([self.spelled[i] if i < len(self.spelled) else None for i in ids])
        left = len(text) - len(text.lstrip())
        text = text.strip()
        return text, [(_clip(start - left, len(text)), _clip(end - left, len(text))) for start, end in spans]

    def align(self, reading: GuardReading, target_spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Embedding gradients gathered at the target's positions: [N, d], response after response."""
        rows = []
        for gradient, guard_spans, spans in zip(reading.gradients, reading.spans, target_spans, strict=True):
            if self.variant == "character":
                overlap = sent(_overlap(spans, guard_spans).to(gradient.dtype), gradient.device)  # [T, U]
                rows.append(overlap @ gradient)
            else:  # identity and index: guard token u is taken for target position u
                missing = max(0, len(spans) - len(gradient))
                rows.append(torch.nn.functional.pad(gradient[: len(spans)], (0, 0, 0, missing)))
        return torch.cat(rows)

    @torch.no_grad()
    def gain(self, aligned: Tensor) -> Tensor:
        """G [n, V] in fp32 for n positions whose aligned embedding gradients [n, d] are given."""
        on_guard = self._on_guard_vocabulary(aligned)  # [n, V_guard]
        if self.variant == "identity":
            return _resize(on_guard, self.target_vocabulary)
        if self.variant == "character":
            gain, spelled = _mean_of_pieces(on_guard, self._pieces), self._pieces.has_any
            # tokens without a spelling (end of text, roles) get the average gain: neutral, where zero
            # would call them good or bad by the sign of the rest
            neutral = gain[:, self._pieces.places].mean(dim=1, keepdim=True)
            gain = torch.where(spelled, gain, neutral)
            padding = neutral.expand(-1, max(0, self.target_vocabulary - gain.shape[1]))
            return torch.cat([gain, padding], dim=1)[:, : self.target_vocabulary]
        return self._spread(on_guard)

    @torch.no_grad()
    def logit_gradient(
        self, logits: Tensor, aligned: Tensor, *, tau: float, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """dS/dz [N, V] in the logits' dtype.

        Args:
            logits: [N, V] of the target at the response positions.
            aligned: [N, d] from `align`.
            tau: temperature of the relaxation (the published code: 0.3).
            seeds: [N] of the Gumbel noise of the relaxation, one for each position; None for no noise.
        """
        result = torch.empty_like(logits)
        chunk = max(1, _CHUNK_BYTES // (4 * 4 * logits.shape[1]))
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            z = logits[rows].float()
            if seeds is not None:
                drawn = [torch.rand(z.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds[rows]]
                uniform = sent(torch.stack(drawn).clamp_min(1e-20), z.device)
                z = z - torch.log(-torch.log(uniform))
            p = torch.softmax(z / tau, dim=1)
            gain = self.gain(aligned[rows]).to(p.device)
            inner = (gain * p).sum(dim=1, keepdim=True)
            result[rows] = (p * (gain - inner) / tau).to(result.dtype)
        return result

    def _on_guard_vocabulary(self, aligned: Tensor) -> Tensor:
        """<b_t, E(g)> for every guard token g: [n, V_guard], fp32."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        if type(self.embedding) is torch.nn.Embedding:
            return (aligned.to(weight.dtype) @ weight.T).float()
        # scaled embeddings (Gemma): ask the module itself, in pieces
        ids = torch.arange(weight.shape[0], device=weight.device)
        columns = [aligned.to(weight.dtype) @ self.embedding(part).T for part in ids.split(8192)]
        return torch.cat(columns, dim=1).float()

    def _spread(self, on_guard: Tensor) -> Tensor:
        lengths = self._pieces.offsets.diff()  # pieces per guard token
        owner = torch.repeat_interleave(lengths, output_size=len(self._pieces.ids))
        share = on_guard[:, owner] / lengths[owner]
        gain = on_guard.new_zeros(len(on_guard), self.target_vocabulary)
        return gain.index_add_(1, self._pieces.ids, share)


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether both tokenizers give every id the same meaning (special tokens and added ones too)."""
    return first is second or first.get_vocab() == second.get_vocab()


def _pieces_of(owner: Any, spelled: list[bytes | None], other: Any, device: torch.device) -> _Pieces:
    """For each token of `owner`, the tokens of `other` that spell the same text."""
    bytes_of = spell_vocabulary(other)
    single = {piece: i for i, piece in reversed(list(enumerate(bytes_of))) if piece is not None and len(piece) == 1}
    texts: dict[int, str] = {}
    ids: list[list[int]] = [[] for _ in spelled]
    special = other.get_vocab()
    names = owner.convert_ids_to_tokens(list(range(len(spelled))))
    for token, piece in enumerate(spelled):
        if piece is None:
            if names[token] in special:  # the same special token exists on the other side
                ids[token] = [special[names[token]]]
            continue
        try:
            texts[token] = piece.decode()
        except UnicodeDecodeError:  # a part of a character: byte by byte, where the other side has bytes
            ids[token] = [single[piece[i : i + 1]] for i in range(len(piece)) if piece[i : i + 1] in single]
    if texts:
        anchor = _anchor(other, bytes_of)
        encoded = other(
            [anchor + text for text in texts.values()], add_special_tokens=False, return_offsets_mapping=True
        )
        for token, other_ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids[token] = [i for i, (_, end) in zip(other_ids, offsets, strict=True) if end > len(anchor)]
    lengths = torch.tensor([0, *(len(pieces) for pieces in ids)])
    flat = torch.tensor([i for pieces in ids for i in pieces], dtype=torch.long)
    has_any = lengths[1:] > 0
    return _Pieces(
        ids=flat.to(device),
        offsets=lengths.cumsum(0).to(device),
        has_any=has_any.to(device),
        places=has_any.nonzero().squeeze(1).to(device),
    )


def _anchor(tokenizer: Any, spelled: list[bytes | None]) -> str:
    """Text to put in front so that no space is added to what follows; empty where none is added anyway.

    SentencePiece-like tokenizers put a space before the first word. Behind a line break the word is in
    mid-text, and its tokens are those of the bare word.
    """
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    return "\n" if first and (spelled[first[0]] or b"").startswith(b" ") else ""


def _mean_of_pieces(on_guard: Tensor, pieces: _Pieces) -> Tensor:
    """Mean over each token's pieces: [n, tokens]; zero for a token that has none."""
    return torch.nn.functional.embedding_bag(
        pieces.ids, on_guard.T.contiguous(), pieces.offsets, mode="mean", include_last_offset=True
    ).T


def _overlap(spans: Sequence[tuple[int, int]], guard_spans: Sequence[tuple[int, int]]) -> Tensor:
    """[T, U]: the share of guard token u's characters that target token t covers."""
    if not spans or not guard_spans:
        return torch.zeros(len(spans), len(guard_spans))
    target = torch.tensor(spans, dtype=torch.float)
    guard = torch.tensor(guard_spans, dtype=torch.float)
    shared = torch.minimum(target[:, None, 1], guard[None, :, 1]) - torch.maximum(target[:, None, 0], guard[None, :, 0])
    return shared.clamp_min(0) / (guard[:, 1] - guard[:, 0]).clamp_min(1)


def _resize(values: Tensor, width: int) -> Tensor:
    """Cut or zero-pad to `width`: embeddings are often padded beyond the tokenizer's length."""
    if values.shape[1] >= width:
        return values[:, :width]
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _clip(value: int, size: int) -> int:
    return min(max(value, 0), size)
