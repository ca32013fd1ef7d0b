"""What S is: the expected safety of the target's behaviour, differentiable in its weights.

An objective is any callable `(target, prompts) -> scores [B]`, higher is safer, attached to the graph
of the target's weights. Shipped: `Guard`, `Classifier` (both read the target's own answers), `Lexicon` (how many listed
expressions those are expected to hold) and `Refusal` (no answers, and as `Lexicon` no second model). One with a
`describe()` method is described in every artefact made with it. Prompts are strings that know their row's own system
message (`prompts.Prompt`); the target's chat format renders it with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safelocus.errors import ModelError
from safelocus.objective.classifier import Classifier
from safelocus.objective.guard import Guard
from safelocus.objective.lexicon import Lexicon
from safelocus.objective.refusal import Refusal

if TYPE_CHECKING:
    from safelocus.model.target import Target

Objective = Callable[["Target", Sequence[str]], Tensor]

__all__ = ["Classifier", "Guard", "Lexicon", "Objective", "Refusal", "describe", "remake"]


def describe(objective: Objective) -> dict[str, Any]:
    """What an objective is, for provenance (JSON)."""
    own = getattr(objective, "describe", None)
    if own is not None:
        return dict(own())
    name = getattr(objective, "__qualname__", type(objective).__qualname__)
    return {"kind": "callable", "name": f"{getattr(objective, '__module__', '')}.{name}"}


def remake(
    described: Mapping[str, Any], *, description: Path | None = None, reader: Guard | None = None, **load: Any
) -> Objective:
    """The objective that `describe` told of, with all of its settings.

    Args:
        description: of a guard unknown here.
        reader: a guard that is loaded already; used where it is the one described.
        load: where and how to load its model: device, trust_remote_code.

    Raises:
        ModelError: it is not one of those shipped, is not described in full, or its model is not what it was.
        WordListError: its list of expressions came from memory, or is not what it was.
    """
    kind = described.get("kind")
    try:
        if kind == "refusal":
            return Refusal(refusals=described["refusals"], compliances=described["compliances"])
        if kind == "lexicon":
            return Lexicon.remade(described)
        if kind not in ("guard", "classifier"):
            raise ModelError(f"an objective of kind {kind!r} cannot be made anew from its description; score with it")
        settings = {name: described[name] for name in ("dtype", "max_new_tokens", "tau", "gumbel_seed")}
        settings["variant"] = None if described["transfer"] == "automatic" else described["transfer"]
        if kind == "guard" and reader is not None and reader.is_the_one(described):
            del settings["dtype"]
            return replace(reader, **settings)
        made: Guard | Classifier
        if kind == "guard":
            made = Guard.load(described["name"], description=description, **settings, **load)
        else:
            load.pop("trust_remote_code", None)
            settings["multi_label"] = described.get("multi_label")  # earlier versions did not tell
            made = Classifier.load(described["name"], unsafe=described["unsafe"], **settings, **load)
        if not made.is_the_one(described):
            raise ModelError(
                f"{described['name']}: not the {kind} that the scores were made with: its weights are others, or how "
                "it is asked; bring that one back, or score again"
            )
        return made
    except KeyError as missing:
        raise ModelError(f"the {kind} objective's {missing} is not recorded, so it cannot be made anew") from missing
