"""S from a list of expressions that must not come: minus how many of them the target's own answer is expected to hold.

    S(x) = - sum over t and e of  w_e * prod over j = 1 .. n_e of p(e_j | x, y_<t+j-1)

y is the target's greedy answer to x, t runs over its T tokens, and e over sequences of n_e tokens that write an
expression; those that do not end within the answer (t + n_e - 1 > T) are left out. y is run once, teacher-forced.

Exact for sequences of one token. What is approximated in longer ones: each of their tokens is conditioned on the
answer's own tokens before it, and not on the sequence's; where the answer goes another way, the second token counts
as it would there. A sequence counts wherever it stands, within a longer word too.

e are, in the target's own tokens:

    spellings     w = 1: every spelling of the list (`wordlist`), as it stands behind a space, a line break and a
                  quotation mark. One that holds another is left out, since that counts already.
    neighbours    w = the cosine: tokens of one whole word (a space and letters) whose input embeddings are alike to
                  that of a spelling of one such token, cosine >= `similarity`. Each dimension is standardised over
                  all such tokens first: else what all embeddings share, and a few dimensions, would decide every
                  cosine (Timkey and van Schijndel, EMNLP 2021).

The derivative in the logits is written out, in chunks of positions, so that beside the logits one tensor of their size
is made:

    dS/dz_t[v] = [v = e_j] A_t[v] - p_t[v] sum over u of A_t[u],     A_t[u]: minus the sum of all w_e prod p with u at t

It holds a factor p (1 - p): where the target is certain of a word, the slope is small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from safelocus import distributed
from safelocus.errors import ModelError, WordListError
from safelocus.model.chat import continuation
from safelocus.model.forcing import Forced, sent
from safelocus.model.generation import Response
from safelocus.objective.spelling import spell_vocabulary
from safelocus.objective.text import AnswerObjective, force_answers, with_slope
from safelocus.wordlist import WordList

if TYPE_CHECKING:
    from safelocus.model.target import Target

SIMILARITY = 0.65  # words of like meaning, and little else: docs/lexicon.md
_PLACES = (
    ("", " "),
    ("\n", ""),
    ('"', ""),
)  # what stands before an expression: text, and what its first token may hold
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class TokenSequences:
    """What a list became in the tokens of one target.

    Attributes:
        ids: sequences of token ids, each once; none holds another of at least its weight.
        weights: of each, in (0, 1].
        num_neighbours: how many of them are neighbours, which stand last.
    """

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    num_neighbours: int

    @property
    def sentence(self) -> str:
        """In numbers, for people; words of the list may be secret."""
        written = len(self.ids) - self.num_neighbours
        alone = sum(len(each) == 1 for each in self.ids[:written])
        return f"{written} token sequences ({alone} of one token) and {self.num_neighbours} neighbours"


@dataclass(kw_only=True, eq=False)
class Lexicon(AnswerObjective):
    """Expressions that must not come, as objective.

    Attributes:
        words: the list.
        similarity: cosine from which a token is a neighbour; None or 1 for no neighbours.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> objective = sl.Lexicon.of(["cake"], max_new_tokens=16)
        >>> bool(objective(target, ["How do I bake a cake?"]) < 0)
        True
    """

    words: WordList
    similarity: float | None = SIMILARITY
    _sequences: WeakKeyDictionary[Any, TokenSequences] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        number = isinstance(self.similarity, int | float)
        if self.similarity is not None and not (number and 0 < self.similarity <= 1):
            raise WordListError(
                f"the similarity of neighbours is a cosine above 0 and at most 1 (for none); found {self.similarity!r}"
            )

    @classmethod
    def load(cls, path: Path | str, **options: Any) -> Self:
        """From a file with one expression on each line; WordListError where it cannot be read.

        Args:
            **options: `similarity`, `max_new_tokens`, `on_responses`.
        """
        return cls(words=WordList.read(path), **options)

    @classmethod
    def of(cls, expressions: Sequence[str], **options: Any) -> Self:
        """From a list in memory; as `load`."""
        return cls(words=WordList.of(expressions), **options)

    @classmethod
    def remade(cls, described: Mapping[str, Any]) -> Self:
        """The one that `describe` told of.

        Raises:
            WordListError: it came from memory, or its file is not what it was.
        """
        if "name" not in described:
            raise WordListError(
                "the scores' list of expressions came from memory, so the objective cannot be made anew; score with a "
                "list in a file"
            )
        made = cls.load(
            described["name"], similarity=described["similarity"], max_new_tokens=described["max_new_tokens"]
        )
        if made.words.hash != described["hash"]:
            raise WordListError(
                f"{described['name']}: {len(made.words)} expressions that are not the {described['num_expressions']} "
                "that the scores were made with; bring that list back, or score again"
            )
        return made

    def score_responses(self, target: "Target", prompts: Sequence[str], responses: Sequence[Response]) -> Tensor:
        """Scores [B] of given answers, at most 0; differentiable in the target's weights."""
        sequences = self.sequences_for(target)
        forced = force_answers(target, prompts, responses)
        scores, slope = _expected(forced, sequences, len(prompts))
        if self.on_responses is not None:
            self.on_responses(prompts, responses, scores)
        return with_slope(scores, forced, slope)

    def sequences_for(self, target: "Target") -> TokenSequences:
        """What the list became in this target's tokens; made once.

        Raises:
            ModelError: its tokenizer cannot write an expression.
        """
        if target.model not in self._sequences:
            self._sequences[target.model] = _sequences(self.words, target, self.similarity)
        return self._sequences[target.model]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "lexicon",
            **({} if self.words.source is None else {"name": self.words.source}),
            "num_expressions": len(self.words),
            "num_spellings": sum(map(len, self.words.spellings)),
            "hash": self.words.hash,
            "similarity": self.similarity,
            "max_new_tokens": self.max_new_tokens,
        }


