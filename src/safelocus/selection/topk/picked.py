"""What was picked, whichever way: a frozen `Picked`."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Picked:
    """Coordinates taken from a stream of tensors; tensors from which nothing was taken are left out.

    `indices`: name -> int64 [k of this tensor], flat, ascending. `scores`: name -> float32, aligned.
    `num_groups`: how many groups were taken, where groups were ranked instead of weights.
    """

    indices: dict[str, Tensor]
    scores: dict[str, Tensor]
    num_groups: int | None = None

    @property
    def num_weights(self) -> int:
        return sum(index.numel() for index in self.indices.values())

    def cpu(self) -> "Picked":
        """The same on the CPU."""
        return replace(
            self,
            indices={name: index.cpu() for name, index in self.indices.items()},
            scores={name: score.cpu() for name, score in self.scores.items()},
        )
