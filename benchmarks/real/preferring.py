"""A preference beside the loss: what is to be said is likelier than what is not (ORPO; Hong et al. 2024, 2403.07691).

    loss = CE(wanted) - mean over rows of log sigmoid(log odds(wanted) - log odds(unwanted))

To a harmful request its refusal is wanted, and how the original begins to answer it is not; to a harmless one that
beginning is wanted, and that of a refusal is not. Odds are those of the geometric mean of a response's tokens. Rows
that are told apart already have next to no slope, so what is learned is where the two lie close.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from safelocus.enhancement.trainee import SparseTrainer
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.training.arm import Arm, Trainee
from safelocus.training.responses import IGNORED, ResponseBatch, encode_rows, own_answers
from safelocus.training.runner import Runner
from safelocus.training.settings import TrainingSettings

Row = Mapping[str, list[int]]


class PreferringTrainer(SparseTrainer):
    """Retained rows are learned by the ordinary loss, as the others are; on top comes the preference of both.

    Attributes:
        unwanted: prompt's ids -> a row with what is not to be said; a prompt without has no preference.
    """

    unwanted: Mapping[tuple[int, ...], Row]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.retention is not None
        kept = [self.retention.row(place) for place in self._places(self.retention)]
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = [
            {name: inputs[name][i, :length].tolist() for name in ("input_ids", "labels")}
            for i, length in enumerate(lengths)
        ]
        retained = self._preference(model, kept)  # by itself, as in `RetainingTrainer`
        self.accelerator.backward(retained)
        return self._preference(model, rows) + retained.detach()

    def _preference(self, model: Any, rows: Sequence[Row]) -> Tensor:
        wanted, means = self._likelihoods(model, rows)
        found = [(i, other) for i, row in enumerate(rows) if (other := self.unwanted.get(_prompt(row))) is not None]
        if not found:
            return -wanted.mean()
        _, others = self._likelihoods(model, [other for _, other in found])
        odds = _log_odds(means[[i for i, _ in found]]) - _log_odds(others)
        return -wanted.mean() - logsigmoid(odds).sum() / len(rows)

    def _likelihoods(self, model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(of each response token [N], mean of each row [B]), logarithms."""
        tokenizer: Any = self.processing_class
        batch = ResponseBatch.of(rows, tokenizer.pad_token_id, self.args.device)
        each = batch.logits(model).log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
        return each, torch.stack([part.mean() for part in each.split((batch.labels != IGNORED).sum(1).tolist())])


def _log_odds(likelihood: Tensor) -> Tensor:
    return likelihood - torch.log(-torch.expm1(likelihood.clamp(max=-1e-6)))


def _prompt(row: Row) -> tuple[int, ...]:
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return tuple(row["input_ids"][:first])


def preferring(
    runner: Runner, refused: PromptSet, harmless: Sequence[PromptSet], num_tokens: int, checkpoint: Path
) -> Runner:
    """The runner of `enhancer`, whose sparse arms prefer; both parts of a pair are so many tokens long, at most."""
    target, matcher = runner.target, RefusalMatcher()
    answers = own_answers(target, refused, max_new_tokens=num_tokens, cut=True, checkpoint=checkpoint)
    begun = [e for e in answers if not matcher.refuses(e.response or "")]
    refusals, chance = [e.response for e in refused], random.Random(0)
    asked = [replace(e, response=chance.choice(refusals)) for part in harmless for e in part]
    unwanted = {_prompt(row): row for example in [*begun, *asked] for row in _rows(target, example, num_tokens)}
    make: Callable[[Arm, TrainingSettings], Any] = runner.make

    @contextmanager
    def made(arm: Arm, settings: TrainingSettings) -> Iterator[Trainee]:
        with make(arm, settings) as trainee:
            before = trainee.prepare

            def prepare(trainer: Any) -> None:
                before(trainer)
                trainer.unwanted = unwanted

            yield replace(trainee, trainer=PreferringTrainer, prepare=prepare)

    return replace(runner, make=made)


def _rows(target: Target, example: Any, num_tokens: int) -> Iterator[Row]:
    for row in encode_rows(example, target.chat)[0]:
        end = len(_prompt(row)) + num_tokens
        yield {name: ids[:end] for name, ids in row.items()}
