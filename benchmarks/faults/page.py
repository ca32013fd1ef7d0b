"""`docs/results/faults.md` from the numbers of the campaigns, which stand beside it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGE, NUMBERS = RESULTS / "faults.md", RESULTS / "faults.json"


def record(campaign: str, found: dict[str, Any]) -> None:
    """Keep the numbers of a campaign, and write the page anew."""
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else {}
    numbers[campaign] = found
    NUMBERS.write_text(json.dumps(dict(sorted(numbers.items())), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(numbers), encoding="utf-8")


def page(numbers: dict[str, Any]) -> str:
    """The page's Markdown."""
    parts = [_HEAD]
    if "mutations" in numbers:
        parts.append(_mutations(numbers["mutations"]["formats"]))
    if "kills" in numbers:
        parts.append(_kills(numbers["kills"]))
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[Any]]) -> str:
    cells = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def _mutations(formats: dict[str, dict[str, int]]) -> str:
    outcomes = ["refused", "loaded", "traceback", "wrong success"]
    rows = [[name, *(counts.get(outcome, 0) for outcome in outcomes)] for name, counts in formats.items()]
    total = sum(map(Counter, formats.values()), Counter())
    rows.append([f"**{sum(total.values()):,} in all**", *(f"{total[outcome]:,}" for outcome in outcomes)])
    return f"{_MUTATIONS}\n\n{table(['format', *outcomes], rows)}"


def _kills(found: dict[str, Any]) -> str:
    outcomes = ["before it began", "resumed", "finished", "other bits", "not resumable"]
    rows = [
        [name, sum(counts.values()), *(counts.get(outcome, 0) for outcome in outcomes)]
        for name, counts in found.items()
    ]
    return f"{_KILLS}\n\n{table(['command', 'n', *outcomes], rows)}"


_HEAD = """# Faults, looked for

Campaigns of `benchmarks/faults/`, each one command; the numbers are in [faults.json](faults.json), and a small
sample of each runs in `make test` (`tests/test_faults.py`). What may happen to inputs, files and processes is one
of: an error in words, or the right result."""

_MUTATIONS = """## Damaged and forged inputs

`python benchmarks/faults/mutating.py`: bits turned, bytes put in, taken out and doubled, files cut short, values of
JSON replaced. *Refused*: by an error for users. *Loaded*: what has no digest (a text of prompts is another text
then; a forged file says what it says consistently). *Traceback*: a fault. *Wrong success*: a changed file with a
digest was loaded, a fault."""

_KILLS = """## Killed at any moment

`python benchmarks/faults/killing.py`: `kill -9` at random moments, then the same command again. *Resumed*,
*finished*, *before it began*: what the second one found; its files are, to the bit, those of a command that nobody
disturbed (times aside). Faults would be *other bits*, and *not resumable*: an error of the second command."""
