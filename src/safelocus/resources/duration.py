"""Rough time of each stage, and what limits it.

    forward           2 * active weights * tokens operations
    backward          as much again for activations, and again for the weights that get a gradient
    generation        per token of a batch: the larger of reading the weights once, and of 2 * active weights * batch

Devices reach some part of the rates on their data sheets: below, a guess that fits well-tuned kernels. Expect the true
time within a factor of three; small models, short texts and slow interconnects take longer.
"""

from dataclasses import dataclass

from safelocus.resources.choosing import Choice
from safelocus.resources.memory import GUARD_TEMPLATE, Answering, Scoring, Training
from safelocus.resources.passes import OPENING_TOKENS, OPENINGS
from safelocus.resources.subject import Subject

_OF_FLOPS, _OF_BANDWIDTH = 0.4, 0.6  # of the rates at best


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of each part, and of what each is limited by.

    Attributes:
        seconds: part -> seconds.
        bound: part -> "operations" or "bytes".
    """

    seconds: dict[str, float]
    bound: dict[str, str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def longest(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        share = self.seconds[self.longest] / self.total if self.total else 0
        return f"about {in_words(self.total)}; {share:.0%} is {self.longest}, limited by {self.bound[self.longest]}"


def scoring_duration(scoring: Scoring, choice: Choice, num_prompts: int) -> Duration:
    """Of scoring so many prompts."""
    target, lengths, batch = scoring.target, scoring.lengths, choice.batch_size
    tokens = lengths.both if scoring.guard is not None else OPENINGS * (lengths.prompt + OPENING_TOKENS)
    parts = {"forward and backward": (_seconds(target, choice, 6 * num_prompts * tokens), "operations")}
    if scoring.guard is not None:
        read = lengths.both + GUARD_TEMPLATE
        parts["generation"] = _generation(target, choice, num_prompts, lengths.prompt, lengths.response, batch)
        parts["guard's reading"] = (_seconds(scoring.guard, choice, 4 * num_prompts * read), "operations")
    return _duration(parts)


def answering_duration(answering: Answering, choice: Choice, num_prompts: int) -> Duration:
    """Of answering so many prompts, every answer as long as it may be, and judging them."""
    lengths = answering.lengths
    parts = {
        "generation": _generation(
            answering.target, choice, num_prompts, lengths.prompt, lengths.response, choice.batch_size
        )
    }
    if answering.guards:
        tokens = num_prompts * (lengths.both + GUARD_TEMPLATE)
        seconds = sum(_seconds(guard, choice, 2 * tokens) for guard in answering.guards)
        parts["guard's reading"] = (seconds, "operations")
    return _duration(parts)


def training_duration(training: Training, choice: Choice, steps: int) -> Duration:
    """Of so many steps, without what is measured before, between and after."""
    lengths, rows = training.lengths, choice.batch_size * choice.accumulation
    retained = rows * training.retained_rows * (lengths.retained or lengths.row)
    passes = 8 if choice.checkpointing else 6
    operations = steps * (passes * rows * lengths.row + (passes + 2) * retained)
    return _duration({"training": (_seconds(training.target, choice, operations), "operations")})


def _duration(parts: dict[str, tuple[float, str]]) -> Duration:
    return Duration(
        seconds={name: seconds for name, (seconds, _) in parts.items()},
        bound={name: bound for name, (_, bound) in parts.items()},
    )


def _seconds(subject: Subject, choice: Choice, operations_per_weight: float) -> float:
    """Layers on several devices work one after another; shards work at the same time."""
    at_once = choice.placement.count if choice.placement.sharded else 1
    rate = choice.device.rates.flops(subject.weight_bytes) * _OF_FLOPS * at_once
    return operations_per_weight * subject.num_active / rate


def _generation(
    subject: Subject, choice: Choice, num_prompts: int, prompt: int, response: int, batch: int
) -> tuple[float, str]:
    batches = -(-num_prompts // batch)
    reading = subject.read_per_step(batch) / (choice.device.rates.bandwidth * _OF_BANDWIDTH)
    computing = _seconds(subject, choice, 2 * batch)
    prefill = _seconds(subject, choice, 2 * num_prompts * prompt)
    bound = "bytes" if reading > computing else "operations"
    return batches * response * max(reading, computing) + prefill, bound


def in_words(seconds: float) -> str:
    """A rough time.

    >>> in_words(0.2), in_words(95), in_words(9000)
    ('a second', '2 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"
