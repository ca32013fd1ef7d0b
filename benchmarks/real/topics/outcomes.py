"""What the cells hold, as numbers, and how the pages write them."""

import math
from collections.abc import Sequence
from typing import Any

import cells
import enhancing
import numpy as np

from safelocus.analysis.words import interval
from safelocus.evaluation.measures import Measure, mean
from safelocus.verification.pooling import level

Cell = dict[str, Any]
PAGES = cells.ROOT / "docs" / "results"
SOURCES = ("harmbench", "advbench", "xstest_unsafe", "xstest_safe", "alpaca", "ag_news", "pubmedqa")
HEADINGS = ("HarmBench", "AdvBench", "XSTest unsafe", "XSTest safe", "Alpaca", "AG News", "PubMedQA", "perplexity")
NAMES = {
    "esi": "ESI", "random": "random", "gradient": "gradient", "snip": "SNIP", "magnitude": "magnitude",
    "lora": "LoRA of equal size", "full": "all weights", "before": "before",
}  # fmt: skip
NAMES |= {method: f"{NAMES[method.partition(' ')[0]]}, {method.partition(' ')[2]}" for method in enhancing.VARIANTS}


def outcomes(found: Sequence[Cell], source: str) -> np.ndarray:
    """[seeds, prompts]: 1 refused or right, 0 not, NaN failed."""
    marks = {"1": 1.0, "0": 0.0, "-": math.nan}
    return np.array([[marks[mark] for mark in cell["outcomes"][source]] for cell in found])


def perplexity(found: Sequence[Cell], source: str = "texts") -> str:
    """exp of the mean nats per token: "12.3 [11.8,12.9]"; over texts, of several seeds the mean of each."""
    measure = mean(_nats(found, source).tolist())
    assert measure.value is not None
    assert measure.low is not None
    assert measure.high is not None
    return f"{math.exp(measure.value):.2f} [{math.exp(measure.low):.2f},{math.exp(measure.high):.2f}]"


def learned(found: Sequence[Cell], bare: Sequence[Cell], before: Cell, than: Sequence[Cell] | None = None) -> Measure:
    """Of the task (the fall of its log perplexity), as a share of what training alone, `bare`, learns; by text.

    Args:
        than: how much more than these.
    """
    own, alone, first, other = (
        _nats(cells, "task") for cells in (found, bare, [before], bare if than is None else than)
    )
    return mean(((than is None) + (other - own) / np.mean(first - alone)).tolist())


def _nats(found: Sequence[Cell], source: str) -> np.ndarray:
    """[texts], per token; of several seeds their mean."""
    nats: np.ndarray = np.nanmean(np.array([cell["nats"][source] for cell in found], float), axis=0)
    return nats


def rates(found: Sequence[Cell]) -> list[str]:
    return [interval(level(outcomes(found, source))) for source in SOURCES]


def numbers(cell: Cell) -> str:
    counts = [(source, len(cell["outcomes"][source])) for source in SOURCES]
    return ", ".join(f"{heading} {n}" for heading, (_, n) in zip(HEADINGS, counts, strict=False))


def negative(change: Measure) -> Measure:
    low, high = (None if end is None else -end for end in (change.high, change.low))
    return Measure(value=None if change.value is None else -change.value, low=low, high=high, n=change.n)


def origin(cell: Cell) -> str:
    return f"from the {cell['from']['source']}, weights {cell['from']['weights']}; computed in {cell['dtype']}"


def told(module: Any) -> str:
    """What a command says of itself, for its page."""
    _, call, *text = (module.__doc__ or "").strip().split("\n\n")
    return f"Made by `{call.strip()}`. " + " ".join(" ".join(text).split()) + " Refusals by the matcher of openings."
