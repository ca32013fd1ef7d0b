"""A patch: new values at a selection's coordinates, and what is needed to undo it bit for bit.

Input: a model and the values at a selection's coordinates before or after a change; or a file. Output: a frozen
`Patch`, which can be applied to a model in memory, and to a folder (see `folder`).

    apply then revert = the identity on the bits of a model without the patch; revert then apply, of one with it
    apply twice = apply once; the second time nothing is written

Its file is one safetensors file (see `run.tensors`), and nothing that runs when it is read:

    indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
    new/TENSOR            in the model's dtype, aligned with the indices
    old/TENSOR            the same; absent from the small form
    header                everything else as JSON: selection (with layout and provenance), digests of the touched
                          tensors before and after, metadata
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from safelocus.distributed import whole
from safelocus.errors import MALFORMED, PatchError
from safelocus.model.fingerprint import Fingerprint, bits, digest, dtype_name
from safelocus.model.target import Target
from safelocus.patch.state import Goal, Outcome, PatchValues, examine, with_values
from safelocus.run.tensors import TensorFile, under
from safelocus.selection.selection import Selection, stored_indices
from safelocus.selection.sparse import restoring, scatter, selected_parameters

FORMAT_VERSION = 2  # 1 had a SHA-256
_FILE = TensorFile(kind="patch", version=FORMAT_VERSION, made_by="`safelocus patch diff`", error=PatchError)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Patch(PatchValues):
    """New values for K weights of one model.

    Attributes:
        selection: the coordinates, the model's layout, and where the coordinates came from.
        new: canonical tensor name -> [k of this tensor], in the model's dtype, on the CPU.
        old: the same from before; None for a patch saved in the small form, which cannot be reverted.
        before: digests of the touched tensors as they were. Their dtype is that of the model it was made from,
            also when `to` has converted the values.
        after: digests of the touched tensors with the patch in them; without those that are not known.
        metadata: what made it: plain JSON values.

    Raises PatchError when values and coordinates do not fit together.
    """

    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module | Target,
        selection: Selection,
        *,
        old: Mapping[str, Tensor] | None = None,
        new: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a patch from a model and the values that it does not hold.

        Args:
            model: holds the new values where `old` is given, the old ones where `new` is. It is not changed.
            selection: the coordinates.
            old: values before (from `safelocus.selection.sparse.gather`), of a model that was changed.
            new: values after, for a model that was not.
            metadata: what made it: plain JSON values.

        Raises:
            PatchError: both or none of `old` and `new`, or they do not fit the coordinates or the dtype.
            SelectionError: the selection does not fit the model.

        Example:
            >>> old = sparse.gather(target.model, selection)                        # doctest: +SKIP
            >>> patch = Patch.of(target, selection, old=old)    # after training  # doctest: +SKIP
        """
        given = old if old is not None else new
        if given is None or (old is not None and new is not None):
            raise PatchError("give the old values of a model that was changed, or the new values for one that was not")
        module = _module(model)

        def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name, parameter in selected_parameters(module, selection).items():
                tensor, index = whole(parameter), selection[name]
                if name not in given or given[name].shape != index.shape or given[name].dtype != tensor.dtype:
                    raise PatchError(
                        f"values for {name} are {_kind(given.get(name))}; expected {tensor.dtype} {list(index.shape)}"
                    )
                other = with_values(tensor, index, given[name])
                yield (name, tensor, other) if old is None else (name, other, tensor)

        return cls.between(module.config, selection, pairs(), metadata=metadata)

    @classmethod
    def between(
        cls,
        config: Any,
        selection: Selection,
        pairs: Iterable[tuple[str, Tensor, Tensor]],
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a patch from each tensor's name and what it is before and after, which come one by one.

        Args:
            config: the model's configuration.
        """
        none = Fingerprint.of_tensors(config, [])
        values: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        digests: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for name, *tensors in pairs:
            for tensor, own, known in zip(tensors, values, digests, strict=True):
                own[name] = bits(tensor).take(selection[name].to(tensor.device)).view(tensor.dtype)
                # all that is kept of it, as in a fingerprint
                known[name] = (tuple(tensor.shape), dtype_name(tensor.dtype), digest(tensor))
        before, after = (replace(none, tensors=known) for known in digests)
        return cls(
            selection=selection, old=values[0], new=values[1], before=before, after=after, metadata=dict(metadata or {})
        )

    @property
    def k(self) -> int:
        """How many weights it sets."""
        return self.selection.k

    @property
    def num_changed(self) -> int | None:
        """How many of them differ from before; None without the old values."""
        if self.old is None:
            return None
        return sum(_num_differing(self.new[name], old) for name, old in self.old.items())

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the values; one, unless the model mixes them."""
        return list(dict.fromkeys(value.dtype for value in self.new.values()))

    def __repr__(self) -> str:
        model = self.selection.provenance.model
        return f"Patch(k={self.k}, tensors={len(self.new)}, model={model!r}, revertible={self.old is not None})"

    def apply(self, model: nn.Module | Target, *, allow_mismatch: bool = False) -> Outcome:
        """Write the new values, unless they are there already.

        Args:
            model: in memory; wrapped by PEFT, torch.compile or FSDP as it may be.
            allow_mismatch: also to a model that is neither as before nor as after: a fine-tuned sibling.

        Returns:
            What was written: nothing, and False, where the patch is applied already.

        Raises:
            PatchError: another model, or another dtype. Nothing was written.
            SelectionError: tensors are missing or have another shape.

        Example:
            >>> if not patch.apply(target):                          # doctest: +SKIP
            ...     print("this model has the patch already")
        """
        return self._write(model, "after", self.new, allow_mismatch)

    def revert(self, model: nn.Module | Target, *, allow_mismatch: bool = False) -> Outcome:
        """Write the old values, unless they are there already; see `apply`.

        With `allow_mismatch` the coordinates must still hold the patch's values. What a sibling held there
        before is not known: the old values are those of the model that the patch was made for.
        """
        return self._write(model, "before", self.old, allow_mismatch)

    @contextmanager
    def applied(self, model: nn.Module | Target, *, allow_mismatch: bool = False) -> Iterator[Outcome]:
        """Within: the patch is in the model. Afterwards the weights are what they were, to the bit, whatever they were.

        Example:
            >>> with patch.applied(target):        # doctest: +SKIP
            ...     evaluation = sl.evaluate(target, prompts)
        """
        with restoring(_module(model), self.selection):
            yield self.apply(model, allow_mismatch=allow_mismatch)

    def to(self, dtype: torch.dtype) -> "Patch":
        """The same patch for the model in another dtype.

        The old values must survive the conversion and back, so that reverting stays exact. The new ones are
        rounded to nearest; how many changed by that, and how many changes are too small for it, the metadata says.

        Raises:
            PatchError: old values would change, or there are none and new ones would be rounded.
        """
        new, num_rounded, rounded = {}, 0, []
        for name, value in self.new.items():
            new[name] = value.to(dtype)
            count = _num_differing(new[name], value)
            num_rounded += count
            rounded += [name] * bool(count)
        if num_rounded and self.old is None:
            raise PatchError(
                f"{num_rounded:,} new values would be rounded to {dtype}, and without the old values (the patch was "
                "saved with old='digest') the result could not be recognised. Convert a patch with old values"
            )
        old = None
        if self.old is not None:
            old = {name: value.to(dtype) for name, value in self.old.items()}
            if lost := [name for name, value in self.old.items() if _num_differing(old[name], value)]:
                raise PatchError(
                    f"the old values of {len(lost)} tensors do not fit {dtype}, first of them {lost[0]}: reverting "
                    "would not be exact. Apply the patch to the model in the patch's own dtype and convert the model"
                )
        known = {name: entry for name, entry in self.after.tensors.items() if name not in rounded}
        converted = replace(self, new=new, old=old, after=replace(self.after, tensors=known))
        if self.dtypes == [dtype]:
            return converted
        lost_again = (self.num_changed or 0) - (converted.num_changed or 0)
        note = {"converted_to": dtype_name(dtype), "num_rounded": num_rounded, "num_lost": lost_again}
        return replace(converted, metadata=self.metadata | note)

    def save(self, path: str | Path, *, old: Literal["values", "digest"] = "values") -> None:
        """Write one safetensors file; an earlier one is replaced, and never left half-written.

        `old="digest"` leaves the old values out: a smaller file that recognises its model but cannot be reverted.
        PatchError for a merged or rounded patch, which only these recognise.
        """
        if old not in ("values", "digest"):
            raise PatchError(f"old={old!r}: expected 'values' or 'digest'")
        if old == "digest":
            replace(self, old=None)  # refuses what nothing would recognise
        kept = self.old if old == "values" else None
        header = {
            "has_old": kept is not None,
            "selection": self.selection.to_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "metadata": self.metadata,
        }
        tensors = stored_indices(self.selection) | {f"new/{name}": value for name, value in self.new.items()}
        _FILE.write(Path(path), header, tensors | {f"old/{name}": value for name, value in (kept or {}).items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a patch; PatchError for anything that is not a whole, unchanged one."""
        header, tensors = _FILE.read(Path(path))
        try:
            return cls(
                selection=Selection.from_json(header["selection"], under("indices/", tensors)),
                new=under("new/", tensors),
                old=under("old/", tensors) if header.get("has_old") else None,
                before=Fingerprint.from_json(header["before"]),
                after=Fingerprint.from_json(header["after"]),
                metadata=header["metadata"],
            )
        except MALFORMED as error:
            raise PatchError(f"{path}: inconsistent patch ({error}). Make it again.") from error

    def _write(
        self, model: nn.Module | Target, goal: Goal, values: dict[str, Tensor] | None, allow_mismatch: bool
    ) -> Outcome:
        module = _module(model)
        tensors = ((name, whole(p)) for name, p in selected_parameters(module, self.selection).items())
        pending, mismatches = examine(self, tensors, goal=goal, allow_mismatch=allow_mismatch)
        if pending:
            assert values is not None
            scatter(module, self.selection, values)
        return self.outcome(pending, mismatches)

    def outcome(self, written: list[str], mismatches: list[str], **files: Any) -> Outcome:
        """Of having written some of the tensors."""
        return Outcome(
            num_weights=sum(self.selection[name].numel() for name in written),
            tensors=tuple(written),
            mismatches=tuple(mismatches),
            **files,
        )


def _module(model: nn.Module | Target) -> nn.Module:
    return model.model if isinstance(model, Target) else model


def _num_differing(converted: Tensor, original: Tensor) -> int:
    return int((bits(converted.to(original.dtype)) != bits(original)).count_nonzero())


def _kind(value: Tensor | None) -> str:
    return "missing" if value is None else f"{value.dtype} {list(value.shape)}"
