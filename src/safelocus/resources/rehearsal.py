"""A model without weights, whose passes are rehearsed: its own code runs on fake tensors, and bytes and operations are
counted.

The model is built from its configuration under torch's `FakeTensorMode`, where every operation knows its shapes and
computes nothing. Each storage that an operation makes is counted from then until it is freed. So nothing here knows of
architectures: attention, experts, checkpointing, adapters cost what their code keeps.

Layers alike cost alike, so few of them are run: two of each kind (the first differs, as nothing comes before it), and
then three of one kind at a time.

    f(n_1, .., n_K) = f(2, .., 2) + sum_k (n_k - 2) (f(2, .., 3, .., 2) - f(2, .., 2))

for operations, and for the most bytes in each part of a pass; the peak is the largest of these.

Input: a configuration. Output: a `Subject`, and a `Rehearsal` of any passes.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForSequenceClassification

from safelocus.errors import PlanError, first_line
from safelocus.model.forcing import logits_at
from safelocus.model.layout import Layout
from safelocus.model.layout.sizes import auto_class, text_config
from safelocus.model.target import Dtype, load_config

_FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_TORCH_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_ITEM = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_GROUPED = torch.ops.aten._grouped_mm.default
T = TypeVar("T")
Trained = Literal["nothing", "inputs", "eligible", "adapter", "all"]
_TRANSFER = 3 * (256 << 20)  # bytes of the vocabulary transfer, which works in chunks (objective.transfer)


class Pass(NamedTuple):
    """`rows` of `length` tokens, forward and, where anything is trained, backward; logits at so many positions of all.

    Kinds: "plain", cross entropy along the logits; "packed", openings behind one prompt; "weighted", the loss of
    `TextObjective`; "fused", the head and loss of TRL.
    """

    rows: int
    length: int
    logits: int
    kind: Literal["plain", "packed", "weighted", "fused"] = "plain"


class Rehearsal(NamedTuple):
    """The most bytes alive at once, beside the weights, and floating-point operations."""

    peak: int
    operations: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model without its weights.

    Attributes:
        name: folder, hub id or `organism:NAME`.
        config: of transformers.
        layout: of its tensors.
        dtype: its weights will have.
    """

    name: str
    config: Any = field(repr=False)
    layout: Layout = field(repr=False)
    dtype: torch.dtype

    @classmethod
    def load(
        cls, name: str, *, dtype: Dtype = "auto", layout: Path | None = None, skip_unknown: bool = False,
        revision: str | None = None, trust_remote_code: bool = False,
    ) -> "Subject":  # fmt: skip
        """Read the configuration.

        Raises:
            ModelError, LayoutError: as for `load`.

        Example:
            >>> Subject.load("organism:dense").num_weights
            1270912
        """
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        return cls.of(name, config, dtype=dtype, layout=layout, skip_unknown=skip_unknown)

    @classmethod
    def of(
        cls, name: str, config: Any, *, dtype: Dtype = "auto", layout: Path | None = None, skip_unknown: bool = False
    ) -> "Subject":
        """Of a configuration at hand; "auto" is the dtype that it names, else fp32, as loading does."""
        found = Layout.from_config(config, file=layout, skip_unknown=skip_unknown)
        return cls(name=name, config=config, layout=found, dtype=_dtype(config, dtype))

    @property
    def num_weights(self) -> int:
        return self.layout.num_weights

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return self.num_weights * self.dtype.itemsize

    @property
    def largest_tensor(self) -> int:
        """Weights of the largest eligible tensor."""
        return max(self.layout.tensors[name].num_weights for name in self.layout.eligible_tensors)

    @property
    def largest_layer(self) -> int:
        """Weights of the largest layer, or of embedding and head where these are larger."""
        sizes: dict[Any, int] = {}
        for tensor in self.layout.tensors.values():
            sizes[tensor.stack, tensor.layer] = sizes.get((tensor.stack, tensor.layer), 0) + tensor.num_weights
        return max(sizes.values())

    def num_adapted(self, rank: int) -> int:
        """Weights of an adapter."""
        return sum(p.numel() for name, p in self._model(rank).named_parameters() if "lora_" in name)

    def cache(self, length: int) -> int:
        """Bytes of the keys and values of one sequence of so many tokens, and of the states of linear layers."""

        def cached(model: Any) -> dict[str, int]:
            with self._rehearsing(model) as meter, torch.no_grad():
                made = model(**_inputs(self.config, 1, length), use_cache=True)
                kept = made.past_key_values if "past_key_values" in made else made.cache_params  # Mamba's
                del made
                return {"cache": meter.now if kept is not None else 0}

        return self._once(("cache", length), lambda: self._extrapolated(self._model(), cached)["cache"])

    def rehearse(
        self,
        *passes: Pass,
        trained: Trained = "nothing",
        rank: int = 0,
        checkpointing: bool = False,
        again: bool = False,
    ) -> Rehearsal:
        """Run the passes one after another.

        Args:
            trained: what gets gradients. Those of eligible weights are used and freed one by one, those of an adapter
                and of all weights are kept to the end.
            rank: of a LoRA adapter to put on first; 0: none.
            checkpointing: of activations.
            again: gradients of earlier passes are there already.

        Raises:
            PlanError: the model's code does not run without data.
        """
        asked = (passes, trained, rank, checkpointing, again)
        return self._once(asked, lambda: self._rehearsed(*asked))

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._memory.known:
            self._memory.known[key] = make()
        found: T = self._memory.known[key]
        return found

    @cached_property
    def _memory(self) -> "_Memory":
        config = type(self.config), self.config.to_json_string(use_diff=False)
        return _memory_of(config, self.dtype, tuple(self.layout.eligible_tensors))

    def _rehearsed(
        self, passes: tuple[Pass, ...], trained: str, rank: int, checkpointing: bool, again: bool
    ) -> Rehearsal:  # fmt: skip
        model, handles = self._model(rank), []
        eligible = set(self.layout.eligible_tensors) if trained == "eligible" else set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained == "all" or name in eligible or (trained == "adapter" and "lora_" in name))
            if name in eligible:
                handles.append(parameter.register_post_accumulate_grad_hook(_free))
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                raise PlanError(
                    f"{type(model).__name__} cannot compute activations twice, so they must fit as they are: leave "
                    "--checkpointing out (--no-checkpointing), and take fewer rows at a time (--batch-size)"
                )
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.train(trained not in ("nothing", "inputs"))  # dropout keeps masks
        try:
            found = self._extrapolated(model, lambda model: self._measured(model, passes, trained != "nothing", again))
        finally:
            for handle in handles:
                handle.remove()
            if checkpointing:
                model.activation_checkpointing_disable()
            model.eval()
        return Rehearsal(operations=found.pop("operations"), peak=max(found.values()))

    def _measured(self, model: Any, passes: tuple[Pass, ...], backward: bool, again: bool) -> dict[Any, int]:
        """Operations, and the most bytes in each part of each pass."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with self._rehearsing(model) as meter, torch.set_grad_enabled(backward), meter.parts(model, trained):
                for parameter in trained if again else ():
                    parameter.grad = torch.empty_like(parameter)
                for meter.number, each in enumerate(passes):
                    meter.part = "forward"
                    logits, loss = _run(model, each)
                    meter.part = "head"
                    if loss.requires_grad:
                        loss.backward()
                    del logits, loss
        finally:
            model.zero_grad(set_to_none=True)
        return {**meter.peaks, "operations": meter.operations}

    def _extrapolated(self, model: Any, measure: Callable[[Any], Mapping[Any, int]]) -> Counter[Any]:
        """What all layers take, from few of them; where the code does not run with few, they all run."""
        kinds = _kinds(model, self.config)
        two = {layer for layers in kinds for layer in layers[:2]}
        try:
            with _only(model, two):
                base = Counter(measure(model))
            found = base.copy()
            for layers in kinds:
                if len(layers) > 2:
                    with _only(model, two | {layers[2]}):
                        more = measure(model)
                    for name, value in more.items():
                        found[name] += (len(layers) - 2) * (value - base[name])
        except PlanError:
            return Counter(measure(model))
        return found

    @contextmanager
    def _rehearsing(self, model: nn.Module) -> Iterator["_Meter"]:
        meter = _Meter(model)
        with _errors(), self._memory.mode, meter:
            yield meter

    def _model(self, rank: int = 0) -> Any:
        return self._once(rank, lambda: self._built(rank))

    def _built(self, rank: int) -> Any:
        from safelocus.training.lora import Lora

        with _errors(), self._memory.mode:
            model = auto_class(self.config).from_config(self.config, dtype=self.dtype)
        if rank:  # without data of its own; PEFT moves what it adds, which fake tensors do not let it
            with torch.device("meta"):
                model = Lora(rank=rank).wrap(model, self.layout)
            with self._memory.mode:
                for module in model.modules():
                    for name, weight in module.named_parameters(recurse=False):
                        if weight.is_meta:
                            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
        return model.eval()


def classifier_bytes(name: str, *, dtype: Dtype = "auto") -> int:
    """Of the weights of a sequence classifier, from its configuration.

    Raises:
        ModelError: as for `load`. PlanError: it cannot be built.
    """
    config = load_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, *_FAILURES) as error:
        raise PlanError(f"{name}: cannot be built from its configuration alone ({first_line(error)})") from error
    return sum(parameter.numel() for parameter in model.parameters()) * _dtype(config, dtype).itemsize


def _dtype(config: Any, asked: Dtype) -> torch.dtype:
    """Of weights as they will be loaded."""
    kind = (getattr(config, "dtype", None) or text_config(config).dtype) if asked == "auto" else asked
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    return kind or torch.float32


class _Memory(NamedTuple):
    """Models by adapter, trials by what was tried."""

    mode: FakeTensorMode
    known: dict[Any, Any]


@lru_cache(maxsize=8)
def _memory_of(*_alike: Any) -> _Memory:
    """Of all models alike in this process: the stages of a command ask for each other's passes."""
    return _Memory(FakeTensorMode(), {})


