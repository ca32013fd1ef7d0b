"""What LoRA adds to single weights of a model, and which adapters can be protected from.

    effective weight = W + s * B A          s: alpha / r, or alpha / sqrt(r) (rank-stabilised), per module

Input: a model wrapped by PEFT. Output: per adapted tensor a `LoraUpdate`, which computes `s * (B A)` at flat
indices with k * r multiply-adds; the product as a whole only where so many are protected that it is quicker.
Linear layers (GPT-2's Conv1D too) and single parameters (`target_parameters`, such as fused experts
`[E, out, in]`) are understood; whatever changes the weights in another way is refused by name.

The exact gradient under protection, where the approximate one of the plain layer is not enough:

    effective weight   W = W0 + M * s B A       M: 0 at the protected coordinates P, 1 elsewhere
    exact              dB = s (M * G) A^T,   dA = s B^T (M * G),    G = dL/dW = dy^T x
    plain layer        dB = s G A^T,         dA = s B^T G

The forward pass and the gradient of the input are exact either way, since the weights at P cancel the adapter.
What is missing, - s (P * G) A^T and - s B^T (P * G), is added by an identity on the layer's output, an
ordinary autograd function, so accumulation, mixed precision and data parallelism see a gradient like any other.
It needs G, one matrix product more per layer: about half a LoRA step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelocus.distributed import whole
from safelocus.errors import TrainingError

# numbers of each factor gathered at once: 1 MB in fp32 stays in a CPU's cache; a device wants few launches
_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 24
# initialisations that move a part of the base weight into the adapter
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraUpdate:
    """What the adapters of one module add to one tensor.

    Attributes:
        layer: PEFT's module around the tensor's own.
        adapters: names of those that count: active when the protection began.
    """

    layer: Any
    adapters: tuple[str, ...]

    @property
    def is_merged(self) -> bool:
        """The tensor holds the sum already."""
        return bool(self.layer.merged)

    @property
    def is_added(self) -> bool:
        """A forward pass would add exactly these adapters: they are neither disabled nor exchanged for others."""
        return not self.layer.disable_adapters and {*_active(self.layer)} == {*self.adapters}

    @property
    def is_linear(self) -> bool:
        """A Linear layer's weight, not a parameter of another module."""
        return not hasattr(self.layer, "get_param")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors."""
        for adapter in self.adapters:
            yield self.layer.lora_A[adapter].weight
            yield self.layer.lora_B[adapter].weight

    @torch.no_grad()
    def at(self, index: Tensor) -> Tensor:
        """The sum over the adapters of s * (B A) at flat indices into the whole tensor: fp32 [k]."""
        total = torch.zeros(index.shape, device=index.device)
        with torch.autocast(index.device.type, enabled=False):  # it is asked for within forward passes too
            for adapter in self.adapters:
                left, right, scaling = _factors(self.layer, adapter)
                total.add_(_product_at(left, right, index), alpha=scaling)
        return total


def lora_updates(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, LoraUpdate]:
    """Name -> update, for those of the named parameters that an adapter changes.

    Raises:
        TrainingError: an adapter changes one of them in a way that cannot be undone weight by weight, or in some of the
            modules that share it.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    updates: dict[str, LoraUpdate] = {}
    for layer in _tuner_layers(model):
        for parameter in _changed_by(layer):
            if (name := names.get(id(parameter))) is not None:
                updates[name] = _update(layer, name)
    users = Counter(id(p) for module in model.modules() for child in module.children() for p in _own(child))
    if shared := [name for name in updates if users[id(parameters[name])] > 1]:
        raise TrainingError(
            f"{len(shared)} selected tensors are used by several modules and changed by an adapter in some, first of "
            f"them {shared[0]!r}: one tensor cannot cancel what is added in one place and not in another. Leave these "
            "modules out of target_modules (--lora-modules), or protect full fine-tuning"
        )
    return updates


