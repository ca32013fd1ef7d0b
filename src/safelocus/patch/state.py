"""What a patch holds, and whether a model's tensors are as they were before a patch, as they are after it, or neither.

A tensor belongs to a patch when its coordinates hold old or new values, and the tensor with the old values
at the coordinates has the digest from before. So a tensor that was changed only in part (an interrupted
apply) is recognised, and one whose other weights differ is not. A patch without old values knows a tensor by
its digest before and after.

Digests are of one dtype, the one in which the patch was made; a tensor of another is converted where that
loses nothing, and does not belong where it does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from safelocus.errors import PatchError, some
from safelocus.model.fingerprint import Fingerprint, bits, digest_as, dtype_name
from safelocus.selection.selection import Selection


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatchValues:
    """Values for K weights of one model, checked to fit together: what `Patch` says of them."""

    selection: Selection
    new: dict[str, Tensor]
    old: dict[str, Tensor] | None
    before: Fingerprint
    after: Fingerprint

    def __post_init__(self) -> None:
        if not self.selection.k:
            raise PatchError("a patch must change at least one weight; the selection holds none")
        object.__setattr__(self, "selection", replace(self.selection, scores=None))
        object.__setattr__(self, "new", self._checked(self.new, "new"))
        if self.old is not None:
            object.__setattr__(self, "old", self._checked(self.old, "old"))
            for name, value in self.new.items():
                if self.old[name].dtype != value.dtype:
                    raise PatchError(f"{name}: old values are {self.old[name].dtype}, new ones {value.dtype}")
        if missing := [name for name in self.new if name not in self.before.tensors]:
            raise PatchError(f"no digest says what {missing[0]} was before the patch")
        if self.old is None and (unknown := [name for name in self.new if name not in self.after.tensors]):
            raise PatchError(
                f"no digest says what {unknown[0]} is after the patch (it was merged, or rounded), so without its old "
                "values nothing would recognise it: keep them"
            )

    def _checked(self, values: Mapping[str, Tensor], which: str) -> dict[str, Tensor]:
        if differing := sorted(set(values) ^ set(self.selection.coordinates)):
            raise PatchError(f"the {which} values and the coordinates name different tensors: {differing[:3]}")
        for name, index in self.selection.coordinates.items():
            if values[name].shape != index.shape:
                raise PatchError(
                    f"the {which} values of {name} have shape {list(values[name].shape)}; expected "
                    f"{list(index.shape)}, one per coordinate"
                )
        return {name: values[name].detach().cpu().contiguous() for name in self.selection.coordinates}


Goal = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What applying or reverting did. True when anything was written.

    Attributes:
        num_weights: how many were written; 0: the model already was as asked.
        tensors: names of those written, in model order.
        mismatches: tensor and reason, where `allow_mismatch` let something pass.
        files: written, in the model's folder.
        left_out: files that hold weights in another form, which the patch does not change.
        num_rounded: new values that the files' dtype rounds.
        num_lost: of these, changes too small for it: the new value is the old one again.
    """

    num_weights: int
    tensors: tuple[str, ...]
    mismatches: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    num_rounded: int = 0
    num_lost: int = 0

    @property
    def changed(self) -> bool:
        return bool(self.tensors)

    def __bool__(self) -> bool:
        return self.changed


@dataclass(frozen=True, kw_only=True)
class TensorState:
    """One tensor against a patch.

    Attributes:
        holds_old, holds_new: at all coordinates, to the bit.
        num_other: coordinates that hold neither.
        rest_matches: the weights outside the patch are those of the model it was made for.
    """

    holds_old: bool
    holds_new: bool
    num_other: int
    rest_matches: bool

    def is_at(self, goal: Goal) -> bool:
        return self.holds_new if goal == "after" else self.holds_old


