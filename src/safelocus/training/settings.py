"""How to train: one frozen record that `enhance`, `preserve` and every control share."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from safelocus.errors import TrainingError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training run.

    Attributes:
        steps: optimizer steps.
        learning_rate: its peak.
        schedule: what it does after the warm-up: stay, or fall to zero along a line or a cosine.
        warmup_steps: steps in which it rises from zero.
        batch_size: rows per forward pass.
        accumulation: forward passes per optimizer step.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; None and 0 leave them.
        max_length: tokens of a row; longer responses are cut, rows whose prompt alone is longer are left out.
        activation_checkpointing: compute activations twice, store few of them.
        seed: of the order of the rows, and of everything random in the model.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_length: int = 1024
    activation_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "max_length"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is at least 1, found {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise TrainingError(f"learning_rate is a positive number, found {self.learning_rate}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise TrainingError(f"warmup_steps is 0 to steps ({self.steps}), found {self.warmup_steps}")
        if not 0 <= self.weight_decay < float("inf"):
            raise TrainingError(f"weight_decay is a number of at least 0, found {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise TrainingError(
                f"max_grad_norm is at least 0, and 0 or None leaves gradients as they are; found {self.max_grad_norm}"
            )
        if self.schedule not in get_args(Schedule):
            raise TrainingError(f"schedule {self.schedule!r}: expected {', '.join(get_args(Schedule))}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
