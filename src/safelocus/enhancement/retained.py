"""What `enhance` retains unless it is told otherwise, and how."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safelocus.errors import TrainingError

if TYPE_CHECKING:
    from safelocus.prompts import PromptSet

RETAINED = ("embedded:ordinary", "embedded:alarming")
# answers that are given: what held up best on the organisms
GIVEN: dict[str, Any] = {"retain_kl": 20.0, "retain_weight": 0.0, "retain_rows": 6, "answer_tokens": 64}
# how the model itself begins to answer: on a real model this cost the fewest needless refusals (docs/enhance.md)
OWN: dict[str, Any] = {"retain_kl": 0.0, "retain_weight": 1.0, "retain_rows": 1, "answer_tokens": 8}


def settled(
    given: Mapping[str, Any], sets: "Sequence[PromptSet]", *, own_answers: bool, lexicon: bool
) -> dict[str, Any]:
    """How to retain these sets: as given, and what is None as suits the model's own answers or those of others.

    Args:
        given: `retain_kl`, `retain_weight`, `retain_rows`, `answer_tokens`, among others.
        own_answers: in place of those given.
        lexicon: what it learns may be its own answers too, which should be whole.

    Raises:
        TrainingError: what is retained would have no weight, or a negative one, or no rows.
    """
    is_own = own_answers or not any(part.is_answered for part in sets)
    suited = OWN if is_own and not lexicon else GIVEN
    found = {name: default if given[name] is None else given[name] for name, default in suited.items()}
    for name, least in (("retain_kl", 0), ("retain_weight", 0), ("retain_rows", 1), ("answer_tokens", 1)):
        if not found[name] >= least:
            raise TrainingError(f"{name} (--{name.replace('_', '-')}) is at least {least}, found {found[name]}")
    if sets and not found["retain_kl"] and not found["retain_weight"]:
        raise TrainingError(
            "what is retained has no weight: retain_weight (--retain-weight) and retain_kl (--retain-kl) are both 0, "
            f"of which {'the latter' if suited is OWN else 'the former'} is the default here. Give one of them, or "
            "retain nothing (retain=None, --retain none)"
        )
    return found
