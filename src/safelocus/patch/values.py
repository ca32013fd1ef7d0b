"""What a patch holds: coordinates, the values there before and after, and digests of the tensors around them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from safelocus.errors import PatchError
from safelocus.model.fingerprint import Fingerprint
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
