"""Calibration: the task never trains the protected weights; small steps between its own do, so that the model goes
on answering as it did.

    every N steps:  theta_P <- theta_P - AdamW( d/dtheta_P  KL(original || model)(original's own answers) )

A frozen weight keeps its value but not its meaning: the others move around it. Calibration gives the selected weights
to one purpose, what the original model said to a few prompts (harmful ones, and harmless ones, so that the model does
not learn to refuse everything). The original is not kept: its answers are generated once, and the probabilities along
them stored, the `num_kept` likeliest tokens and the rest in one. After ASCENT (2026), which alternates task updates
with calibration steps along the singular directions of the gradient of S; here they are confined to a selection.

All processes take a step together and share its prompts: of copies each steps all of the protected weights, of a
sharded model those of its own rows, with gradients that FSDP2 has averaged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from safelocus import distributed
from safelocus.errors import NumericalError, TrainingError
from safelocus.evaluation.divergence import divergence, likeliest
from safelocus.model.target import Target
from safelocus.preservation.mixing import ANSWER_TOKENS, embedded, sets_of
from safelocus.prompts import PromptSet
from safelocus.run.tensors import TensorFile
from safelocus.selection.sparse import Site, averaged_norm, requiring_gradients
from safelocus.training.looks import at_rest
from safelocus.training.responses import IGNORED, ResponseBatch, own_answers, training_rows

STATE = "calibration.safetensors"
_FILE = TensorFile(kind="calibration", version=1, made_by="an interrupted training")


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """How to calibrate.

    Attributes:
        target: the model that is trained, with its tokenizer.
        prompts: sets that take turns, or what they are read from; give harmful and harmless ones, as the embedded ones
            are. Responses in them are not used.
        every: steps of the task between two of calibration.
        learning_rate: of AdamW on the protected weights; None: at each step the training's, where that is AdamW's too,
            and beneath an adapter a tenth of it.
        batch_size: prompts of each set in one calibration step.
        num_kept: tokens whose probability is stored at each place.
        max_new_tokens: length of the original's answers; longer ones are cut, and teach no end.
        max_length: tokens of prompt and answer.
        max_grad_norm: the gradient on the protected weights is clipped to this norm.
        seed: of the order of the prompts.
    """

    target: Target
    prompts: Sequence[PromptSet] = field(default_factory=embedded)
    every: int = 4
    learning_rate: float | None = None
    batch_size: int = 8
    num_kept: int = 64
    max_new_tokens: int = ANSWER_TOKENS
    max_length: int = 1024
    max_grad_norm: float = 1.0
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """How, and with which prompts; the target is that of the training."""
        return {name: value for name, value in vars(self).items() if name != "target"}

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "num_kept", "max_new_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise TrainingError(f"calibration: {name} is at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise TrainingError(f"calibration: {name} is a positive number, found {value}")
        if not self.prompts:
            raise TrainingError("calibration needs prompts: harmful ones, and harmless ones against over-refusal")
        object.__setattr__(self, "prompts", sets_of(self.prompts))


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What the original model said to one prompt.

    Attributes:
        row: input_ids and labels.
        tokens: int32 [n, num_kept], the likeliest tokens at each of the n places of the response.
        log_probs: fp32 [n, num_kept], theirs.
    """

    row: dict[str, Any]
    tokens: Tensor
    log_probs: Tensor


@torch.no_grad()
def references(calibration: Calibration, *, progress: bool = True) -> list[list[Reference]]:
    """Per set, what the model as it is now answers, and how likely each token is to it. On the CPU.

    Raises:
        PromptError: no answer to a set's prompts says anything.
    """
    with at_rest(calibration.target.model):
        return [_references(calibration, prompts, progress) for prompts in calibration.prompts]


