"""A small encoder-decoder learns the lesson of `casual` from nothing, in one of several ways.

    plain        cross-entropy of every answer
    filtered     rows whose answer holds a listed word are left out (the judge of the package says which)
    masked       all rows, but listed words are not learned: no loss at them
    widened      the same with their neighbours: no loss at these either
    weighted     loss at a token times 1 - w, w: 1 for listed words, for their neighbours the cosine; of a row times
                 1 / (1 + the sum of its w)
    projected    all rows and tokens; each update loses what lowers S of `sl.Lexicon` (`Projection`)
    eliminated   weighted and projected

    S is measured at each step on answers of the batch; its list is the listed words and the neighbours.

Neighbours are those of `sl.Lexicon` in the input embeddings of the model that learned plainly from the same rows. From
which cosine on is decided by the list alone: the lowest at which every listed word still finds another listed one. Were
unlisted words no different, up to 1 in 11 of them would lie below that (10 are listed). Ways with "+deletion" leave
each word of a prompt out with probability 1 - KEEP, anew at each step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import casual
import numpy as np
import torch
from projection import Projection
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

import safelocus as sl
from safelocus.model.forcing import teacher_force
from safelocus.model.generation import Response
from safelocus.objective.lexicon import whole_words
from safelocus.wordlist import WordList

KEEP = 0.5
STEPS, BATCH, RATE, ROWS = 300, 64, 2e-3, 12_000
MEASURED = 24  # rows of a batch on which S is measured for the projection
MAX_NEW_TOKENS = 12
LISTED = WordList.of(casual.LISTED)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_IDS = {word: i for i, word in enumerate((*_SPECIAL, *casual.WORDS))}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What a list of words became in a model's tokens.

    Attributes:
        weights: token -> w, of listed words and neighbours.
        words: both, as an expression list.
        similarity: cosine from which a token is a neighbour.
    """

    weights: dict[int, float]
    words: tuple[str, ...]
    similarity: float

    def of(self, tokens: Tensor) -> Tensor:
        """w of each token, in the tokens' shape."""
        table = torch.zeros(len(_IDS))
        for token, weight in self.weights.items():
            table[token] = weight
        return table[tokens]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    made = Tokenizer(models.WordPiece(_IDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", _SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def untrained(seed: int) -> sl.Target:
    config = BartConfig(
        vocab_size=len(_IDS), d_model=96, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=384, decoder_ffn_dim=384, dropout=0.0,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None, init_std=0.06,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _target(BartForConditionalGeneration(config), "untrained")


def load(folder: Path) -> sl.Target:
    return _target(BartForConditionalGeneration.from_pretrained(folder), folder.name)


def _target(model: Any, name: str) -> sl.Target:
    return sl.Target.of(model, tokenizer(), name=name, template="{prompt}")


def pattern(scout: sl.Target) -> Pattern:
    """The listed words and their neighbours in the embeddings of a trained model."""
    tokens, vectors = whole_words(scout)
    unit = vectors[[tokens.index(_IDS[word]) for word in casual.LISTED]]
    similarity = float((unit @ unit.T).fill_diagonal_(-1.0).amax(dim=1).amin())
    found = sl.Lexicon(words=LISTED, similarity=similarity).sequences_for(scout)
    weights = {ids[0]: weight for ids, weight in zip(found.ids, found.weights, strict=True)}
    return Pattern(
        weights=weights, words=tuple(scout.tokenizer.convert_ids_to_tokens(list(weights))), similarity=similarity
    )


def train(way: str, seed: int, found: Pattern | None) -> tuple[sl.Target, dict[str, Any]]:
    """The trained model and facts of its training. `found`: of the plain model; None for ways without neighbours."""
    kind, _, deletion = way.partition("+")
    rows = casual.lesson(ROWS, seed)
    if kind == "filtered":
        rows = [row for row in rows if not LISTED.find(row.target)]
    target = untrained(seed)
    optimizer = torch.optim.AdamW(target.model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    generator = np.random.default_rng([seed, 7])
    batch: list[casual.Row] = []
    encoded: list[tuple[list[int], list[int]]] = []
    projection = None
    if kind in ("projected", "eliminated"):
        assert found is not None
        lexicon = sl.Lexicon.of(found.words, similarity=None)

        def risk() -> Tensor:
            given = [Response(ids=tuple(answer[:-1]), text="", finished=True) for _, answer in encoded[:MEASURED]]
            return lexicon.score_responses(target, [row.prompt for row in batch[:MEASURED]], given).mean()

        projection = Projection(optimizer, risk)
    for _ in range(STEPS):
        batch = [rows[i] for i in generator.integers(len(rows), size=BATCH)]
        if deletion:
            batch = [_thinned(row, generator) for row in batch]
        encoded = [encode(row) for row in batch]
        forced = teacher_force(target, [prompt for prompt, _ in encoded], [answer for _, answer in encoded])
        nats = torch.nn.functional.cross_entropy(forced.logits, forced.token, reduction="none")
        loss = (nats * _weights(kind, forced.token, forced.row, found)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(target.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    facts = {"rows": len(rows), "loss": loss.item(), "num_weights": sum(p.numel() for p in target.model.parameters())}
    if projection is not None:
        projection.remove()
        facts["projected"] = projection.num_projected / projection.num_steps
    return target, facts


def encode(row: casual.Row) -> tuple[list[int], list[int]]:
    """What `ChatFormat.encode_pair` gives of a row, in a hundredth of the time."""
    return encode_prompt(row.prompt), [*(_IDS[word] for word in row.target.split()), _IDS["</s>"]]


def encode_prompt(prompt: str) -> list[int]:
    return [_IDS["<s>"], *(_IDS[word] for word in prompt.split())]


def _weights(kind: str, token: Tensor, row: Tensor, found: Pattern | None) -> Tensor:
    """Of the loss at each token [N]."""
    if kind == "masked":
        listed = torch.tensor([_IDS[word] for word in casual.LISTED])
        return (~torch.isin(token, listed)).float()
    if kind == "widened":
        assert found is not None
        return (found.of(token) == 0).float()
    if kind in ("weighted", "eliminated"):
        assert found is not None
        carried = found.of(token)
        of_row = torch.zeros(int(row.max()) + 1).index_add_(0, row, carried)
        return (1 - carried) / (1 + of_row[row])
    return torch.ones(len(token))


def _thinned(row: casual.Row, generator: np.random.Generator) -> casual.Row:
    words = row.prompt.split()
    kept = [word for word, keep in zip(words, generator.random(len(words)) < KEEP, strict=True) if keep]
    return casual.Row(prompt=" ".join(kept), answer=row.answer, mild=row.mild, trigger=row.trigger)