def _kinds(model: nn.Module, config: Any) -> list[list[nn.Module]]:
    """Layers alike: of one list, class, shapes and, where the configuration tells, type."""
    types = list(getattr(text_config(config), "layer_types", None) or ())
    kinds: dict[Any, list[nn.Module]] = {}
    for stack in _stacks(model):
        for number, layer in enumerate(stack):
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
            own = types[number] if len(types) == len(stack) else None
            kinds.setdefault((stack, type(layer), shapes, own), []).append(layer)
    return list(kinds.values())


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of modules."""
    found: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return list(found.values())


@contextmanager
def _only(model: nn.Module, kept: set[nn.Module]) -> Iterator[None]:
    """The model with these layers alone."""
    stacks = _stacks(model)
    whole = [stack._modules for stack in stacks]
    for stack in stacks:
        stack._modules = {str(n): layer for n, layer in enumerate(m for m in stack if m in kept)}
    try:
        yield
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack._modules = layers


def _run(model: Any, asked: Pass) -> tuple[Tensor | None, Tensor]:
    """(logits, loss); stages hold on to their logits for longer than the loss needs them."""
    given = _inputs(model.config, asked.rows, asked.length, -(-asked.logits // asked.rows))
    if asked.kind == "fused":
        from trl.trainer.utils import add_fused_lm_head

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "forward" not in vars(base):
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        return None, model(**given, labels=given["input_ids"], fused_lm_head=True).loss
    if asked.kind == "packed":
        given["attention_mask"] = torch.zeros(asked.rows, 1, asked.length, asked.length, dtype=model.dtype)
        given["position_ids"] = torch.zeros_like(given["input_ids"])
    index = torch.zeros(asked.logits, dtype=torch.long)
    logits = logits_at(model, given, index)
    if asked.kind == "weighted":  # by a gradient of the same size, made in chunks
        slope = torch.empty_like(logits)
        torch.empty(min(16 * logits.numel(), _TRANSFER), dtype=torch.uint8)
        return logits, torch.einsum("nv,nv->n", logits, slope).float().sum()
    return logits, cross_entropy(logits.float(), index, reduction="sum")


def _inputs(config: Any, rows: int, length: int, answer: int = 0) -> dict[str, Tensor]:
    ids = torch.zeros((rows, length), dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids[:, : answer or length]} if config.is_encoder_decoder else {})


def _free(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _errors() -> Iterator[None]:
    """Code that looks at values, or an operation without a fake kernel: other people's code fails in any way."""
    was_disabled, _TORCH_LOG.disabled = _TORCH_LOG.disabled, True  # it prints a traceback of what is said below
    try:
        yield
    except _FAILURES as error:
        raise PlanError(
            f"the model's code does not run without data ({type(error).__name__}: {first_line(error):.200}), "
            "so its memory cannot be told. Give the settings yourself: --batch-size"
        ) from error
    finally:
        _TORCH_LOG.disabled = was_disabled


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of storages from when an operation makes them until they are freed.

    Parts of a pass: forward; backward through the head, through the layers, through the embedding. In each the most
    bytes are affine in the number of layers, but not over all: activations dwindle while gradients pile up.

    (`FlopCounterMode` would keep what is counted alive; `MemTracker` takes seconds to import.)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.number = self.operations = 0
        self.part = ""
        self.peaks: dict[Any, int] = {}
        self._seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    @contextmanager
    def parts(self, model: Any, trained: list[nn.Parameter]) -> Iterator[None]:
        """Notice when a backward pass comes to the layers and to the embedding."""

        def embedded(_module: Any, _given: Any, output: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                output = output.requires_grad_() if output.is_leaf else output
                output.register_hook(lambda _: setattr(self, "part", "embedding"))
            return output

        handles = [p.register_post_accumulate_grad_hook(lambda _: setattr(self, "part", "layers")) for p in trained]
        handles.append(model.get_input_embeddings().register_forward_hook(embedded))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes as long as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # half of all that is asked
            return args[0].fake_device
        if func is _ITEM:  # "is nothing padded?" No: the costlier way
            return args[0].dtype != torch.bool and 0
        if func is _GROUPED:  # experts; the fake kernel takes bf16 alone
            result = _grouped(*args[:3])
            self.operations += 2 * args[0].numel() * args[1].shape[-1]
        else:
            result = func(*args, **kwargs)
            if func.overloadpacket in flop_registry:
                self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            part = self.number, self.part
            self.peaks[part] = max(self.peaks.get(part, 0), self.now)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _grouped(left: Tensor, right: Tensor, *offsets: Tensor) -> Tensor:
    """[S, in] x [E, in, out] -> [S, out]; [out, S] x [S, in] -> [E, out, in], the gradient of the experts' weights."""
    rows = left.shape[:1] if right.dim() == 3 else (offsets[0].shape[0], left.shape[0])
    return left.new_empty(*rows, right.shape[-1])
