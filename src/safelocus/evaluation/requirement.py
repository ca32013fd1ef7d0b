"""What a pipeline requires of a model, such as `asr<=0.05`: held only where the whole interval holds it.

    <=, <    the high end of the measure's 95 % interval is
    >=, >    the low end is

A measure without an interval (nothing could be observed, or one mean alone) meets nothing.
"""

import math
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from safelocus.errors import SafelocusError
from safelocus.evaluation.measures import Measure
from safelocus.evaluation.result import PERPLEXITY

_HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_SPELLED = re.compile(r"\s*(?P<measure>[^<>=]*?)\s*(?P<comparison><=|>=|<|>)\s*(?P<bound>[^<>=\s]+)\s*")
_NO_SHARES = (PERPLEXITY, "kl")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One measure and its bound.

    Attributes:
        measure: by its name among `Evaluation.measures`.
        comparison: one of <=, >=, <, >.
        bound: between 0 and 1, but for perplexity and kl.
    """

    measure: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `asr<=0.05`.

        Raises:
            SafelocusError: that is no requirement.

        Example:
            >>> str(Requirement.parse("asr <= 0.05"))
            'asr<=0.05'
        """
        found = _SPELLED.fullmatch(text)
        try:
            bound = float(found["bound"]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or not found["measure"] or not math.isfinite(bound):
            raise SafelocusError(f"--require {text!r}: expected a measure, <= or >=, and a number, such as asr<=0.05")
        if found["measure"] not in _NO_SHARES and not 0 <= bound <= 1:
            raise SafelocusError(f"--require {text!r}: {found['measure']} is a share; expected a bound from 0 to 1")
        return cls(measure=found["measure"], comparison=found["comparison"], bound=bound)

    def __str__(self) -> str:
        return f"{self.measure}{self.comparison}{self.bound:g}"

    def check(self, known: Collection[str]) -> None:
        """SafelocusError where no such measure will be made."""
        if self.measure not in known:
            raise SafelocusError(
                f"--require {self}: this evaluation has no measure {self.measure!r}; expected one of {', '.join(known)}"
            )

    def judge(self, measures: Mapping[str, Measure]) -> "Judged":
        """Whether it is met, and by what."""
        measure = measures.get(self.measure)
        holds, is_most = _HOLDS[self.comparison], self.comparison.startswith("<")
        end = None if measure is None else measure.high if is_most else measure.low
        if measure is None or measure.value is None:
            return Judged(requirement=self, met=False, reason=f"{self.measure}: nothing could be scored")
        if end is None:
            return Judged(requirement=self, met=False, reason=f"{self.measure} is {measure}, without an interval")
        met = bool(holds(end, self.bound))
        reason = f"{self.measure} is {measure}" + ("" if met else f", so it may be {end:.3f}")
        if not met and holds(measure.value, self.bound):
            reason += "; more prompts would narrow that"
        return Judged(requirement=self, met=met, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Of a requirement.

    Attributes:
        reason: what was measured, in words.
    """

    requirement: Requirement
    met: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"requirement": str(self.requirement), "met": self.met, "reason": self.reason}

    def __str__(self) -> str:
        return f"requirement {self.requirement} {'met' if self.met else 'NOT met'}: {self.reason}"
