"""A patch from two checkpoints: what changed from one to the other, all of it or the largest changes.

    diff("base", "aligned", largest=80_000_000)     # the K weights with the largest |after - before|

Both are read tensor by tensor, as the tensors are in memory: two tensors at a time, and 8 bytes of index and
both values for every weight taken. K weights are found in four passes over the files (one counts what changed, for
the others see `topk`), all changed weights in one; a last pass reads the values. Changes are compared in fp32;
ties fall by tensor order, then flat index. A change of sign of a zero is a change of size 0.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from safelocus.errors import PatchError, some
from safelocus.model.fingerprint import bits
from safelocus.patch.checkpoint import Checkpoint
from safelocus.patch.patch import Patch
from safelocus.patch.state import with_values
from safelocus.progress import track
from safelocus.run.identity import Provenance
from safelocus.selection import topk
from safelocus.selection.ratio import count_for_ratio
from safelocus.selection.selection import Selection


def diff(
    before: str | Path,
    after: str | Path,
    *,
    ratio: float | None = None,
    largest: int | None = None,
    only_eligible: bool = False,
    layout: Path | None = None,
    skip_unknown: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Patch:
    """The patch that turns one checkpoint into another, or goes the largest steps of that way.

    Args:
        before, after: folder, hub id or `organism:NAME`, of the same architecture and dtype.
        ratio: take at most this share of all the model's weights, those that changed most.
        largest: the same, as a number. Neither: every weight that changed.
        only_eligible: leave out embeddings, norms, biases and routers, changed as they may be.
        layout: TOML file that describes an architecture unknown here.
        skip_unknown: what is not understood is not eligible, instead of an error.
        revision: of both, on the hub.

    Raises:
        PatchError: tensors with other shapes or dtypes, or that only one has (names are listed); no change.
        NumericalError: NaN or infinity among the weights, where the largest changes are asked for.
    """
    if ratio is not None and largest is not None:
        raise PatchError("give a ratio or a number of weights, not both")
    if largest is not None and largest < 1:
        raise PatchError(f"the number of weights must be at least 1, found {largest}")
    how = {"revision": revision, "layout": layout, "skip_unknown": skip_unknown}
    first, second = (Checkpoint.open(name, **how) for name in (before, after))  # type: ignore[arg-type]
    changes = _Changes(first, second, only_eligible=only_eligible, progress=progress)
    k = largest if ratio is None else count_for_ratio(first.layout, ratio, num_eligible=first.layout.num_weights)
    coordinates = changes.all() if k is None else changes.largest(k)
    if not coordinates:
        which = "eligible weights, whatever else changed (--eligible)" if only_eligible else "weights"
        raise PatchError(f"{before} and {after} hold the same {which}: there is nothing to put into a patch")
    selection = Selection(
        coordinates=coordinates,
        layout=first.layout,
        provenance=Provenance(method="diff", model=str(before)),
        ratio=ratio,
        of=None if ratio is None else "model",
        num_requested=k,
        only_eligible=only_eligible,
    )
    return Patch.between(
        first.model.config, selection, changes.at(selection),
        metadata={"made_by": "patch diff", "before": first.name, "after": second.name},
    )  # fmt: skip


class _Changes(Mapping[str, Tensor]):
    """Name -> |after - before| of every weight, fp32, -inf where no bit changed; computed when asked for."""

    def __init__(self, first: Checkpoint, second: Checkpoint, *, only_eligible: bool, progress: bool) -> None:
        self.first, self.second = first, second
        self._progress = progress
        _check_same(first, second)
        # what neither has in its files is computed anew whenever the model is loaded (sinusoidal positions)
        self._names = [
            name
            for name, tensor in first.layout.tensors.items()
            if first.holds(name) and (tensor.eligible or not only_eligible)
        ]

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        yield from track(self._names, "compare", enabled=self._progress)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        before, after = (checkpoint.tensor(checkpoint.forms(name)[0]) for checkpoint in (self.first, self.second))
        if before.dtype != after.dtype:
            raise PatchError(
                f"{name} is {before.dtype} in {self.first.name} and {after.dtype} in {self.second.name}; convert "
                "one of them, and save it, first"
            )
        return before, after

    def __getitem__(self, name: str) -> Tensor:
        before, after = self.pair(name)
        size = (after.float() - before.float()).abs_()
        return size.masked_fill_(bits(before) == bits(after), -torch.inf)

    def all(self) -> dict[str, Tensor]:
        found = {}
        for name in self:
            before, after = (bits(tensor).flatten() for tensor in self.pair(name))
            found[name] = (before != after).nonzero().flatten()
        return {name: index for name, index in found.items() if index.numel()}

    def at(self, selection: Selection) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the tensor before, and the same with what the selected weights became."""
        for name, index in selection.coordinates.items():
            before, after = self.pair(name)
            yield name, before, with_values(before, index, bits(after).take(index).view(after.dtype))

    def largest(self, k: int) -> dict[str, Tensor]:
        num_changed = sum(topk.count_eligible(self[name]) for name in self)
        return topk.pick(self, min(k, num_changed)).indices


def _check_same(first: Checkpoint, second: Checkpoint) -> None:
    ours, theirs = first.layout.tensors, second.layout.tensors
    differing = []
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = (list(t[name].shape) if name in t else "missing" for t in (ours, theirs))
        if one != other:
            differing.append(f"{name} ({one} against {other})")
        elif first.holds(name) != second.holds(name):
            differing.append(f"{name} (only in the files of {(first if first.holds(name) else second).name})")
    if differing:
        raise PatchError(
            f"{first.name} and {second.name} are models of other shapes: {len(differing)} tensors differ: "
            f"{some(differing, 3)}. A patch changes values only"
        )
