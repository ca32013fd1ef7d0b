"""Verification: do the selected weights carry safety, and only that? Disturb them, and controls, and look.

`verify` measures; a `Verification` holds the cells, pools them over seeds, ranks scorers and says a verdict.
`stability` asks how far a selection depends on prompts, seeds and the objective.
"""

from safelocus.verification.agreement import Stability, stability
from safelocus.verification.cells import Cell, Setting
from safelocus.verification.interventions import Intervention, Noise, Transplant, Zero, intervening
from safelocus.verification.result import Verification
from safelocus.verification.run import verify
from safelocus.verification.verdict import VerificationVerdict

__all__ = [
    "Cell", "Intervention", "Noise", "Setting", "Stability", "Transplant", "Verification", "VerificationVerdict",
    "Zero", "intervening", "stability", "verify",
]  # fmt: skip
