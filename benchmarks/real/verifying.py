"""Noise and zeros on the aligned twin: do the top 1 % by ESI carry its refusals, and do as many others not?

    python benchmarks/real/verifying.py

The paper's 0.38 sigma, stronger and weaker, on top, bottom and random draws, five seeds of the noise; and zeroing.
Refusals on 100 prompts of AdvBench's measured half, over-refusal on 100 of Alpaca, perplexity of 100 benign texts. One
cell per strength of the noise; each is a whole `Verification`, with its verdict.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import cells
import sets

import safelocus as sl
from safelocus.analysis.claims import verify_claims
from safelocus.model.target import Target
from safelocus.scoring.scores import Scores

TABLE = "verify"
NOISES = (0.38, 1.0, 0.1, 0.2, 0.3)
RATIO = 0.01
NUM = 100


@cache
def _scored() -> tuple[Target, Scores]:
    target = cells.subject("smollm2:aligned")
    return target, cells.scores(target, "esi")


def disturbed(how: dict[str, Any], unfinished: Path) -> dict[str, Any]:
    target, scores = _scored()
    found = sl.verify(
        target, scores, prompts=sets.advbench().limit(NUM, seed=0),
        harmless=sets.alpaca().limit(NUM, seed=0), ratios=(RATIO,), judges=cells.JUDGE,
        perplexity=sets.texts(), max_new_tokens=sets.NEW_TOKENS, checkpoint=unfinished, **how,
    )  # fmt: skip
    return {
        **cells.described(target), **found.to_json(), "claims": [claim.to_json() for claim in verify_claims(found)],
    }  # fmt: skip


def main() -> None:
    given = cells.options(__doc__).parse_args()
    work = {
        f"noise-{noise:g}": partial(disturbed, {"noises": (noise,), "seeds": 5, "random_draws": 1}) for noise in NOISES
    }
    work["zero"] = partial(disturbed, {"interventions": ("zero",), "seeds": 3})
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