def with_values(tensor: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy with other values at flat indices."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    bits(copy).put_(index.to(copy.device), bits(values.to(copy.device)))
    return copy


def digests(fingerprint: Fingerprint, name: str) -> tuple[torch.dtype, str] | None:
    """(dtype, digest) of a tensor; None where the fingerprint does not have it."""
    if name not in fingerprint.tensors:
        return None
    _, dtype, value = fingerprint.tensors[name]
    return getattr(torch, dtype), value


def tensor_state(patch: PatchValues, name: str, tensor: Tensor) -> TensorState:
    """`tensor` has the shape and dtype that the patch has for `name`; it is not changed."""
    index = patch.selection[name].to(tensor.device)
    current = bits(tensor).take(index)
    is_new = current == bits(patch.new[name]).to(tensor.device)
    holds_new = bool(is_new.all())
    before, after = digests(patch.before, name), digests(patch.after, name)
    assert before is not None
    if patch.old is not None:
        old = patch.old[name]
        is_old = current == bits(old).to(tensor.device)
        holds_old = bool(is_old.all())
        # where all new values are in, the digest after tells the same without a copy that has the old ones
        rest_matches = holds_new and after is not None and digest_as(tensor, after[0]) == after[1]
        if not rest_matches:
            restored = tensor if holds_old else with_values(tensor, index, old)
            rest_matches = digest_as(restored, before[0]) == before[1]
        return TensorState(
            holds_old=holds_old,
            holds_new=holds_new,
            num_other=int((~(is_old | is_new)).count_nonzero()),
            rest_matches=rest_matches,
        )
    holds_old = digest_as(tensor, before[0]) == before[1]
    applied = tensor if holds_new else with_values(tensor, index, patch.new[name])
    rest_matches = holds_old or (after is not None and digest_as(applied, after[0]) == after[1])
    num_other = 0 if rest_matches else int((~is_new).count_nonzero())
    return TensorState(holds_old=holds_old, holds_new=holds_new, num_other=num_other, rest_matches=rest_matches)


def examine(
    patch: PatchValues, tensors: Iterable[tuple[str, Tensor]], *, goal: Goal, allow_mismatch: bool
) -> tuple[list[str], list[str]]:
    """(tensors that are not at the goal yet, mismatches that were allowed); reads one tensor at a time.

    A name may come more than once (a tied tensor that is stored twice).

    Raises:
        PatchError: no old values to revert to; another dtype; neither the state before nor after, unless
            `allow_mismatch`. Even then, only coordinates that hold the patch's values are reverted.
    """
    if goal == "before" and patch.old is None:
        raise PatchError(
            "the patch holds no old values (it was saved with old='digest'), so it cannot be reverted. Take the "
            "original model, or a patch saved with its old values"
        )
    pending: dict[str, None] = {}
    problems, fatal = [], []  # fatal: whatever is allowed
    for name, tensor in tensors:
        dtype = patch.new[name].dtype
        if tensor.dtype != dtype:
            own, patched = dtype_name(tensor.dtype), dtype_name(dtype)
            raise PatchError(
                f"{name} is {own} in the model and {patched} in the patch. Load the model as {patched}, or convert the "
                f"patch: --dtype {own}, patch.to(torch.{own})"
            )
        state = tensor_state(patch, name, tensor)
        if not state.is_at(goal):
            pending[name] = None
        if state.num_other:
            number, total = f"{state.num_other:,}", f"{patch.selection[name].numel():,}"
            problems.append(f"{name} ({number} of its {total} coordinates hold neither the old nor the new value)")
            fatal += problems[-1:] if goal == "before" else []
        elif not state.rest_matches:
            problems.append(f"{name} (weights outside the patch differ)")
        del tensor  # before the next one is read
    if fatal and allow_mismatch:
        raise PatchError(
            f"{_differ(fatal, patch)} Only weights that hold the patch's values can be reverted; was the model trained "
            "further?"
        )
    if problems and not allow_mismatch:
        action = "apply" if goal == "after" else "revert"
        raise PatchError(
            f"{_differ(problems, patch)} Is it the model that the patch was made for? To {action} it on a fine-tuned "
            "sibling, allow it: --allow-mismatch, allow_mismatch=True"
        )
    return list(pending), problems


def _differ(problems: list[str], patch: PatchValues) -> str:
    return (
        f"the model is neither as before the patch nor as after it: {len(problems)} of {len(patch.new)} tensors "
        f"differ: {some(problems, 3)}."
    )
