"""Protection: the selected weights keep their values, whatever trains the model (SPA, paper section 4).

    full fine-tuning    after each step       W[P] = W0[P]
    LoRA, "exact"       after each step       W[P] = W0[P] - s * (B A)[P], so that W + s * B A = W0 at P
    LoRA, "patch"       after training        the same, as a patch that is shipped beside the adapter

Input: a model and a selection P. Nothing is masked: weights are written back, so it holds for any optimizer, with
decay, momentum and whatever else moves them. A step never waits for the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from safelocus.errors import SafelocusError, SelectionError, TrainingError, some
from safelocus.model.fingerprint import bits
from safelocus.patch import Patch
from safelocus.preservation.calibration import Calibration, Calibrator, references
from safelocus.preservation.held import Held, check_shards, hold
from safelocus.preservation.lora import masking, peft_model
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import Site
from safelocus.training.lora import LoraMode

_BENEATH_ADAPTER = 0.1  # of its rate: adapters are trained at about ten times that of the weights beneath them
# layers whose base cancels their adapter at some places, and so does not hold values of its own there
_CORRECTED: WeakSet[nn.Module] = WeakSet()


class Protection:
    """Selected weights of a model that keep their values; made by `preserve`.

    As a context manager it restores them once more at the end, and lets go of the optimizer or trainer.

    Attributes:
        selection: which weights.
        model: whose weights.
        mode: what is done about LoRA, "exact" or "patch".
        exact_gradient: whether the adapter's gradient is that of the effective weights; see `lora`.
        calibrator: takes the steps of a calibration, which change the values that are kept; None without one.
        notes: what a user should know, in sentences; empty when there is nothing to say.

    Raises:
        TrainingError: none of the selected weights is trained, or an adapter cannot be protected from.
        SelectionError: the selection does not fit the model.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, *, mode: LoraMode = "exact", exact_gradient: bool = False
    ) -> None:
        if mode not in get_args(LoraMode):
            raise TrainingError(f"mode {mode!r}: expected {' or '.join(get_args(LoraMode))}")
        if exact_gradient and mode != "exact":
            raise TrainingError('exact_gradient belongs to mode="exact": otherwise the adapter trains freely')
        self.model = model
        self.selection = selection
        self.mode = mode
        self.exact_gradient = exact_gradient
        self.calibrator: Calibrator | None = None
        self.notes: list[str] = []
        self._original: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        self._layer_hooks: list[Any] = []
        self._held, self._untrained = hold(model, selection, exact_gradient=exact_gradient)
        self._watch_adapters()

    @property
    def num_protected(self) -> int:
        """Weights that are held in this process: those of the selection that training can change."""
        return sum(held.values.numel() for held in self._held.values())

    @property
    def num_protected_in_all(self) -> int:
        """The same, in all processes of a sharded model together."""
        return sum(held.site.num_selected for held in self._held.values())

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes what a forward pass sees of the weights."""
        return any(held.update is not None for held in self._held.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the protection: saved values and indices, those shared with the selection included."""
        tensors = {
            id(t): t for h in self._held.values() for t in (h.values, h.site.index, h.site.position, h.flat_index)
        }
        return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)

    def __repr__(self) -> str:
        adapted = sum(held.update is not None for held in self._held.values())
        lora = f", lora={adapted} tensors ({self.mode})" if adapted else ""
        return f"Protection({self.num_protected:,} of {self.selection.k:,} weights in {len(self._held)} tensors{lora})"

    @torch.no_grad()
    def restore(self) -> None:
        """Write the protected weights back. Hooks call it after each step; call it yourself in a loop of your own.

        Raises:
            TrainingError: a tensor that did not require gradients when the protection began does so now.
        """
        _refuse_thawed([name for name, parameter in self._untrained.items() if parameter.requires_grad])
        for name, held in self._held.items():
            self._held[name] = held = held.settled()
            held.site.write(self._wanted(held))

    def calibrate(
        self, calibration: Calibration, *, training_rate: Callable[[], float] | None = None, progress: bool = True
    ) -> None:
        """From now on take calibration steps between those of the training; the model is the original now.

        Args:
            training_rate: says the learning rate of the AdamW that trains the model, in the step that was just taken.

        Raises:
            TrainingError: it is for another model, or has no learning rate, or an adapter trains freely beside the
                weights, or beside shards.
            SafelocusError: the weights are sharded otherwise than by rows over all processes.
            PromptError: no answer to a set's prompts says anything.
        """
        own = {id(parameter) for parameter in calibration.target.model.parameters()}
        if any(id(held.site.parameter) not in own for held in self._held.values()):
            raise TrainingError("the calibration's target is not the model that is protected; give the same object")
        own_rate = calibration.learning_rate
        rate = training_rate if own_rate is None else partial(float, own_rate)
        share = _BENEATH_ADAPTER if own_rate is None and self.is_adapted else 1.0
        if rate is None:
            raise TrainingError(
                "calibration takes AdamW's steps, at the rate of the AdamW that trains the model, but none is known to "
                "do that: give learning_rate"
            )
        if self.mode == "patch" and self.is_adapted:
            raise TrainingError('calibration needs mode="exact": in "patch" the adapter changes the same weights')
        check_shards(self._held)
        self._original = {name: held.values.clone() for name, held in self._held.items()}
        masters = {name: nn.Parameter(held.values.float()) for name, held in self._held.items()}
        self.calibrator = Calibrator(
            calibration=calibration, rate=lambda: rate() * share,
            sets=references(calibration, progress=progress), masters=masters,
            is_sharded=any(held.site.position is not None for held in self._held.values()),
        )  # fmt: skip

    def after_step(self) -> None:
        """What a loop of your own calls after each step of the training: restores, and calibrates when it is time."""
        self.restore()
        self.calibrate_if_due()

    def calibrate_if_due(self) -> None:
        """Count a step of the training, and take one of calibration every so many."""
        if self.calibrator is not None and self.calibrator.count_step():
            self.keep(self.calibrator.step({name: held.site for name, held in self._held.items()}))

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Keep other values from now on: name -> [k of this tensor], any dtype.

        Raises:
            SelectionError: values are missing, or of another length. Nothing was changed.
        """
        _check_values({name: held.values.shape for name, held in self._held.items()}, values)
        for name, held in self._held.items():
            self._held[name] = replace(held, values=values[name].to(held.values, copy=True))
        self.restore()

    @torch.no_grad()
    def check(self) -> int:
        """How many protected weights do not have the bits they should have: 0 after `restore`. Waits for the device.

        With LoRA in mode "exact" these are the bits that cancel the adapter.
        """
        return sum(
            int((bits(held.site.read()) != bits(self._wanted(held).to(held.values.dtype))).count_nonzero())
            for held in map(Held.settled, self._held.values())
        )

    def effective(self) -> dict[str, Tensor]:
        """Name -> the protected weights as the forward pass sees them, adapters included: fp32, [k of this tensor]."""
        found = {}
        for name, held in self._held.items():
            held = held.settled()
            found[name] = held.site.read().float()
            if held.update is not None and not held.update.is_merged:
                found[name] += held.update.at(held.flat_index)
        return found

    @torch.no_grad()
    def update(self, selection: Selection, *, values: Mapping[str, Tensor] | None = None) -> None:
        """Protect another selection from now on.

        Weights that were protected keep their value, and those that no longer are are let go. New ones keep the
        value that they have now, with LoRA that of the base, as when a protection begins (`notes` says so); `values`
        (name -> [k of this tensor], of the original model say) gives others.

        Raises:
            TrainingError: a calibration trains the selection that is protected now.
            SelectionError: it does not fit the model, or the values do not fit it. The first stays protected.
        """
        if self.calibrator is not None:
            raise TrainingError("a calibration trains the protected weights, so the selection cannot be changed")
        for held in map(Held.settled, self._held.values()):
            held.site.write(held.values)  # what was held is now what the model holds, without corrections
        self._let_go_of_layers()
        try:
            fresh, untrained = hold(self.model, selection, exact_gradient=self.exact_gradient)
            if values is not None:
                _check_values({name: selection[name].shape for name in fresh}, values)
        except SafelocusError:
            self._watch_adapters()
            self.restore()
            raise
        self.selection, self._held, self._untrained = selection, fresh, untrained
        note = "newly selected weights have the base's values: what the adapter changed of them is gone"
        if values is None and self.is_adapted and note not in self.notes:
            self.notes.append(note)
        if values is not None:
            for name, held in self._held.items():
                self._held[name] = replace(held, values=held.site.part_of(values[name]).to(held.values))
        self._watch_adapters()
        self.restore()

    def bind(self, model: nn.Module) -> None:
        """Follow the weights to the parameters that now hold them: a trainer may wrap, move or shard the model.

        Raises:
            TrainingError: a tensor that was not trained when the protection began is trained now.
        """
        fresh, untrained = hold(model, self.selection, exact_gradient=self.exact_gradient, known=self._held)
        _refuse_thawed([name for name in fresh if name in self._untrained])
        self._untrained = untrained
        sharded: dict[str, Site] = {}
        for name, held in fresh.items():
            old = self._held.get(name)
            if old is not None and old.site.parameter is not held.site.parameter:
                assert old.site.position is None, f"{name} was sharded twice"
                fresh[name] = replace(held, values=held.site.part_of(old.values).to(held.values))
                if held.site.position is not None:
                    sharded[name] = held.site
        self.model, self._held = model, fresh
        if self.calibrator is not None and sharded:
            check_shards(fresh)
            self.calibrator.follow(sharded)
        self._watch_adapters()

    def merge(self) -> Any:
        """Merge the adapter into the weights and give the protected ones their exact bits: returns the bare model.

        The protection ends. Use it in place of `model.merge_and_unload()`, which leaves rounding errors there.
        """
        merged = peft_model(self.model).merge_and_unload()
        self.restore()
        self._let_go_of_layers()
        self.remove()
        return merged

    def patch(self) -> Patch:
        """The correction that belongs to the adapter when it is shipped unmerged.

        Base + patch + adapter have the protected weights as they are kept, those of the base or calibrated ones, to
        half a unit in the last place of its dtype. Save it beside the adapter; load the base, apply it, then load the
        adapter.

        Raises:
            TrainingError: no adapter changes the selected weights, or they are sharded.
        """
        held = {name: each for name, each in self._held.items() if each.update is not None}
        if not held:
            raise TrainingError(
                "no adapter changes the selected weights, so there is nothing to correct: the model holds them already"
            )
        if sharded := [name for name, each in held.items() if each.site.position is not None]:
            raise TrainingError(f"{sharded[0]!r} is sharded; make the patch from a model that is whole in one process")
        self.restore()
        if self.mode == "exact":
            values = {"old": {name: self._base(name) for name in held}}
        else:
            values = {"new": {name: each.corrected().to(each.values.dtype) for name, each in held.items()}}
        adapters = {adapter for each in held.values() if each.update for adapter in each.update.adapters}
        return Patch.of(
            peft_model(self.model),
            replace(self.selection, coordinates={name: self.selection[name] for name in held}, scores=None),
            metadata={"made_by": "preserve", "adapters": sorted(adapters)},
            **values,
        )

    @torch.no_grad()
    def remove(self, *, restore_base: bool = False) -> None:
        """Let go of the trainer or optimizer. The weights stay as they are.

        Args:
            restore_base: LoRA in mode "exact": give the base its own values back, which otherwise go on cancelling the
                adapter and are right beside it only. The adapter acts at the protected places again then. Do so before
                PEFT's `unload()`, or before the selection is protected anew.
        """
        if restore_base:
            self._let_go_of_layers()
            for name, held in self._held.items():
                if held.update is not None and not held.update.is_merged:
                    held.site.write(self._base(name))
        for handle in [*self._handles, *self._layer_hooks]:
            handle.remove()
        self._handles, self._layer_hooks = [], []

    def add_handle(self, handle: Any) -> None:
        """Something with a `remove()`, called when the protection ends."""
        self._handles.append(handle)

    def trained(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """Tensor name -> the parameters whose training would change its selected weights."""
        for name, held in self._held.items():
            yield name, held.parameters()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()
        self.remove()

    def _base(self, name: str) -> Tensor:
        """What the tensor must hold where no adapter is added."""
        return self._held[name].values if self._original is None else self._original[name]

    def _corrected(self, name: str) -> Tensor:
        return self._held[name].corrected()

    def _wanted(self, held: Held) -> Tensor:
        return held.corrected() if self.mode == "exact" else held.values

    def _watch_adapters(self) -> None:
        """Without the adapter (the reference policy of DPO, say) a forward pass must see the base's own weights."""
        self._let_go_of_layers()
        for name, held in self._held.items():
            if held.update is None or self.mode != "exact":
                continue
            layer = held.update.layer
            _CORRECTED.add(layer)
            self._layer_hooks.append(layer.register_forward_pre_hook(self._swap(name, self._base)))
            self._layer_hooks.append(layer.register_forward_hook(self._swap(name, self._corrected), always_call=True))
            if self.exact_gradient:
                self._layer_hooks.append(layer.register_forward_hook(self._masking(name)))

    def _let_go_of_layers(self) -> None:
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks = []
        for held in self._held.values():
            if held.update is not None:
                _CORRECTED.discard(held.update.layer)

    def _masking(self, name: str) -> Callable[..., Tensor]:
        return masking(lambda: self._held[name].update, lambda: self._held[name].flat_index)

    def _swap(self, name: str, values: Callable[[str], Tensor]) -> Callable[..., None]:
        def write(_: Any, inputs: tuple[Any, ...], *output: Any) -> None:
            held = self._held[name]
            update = held.update
            if update is None or update.is_added or update.is_merged:
                return
            if held.site.position is not None:
                raise TrainingError(
                    f"{name} is sharded, so a forward pass without the adapter (the reference of DPO, say) cannot be "
                    'given the base\'s own weights. Use mode="patch", or precompute the reference log-probabilities'
                )
            is_followed = any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
            if not output and is_followed and torch.is_grad_enabled():
                raise TrainingError(
                    f"{name}: a forward pass with the adapter disabled or exchanged sees the base's own weights, which "
                    "are gone again before a backward pass: its gradients would be wrong. Run it under torch.no_grad()"
                )
            # a graph from before may still need the weights: it gets the same bits back before it runs
            with torch.no_grad(), _unsafe_preserve_version_counter(held.site.parameter):
                held.site.write(values(name))

        return write


def check_uncorrected(model: nn.Module) -> None:
    """TrainingError where an earlier protection changed the base to cancel an adapter: its values are not its own."""
    if corrected := [name for name, layer in model.named_modules() if layer in _CORRECTED and not layer.merged]:
        raise TrainingError(
            f"the model is protected already: in {len(corrected)} layers ({some(corrected)}) the base cancels the "
            "adapter, and does not hold values of its own. Keep that protection (update() takes another selection), or "
            "protect anew after its remove(restore_base=True) or merge()"
        )


def _check_values(shapes: Mapping[str, torch.Size], values: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, shape in shapes.items() if name not in values or values[name].shape != shape]:
        raise SelectionError(
            f"values are missing or of another length for {len(wrong)} of {len(shapes)} tensors ({some(wrong)}); "
            "expected one per protected weight"
        )


def _refuse_thawed(thawed: Sequence[str]) -> None:
    if thawed:
        raise TrainingError(
            f"{len(thawed)} selected tensors are trained that were frozen when the protection began, first of "
            f"them {thawed[0]!r}, so their values were not kept. Call preserve after requires_grad_()"
        )
