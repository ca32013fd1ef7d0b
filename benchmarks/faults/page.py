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
    if "disturbances" in numbers:
        parts.append(_disturbances(numbers["disturbances"]))
    if "poisons" in numbers:
        parts.append(_poisons(numbers["poisons"]))
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


def _disturbances(found: dict[str, dict[str, dict[str, int]]]) -> str:
    rows = [
        [name, kind, sum(counts.values()), *(_sum(counts, *outcomes) for outcomes in _OUTCOMES.values())]
        for kind, commands in found.items()
        for name, counts in commands.items()
    ]
    return f"{_DISTURBANCES}\n\n{table(['command', 'disturbed by', 'n', *_OUTCOMES], rows)}"


def _poisons(found: dict[str, dict[str, dict[str, int]]]) -> str:
    outcomes = ["refused", "counted", "no effect", "traceback", "silent"]
    rows = [
        [name, place, sum(counts.values()), *(counts.get(outcome, 0) for outcome in outcomes)]
        for name, places in found.items()
        for place, counts in places.items()
    ]
    return f"{_POISONS}\n\n{table(['command', 'place', 'n', *outcomes], rows)}"


def _sum(counts: dict[str, int], *outcomes: str) -> int:
    return sum(counts.get(outcome, 0) for outcome in outcomes)


_OUTCOMES = {
    "begun anew": ("before it began",),
    "resumed": ("resumed",),
    "finished": ("finished", "one of two", "one after the other"),
    "faults": ("other bits", "not resumable", "traceback", "litter"),
}

_HEAD = """# Faults, looked for

Campaigns of `benchmarks/faults/`, each one command; the numbers are in [faults.json](faults.json), and a small
sample of each runs in `make test` (`tests/test_faults.py`). What may happen to inputs, files and processes is one
of: an error in words, or the right result."""

_MUTATIONS = """## Damaged and forged inputs

`python benchmarks/faults/mutating.py`: bits turned, bytes put in, taken out and doubled, files cut short, values of
JSON replaced. *Refused*: by an error for users. *Loaded*: what has no digest (a text of prompts is another text
then; a forged file says what it says consistently). *Traceback*: a fault. *Wrong success*: a changed file with a
digest was loaded, a fault."""

_DISTURBANCES = """## Killed, out of space, frozen, twice

`python benchmarks/faults/killing.py`: every command is disturbed at a random moment, and then given again. *kill*:
SIGKILL, half of the times after a random time, half of them just before a random change of the file system. *full*:
from a random change on there is no space. *frozen*: from then on nothing can be written, renamed or removed.
*twice*: started twice at once into one place. *Begun anew*, *resumed*, *finished*: what the second command did; its
files are, to the bit, those of a command that nobody disturbed (but for times). *Faults*: other bits, an error of
the second command, a traceback of the first, or files left that nobody needs. *Saving*: killed just before a random
change within the model, or adapter, that is saved."""

_POISONS = """## NaN and infinity

`python benchmarks/faults/poisoning.py`: one value, or a token's, becomes NaN, infinite or negatively infinite at a
random moment: in logits and activations of a model or guard, in weights (for good), in gradients, in losses, in a
guard's log-odds. *Refused*: an error that speaks of it. *Counted*: answers that failed, or could not be judged, are
more than without it. *No effect*: the same files, to the bit. *Traceback*, and *silent* (other files, and nothing says
why), are faults."""
