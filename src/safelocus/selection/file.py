"""The file of a selection: one safetensors file (see `run.tensors`), and nothing that runs when it is read.

indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
scores/TENSOR         float32, aligned with the indices; absent from a selection without scores
header                everything else as JSON
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelocus.errors import SelectionError
from safelocus.run.tensors import TensorFile, under

FORMAT_VERSION = 2  # 1 had no digest
_FILE = TensorFile(kind="selection", version=FORMAT_VERSION, made_by="`safelocus select`", error=SelectionError)
_INT32_ELEMENTS = 2**31  # flat indices of a tensor with fewer elements fit int32


def index_dtype(num_weights: int) -> torch.dtype:
    """Of the flat indices into a tensor of this many elements, on disk."""
    return torch.int32 if num_weights < _INT32_ELEMENTS else torch.int64


def write(
    path: Path, header: Mapping[str, Any], indices: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None
) -> None:
    """Write a selection whose indices have the dtype to be stored; an earlier file is replaced."""
    tensors = {f"indices/{name}": value for name, value in indices.items()}
    tensors |= {f"scores/{name}": value for name, value in (scores or {}).items()}
    _FILE.write(path, {"has_scores": scores is not None, **header}, tensors)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor] | None]:
    """(header, indices as stored, scores or None); SelectionError for what is not a selection's whole file."""
    header, tensors = _FILE.read(path)
    return header, under("indices/", tensors), under("scores/", tensors) if header.get("has_scores") else None
