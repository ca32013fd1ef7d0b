"""Bytes of one stage, and how they are shared by several devices; and the tokens of its rows.

    need = what stands all the time + the largest of the phases that come one after another

Input: the parts, from `memory`. Output: a `Need`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from safelocus.resources.rehearsal import Peak


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one stage on one device, and beside it.

    Attributes:
        standing: name -> bytes that are there all the time.
        phases: name -> bytes that come and go, one after another.
        host: name -> bytes on the CPU, where the model lies on an accelerator.
    """

    standing: Mapping[str, int]
    phases: Mapping[str, Peak]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.standing.values()) + self.phases[self.largest_phase].total

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total)

    def on_host(self) -> "Need":
        """The same where the device is the CPU: what would lie beside the device is on it."""
        return replace(self, standing={**self.standing, **self.host}, host={})

    def offloaded(self, *, gathered: int) -> "Need":
        """The same with weights, and all that is kept of them, on the host; `gathered` bytes of them come at a time."""
        guard = {name: size for name, size in self.standing.items() if name.startswith("guard")}
        rest = {name: size for name, size in self.standing.items() if name not in guard}
        return replace(self, standing={"gathered layers": gathered, **guard}, host={**rest, **self.host})

    def spread(self, count: int, *, gathered: int | None = None) -> "Need":
        """The share of each of several devices. Shards are gathered to compute with, and every process has a guard."""
        sharded = gathered is not None
        standing = {
            name: size if sharded and name.startswith(("guard", "gathered")) else -(-size // count)
            for name, size in self.standing.items()
        }
        if gathered is not None:
            shards = {name: replace(peak, gradients=-(-peak.gradients // count)) for name, peak in self.phases.items()}
            return replace(self, standing=standing | {"gathered layers": gathered}, phases=shards)
        # layers, and with them what they keep, are divided; the head's logits are on one device
        parts = {
            name: Peak(-(-peak.activations // count), peak.logits, -(-peak.gradients // count))
            for name, peak in self.phases.items()
        }
        return replace(self, standing=standing, phases=parts)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens.

    Attributes:
        prompt, response: of a prompt in its template, and of an answer.
        row: of a training row, at most.
        retained: of a row to retain.
    """

    prompt: int = 64
    response: int = 256
    row: int = 512
    retained: int | None = None

    @property
    def both(self) -> int:
        return self.prompt + self.response