@torch.no_grad()
def _expected(forced: Forced, sequences: TokenSequences, num_rows: int) -> tuple[Tensor, Tensor]:
    """S [num_rows], and dS/dz [N, V] in the logits' dtype."""
    logits = forced.logits.detach()
    dtype, device, num = torch.promote_types(logits.dtype, torch.float32), logits.device, len(logits)
    columns = sorted({token for ids in sequences.ids for token in ids})
    column_of = {token: column for column, token in enumerate(columns)}
    asked = sent(torch.tensor(columns), device)
    rows_at_once = max(1, _CHUNK_BYTES // (8 * logits.shape[1]))
    parts = (part.to(dtype) for part in logits.split(rows_at_once))
    p = torch.cat([(part[:, asked] - part.logsumexp(dim=1, keepdim=True)).exp() for part in parts])  # [N, U]
    scores = torch.zeros(num_rows, dtype=dtype, device=device)
    gain = torch.zeros_like(p)  # A
    for length in sorted({len(ids) for ids in sequences.ids}):
        starts = num - length + 1
        if starts < 1:
            continue
        same = forced.row[:starts] == forced.row[length - 1 :]  # [starts] whether the sequence ends in the same answer
        chosen = [number for number, ids in enumerate(sequences.ids) if len(ids) == length]
        at_once = max(1, _CHUNK_BYTES // (8 * starts))
        for first in range(0, len(chosen), at_once):
            some = chosen[first : first + at_once]
            ids = sent(torch.tensor([[column_of[token] for token in sequences.ids[n]] for n in some]), device)  # [E, n]
            weights = sent(torch.tensor([sequences.weights[n] for n in some], dtype=dtype), device)
            expected = weights * same[:, None]  # [starts, E]
            for j in range(length):
                expected = expected * p[j : j + starts, ids[:, j]]
            scores.index_add_(0, forced.row[:starts], -expected.sum(dim=1))
            for j in range(length):
                gain[j : j + starts].index_add_(1, ids[:, j], -expected)
    slope = torch.empty_like(logits)
    for first in range(0, num, rows_at_once):
        rows = slice(first, first + rows_at_once)
        inner = -torch.softmax(logits[rows].to(dtype), dim=1) * gain[rows].sum(dim=1, keepdim=True)
        slope[rows] = inner.index_add_(1, asked, gain[rows]).to(slope.dtype)
    return scores, slope


def _sequences(words: WordList, target: "Target", similarity: float | None) -> TokenSequences:
    tokenizer = target.tokenizer
    found: dict[tuple[int, ...], None] = {}
    for line, spellings in zip(words.lines, words.spellings, strict=True):
        for number, spelling in enumerate(spellings):
            written = [_ids(tokenizer, context, start + spelling) for context, start in _PLACES]
            if number == 0 and not all(written):
                raise ModelError(
                    f"{words.source or 'the list of expressions'}, line {line}: the tokenizer of {target.name} cannot "
                    "write this expression (it has no tokens for all of its characters), so the model cannot say it "
                    "either; leave it out"
                )
            found |= dict.fromkeys(ids for ids in written if ids)
    kept = [ids for ids in found if not _holds_another(ids, found)]
    near = {} if similarity is None or similarity >= 1 else _neighbours(kept, target, similarity)
    return TokenSequences(
        ids=(*kept, *((token,) for token in near)), weights=(*(1.0 for _ in kept), *near.values()),
        num_neighbours=len(near),
    )  # fmt: skip


def _ids(tokenizer: Any, context: str, text: str) -> tuple[int, ...] | None:
    """Tokens of text that follows a context; None where they do not spell it."""
    ids = continuation(tokenizer, context, text)
    if not ids or tokenizer.unk_token_id in ids:
        return None
    return tuple(ids)


def _holds_another(ids: tuple[int, ...], others: Mapping[tuple[int, ...], None]) -> bool:
    size = len(ids)
    return any(
        ids[start:end] in others for start in range(size) for end in range(start + 1, size + 1) if end - start < size
    )


def _neighbours(listed: Sequence[tuple[int, ...]], target: "Target", similarity: float) -> dict[int, float]:
    """token -> cosine to the nearest listed one, of whole words of one token that are not listed themselves."""
    whole, unit = whole_words(target)
    alone = {ids[0] for ids in listed if len(ids) == 1}
    asked, others = (
        [n for n, token in enumerate(whole) if (token in alone) == is_listed] for is_listed in (True, False)
    )
    if not asked or not others:
        return {}
    cosine = (unit[others] @ unit[asked].T).amax(dim=1)
    near = (cosine >= similarity).nonzero()[:, 0].tolist()
    return {whole[others[place]]: min(1.0, float(cosine[place])) for place in near}


@torch.no_grad()
def whole_words(target: "Target") -> tuple[list[int], Tensor]:
    """Tokens of one whole word, and their input embeddings: [W, D], standardised over these words, of length 1."""
    embedding = distributed.whole(target.model.get_input_embeddings().weight)
    spelled = spell_vocabulary(target.tokenizer)[: len(embedding)]
    whole = [token for token, piece in enumerate(spelled) if piece is not None and _is_word(piece)]
    words = embedding[whole].float()
    if len(words) > 1:
        words = (words - words.mean(dim=0)) / words.std(dim=0).clamp(min=torch.finfo(words.dtype).tiny)
    return whole, torch.nn.functional.normalize(words, dim=1)


def _is_word(piece: bytes) -> bool:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    return text.startswith(" ") and len(text) > 2 and text[1:].isalpha()