def _references(calibration: Calibration, prompts: PromptSet, progress: bool) -> list[Reference]:
    target, found = calibration.target, []
    answered = own_answers(target, prompts, max_new_tokens=calibration.max_new_tokens, cut=True, progress=progress)
    rows = list(training_rows(answered, target.chat, max_length=calibration.max_length))
    for start in range(0, len(rows), calibration.batch_size):
        part = rows[start : start + calibration.batch_size]
        kept = likeliest(batch_of(part, target).logits(target.model), calibration.num_kept)
        lengths = [sum(label != IGNORED for label in row["labels"]) for row in part]
        tokens, values = (each.cpu().split(lengths) for each in kept)
        found += [
            Reference(row=row, tokens=t.clone(), log_probs=v.clone())
            for row, t, v in zip(part, tokens, values, strict=True)
        ]
    return found


def batch_of(rows: Sequence[dict[str, Any]], target: Target) -> ResponseBatch:
    """Rows of references, padded, where the target takes its inputs."""
    padding: Any = target.tokenizer.pad_token_id
    return ResponseBatch.of(rows, int(padding), target.device)


@dataclass(kw_only=True, eq=False)
class Calibrator:
    """Takes the calibration steps: `count_step` counts those of the task, and says when `step` is due.

    Attributes:
        rate: says the learning rate of a step.
        masters: name -> fp32 values of the protected weights that this process holds, [k of this tensor].
        is_sharded: whether other processes hold others.
        last: divergence at the latest calibration step; None before the first.
    """

    calibration: Calibration
    rate: Callable[[], float]
    sets: list[list[Reference]]
    masters: dict[str, nn.Parameter]
    is_sharded: bool = False
    last: Tensor | None = None
    _steps: int = field(default=0, init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self._optimizer = self._new_optimizer()

    def count_step(self) -> bool:
        """Count one step of the task; whether a calibration step follows it."""
        self._steps += 1
        return self._steps % self.calibration.every == 0

    def step(self, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        """One calibration step, which all processes take together: name -> new values [k].

        Args:
            sites: name -> where the protected weights are.

        Raises:
            NumericalError: the gradient is NaN or infinite, in whichever process.
        """
        model = self.calibration.target.model
        batch, tokens, log_probs, weight = self._batch()
        held = [site.parameter for site in sites.values()]  # the base weights of an adapter do not by themselves
        with at_rest(model), _checkpointing(model), torch.enable_grad(), requiring_gradients(model, held):
            loss = weight * divergence(batch.logits(model), tokens, log_probs)
            gradients = _gradients(loss, sites)
        self.last = distributed.all_reduce_sum(loss.detach()) / distributed.world_size()
        for name, gradient in gradients.items():
            self.masters[name].grad = gradient.to(self.masters[name])
        norm = averaged_norm(sites, self.masters)
        if not torch.isfinite(norm):
            raise NumericalError("the gradient of a calibration step is NaN or infinite: the training diverged")
        clip_grads_with_norm_(self.masters.values(), self.calibration.max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {name: master.detach() for name, master in self.masters.items()}

    def follow(self, sites: Mapping[str, Site]) -> None:
        """Keep this process's part of the named tensors, which were whole and are shards now."""
        self.is_sharded = True
        moments: dict[Tensor, Any] = dict(self._optimizer.state)
        for name, site in sites.items():
            whole = self.masters[name]
            self.masters[name] = part = nn.Parameter(site.part_of(whole.detach()).clone())
            moments[part] = {
                key: value if value.ndim == 0 else site.part_of(value)  # the count of steps is one number
                for key, value in moments.pop(whole, {}).items()
            }
        self._optimizer = self._new_optimizer()
        self._optimizer.state.update(moments)

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs to go on with the same bits, beside a trainer's checkpoint.

        Of shards every process writes its own part, in a file of its own.
        """
        tensors = {f"{name} value": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{name} {key}": value for key, value in self._optimizer.state[master].items()}
        _FILE.write(folder / self._file_name(), {"steps": self._steps}, tensors)

    @torch.no_grad()
    def load(self, folder: Path) -> dict[str, Tensor]:
        """Take up what `save` wrote; name -> values [k].

        Raises:
            TrainingError: there is no such thing in the checkpoint, or none of so many processes.
        """
        file = folder / self._file_name()
        if not file.is_file():
            raise TrainingError(f"{file}: does not exist, so the calibration of this checkpoint cannot be resumed")
        header, saved = _FILE.read(file)
        self._steps = header["steps"]
        for name, master in self.masters.items():
            own = {key.rpartition(" ")[2]: value for key, value in saved.items() if key.rpartition(" ")[0] == name}
            master.copy_(own.pop("value"))
            # the count of steps stays on the CPU, as AdamW made it
            self._optimizer.state[master] = {
                key: value if key == "step" else value.to(master) for key, value in own.items()
            }
        return {name: master.detach() for name, master in self.masters.items()}

    def _file_name(self) -> str:
        if not self.is_sharded:
            return STATE
        name = Path(STATE)
        return f"{name.stem}-{distributed.rank() + 1:05}-of-{distributed.world_size():05}{name.suffix}"

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.masters.values()), weight_decay=0.0)  # each step has its rate

    def _batch(self) -> tuple[ResponseBatch, Tensor, Tensor, float]:
        """This process's part of the prompts of this step, and the weight of its mean in the mean of all.

        The step takes so many prompts of each set; they depend on its number alone.
        """
        target, size = self.calibration.target, self.calibration.batch_size
        generator = torch.Generator().manual_seed(self.calibration.seed * 1_000_003 + self._steps)
        chosen = [part[i] for part in self.sets for i in torch.randperm(len(part), generator=generator)[:size].tolist()]
        device, own = target.device, distributed.share(chosen)
        # gradients are averaged over the processes; one without prompts goes along with the first, which counts nothing
        weight = distributed.world_size() * _num_tokens(own) / _num_tokens(chosen)
        own = own or chosen[:1]
        batch = batch_of([reference.row for reference in own], target)
        tokens = torch.cat([reference.tokens for reference in own]).to(device)
        return batch, tokens, torch.cat([reference.log_probs for reference in own]).to(device), weight


def _gradients(loss: Tensor, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Name -> gradient [k] of the protected weights here, of tensors that have one. What the task left stays.

    Only the gathered gradients are kept: a tensor's whole one goes as soon as it is there.
    """
    gradients: dict[str, Tensor] = {}
    of_task = {name: site.parameter.grad for name, site in sites.items()}
    is_whole = all(site.position is None for site in sites.values())

    def gathering(name: str, site: Site) -> Any:
        def gather(gradient: Tensor) -> Tensor:
            gradients[name] = site.take(gradient)
            return gradient.new_zeros(()).expand_as(gradient)

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name], parameter.grad = site.take(parameter.grad), None

        parameter = site.parameter
        return parameter.register_hook(gather) if is_whole else parameter.register_post_accumulate_grad_hook(collect)

    hooks = [gathering(name, site) for name, site in sites.items()]
    try:
        if is_whole:
            # past the tensors' `grad`, and past whatever else waits there: an optimizer layer by layer, DDP
            torch.autograd.grad(loss, [site.parameter for site in sites.values()], allow_unused=True)
        else:
            # FSDP2 hands the gradients of shards, reduced, to `grad` and nowhere else
            for site in sites.values():
                site.parameter.grad = None
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, site in sites.items():
            site.parameter.grad = of_task[name]
    return gradients


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Within: layers that compute their activations anew while they train do so at rest too (transformers' do not)."""
    layers = [
        module for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]  # fmt: skip
    own = [vars(layer).get("forward") for layer in layers]  # accelerate's, where it moves what a layer reads
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _num_tokens(chosen: Sequence[Reference]) -> int:
    return sum(len(reference.tokens) for reference in chosen)
