"""Where scores, and whatever is made from them, come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What scores were made from. Plain JSON values; unknown things are None.

    Attributes:
        method: "esi", "snip", ...; "manual" for coordinates that no scores stand behind.
        model, prompts: as they were given.
        objective: what S was, as `objective.describe` tells it.
        prompts_hash, num_prompts, seed: of the scoring.
        fingerprint: `Fingerprint.to_json()` of the target.
        versions: package -> version.
        extra: anything else worth keeping.
    """

    method: str = "manual"
    model: str | None = None
    objective: dict[str, Any] | None = None
    prompts: str | None = None
    prompts_hash: str | None = None
    num_prompts: int | None = None
    seed: int | None = None
    fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def objective_label(self) -> str | None:
        """The objective in a few words: "guard meta-llama/Llama-Guard-3-8B"."""
        if self.objective is None:
            return None
        return " ".join(str(self.objective[key]) for key in ("kind", "name") if key in self.objective)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)