def trained_copies(model: nn.Module) -> dict[int, nn.Parameter]:
    """Identity of a parameter -> the copy that is trained in its place (PEFT's `modules_to_save`)."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        saved, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
        if isinstance(saved, nn.ModuleDict) and isinstance(original, nn.Module):
            active: Any = module
            for adapter in (name for name in active.active_adapters if name in saved):
                own = dict(saved[adapter].named_parameters())
                copies |= {id(parameter): own[name] for name, parameter in original.named_parameters()}
    return copies


def peft_model(model: nn.Module) -> Any:
    """The PEFT model inside wrappers; TrainingError where there is none."""
    inner: Any = model
    while not hasattr(inner, "merge_and_unload"):
        inner = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if inner is None:
            raise TrainingError(f"{type(model).__name__} is not a PEFT model: there is no adapter to merge")
    return inner


def _tuner_layers(model: nn.Module) -> Iterable[Any]:
    if not any(hasattr(module, "base_layer") for module in model.modules()):
        return []  # importing PEFT takes a second
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _changed_by(layer: Any) -> list[nn.Parameter]:
    """Parameters of the wrapped module that the layer may change."""
    if hasattr(layer, "get_param"):
        return [layer.get_param()]
    from peft.tuners import lora

    base = layer.get_base_layer()
    if type(layer) is lora.Linear and not any(layer.lora_bias.values()):
        return [base.weight]
    return _own(base)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _update(layer: Any, name: str) -> LoraUpdate:
    from peft.tuners import lora

    active = _active(layer)
    kind = f"{type(layer).__module__.rpartition('.')[0].rpartition('.')[2]}.{type(layer).__name__}"
    if type(layer) not in (lora.Linear, lora.ParamWrapper):
        raise TrainingError(
            f"{name} is adapted by {kind}, which does not add a low-rank product to a plain weight. Protected can be "
            "what LoRA changes in Linear layers and target_parameters; leave this module out of target_modules, or "
            "protect full fine-tuning"
        )
    if hasattr(layer, "get_param") and hasattr(layer.get_param(), "to_local"):
        raise TrainingError(f"{name} is sharded and adapted through target_parameters; protect it in one process")
    if layer.merged:
        raise TrainingError(f"the adapter of {name} is merged already; call model.unmerge_adapter() first")
    for adapter in active:
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            raise TrainingError(
                f"{name}: adapter {adapter!r} is the variant {variant} of LoRA. DoRA and its like rescale whole rows "
                "of the weight, so single weights cannot be held; train plain LoRA (use_dora=False)"
            )
    if name.endswith(".bias"):
        raise TrainingError(
            f"{name}: the adapter has a bias of its own, so that of the layer cannot be held; train LoRA without "
            "(lora_bias=False)"
        )
    return LoraUpdate(layer=layer, adapters=active)


def check_initialisation(model: nn.Module) -> None:
    """TrainingError for an adapter that took over a part of the base weights when it was made (PiSSA, ...)."""
    configs = getattr(model, "peft_config", None)
    for name, config in (configs if isinstance(configs, Mapping) else {}).items():
        how = getattr(config, "init_lora_weights", True)
        if isinstance(how, str) and how.lower().startswith(_MOVING):
            raise TrainingError(
                f"adapter {name!r} was initialised with init_lora_weights={how!r}, which changes the base weights, so "
                "they are not those that were selected. Use the default initialisation"
            )


def _active(layer: Any) -> tuple[str, ...]:
    return tuple(name for name in layer.active_adapters if name in getattr(layer, "lora_A", ()))


def _product_at(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """left [E, rows, r] @ right^T, of right [E, columns, r], at flat indices: fp32 [k]."""
    (num_experts, num_rows, rank), num_columns = left.shape, right.shape[1]
    if num_experts == 1 and 2 * rank * len(index) > num_rows * num_columns:
        return (left[0] @ right[0].t()).take(index)  # measured: gathering factors would take longer
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    found = torch.empty(index.shape, device=index.device)
    step = max(1, (_CHUNK if index.is_cpu else _DEVICE_CHUNK) // rank)
    for chunk, products in zip(index.split(step), found.split(step), strict=True):
        row = chunk // num_columns  # counted through all experts
        column = row // num_rows * num_columns + chunk % num_columns
        torch.linalg.vecdot(left.index_select(0, row), right.index_select(0, column), out=products)
    return found


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """(left [E, rows, r], right [E, columns, r], scaling) in fp32: rows and columns as they lie in the tensor."""
    if hasattr(layer, "get_delta_factors") and layer.get_param().dim() == 3:
        left, right, scaling = layer.get_delta_factors(adapter)
        right = right.transpose(-1, -2)
    else:
        left = whole(layer.lora_B[adapter].weight)[None]
        right = whole(layer.lora_A[adapter].weight).t()[None]
        scaling = layer.scaling[adapter]
        if layer.fan_in_fan_out:
            left, right = right, left
    return left.float().contiguous(), right.float().contiguous(), scaling


class _MaskedGradient(torch.autograd.Function):
    """y -> y; adds what protection takes off the gradient of A and B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, layout: tuple[float, bool]) -> Any:
        ctx.save_for_backward(x, a, b, index)
        ctx.scaling, ctx.is_transposed = layout
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, a, b, index = ctx.saved_tensors
        rows, columns = dy.flatten(0, -2), x.flatten(0, -2).to(dy.dtype)
        # as the tensor lies in memory: GPT-2 stores [in, out]
        whole = columns.t() @ rows if ctx.is_transposed else rows.t() @ columns
        only = torch.zeros_like(whole).put_(index, whole.take(index))
        only = (only.t() if ctx.is_transposed else only) * -ctx.scaling
        return dy, None, (b.t().to(dy.dtype) @ only).to(a.dtype), (only @ a.t().to(dy.dtype)).to(b.dtype), None, None


def masking(update: Callable[[], LoraUpdate | None], index: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """A forward hook for the layer of an update that makes its gradient exact; both may move, so they are asked for."""

    def correct(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        current = update()
        if current is None or not current.is_added or not torch.is_grad_enabled():
            return output
        for adapter in current.adapters:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            layout = (layer.scaling[adapter], bool(layer.fan_in_fan_out))
            # in a replica of the layer on another device too
            output = _MaskedGradient.apply(output, inputs[0], a, b, index().to(output.device), layout)
        return output

    return correct
