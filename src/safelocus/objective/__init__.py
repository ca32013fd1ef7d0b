"""What S is: the expected safety of the target's behaviour, differentiable in its weights.

An objective is any callable `(target, prompts) -> scores [B]`, higher is safer, attached to the graph
of the target's weights. Shipped: `Guard`, `Classifier` (both read the target's own answers) and
`Refusal` (no second model). One with a `describe()` method is described in every artefact made with it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safelocus.objective.classifier import Classifier
from safelocus.objective.guard import Guard
from safelocus.objective.refusal import Refusal

if TYPE_CHECKING:
    from safelocus.target import Target

Objective = Callable[["Target", Sequence[str]], Tensor]

__all__ = ["Classifier", "Guard", "Objective", "Refusal", "describe"]


def describe(objective: Objective) -> dict[str, Any]:
    """What an objective is, for provenance (JSON)."""
    own = getattr(objective, "describe", None)
    if own is not None:
        return dict(own())
    name = getattr(objective, "__qualname__", type(objective).__qualname__)
    return {"kind": "callable", "name": f"{getattr(objective, '__module__', '')}.{name}"}
