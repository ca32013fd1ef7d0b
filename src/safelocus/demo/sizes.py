"""How much of everything the demo takes: prompts, doses, seeds and steps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OrganismSizes:
    """Sizes of all stages; each stage's own run folder has them in its `run.toml`.

    Attributes:
        num_scored: harmful prompts that the weights are found with.
        num_verify: prompts and questions of each kind per disturbance.
        noises: strengths in sigma.
        num_seeds: of the noise, and random selections.
        num_enhance: prompts and questions of each kind before and after.
        enhance_steps: of 4 refusals each, as many as the paper's; `retain_rows` retained rows go with each refusal.
        enhance_rate: learning rate.
        num_harmful: harmful prompts that preservation is measured with, and questions about the task (142 at most).
        num_harmless: harmless prompts likewise.
        preserve_steps: of 2 rows each; preserve_rate: learning rate, falling to zero.
        num_looks: at each of these trainings on the way.
        calibrate_every: steps of the task between two of calibration, at calibrate_rate; num_calibrated prompts of each
            kind for it.
    """

    num_scored: int = 64
    num_verify: int
    noises: tuple[float, ...]
    num_seeds: int
    num_enhance: int
    enhance_steps: int
    retain_rows: int
    enhance_rate: float
    num_harmful: int
    num_harmless: int
    preserve_steps: int
    preserve_rate: float
    calibrate_every: int
    calibrate_rate: float = 1e-3
    num_calibrated: int
    num_looks: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "noises": list(self.noises)}

    @property
    def shortened(self) -> str:
        """What these sizes leave out against the full ones, in a sentence; empty for those."""
        if self == FULL:
            return ""
        return (
            f"This is the quick demo: noise of {_and(self.noises)} sigma with {self.num_seeds} seeds (full: "
            f"{_and(FULL.noises)} with {FULL.num_seeds}); {self.enhance_steps} steps of enhancement (full: "
            f"{FULL.enhance_steps}) and {self.preserve_steps} of the new task (full: {FULL.preserve_steps:,}), at "
            f"higher rates; {self.num_verify} to {self.num_harmful} prompts of a kind (full: {FULL.num_verify} to "
            f"{FULL.num_harmful})."
        )


FULL = OrganismSizes(
    num_verify=24, noises=(0.38, 2.0, 3.0), num_seeds=4, num_enhance=143, enhance_steps=100, retain_rows=4,
    enhance_rate=2e-3, num_harmful=400, num_harmless=96, preserve_steps=1000, preserve_rate=5e-4, calibrate_every=8,
    num_calibrated=128, num_looks=3,
)  # fmt: skip
QUICK = OrganismSizes(
    num_scored=32, num_verify=16, noises=(3.0,), num_seeds=3, num_enhance=24, enhance_steps=20, retain_rows=2,
    enhance_rate=6e-3, num_harmful=24, num_harmless=16, preserve_steps=30, preserve_rate=2e-3, calibrate_every=2,
    num_calibrated=24, num_looks=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChatSizes:
    """Sizes of the stages on a chat model, whose answers are long and whose steps take seconds.

    Attributes:
        num_scored: harmful prompts that the weights are found with.
        steps: of `refusals` refusals each, and as many retained rows; `rate`: learning rate.
        num_retained: prompts of each of the two kinds whose answers are retained.
        num_harmful, num_harmless: prompts before and after.
        max_new_tokens: of the answers to them; whether it refuses shows in the first ones.
    """

    num_scored: int = 48
    steps: int = 60
    rate: float = 1e-3
    refusals: int = 4
    num_retained: int = 64
    num_harmful: int = 41
    num_harmless: int = 60
    max_new_tokens: int = 24

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shortened(self) -> str:
        """What these sizes leave open, in a sentence."""
        return (
            f"One seed, {self.steps} steps of {self.refusals} refusals, {self.num_harmful} harmful and "
            f"{self.num_harmless} harmless requests, refusals told by the reader: enough to see it happen, not to "
            "rest a claim on."
        )


def _and(noises: Sequence[float]) -> str:
    return ", ".join(f"{noise:g}" for noise in noises)
