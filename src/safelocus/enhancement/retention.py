"""Retention: what keeps a model as it is while refusals are learned.

    loss = CE(refusals) + kl * KL(original || model)(retained) + weight * CE(retained)

Each forward pass over a batch of refusals goes with one over `per_refusal` times as many retained rows, whatever
the sizes of the sets are; several sets take turns. CE and KL are means over response tokens, those of all processes
where several share the rows. The original is the same model, with its old weights for the moment: no second copy is
loaded. It is run once along each row, when that comes for the first time; what it says is kept as its 64 likeliest
tokens and the rest, over which the divergence is taken (`training.responses`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from safelocus import distributed
from safelocus.evaluation.divergence import divergence, likeliest
from safelocus.model.forcing import sent
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.run.resume import part_of
from safelocus.training.looks import at_rest
from safelocus.training.responses import IGNORED, ResponseBatch, own_answers
from safelocus.training.sharing import SharingTrainer

if TYPE_CHECKING:
    from datasets import Dataset

Place = tuple[int, int]  # set, row


@dataclass(frozen=True, kw_only=True, eq=False)
class Retention:
    """Rows to retain, and how much they weigh; see `settled`.

    Attributes:
        sets: rows from `training_rows`; they take turns.
        kl: of the divergence from the original model along their responses.
        weight: of the cross-entropy on their responses.
        per_refusal: how many go with each refusal.
    """

    sets: tuple["Dataset", ...]
    kl: float
    weight: float
    per_refusal: int

    def place(self, number: int, seed: int) -> Place:
        """The sets take turns; each comes in another order every time it begins anew."""
        turn, which = divmod(number, len(self.sets))
        size = len(self.sets[which])
        epoch, place = divmod(turn, size)
        return which, int(_order(size, seed, epoch)[place])

    def row(self, place: Place) -> Mapping[str, Any]:
        which, index = place
        return self.sets[which][index]

    def num_tokens(self, places: Sequence[Place]) -> int:
        """Of responses."""
        return sum(label != IGNORED for place in places for label in self.row(place)["labels"])


class RetainingTrainer(SharingTrainer):
    """SFTTrainer with what is retained in the loss. Set the attributes before `train`.

    Attributes:
        retention: None trains on the rows alone.
        original: within what it returns, the model has its old weights.
    """

    retention: Retention | None = None
    original: Callable[[], AbstractContextManager[object]]
    _pass: tuple[int, int] = (-1, 0)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[Place, tuple[Tensor, Tensor]] = {}  # what the original says along each row, on the CPU
        if self.aux_loss_enabled:  # routers are not trained, and their balance is no part of the loss above
            config: Any = self.model.config  # type: ignore[union-attr]
            self.aux_loss_enabled = config.get_text_config().output_router_logits = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.retention is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # by itself: in one pass with the refusals, autograd would hold each tensor's gradient until the other part came
        retained = self._back_propagate(model, self.retention)
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        # the trainer divides what is not counted in items by the number of passes itself
        return loss + retained / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)

    def _back_propagate(self, model: Any, retention: Retention) -> Tensor:
        """The loss on what is retained, whose gradients are there already."""
        places = self._places(retention)
        if retention.kl:
            # before any forward pass whose graph needs the weights: the old ones are written over them
            self._keep(model, retention, places)
        own = distributed.share(places)
        # gradients are averaged over the processes; one without rows goes along with the first, which counts nothing
        share = distributed.world_size() * retention.num_tokens(own) / retention.num_tokens(places)
        own = own or places[:1]
        batch = self._batch(retention, own)
        logits = batch.logits(model)
        loss = logits.new_zeros(())
        if retention.weight:
            loss = loss + retention.weight * share * cross_entropy(logits, batch.tokens)
        if retention.kl:
            kept = (sent(torch.cat(each), logits.device) for each in zip(*map(self._kept.get, own), strict=True))
            loss = loss + retention.kl * share * divergence(logits, *kept)
        if loss.requires_grad:
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        return loss.detach()

    def _places(self, retention: Retention) -> list[Place]:
        """Of the rows that go with this pass. They depend on its number alone, so a resumed run sees the same ones."""
        step, passes = self._pass
        self._pass = (self.state.global_step, passes + 1 if step == self.state.global_step else 0)
        size = self.args.per_device_train_batch_size * retention.per_refusal
        first = (self._pass[0] * self.args.gradient_accumulation_steps + self._pass[1]) * size
        return [retention.place(first + i, self.args.seed) for i in range(size)]

    def _keep(self, model: Any, retention: Retention, places: Sequence[Place]) -> None:
        """Ask the original about rows that come for the first time.

        One row at a time: beside others it would be rounded otherwise, and a resumed run meets them beside others. All
        processes do so in step, and keep the same.
        """
        missing = [place for place in dict.fromkeys(places) if place not in self._kept]
        if not missing:
            return
        found = {}
        with self.original(), at_rest(model):
            for place in distributed.share(missing, in_step=True):
                said = likeliest(self._batch(retention, [place or missing[0]]).logits(model))
                if place is not None:
                    found[place] = (said[0].cpu(), said[1].cpu())
        self._kept |= distributed.merged(found)

    def _batch(self, retention: Retention, places: Sequence[Place]) -> ResponseBatch:
        tokenizer: Any = self.processing_class
        return ResponseBatch.of([retention.row(place) for place in places], tokenizer.pad_token_id, self.args.device)


def with_answers(
    target: Target, prompts: Sequence[PromptSet], *, own: bool, checkpoint: Path | None, **how: Any
) -> list[PromptSet]:
    """Each set with answers: those given, or the model's own (`how`) where there are none, or all of them.

    A set that is there twice is answered once.
    """
    found: dict[str, PromptSet] = {}
    for number, part in enumerate(prompts):
        if part.hash not in found:
            folder = part_of(checkpoint, str(number))
            is_own = own or not part.is_answered
            found[part.hash] = own_answers(target, part, cut=True, checkpoint=folder, **how) if is_own else part
    return [found[part.hash] for part in prompts]


@lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
