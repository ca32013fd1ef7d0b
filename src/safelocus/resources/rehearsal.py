"""Rehearse a pass on tensors without data, and count the bytes that would be alive.

The model is built from its configuration on torch's meta device, where every operation knows its shapes and computes
nothing. The model's own code runs forward and backward; each storage that an operation makes is counted until it is
freed. So nothing here knows of architectures: attention, experts, checkpointing, adapters cost what their code keeps.

Layers alike are run once, and stand for all others of their kind: what one keeps in the forward pass is counted as
often as there are such layers, until its backward pass is over; so are gradients that wait for those of another pass.

Input: a configuration and a dtype. Output: `Peak`, bytes beside the weights. Milliseconds, whatever the model's size.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from safelocus.errors import PlanError
from safelocus.model.layout.sizes import text_config

_FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_ITEM = torch.ops.aten._local_scalar_dense.default
_GROUPED = torch.ops.aten._grouped_mm.default
_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once during a pass, beside the weights.

    Attributes:
        activations: kept for the backward pass, or used for a moment.
        logits: everything as wide as the vocabulary.
        gradients: of weights, until they are freed.
    """

    activations: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradients


class Rehearsal:
    """A model without data, ready to be rehearsed.

    Args:
        config: of a transformers model.
        auto: the class that makes the model, `AutoModelForCausalLM` or the like.
        dtype: of the weights.
        wrap: changes the model, to put an adapter on it for example.
    """

    def __init__(self, config: Any, auto: Any, *, dtype: torch.dtype, wrap: Callable[[Any], Any] | None = None) -> None:
        with _errors(), torch.device("meta"):
            model = auto.from_config(config, dtype=dtype)
        self._repeated = _shorten(model, config)
        self.model: Any = (model if wrap is None else wrap(model)).eval()
        self.vocabulary = int(text_config(config).vocab_size)
        self._shapes = {tuple(parameter.shape) for parameter in self.model.parameters() if parameter.dim() > 1}

    def peak(
        self,
        work: Callable[[Any], Tensor | Iterator[Tensor] | None],
        *,
        trained: Callable[[str], bool] = lambda _: True,
        checkpointing: bool = False,
        keep_gradients: bool = False,
    ) -> Peak:
        """Run `work(model)`; where it returns a scalar, back-propagate it.

        Args:
            work: the pass; or several, each back-propagated before the next begins, where it yields scalars.
            trained: whether the weights of a name get gradients; default: all do.
            checkpointing: of activations.
            keep_gradients: keep each weight's gradient to the end; else it is freed the moment it is complete.

        Raises:
            PlanError: the model's code does not run without data.
        """
        meter = _Meter(self.vocabulary, self._shapes)
        meter.ignore(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained(name))
        freed = [] if keep_gradients else [p for p in self.model.parameters() if p.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(_free) for parameter in freed]
        for layer, times in self._repeated.items():
            handles += _Others(meter, layer, times, keep_gradients).watch()
        # the first layer's backward pass has an end only if its input has a gradient
        embedding = self.model.get_input_embeddings()
        handles.append(
            embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_() if out.is_leaf else out)
        )
        try:
            with _errors(), _checkpointing(self.model, checkpointing), _as_on_a_device(), meter:
                made = work(self.model)
                for loss in made if isinstance(made, Iterator) else () if made is None else (made,):
                    meter.is_backward = True
                    loss.backward()
                    meter.is_backward = False
        finally:
            for handle in handles:
                handle.remove()
            self.model.zero_grad(set_to_none=True)
        return Peak(
            activations=meter.at_peak["activations"],
            logits=meter.at_peak["logits"],
            gradients=meter.at_peak["gradients"],
        )

    def cache(self, length: int) -> int:
        """Bytes of the keys and values of one sequence of so many tokens, in all layers."""
        given = inputs(1, length)
        if self.model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"]
        with _errors(), torch.no_grad(), _as_on_a_device(), _Meter(self.vocabulary, self._shapes):
            made = self.model(**given, use_cache=True)
        cached = made.past_key_values if "past_key_values" in made else made.cache_params  # Mamba's
        parts = (
            [cached.self_attention_cache, cached.cross_attention_cache]
            if hasattr(cached, "cross_attention_cache")
            else [cached]
        )
        sizes = [
            sum(t.nbytes for t in tree_iter(vars(layer)) if isinstance(t, Tensor)) for p in parts for layer in p.layers
        ]
        copies = [1 + times for times in self._repeated.values()]
        if len(copies) == len(sizes):
            return sum(size * number for size, number in zip(sizes, copies, strict=True))
        return round(sum(sizes) * sum(copies) / max(len(copies), 1))


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids and mask [B, L] without data."""
    ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _errors() -> Iterator[None]:
    """Code that looks at values, or an operation without a meta kernel: other people's code fails in any way."""
    try:
        yield
    except _FAILURES as error:
        raise PlanError(
            f"the model's code does not run without data ({type(error).__name__}: {str(error).splitlines()[0]:.200}), "
            "so its memory cannot be told. Give the settings yourself: --batch-size"
        ) from error


