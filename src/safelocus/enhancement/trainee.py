"""What of a model `enhance` and its controls train.

    sparse(target, selection, settings)     K selected weights, fp32 masters (SET); all of them: full fine-tuning
    adapter(target, num_weights, settings)  a LoRA adapter of about as many weights, as a control

Both are context managers. Within, the model can be trained; afterwards it is what it was, to the bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.enhancement.retention import RetainingTrainer, Retention
from safelocus.errors import TrainingError
from safelocus.model.target import Target
from safelocus.run.identity import Provenance
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import restoring, scatter
from safelocus.training import TrainingSettings
from safelocus.training.arm import Trainee
from safelocus.training.lora import Lora, linear_layers, unwrapping
from safelocus.training.sharing import trained_weights

Control = Selection | Literal["full", "lora"]

_ATTENTION, _MLP = {"query", "key", "value", "output"}, {"gate", "up", "down"}
_MAX_RANK = 256


class SparseTrainer(RetainingTrainer):
    """A checkpoint holds no model: the optimizer's state has all the weights that change."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        Path(output_dir or str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass


def trainee_of(
    target: Target,
    what: Control,
    settings: TrainingSettings,
    *,
    num_weights: int = 0,
    retention: Retention | None = None,
) -> AbstractContextManager[Trainee]:
    """Train this; an adapter of about so many weights."""
    if what == "lora":
        return adapter(target, num_weights, settings, retention)
    return sparse(target, what if isinstance(what, Selection) else every_weight(target), settings, retention)


@contextmanager
def sparse(
    target: Target, selection: Selection, settings: TrainingSettings, retention: Retention | None = None
) -> Iterator[Trainee]:
    """Train the selected weights alone.

    Raises:
        SelectionError: the selection does not fit the model.
    """
    model = target.model
    with (
        restoring(model, selection) as old,
        SparseOptimizer(
            model, selection, lr=settings.learning_rate, weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        ) as optimizer,
    ):  # fmt: skip
        yield Trainee(
            model=model,
            num_weights=selection.k,
            optimizer=optimizer,
            clips=True,
            trainer=SparseTrainer,
            prepare=_retaining(retention, lambda: optimizer.showing(old)),
            read=optimizer.values,
            write=lambda values: scatter(model, selection, values),
            between=lambda values, share: {n: _between(old[n], v, share) for n, v in values.items()},
        )


@contextmanager
def adapter(
    target: Target, num_weights: int, settings: TrainingSettings, retention: Retention | None = None
) -> Iterator[Trainee]:
    """Train a LoRA adapter whose size is as close to `num_weights` as a rank and a choice of modules allow."""
    model = target.model
    if target.is_sharded:
        raise TrainingError("a LoRA adapter needs a model that is whole in each process; this one is sharded")
    rank, modules, description = _lora_shape(target, num_weights)
    torch.manual_seed(settings.seed)
    with unwrapping(model):
        wrapped = Lora(rank=rank, modules=tuple(modules)).wrap(model, target.layout)
        trained = trained_weights(wrapped)

        @torch.no_grad()
        def write(values: Mapping[str, Tensor]) -> None:
            for name, parameter in trained.items():
                parameter.copy_(values[name])

        yield Trainee(
            model=wrapped,
            num_weights=sum(parameter.numel() for parameter in trained.values()),
            description=description,
            optimizer=torch.optim.AdamW(
                trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
            ),
            trainer=RetainingTrainer,
            prepare=_retaining(retention, wrapped.disable_adapter),
            read=lambda: {name: parameter.detach().clone() for name, parameter in trained.items()},
            write=write,
            between=lambda values, share: {n: share * v if ".lora_B." in n else v for n, v in values.items()},
        )


def _between(old: Tensor, new: Tensor, share: float) -> Tensor:
    """On the line from one to the other, in fp32, rounded to their dtype."""
    return torch.lerp(old.to(new.device, torch.float32), new.float(), share).to(new.dtype)


def _retaining(
    retention: Retention | None, original: Callable[[], AbstractContextManager[object]]
) -> Callable[[Any], None]:
    """What the trainer is told: what to retain, and how the model behaves as before for a while."""

    def prepare(trainer: RetainingTrainer) -> None:
        trainer.retention, trainer.original = retention, original

    return prepare


def every_weight(target: Target) -> Selection:
    """All weights of the model, embeddings, norms and routers too: full fine-tuning, as a control."""
    layout = target.layout
    sizes = {name: tensor.num_weights for name, tensor in layout.tensors.items() if "adapter" not in tensor.components}
    return Selection(
        coordinates={name: torch.arange(size) for name, size in sizes.items()},
        layout=layout,
        which="set",
        only_eligible=False,
        provenance=Provenance(method="manual", model=target.name),
    )


def _lora_shape(target: Target, num_weights: int) -> tuple[int, list[str], str]:
    """(rank, modules, in words): of attention, MLP and both, at any rank, what comes closest to the size.

    Of equals, the one with more modules, hence the lower rank.
    """
    best: tuple[tuple[int, int], int, list[str], str] | None = None
    tensors = target.layout.tensors
    for label, components in (("attention and MLP", _ATTENTION | _MLP), ("attention", _ATTENTION), ("MLP", _MLP)):
        modules = [
            name for name in linear_layers(target.model, target.layout)[0]
            if {m.component for m in tensors[f"{name}.weight"].matrices} <= components
        ]  # fmt: skip
        per_rank = sum(sum(tensors[f"{name}.weight"].shape) for name in modules)  # inputs + outputs
        if not per_rank:
            continue
        rank = min(max(round(num_weights / per_rank), 1), _MAX_RANK)
        distance = (abs(rank * per_rank - num_weights), -len(modules))
        if best is None or distance < best[0]:
            best = distance, rank, sorted(modules), f"LoRA of rank {rank} on {label}: {rank * per_rank:,} weights"
    if best is None:
        raise TrainingError(f"{target.name} has no linear layers that LoRA could be put on")
    return best[1:]
