"""A selection: a set of coordinates (tensor, flat index) of one model's weights, and where it came from.

Input: `Scores.select`, set operations on selections, a file, or coordinates of your own. Output: a
frozen `Selection`.

Its file is one safetensors file (see `run.tensors`), and nothing that runs when it is read:

    indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
    scores/TENSOR         float32, aligned with the indices; absent from a selection without scores
    header                everything else as JSON
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from safelocus.errors import MALFORMED, SelectionError, some
from safelocus.model.fingerprint import Fingerprint, check_made_for
from safelocus.model.fingerprint import digest as tensor_digest
from safelocus.model.layout import Layout, TensorMapping, canonical_name
from safelocus.run.identity import Provenance, digest
from safelocus.run.tensors import TensorFile, under
from safelocus.selection.ratio import count_for_ratio

__all__ = ["Provenance", "Selection", "count_for_ratio"]

Operation = Literal["&", "-", "|"]

# fields of a Selection that are saved as they are
_PLAIN = (
    "which",
    "granularity",
    "ratio",
    "of",
    "num_requested",
    "seed",
    "operation",
    "parents",
    "only_eligible",
)
FORMAT_VERSION = 2  # 1 had no digest
_FILE = TensorFile(kind="selection", version=FORMAT_VERSION, made_by="`safelocus select`", error=SelectionError)
_INT32_ELEMENTS = 2**31  # flat indices of a tensor with fewer elements fit int32
_CHUNK = 1 << 22  # coordinates looked up at once: each takes a few int64 of scratch


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Selection(TensorMapping):
    """Coordinates of K weights: a mapping from tensor names to flat indices, `coordinates` itself.

    `len` counts the tensors that have any, `k` the weights. Indexing alone also takes the model's other tensors, and
    finds nothing selected there.

    Attributes:
        coordinates: canonical tensor name -> flat indices, int64 [k of this tensor], ascending, unique, on
            the CPU. Tensors without any are left out; tensors follow the layout's order.
        layout: of the model.
        scores: name -> float32, aligned with the indices; None where there are none.
        provenance: of the scores it was selected from.
        which: "top", "bottom", "random"; "set" for the result of a set operation; "manual".
        granularity: what was ranked. Groups are taken whole, so `k` may be less than `num_requested`.
        ratio, of, num_requested: the K asked for; None for sets and by hand.
        seed: of a random selection.
        operation, parents: of a set operation, and what both operands were.
        only_eligible: refuse tensors that are not eligible.

    Raises SelectionError when the coordinates are not what is said above, or do not fit the layout.
    """

    coordinates: dict[str, Tensor]
    layout: Layout
    scores: dict[str, Tensor] | None = None
    provenance: Provenance = field(default_factory=Provenance)
    which: str = "manual"
    granularity: str = "weight"
    ratio: float | None = None
    of: str | None = None
    num_requested: int | None = None
    seed: int | None = None
    operation: str | None = None
    parents: tuple[dict[str, Any], ...] = ()
    only_eligible: bool = True

    def __post_init__(self) -> None:
        for name in self.coordinates:
            self._check_tensor(name)
        indices = {
            name: _checked_indices(name, self.coordinates[name], self.layout)
            for name in self.layout.tensors
            if name in self.coordinates and self.coordinates[name].numel()
        }
        object.__setattr__(self, "coordinates", indices)
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked_scores(self.scores, indices))

    @property
    def _held(self) -> Mapping[str, Tensor]:
        return self.coordinates

    def _check_tensor(self, name: str) -> None:
        tensor = self.layout.tensors.get(name)
        if tensor is None:
            raise SelectionError(
                f"{name!r} is not a tensor of this model ({self.layout.family}). Expected names such as "
                f"{some(self.layout.eligible_tensors)}."
            )
        if self.only_eligible and not tensor.eligible:
            raise SelectionError(
                f"{name!r} is not eligible: it holds {', '.join(tensor.components)}. Pass "
                "only_eligible=False to select it all the same."
            )

    @property
    def k(self) -> int:
        """How many weights are selected."""
        return sum(index.numel() for index in self.coordinates.values())

    @property
    def num_weights(self) -> int:
        """How many weights the model has."""
        return self.layout.num_weights

    def __getitem__(self, name: str) -> Tensor:
        """Flat indices into a tensor, empty where none of it is selected; the name may be wrapped."""
        name = canonical_name(name)
        if name in self.coordinates:
            return self.coordinates[name]
        if name not in self.layout.tensors:
            raise SelectionError(f"{name!r} is not a tensor of this model ({self.layout.family})")
        return torch.empty(0, dtype=torch.int64)

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if key != "parents")
        return f"Selection({values})"

    def describe(self) -> dict[str, Any]:
        """What it is, in a few JSON values; those that are unknown are left out."""
        values = {
            "k": self.k,
            **{name: getattr(self, name) for name in _PLAIN if name not in ("parents", "only_eligible")},
            "method": self.provenance.method,
            "model": self.provenance.model,
            "objective": self.provenance.objective_label,
            "prompts_hash": self.provenance.prompts_hash,
            "parents": list(self.parents) or None,
        }
        return {key: value for key, value in values.items() if value is not None}

    def identity(self) -> dict[str, str]:
        """Which weights, and of which scores."""
        of = {**self.describe(), "only_eligible": self.only_eligible}
        coordinates = {name: tensor_digest(index) for name, index in self.coordinates.items()}
        return {"coordinates": digest(coordinates), "description": digest(of)}

    def per_matrix_counts(self) -> dict[str, int]:
        """Matrix name -> selected weights, for every matrix that could have any, zeros included."""
        counts: dict[str, int] = {}
        for name, tensor in self.layout.tensors.items():
            if tensor.eligible or name in self.coordinates:
                found = torch.zeros(tensor.num_matrices, dtype=torch.int64)
                for flat_index in self[name].split(_CHUNK):
                    found += torch.bincount(tensor.matrix_of(flat_index), minlength=tensor.num_matrices)
                counts |= zip((matrix.name for matrix in tensor.matrices), found.tolist(), strict=True)
        return counts

    def counts_by(self, *attributes: str) -> dict[Any, int]:
        """Selected weights per value of a matrix's attribute: "component", "layer", "expert", "tensor", ...

        With several attributes the keys are tuples, as in `counts_by("layer", "expert")`. In model order.
        """
        by_matrix = self.per_matrix_counts()
        counts: dict[Any, int] = {}
        for matrix in self.layout.matrices:
            if matrix.name in by_matrix:
                values = tuple(getattr(matrix, attribute) for attribute in attributes)
                key = values[0] if len(values) == 1 else values
                counts[key] = counts.get(key, 0) + by_matrix[matrix.name]
        return counts

    def num_common(self, other: "Selection") -> int:
        """How many coordinates both have."""
        _check_same_tensors(self, other)
        shared = [name for name in self.coordinates if name in other.coordinates]
        return sum(int(_is_in(self[name], other[name]).count_nonzero()) for name in shared)

    def iou(self, other: "Selection") -> float:
        """Intersection over union of the coordinates; 1.0 for two empty selections."""
        num_common = self.num_common(other)
        num_either = self.k + other.k - num_common
        return num_common / num_either if num_either else 1.0

    def __and__(self, other: "Selection") -> "Selection":
        return self.combine(other, "&")

    def __sub__(self, other: "Selection") -> "Selection":
        return self.combine(other, "-")

    def __or__(self, other: "Selection") -> "Selection":
        return self.combine(other, "|")

    def combine(self, other: "Selection", operation: Operation, *, allow_mismatch: bool = False) -> "Selection":
        """Intersection, difference or union; the result belongs to this selection's model.

        Scores stay this selection's; a union keeps them only when both come from the same scores.
        Raises SelectionError when the models' tensors differ, or, unless `allow_mismatch`, their weights. What differs
        all the same, or cannot be told (another dtype), is kept in the result's `provenance.extra["remarks"]`.
        """
        if operation not in ("&", "-", "|"):
            raise SelectionError(f"set operation {operation!r}: expected '&', '-' or '|'")
        _check_same_tensors(self, other)
        own, theirs = self.provenance.fingerprint, other.provenance.fingerprint
        provenance = self.provenance
        if own is not None and theirs is not None and own != theirs:
            found = check_made_for(own, Fingerprint.from_json(theirs), "one selection", allow_mismatch=allow_mismatch)
            if remarks := list(dict.fromkeys([*provenance.extra.get("remarks", ()), *found])):
                provenance = replace(provenance, extra={**provenance.extra, "remarks": remarks})
        same_scores = _without_remarks(self.provenance) == _without_remarks(other.provenance)
        same_scores = same_scores and other.scores is not None
        keeps_scores = self.scores is not None and (operation != "|" or same_scores)
        indices, scores = {}, {}
        for name in self.layout.tensors:
            if name not in self.coordinates and name not in other.coordinates:
                continue
            if operation == "|":
                added = ~_is_in(other[name], self[name])
                indices[name], order = torch.cat([self[name], other[name][added]]).sort()
                if keeps_scores:
                    scores[name] = torch.cat([_scores_of(self, name), _scores_of(other, name)[added]])[order]
            else:
                is_kept = _is_in(self[name], other[name]) ^ (operation == "-")
                indices[name] = self[name][is_kept]
                if keeps_scores:
                    scores[name] = _scores_of(self, name)[is_kept]
        return Selection(
            coordinates=indices,
            scores=scores if keeps_scores else None,
            layout=self.layout,
            provenance=provenance,
            which="set",
            granularity=self.granularity if self.granularity == other.granularity else "weight",
            operation=operation,
            parents=(self.describe(), other.describe()),
            only_eligible=self.only_eligible and other.only_eligible,
        )

    def require(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Match every selected tensor with a parameter, or raise SelectionError listing those without one.

        `shapes`: parameter name -> shape, of `model.named_parameters()` say; names may be wrapped by PEFT,
        torch.compile or FSDP. Returns canonical name -> the parameter's own name.
        """
        if not self.coordinates:
            raise SelectionError("the selection holds no weights: there is nothing to act on")
        given: dict[str, str] = {}
        for name in shapes:
            canonical = canonical_name(name)
            given.setdefault(self.layout.tied.get(canonical, canonical), name)
        missing = [name for name in self.coordinates if name not in given]
        if missing:
            raise SelectionError(
                f"{len(missing)} of the selection's {len(self.coordinates)} tensors are not among the "
                f"{len(shapes)} given: {some(missing)}. Found names such as {some(list(shapes))}. Was the "
                "selection made for another model?"
            )
        for name in self.coordinates:
            expected, found = self.layout.tensors[name].shape, tuple(shapes[given[name]])
            if expected != found:
                raise SelectionError(
                    f"{given[name]!r} has shape {list(found)}; the selection was made for {list(expected)}. "
                    "Select again with this model."
                )
        return {name: given[name] for name in self.coordinates}

    def check(self, fingerprint: Fingerprint, *, allow_mismatch: bool = False, only_tensors: bool = False) -> list[str]:
        """Raise SelectionError, saying what differs, unless it was made for the model of this fingerprint.

        With `allow_mismatch` (for a fine-tuned sibling, say) the differences are returned instead. The model may be in
        another dtype than then, if its fingerprint is made for that: `target.fingerprint(like=...)`. With
        `only_tensors` the fingerprint may be of some tensors, and these alone are compared.
        """
        own = self.provenance.fingerprint
        if own is None:
            if not allow_mismatch:
                raise SelectionError(
                    "the selection carries no fingerprint, so nothing says that it was made for this model. "
                    "If you know that it was, allow it: --allow-mismatch, allow_mismatch=True."
                )
            return ["the selection carries no fingerprint"]
        if only_tensors:
            tensors = {name: entry for name, entry in own["tensors"].items() if name in fingerprint.tensors}
            own = {"model_type": fingerprint.model_type, "config": fingerprint.config, "tensors": tensors}
        return check_made_for(own, fingerprint, "the selection", allow_mismatch=allow_mismatch)

    def to_json(self) -> dict[str, Any]:
        """Everything but coordinates and scores, as plain values; `from_json` puts them together again."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "k": self.k,
            "provenance": self.provenance.to_json(),
            "layout": self.layout.to_json(),
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], coordinates: dict[str, Tensor], scores: dict[str, Tensor] | None = None
    ) -> Self:
        """Raises SelectionError, KeyError or TypeError for values that do not belong together."""
        plain = {name: values[name] for name in _PLAIN}
        selection = cls(
            coordinates=coordinates,
            scores=scores,
            layout=Layout.from_json(values["layout"]),
            provenance=Provenance.from_json(values["provenance"]),
            **{**plain, "parents": tuple(plain["parents"])},
        )
        if selection.k != values["k"]:
            raise SelectionError(f"the header says {values['k']} weights, the file holds {selection.k}")
        return selection

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; an earlier one is replaced, and never left half-written."""
        tensors = stored_indices(self) | {f"scores/{name}": value for name, value in (self.scores or {}).items()}
        _FILE.write(Path(path), {"has_scores": self.scores is not None, **self.to_json()}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a selection; SelectionError for anything that is not a whole one."""
        header, tensors = _FILE.read(Path(path))
        scores = under("scores/", tensors) if header.get("has_scores") else None
        try:
            selection = cls.from_json(header, under("indices/", tensors), scores)
        except MALFORMED as error:
            raise SelectionError(f"{path}: inconsistent selection ({error}). Make it again.") from error
        return selection


def index_dtype(num_weights: int) -> torch.dtype:
    """Of the flat indices into a tensor of this many elements, on disk."""
    return torch.int32 if num_weights < _INT32_ELEMENTS else torch.int64


def stored_indices(selection: Selection) -> dict[str, Tensor]:
    """The coordinates as files hold them: indices/TENSOR -> flat indices."""
    tensors = selection.layout.tensors
    return {
        f"indices/{name}": index.to(index_dtype(tensors[name].num_weights))
        for name, index in selection.coordinates.items()
    }


def _checked_indices(name: str, index: Tensor, layout: Layout) -> Tensor:
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise SelectionError(
            f"indices of {name!r} are {index.dtype} {list(index.shape)}: expected one-dimensional int64"
        )
    index = index.detach().to(device="cpu", dtype=torch.int64).contiguous()
    if not bool((index[1:] > index[:-1]).all()):
        raise SelectionError(f"indices of {name!r} are not ascending and unique. Use torch.unique(indices).")
    tensor, first, last = layout.tensors[name], int(index[0]), int(index[-1])
    if first < 0 or last >= tensor.num_weights:
        raise SelectionError(
            f"indices of {name!r} run from {first} to {last}: expected 0 to {tensor.num_weights - 1}, the "
            f"flat indices of a tensor of shape {list(tensor.shape)}"
        )
    return index


def _checked_scores(scores: dict[str, Tensor], indices: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: value for name, value in scores.items() if value.numel()}
    if set(kept) != set(indices):
        differing = sorted(set(kept) ^ set(indices))
        raise SelectionError(f"scores and coordinates name different tensors: {some(differing)}")
    for name, value in kept.items():
        if value.shape != indices[name].shape or value.dtype != torch.float32:
            raise SelectionError(
                f"scores of {name!r} are {value.dtype} {list(value.shape)}: expected torch.float32 "
                f"{list(indices[name].shape)}, one per index"
            )
    return {name: kept[name].detach().cpu().contiguous() for name in indices}


def _without_remarks(provenance: Provenance) -> Provenance:
    return replace(provenance, extra={**provenance.extra, "remarks": None})


def _scores_of(selection: Selection, name: str) -> Tensor:
    assert selection.scores is not None
    return selection.scores.get(name, torch.empty(0, dtype=torch.float32))


def _is_in(ours: Tensor, theirs: Tensor) -> Tensor:
    """bool: which of `ours` are among `theirs`; both ascending and unique."""
    if not theirs.numel():
        return torch.zeros(ours.shape, dtype=torch.bool)
    position = torch.searchsorted(theirs, ours).clamp_(max=theirs.numel() - 1)
    return theirs[position] == ours


def _check_same_tensors(a: Selection, b: Selection) -> None:
    if a.layout is b.layout:
        return
    named = (*a.coordinates, *b.coordinates)
    check_same_shapes(
        *({name: s.layout.tensors[name].shape for name in named if name in s.layout.tensors} for s in (a, b))
    )


def check_same_shapes(a: Mapping[str, Sequence[int]], b: Mapping[str, Sequence[int]]) -> None:
    """Raise SelectionError, which lists names, unless both have the same tensors: name -> shape."""
    named = dict.fromkeys([*a, *b])
    if differing := [name for name in named if a.get(name) != b.get(name)]:
        raise SelectionError(
            f"they belong to different models: {len(differing)} of {len(named)} tensors have no counterpart of the "
            f"same shape: {some(differing)}"
        )