def _free(parameter: Tensor) -> None:
    parameter.grad = None


class _Others:
    """The layers that one stands for: what they hold while it is alive in their place."""

    def __init__(self, meter: "_Meter", layer: nn.Module, times: int, keep_gradients: bool) -> None:
        self._meter, self._layer, self._times, self._keep = meter, layer, times, keep_gradients
        self._began = self._num_passes = self._waiting = 0
        self._gradients = sum(p.nbytes for p in layer.parameters() if p.requires_grad)

    def watch(self) -> list[Any]:
        """Hooks, to be removed."""
        if not self._times:
            return []
        return [
            self._layer.register_forward_pre_hook(self._before, with_kwargs=True),
            self._layer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._began = self._meter.now

    def _after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad), None)
        computed_once_more = self._meter.is_backward
        if states is None or computed_once_more or not torch.is_grad_enabled():
            return
        kept = self._times * (self._meter.now - self._began)
        self._meter.add("activations", kept)
        self._num_passes += 1
        states.register_hook(lambda _: self._done(kept))

    def _done(self, kept: int) -> None:
        """The backward pass is through; gradients are complete when it is through for every forward pass."""
        self._meter.add("activations", -kept)
        self._num_passes -= 1
        waiting = self._times * self._gradients if self._num_passes or self._keep else 0
        self._meter.add("gradients", waiting - self._waiting)
        self._waiting = waiting


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages from when an operation makes them until they are freed."""

    def __init__(self, vocabulary: int, weight_shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.now = 0
        self.is_backward = False
        self._peak = 0
        self._vocabulary, self._weight_shapes = vocabulary, weight_shapes
        self._known: dict[int, tuple[str, int]] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def ignore(self, model: nn.Module) -> None:
        """What is there before is not counted."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()._cdata] = ("", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM and args[0].is_meta:  # "is nothing padded?" No: the costlier way
            return args[0].dtype != torch.bool and 0
        # experts: on meta of bf16 alone, elsewhere of any type
        result = _grouped(*args[:3]) if func is _GROUPED else func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        kind, size = self._kind(tensor), storage.nbytes()
        self._known[key] = (kind, size)
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.add(kind, size)

    def add(self, kind: str, size: int) -> None:
        """Count so many bytes more (or less)."""
        self.alive[kind] += size
        self.now += size
        if self.now > self._peak:
            self._peak, self.at_peak = self.now, self.alive.copy()

    def _kind(self, tensor: Tensor) -> str:
        if self.is_backward and tuple(tensor.shape) in self._weight_shapes:
            return "gradients"
        return "logits" if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary else "activations"

    def _forget(self, key: int) -> None:
        kind, size = self._known.pop(key)
        del self._watched[key]
        self.add(kind, -size)


@contextmanager
def _as_on_a_device() -> Iterator[None]:
    """On meta, torch would take attention apart and keep every [L, L], where devices fuse it; and knows no autocast.

    Replaced in their modules: modes of torch do not reach what checkpointing computes once more.
    """
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    torch.autocast = lambda device_type, *given, **options: (  # type: ignore[assignment, misc]
        nullcontext() if device_type == "meta" else autocast(device_type, *given, **options)
    )
    torch.is_autocast_enabled = lambda *device: device != ("meta",) and enabled(*device)
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
        torch.autocast, torch.is_autocast_enabled = autocast, enabled  # type: ignore[misc]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    biased = attn_mask is not None and attn_mask.requires_grad
    if biased or query.shape[-1] != value.shape[-1] or query.shape[1] != key.shape[1]:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    options.pop("enable_gqa", None)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=attn_mask.device)
    output: Tensor = _FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, **options)[0]
    return output


def _grouped(left: Tensor, right: Tensor, *offsets: Tensor) -> Tensor:
    """[S, in] x [E, in, out] -> [S, out]; [out, S] x [S, in] -> [E, out, in], the gradient of the experts' weights."""
    rows = left.shape[:1] if right.dim() == 3 else (offsets[0].shape[0], left.shape[0])
    return left.new_empty(*rows, right.shape[-1])


def _shorten(model: nn.Module, config: Any) -> dict[nn.Module, int]:
    """Keep one layer of each kind: layer -> how many others like it were left out."""
    kinds = list(getattr(text_config(config), "layer_types", None) or [])
    repeated: dict[nn.Module, int] = {}
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    outer = [(name, part) for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    for name, layers in outer:
        first: dict[Any, nn.Module] = {}
        for number, layer in enumerate(layers):
            shapes = tuple((own, tuple(parameter.shape)) for own, parameter in layer.named_parameters())
            kind = (type(layer), shapes, kinds[number] if len(kinds) == len(layers) else None)
            own = first.setdefault(kind, layer)
            repeated[own] = repeated.get(own, -1) + 1
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.ModuleList(first.values()))
    return repeated


@contextmanager
def _checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.eval()
