"""What a model was, to the bit: so that a selection or patch never lands on another model unnoticed.

The fingerprint holds a digest of the architecture's configuration and, per tensor, the shape, the
dtype and a 128-bit digest (xxh3) of the values' bytes. Names are canonical (wrappers of PEFT,
torch.compile and FSDP stripped; adapters left out), so a wrapped model has its base's fingerprint.
The digest guards against mistakes, not against forgery.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import xxhash
from torch import Tensor, nn

from safelocus.distributed import whole
from safelocus.errors import RunError, SelectionError, some
from safelocus.model.layout import Layout, canonical_name, is_adapter

# Attributes of a config that do not change what the weights are.
_VOLATILE = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures",
    "_attn_implementation", "_experts_implementation", "_attn_implementation_autoset", "name_or_path",
}  # fmt: skip
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Identity of a model's weights.

    Attributes:
        model_type: the configuration's `model_type`.
        config: hex digest of the configuration (without paths, versions and run-time switches).
        tensors: canonical name -> (shape, dtype, hex digest of the bytes).
    """

    model_type: str
    config: str
    tensors: Mapping[str, tuple[tuple[int, ...], str, str]]

    @classmethod
    def of(cls, model: nn.Module, layout: Layout, *, like: Mapping[str, Any] | None = None) -> Self:
        """Read every parameter once (16 GB of weights take a few seconds) and digest it; `like`: see `of_tensors`."""
        named = ((canonical_name(name), parameter) for name, parameter in model.named_parameters())
        own = ((name, parameter) for name, parameter in named if name in layout.tensors and not is_adapter(name))
        return cls.of_tensors(model.config, own, like=like)

    @classmethod
    def of_tensors(
        cls, config: Any, tensors: Iterable[tuple[str, Tensor]], *, like: Mapping[str, Any] | None = None
    ) -> Self:
        """From canonical names and values, which may come one by one, and may be some of the model's only.

        Args:
            like: JSON of the fingerprint of a model that this one may be in another dtype: what it can tell then, is
                told in that one's.
        """
        known = {} if like is None else cls.from_json(like).tensors
        read = {name: _entry(whole(value.detach()), known.get(name)) for name, value in tensors}
        return cls(model_type=config.model_type, config=_config_digest(config), tensors=read)

    @property
    def id(self) -> str:
        """One short name for the whole: 16 hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self.to_json(), sort_keys=True).encode())

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, in words, most fundamental first; empty when the models are the same."""
        found = []
        if self.model_type != other.model_type:
            found.append(f"model type: {self.model_type} against {other.model_type}")
        elif self.config != other.config:
            found.append("configuration values differ")
        only_self = [name for name in self.tensors if name not in other.tensors]
        only_other = [name for name in other.tensors if name not in self.tensors]
        for names, where in ((only_self, "first"), (only_other, "second")):
            if names:
                found.append(f"{len(names)} tensors exist only in the {where}: {some(names)}")
        shared = [name for name in self.tensors if name in other.tensors]
        for position, what in enumerate(("shape", "dtype", "values")):
            changed = [n for n in shared if self.tensors[n][position] != other.tensors[n][position]]
            if changed:
                found.append(f"{what} of {len(changed)} of {len(shared)} tensors differ: {some(changed)}")
                break  # another shape or dtype always means other bytes too
        return found

    def came_back(self, now: "Fingerprint", *, after: str) -> None:
        """Raise RunError where a model that was to be left as it was is not."""
        if differences := self.differences(now):
            raise RunError(
                f"the model did not come back as it was ({'; '.join(differences)}); something else changed its weights "
                f"during the {after}. Load it anew, and begin again with nothing else running on it"
            )

    def to_json(self) -> dict[str, Any]:
        tensors = {name: [list(shape), dtype, digest] for name, (shape, dtype, digest) in self.tensors.items()}
        return {"model_type": self.model_type, "config": self.config, "tensors": tensors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        tensors = {name: (tuple(shape), dtype, digest) for name, (shape, dtype, digest) in data["tensors"].items()}
        return cls(model_type=data["model_type"], config=data["config"], tensors=tensors)


def check_made_for(
    known: Mapping[str, Any], model: Fingerprint, what: str, *, allow_mismatch: bool = False
) -> list[str]:
    """Whether scores or a selection were made for this model, in whatever dtype it is in memory: the one rule for all.

    Values are compared in the dtype of then. A wider one loses nothing, so the weights are the same or another model's.
    In a narrower one, rounded weights cannot be told from another model's, which is a remark, as it is where all
    weights are the same and the configuration alone is not.

    Args:
        known: `to_json` of the fingerprint of then.
        model: that of the model now, made `like=known`.

    Returns:
        What differs or cannot be told, in sentences.

    Raises:
        SelectionError: it was made for another model, and that is not allowed.
    """
    then = Fingerprint.from_json(known)
    shared = [
        name for name in then.tensors if name in model.tensors and then.tensors[name][0] == model.tensors[name][0]
    ]
    rounded = [name for name in shared if then.tensors[name][1] != model.tensors[name][1]]
    left = {name: entry for name, entry in then.tensors.items() if name not in rounded}
    now = {name: entry for name, entry in model.tensors.items() if name not in rounded}
    differences = replace(then, tensors=left).differences(replace(model, tensors=now))
    if differences and (then.model_type, then.tensors) == (model.model_type, model.tensors):
        # a later transformers has more options, a trainer names more special tokens
        return [f"{what} was made with another configuration of this model, whose weights are the same"]
    if differences and not allow_mismatch:
        raise SelectionError(
            f"{what} was made for another model than this one: {'; '.join(differences)}. If you mean it (a fine-tuned "
            "sibling, say), allow it: --allow-mismatch, allow_mismatch=True"
        )
    remarks = [f"{what} was made for another model: {'; '.join(differences)}"] if differences else []
    if rounded:
        remarks.append(
            f"{len(rounded)} tensors have another dtype than when {what} was made ({some(rounded)}), so only names "
            "and shapes say that this is the same model"
        )
    return remarks


def _entry(value: Tensor, known: tuple[tuple[int, ...], str, str] | None) -> tuple[tuple[int, ...], str, str]:
    """(shape, dtype, digest): in the dtype that is known, where this one is wider, or is found to hold the same."""
    own = dtype_name(value.dtype)
    if known is None or known[1] == own:
        return tuple(value.shape), own, digest(value)
    dtype = getattr(torch, known[1])
    converted = digest_as(value, dtype)
    if converted == known[2] or torch.promote_types(value.dtype, dtype) == value.dtype:
        return tuple(value.shape), known[1], converted or digest(value)
    return tuple(value.shape), own, digest(value)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width: NaN payloads and negative zeros compare and move exactly."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def digest_as(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Digest of the tensor in another dtype; None where converting would change values."""
    if tensor.dtype == dtype:
        return digest(tensor.detach())
    converted = tensor.detach().to(dtype)
    return digest(converted) if torch.equal(bits(converted.to(tensor.dtype)), bits(tensor)) else None


def digest(value: Tensor) -> str:
    """128 bits of a tensor's bytes, in hexadecimal."""
    flat = value.contiguous().view(-1)
    if flat.numel() == 0:
        return xxhash.xxh3_128_hexdigest(b"")
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).cpu().numpy().data)


def _config_digest(config: Any) -> str:
    def stable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): stable(item) for key, item in value.items() if key not in _VOLATILE}
        return value

    return xxhash.xxh3_128_hexdigest(json.dumps(stable(config.to_dict()), sort_keys=True, default=str).encode())
