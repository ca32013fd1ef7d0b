"""What `enhance` retains unless it is told otherwise, and how."""

from collections.abc import Mapping
from typing import Any

RETAINED = ("embedded:ordinary", "embedded:alarming")
# to answers that are given: what held up best on the organisms
GIVEN: dict[str, Any] = {"retain_kl": 20.0, "retain_weight": 0.0, "retain_rows": 6, "answer_tokens": 64}
# to how the model itself begins to answer: what told harm apart best on a real model (docs/enhance.md)
OWN: dict[str, Any] = {"retain_kl": 0.0, "retain_weight": 1.0, "retain_rows": 1, "answer_tokens": 8}


def settled(given: Mapping[str, Any], *, own: bool, lexicon: bool) -> dict[str, Any]:
    """How to retain: as given, and what is None as suits the model's own answers (`own`) or those of others.

    lexicon: what it learns may be its own answers too, which should be whole.
    """
    suited = OWN if own and not lexicon else GIVEN
    return {name: default if given[name] is None else given[name] for name, default in suited.items()}
