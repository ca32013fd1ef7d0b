"""The logical weight matrices of a model: every tensor, by layer, component and expert.

Input: a model (weights, meta, PEFT-wrapped, compiled or sharded) or only its configuration.
Output: a `Layout`, plain data. Families of architectures are data (`families/*.toml`, see
`rules`); a model that no family describes is an error that shows the TOML to write.

Defined over the parameters as transformers keeps them in memory (fused experts), under their
canonical names. A tensor that the model uses twice (tied embeddings) is listed and counted once.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelocus.errors import ArchitectureError, LayoutError, first_line
from safelocus.model.layout.groups import Groups
from safelocus.model.layout.rules import Family, Rule, families, read_family
from safelocus.model.layout.sizes import Sizes, auto_class, sizes_of, text_config
from safelocus.model.layout.tensor import COMPONENTS, ELIGIBLE, GRANULARITIES, Matrix, TensorLayout
from safelocus.model.layout.unknown import collapse, describe_unknown

__all__ = [
    "COMPONENTS",
    "ELIGIBLE",
    "GRANULARITIES",
    "Groups",
    "Layout",
    "Matrix",
    "TensorLayout",
    "TensorMapping",
    "canonical_name",
    "is_adapter",
]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?(?:module\.)*")
# names that PEFT gives to what it adds; everything else below a `base_layer` is the model's own
_ADAPTER = re.compile(
    r"(^|\.)(\w*lora_\w+|(loha|lokr|hada|ia3|p?vera|b?oft|psoft|hra|hira|bone|miss|fourierft|waveft|road|shira|c3a|"
    r"ln_tuning|trainable_tokens|osf|deft|beft|frod|lily|peanut|adamss|delora|sparse|adaption|supertuning|shadow)_\w+|"
    r"modules_to_save|prompt_encoder|ranknum|poly_router)(\.|$)"
)
# what holds the model's own tensor where PEFT adds to it
_HOLDERS = re.compile(r"\.(token_adapter|base_layer|original_module)(?=\.)")
_UNKNOWN_RULE = Rule.parse("**", "unknown", where="unknown")
_ADAPTER_RULE = Rule.parse("**", "adapter", where="adapters")


def is_adapter(name: str) -> bool:
    """True for a parameter that PEFT added (LoRA factors, saved copies of modules, prompts)."""
    return _ADAPTER.search(name) is not None


def canonical_name(name: str) -> str:
    """The name a parameter has in the bare model, without the wrappers of PEFT, torch.compile, DDP and FSDP.

    >>> canonical_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    name = _PREFIXES.sub("", _WRAPPERS.sub("", name))
    # nested adapters differ only by their base_layer, so theirs is kept
    return name if is_adapter(name) else _HOLDERS.sub("", name)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All tensors of a model, in model order."""

    family: str  # "llama", "gpt_oss", ..., or the stem of the user's file
    matched_by: str  # "model_type", "names" or "file"
    tensors: dict[str, TensorLayout]  # canonical name -> layout
    tied: dict[str, str]  # further name of a tensor -> the name it is listed under

    def __post_init__(self) -> None:
        assert all(name == tensor.name for name, tensor in self.tensors.items())

    @classmethod
    def of(cls, model: nn.Module, *, file: Path | None = None, skip_unknown: bool = False) -> Layout:
        """Layout of a model with a `.config`; its weights are not read, so it may be on meta.

        Raises LayoutError, with the TOML to write, when a tensor is not understood. `skip_unknown` makes such tensors
        "unknown", which are never eligible, where at least half of the model is understood.
        """
        config = getattr(model, "config", getattr(getattr(model, "module", None), "config", None))
        if config is None:
            raise LayoutError(f"{type(model).__name__} has no .config; expected a transformers model")
        if any(getattr(each, "is_prompt_learning", False) for each in getattr(model, "peft_config", {}).values()):
            raise LayoutError(
                "the adapter learns prompts (prefix tuning, prompt tuning and the like), which change no weights and "
                "take part in no score: take the model without it, model.get_base_model()"
            )
        shapes, tied = _shapes(model)
        family = read_family(Path(file)) if file is not None else _by_model_type(config)
        if family is None:
            family, tensors = _by_names(config, shapes, skip_unknown)
            return cls(family=family.name, matched_by="names", tensors=tensors, tied=tied)
        sizes = family.sizes_for(config)
        tensors, unknown = _match(family, shapes, sizes, strict=not skip_unknown)
        if unknown and skip_unknown:
            tensors = _skipping(tensors, shapes)
        elif unknown:
            raise LayoutError(describe_unknown(config, shapes, unknown, family, sizes))
        matched_by = "model_type" if file is None else "file"
        return cls(family=family.name, matched_by=matched_by, tensors=tensors, tied=tied)

    @classmethod
    def from_config(cls, config: Any, *, file: Path | None = None, skip_unknown: bool = False) -> Layout:
        """Layout of the model that a configuration describes, built on meta: no weights, any size."""
        if (auto := auto_class(config)) is not None:
            return cls.of(_on_meta(auto, config), file=file, skip_unknown=skip_unknown)
        raise ArchitectureError(
            f"{type(config).__name__} (model_type {getattr(config, 'model_type', None)!r}) describes no "
            "model that generates text, as far as this version of transformers knows"
        )

    @cached_property
    def left_out(self) -> str | None:
        """What was not understood and skipped, in a sentence; None where all is understood."""
        unknown = [tensor for tensor in self.tensors.values() if "unknown" in tensor.components]
        if not unknown:
            return None
        kinds = dict.fromkeys(collapse(tensor.name, stacks=False) for tensor in unknown)
        share = sum(tensor.num_weights for tensor in unknown) / self.num_weights
        return (
            f"{len(unknown)} tensors with {share:.1%} of the weights are not understood and were left out "
            f"(--skip-unknown): {', '.join(kinds)}"
        )

    @cached_property
    def num_layers(self) -> int:
        """Layers that hold weights, encoder and decoder layers together."""
        return len({(t.stack, t.layer) for t in self.tensors.values() if t.layer is not None})

    @cached_property
    def num_weights(self) -> int:
        """The model's parameters: adapters left out, tied tensors counted once."""
        return sum(t.num_weights for t in self.tensors.values() if "adapter" not in t.components)

    @cached_property
    def num_eligible(self) -> int:
        return sum(self.tensors[name].num_weights for name in self.eligible_tensors)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """All matrices, eligible or not, in tensor order."""
        return [matrix for tensor in self.tensors.values() for matrix in tensor.matrices]

    @cached_property
    def eligible_tensors(self) -> list[str]:
        """Names of the tensors whose weights may be selected (all of them or none: see TensorLayout)."""
        return [name for name, tensor in self.tensors.items() if tensor.eligible]

    def groups(self, granularity: str) -> Groups:
        """Groups of the eligible weights with ids that are comparable across tensors."""
        return Groups((self.tensors[name] for name in self.eligible_tensors), granularity)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`; `from_json` restores an equal layout."""
        return {
            "family": self.family,
            "matched_by": self.matched_by,
            "tied": self.tied,
            "tensors": [tensor.to_json() for tensor in self.tensors.values()],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        tensors = [TensorLayout.from_json(tensor) for tensor in values["tensors"]]
        return cls(
            family=values["family"],
            matched_by=values["matched_by"],
            tied=dict(values["tied"]),
            tensors={tensor.name: tensor for tensor in tensors},
        )


def _on_meta(auto: Any, config: Any) -> nn.Module:
    """A model without weights; what its own code fails on is said to be its own."""
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # whatever a class says to a configuration that it cannot be built from
        raise ArchitectureError(
            f"transformers cannot build {type(config).__name__} (model_type {config.model_type!r}) from this "
            f"configuration: {type(error).__name__}: {first_line(error)}\n"
            "That is between the configuration and transformers' own class: check the configuration for what is "
            "missing in it, and whether the model's card asks for another version or for further packages."
        ) from error


def _skipping(tensors: Mapping[str, TensorLayout], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorLayout]:
    """In model order, with all that is not understood as "unknown"."""
    found = {name: tensors.get(name) or _UNKNOWN_RULE.apply(name, shape, Sizes()) for name, shape in shapes.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _shapes(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Canonical name -> (global) shape in model order, and further names of tied parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical_name(raw)
        if id(parameter) in first:
            if name != first[id(parameter)]:
                tied[name] = first[id(parameter)]
            continue
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise LayoutError(
                f"{name} is {parameter.dtype}: the model is quantised, and its weights have no place in a "
                "tensor of their own. Load it unquantised (bf16, say)."
            )
        assert name not in shapes, f"two parameters are called {name}"
        first[id(parameter)] = name
        # DeepSpeed ZeRO-3 leaves an empty tensor and keeps the shape apart
        shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return shapes, tied


def _match(
    family: Family, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, *, strict: bool = True
) -> tuple[dict[str, TensorLayout], list[str]]:
    """Layouts of the tensors the family knows, and the names of those it does not.

    A tensor whose name is known but whose shape does not fit is an error, or with `strict=False`
    one more that is not known.
    """
    tensors: dict[str, TensorLayout] = {}
    unknown = []
    for name, shape in shapes.items():
        try:
            found = _ADAPTER_RULE.apply(name, shape, sizes) if is_adapter(name) else family.find(name, shape, sizes)
        except LayoutError:
            if strict:
                raise
            found = None
        if found is None:
            unknown.append(name)
        else:
            tensors[name] = found
    return tensors, unknown


def _by_model_type(config: Any) -> Family | None:
    for model_type in (getattr(config, "model_type", None), getattr(text_config(config), "model_type", None)):
        for family in families().values():
            if model_type in family.model_types:
                return family
    return None


def _by_names(
    config: Any, shapes: Mapping[str, tuple[int, ...]], skip_unknown: bool = False
) -> tuple[Family, dict[str, TensorLayout]]:
    """The family that understands every tensor of a model whose type none of them lists, or most of them."""
    found: list[tuple[Family, dict[str, TensorLayout]]] = []
    closest: Family | None = None
    missing = list(shapes)
    for family in (family for family in families().values() if family.by_names):
        try:
            sizes = family.sizes_for(config)
        except LayoutError:  # lacks a number that this family's rules are written in
            continue
        tensors, unknown = _match(family, shapes, sizes, strict=False)
        if not unknown:
            found.append((family, tensors))
        elif len(unknown) < min(len(missing), len(shapes) // 2 + 1):
            closest, missing = family, unknown
    if not found and closest is not None and skip_unknown:
        # strict: a known name with another shape is of another architecture, whose other tensors may mean other things
        tensors, _ = _match(closest, shapes, closest.sizes_for(config))
        return closest, _skipping(tensors, shapes)
    if not found:
        sizes = closest.sizes_for(config) if closest else sizes_of(config)
        raise LayoutError(describe_unknown(config, shapes, missing, closest, sizes))
    family, tensors = found[0]
    for other, others in found[1:]:
        for name, tensor in tensors.items():
            if tensor != others[name]:
                raise LayoutError(
                    f"{name} can be understood in two ways: as in family {family.name!r} ({tensor.axes}, "
                    f"{tensor.parts}) and as in {other.name!r} ({others[name].axes}, {others[name].parts}), "
                    f"and model_type {getattr(config, 'model_type', None)!r} does not tell which. Save the "
                    f'line extends = "{family.name}" (or the other) to a file and give it with --layout.'
                )
    return family, tensors


class TensorMapping(Mapping[str, Tensor]):
    """What selections and scores are: tensors by canonical names, in the layout's order; wrapped names find the same.

    Two of them are equal only when they are the same object: tensors have no single truth value to compare by.
    """

    @property
    @abstractmethod
    def _held(self) -> Mapping[str, Tensor]: ...

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and canonical_name(name) in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str, default: Any = None) -> Any:
        return self._held.get(canonical_name(name), default)

    __eq__ = object.__eq__
    __hash__ = object.__hash__
