"""The file of a selection: one safetensors file, and nothing that runs when it is read.

    indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
    scores/TENSOR         float32, aligned with the indices; absent from a selection without scores
    header, key `safelocus.selection.selection`
                          everything else as JSON, with a format version

Written under a temporary name in the same folder and renamed: a reader sees the old file or the new.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelocus.errors import SelectionError

FORMAT_VERSION = 1
_HEADER = "safelocus.selection"
_INT32_ELEMENTS = 2**31  # flat indices of a tensor with fewer elements fit int32


def index_dtype(num_weights: int) -> torch.dtype:
    """Of the flat indices into a tensor of this many elements, on disk."""
    return torch.int32 if num_weights < _INT32_ELEMENTS else torch.int64


def write(
    path: Path, header: Mapping[str, Any], indices: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None
) -> None:
    """Write a selection whose indices have the dtype to be stored; an earlier file is replaced."""
    tensors = {f"indices/{name}": owned(value) for name, value in indices.items()}
    tensors |= {f"scores/{name}": owned(value) for name, value in (scores or {}).items()}
    values = {"format_version": FORMAT_VERSION, "has_scores": scores is not None, **header}
    metadata = {_HEADER: json.dumps(values, allow_nan=False)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SelectionError(f"{path}: cannot be written ({error}). Choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor] | None]:
    """(header, indices as stored, scores or None); SelectionError for what is not a selection's file."""
    if not path.is_file():
        raise SelectionError(f"{path}: no such file. Expected a selection written by `safelocus select`.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _parse(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise SelectionError(
            f"{path}: not a safetensors file, or cut short ({error}). Expected a selection; make it or copy it again."
        ) from error
    scores = _under("scores/", tensors) if header.get("has_scores") else None
    return header, _under("indices/", tensors), scores


def _parse(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise SelectionError(
            f"{path}: a safetensors file, but not a selection (its header has no {_HEADER!r}). Expected a "
            "file written by `safelocus select`."
        )
    try:
        header = json.loads(metadata[_HEADER])
        version = header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SelectionError(f"{path}: damaged header ({error!r}). Make the selection again.") from error
    if version != FORMAT_VERSION:
        raise SelectionError(
            f"{path}: format version {version}, but this safelocus reads version {FORMAT_VERSION}. Upgrade "
            "safelocus, or make the selection again."
        )
    return header


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def owned(tensor: Tensor) -> Tensor:
    """A contiguous tensor with memory of its own: safetensors refuses views and shared storage."""
    shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()
