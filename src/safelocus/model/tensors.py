"""What selections and scores have in common: a tensor for each canonical name of a model's tensors."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from safelocus.model.layout import canonical_name


class TensorMapping(Mapping[str, Tensor]):
    """A mapping over canonical tensor names, in the layout's order; wrapped names (PEFT, torch.compile) find the same.

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
