"""One patch from several that were made for the same model.

The coordinates are the union. Where two patches set one weight to different values, that is an error, or the
first (or last) patch wins. What a tensor's digest is with several patches in it is not known without the model, so
the merged patch recognises such a tensor by its old values and its digest from before alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from safelocus.errors import PatchError, some
from safelocus.model.fingerprint import bits
from safelocus.patch.patch import Patch

Prefer = Literal["first", "last"]


def merge(patches: Sequence[Patch], *, prefer: Prefer | None = None) -> Patch:
    """The union of patches of the same base.

    Args:
        patches: two or more, each with its old values.
        prefer: whose value is taken where two set the same weight differently; None: that is an error.

    Raises:
        PatchError: other bases or dtypes, conflicts, or no old values.
        SelectionError: the patches' models have tensors of other shapes.
    """
    if len(patches) < 2:
        raise PatchError("give two or more patches to merge")
    if prefer not in (None, "first", "last"):
        raise PatchError(f"prefer={prefer!r}: expected 'first' or 'last'")
    merged = patches[0]
    for number, patch in enumerate(patches[1:], start=2):
        merged = _merge_two(merged, patch, prefer, f"patch {number}")
    metadata = {"made_by": "patch merge", "prefer": prefer, "patches": [patch.metadata for patch in patches]}
    return replace(merged, metadata=metadata)


def _merge_two(first: Patch, second: Patch, prefer: Prefer | None, label: str) -> Patch:
    if first.old is None or second.old is None:
        raise PatchError("patches without old values (saved with old='digest') cannot be merged")
    _check_same_base(first, second, label)
    selection = first.selection.combine(second.selection, "|", allow_mismatch=True)
    new, old, num_conflicts, in_conflict = dict(first.new), dict(first.old), 0, []
    for name in second.new:
        if name not in first.new:
            new[name], old[name] = second.new[name], second.old[name]
            continue
        ours, theirs = first.selection[name], second.selection[name]
        conflicts = _num_differing(ours, first.new[name], theirs, second.new[name])
        num_conflicts += conflicts
        in_conflict += [name] * bool(conflicts)
        target = selection[name]
        new[name] = _overlay(target, (ours, first.new[name]), (theirs, second.new[name]), last_wins=prefer == "last")
        old[name] = _overlay(target, (ours, first.old[name]), (theirs, second.old[name]), last_wins=False)
    if num_conflicts and prefer is None:
        raise PatchError(
            f"{label} sets {num_conflicts:,} weights to other values than the patches before it, in "
            f"{len(in_conflict)} tensors ({some(in_conflict, 3)}). Say which wins: --prefer first|last, prefer="
        )
    alone = {**first.after.tensors, **second.after.tensors}
    known = {name: entry for name, entry in alone.items() if not (name in first.new and name in second.new)}
    return replace(
        first,
        selection=selection,
        new=new,
        old=old,
        before=replace(first.before, tensors={**first.before.tensors, **second.before.tensors}),
        after=replace(first.after, tensors=known),
    )


def _num_differing(ours: Tensor, first: Tensor, theirs: Tensor, second: Tensor) -> int:
    """Of two tensors' values at indices that both have."""
    where = torch.searchsorted(ours, theirs).clamp_(max=ours.numel() - 1)
    shared = ours[where] == theirs
    return int((bits(first)[where[shared]] != bits(second)[shared]).count_nonzero())


def _overlay(target: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, last_wins: bool) -> Tensor:
    """Values at `target`, the union of both indices; where both have one, the first's or the last's."""
    values = torch.empty(target.shape, dtype=first[1].dtype)
    for index, given in (first, second) if last_wins else (second, first):
        bits(values)[torch.searchsorted(target, index)] = bits(given)
    return values


def _check_same_base(first: Patch, second: Patch, label: str) -> None:
    # other values of a configuration say nothing: trainers change them (special tokens, caches)
    if first.before.model_type != second.before.model_type:
        raise PatchError(
            f"{label} was made for another architecture ({second.before.model_type}, not {first.before.model_type}); "
            "patches of one base can be merged"
        )
    common = [name for name in second.new if name in first.new]
    if mixed := [name for name in common if first.new[name].dtype != second.new[name].dtype]:
        raise PatchError(
            f"{label} holds {mixed[0]} in another dtype; convert it: patch.to({first.new[mixed[0]].dtype})"
        )
    if differing := [name for name in common if _are_apart(first, second, name)]:
        raise PatchError(
            f"{label} was made for another base: {len(differing)} of {len(common)} tensors that both touch were "
            f"different before, first of them {differing[0]}. Make it again for the same base"
        )


def _are_apart(first: Patch, second: Patch, name: str) -> bool:
    """Whether a tensor was another one before: by its digests; where these are of two dtypes, by the old values."""
    assert first.old is not None
    assert second.old is not None
    ours, theirs = first.before.tensors[name], second.before.tensors[name]
    if ours[1] == theirs[1] or ours[0] != theirs[0]:
        return ours != theirs
    return _num_differing(first.selection[name], first.old[name], second.selection[name], second.old[name]) > 0
