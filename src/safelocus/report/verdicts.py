"""Verdicts as terminal and page show them: the paper's claims beside what a demo measured; a run's acceptance card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import dropwhile, groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from safelocus.analysis import acceptance
from safelocus.analysis import claims as judged
from safelocus.analysis.claims import Claim
from safelocus.analysis.words import capital
from safelocus.errors import RunError
from safelocus.report.blocks import Part, Section, Verdicts
from safelocus.report.grid import Grid
from safelocus.report.runs import ReportRun

TITLES = {"dense": "Dense", "moe": "Mixture of experts"}
_TONES = {
    judged.HOLDS: "good", judged.NOT_ONLY_SAFETY: "mixed", judged.CONTROLS_OPEN: "mixed",
    judged.SO_DO_CONTROLS: "mixed", judged.UNDECIDED: "open", judged.NOT_SEEN: "bad",
}  # fmt: skip
_STYLES = {"good": "bold green", "mixed": "bold yellow", "open": "bold cyan", "bad": "bold red"}  # of a terminal
_STAGES = {"locate": "Locate", "verify": "Verify", "enhance": "Enhance (SET)", "preserve": "Preserve (SPA)"}
_TITLE = "The paper's claims, and what was just measured"
_NOTE = "percent [95 % interval]; holds: all of the interval is beyond the claim's threshold"


def claims_table(claims: Mapping[str, Sequence[Claim]]) -> Table:
    """One row per claim, one column per model: the verdict, and the numbers it rests on. Fits 100 columns."""
    table = Table(
        title=_TITLE, caption=_NOTE, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
        caption_justify="left", expand=True,
    )  # fmt: skip
    table.add_column("claim", ratio=24)
    for name in claims:
        table.add_column(TITLES.get(name, name), ratio=38)
    for row in _rows(claims):
        table.add_row(Text(_words(row)), *(_cell(claim) for claim in row))
    return table


def claims_sections(run: ReportRun) -> list[Section]:
    """What stands first on the page of a demo: the story in plain words, and the claims."""
    try:
        claims = {name: [Claim.from_json(each) for each in found] for name, found in run.results["claims"].items()}
        models = [TITLES.get(name, name) for name in claims]
        stages = [(_STAGES[stage], [_row(found) for found in group]) for stage, group in groupby(_rows(claims), _stage)]
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{run.folder}: damaged claims ({error!r}); run `demo` again") from error
    organisms = set(models) <= set(TITLES.values())
    return [
        Section(
            title="Which weights make a model safe?",
            what="Two tiny chat models, built to be looked into, and the claims of a paper about large ones"
            if organisms
            else "A chat model as it was released, and the claims of a paper about larger ones",
            summary=[
                *(_STORY if organisms else _CHAT_STORY),
                _tally(claims),
                *([run.results["shortened"]] if run.results.get("shortened") else []),
            ],
            parts=[Part(title=_TITLE, notes=[_NOTE, _MEANING], blocks=[Verdicts(titles=models, stages=stages)])],
            leads=True,
        )
    ]


_STORY = (
    "A dense model and a mixture of experts were taught to refuse harmful requests; each has a twin that complies. "
    "safelocus looked for the weights that carry the refusals (locate), disturbed them (verify), trained them in the "
    "twin to refuse again (enhance), and protected them while the model learned a new task (preserve).",
)
_CHAT_STORY = (
    "The model answers nearly everything it is asked. safelocus looked for the weights that decide whether it refuses "
    "(locate), and trained only these to refuse harmful requests, and to begin its answers to harmless ones as before "
    "(enhance). What came out is a small patch, which can be applied and taken out again.",
)
_MEANING = (
    "Holds: the interval lies beyond the threshold. Not seen: it lies short of it. Not decided: it crosses it, or too "
    "little was run. Controls are as many other weights, or no protection, treated the same way: where they do as "
    "well, the choice of weights did not matter."
)


_CARD = "Acceptance card"
_CARD_NOTE = "points [95 % interval]; passes: all of the interval says so; fails: it was not shown"
_CARD_TONES = {acceptance.PASSES: "good", acceptance.FAILS: "bad", acceptance.NOT_MEASURED: "open"}


def acceptance_grid(results: Mapping[str, Any]) -> Grid | None:
    """The card of a run's results; None where it has none."""
    card = results.get("acceptance")
    if not card:
        return None
    rows = [(each["asked"], each["verdict"], each["measured"], each["todo"]) for each in card["criteria"]]
    return Grid(
        title=_CARD, headings=("question", "verdict", "measured", "what is missing"), rows=tuple(rows), num_labels=4,
        caption=". ".join([_CARD_NOTE, *(f"Left out: {said}" for said in card["left_out"])]),
    )  # fmt: skip


def acceptance_part(results: Mapping[str, Any]) -> Part | None:
    """The same, for the page."""
    card = results.get("acceptance")
    if not card:
        return None
    rows = [
        (each["asked"], [(each["verdict"], _CARD_TONES[each["verdict"]], f"{each['measured']}. {each['todo']}")])
        for each in card["criteria"]
    ]
    runs = ", ".join(f"{run['name']} (seed {run['seed']})" for run in card["runs"])
    notes = [_CARD_NOTE, f"From {runs}.", *(f"Left out: {said}." for said in card["left_out"])]
    return Part(title=_CARD, notes=notes, blocks=[Verdicts(titles=["answer"], stages=[("", rows)])])


def _tally(claims: Mapping[str, Sequence[Claim]]) -> str:
    """How often each verdict was reached, by model."""
    said = []
    for name, found in claims.items():
        counts = Counter(claim.verdict for claim in found)
        parts = [f"{verdict}: {counts[verdict]}" for verdict in judged.VERDICTS if counts[verdict]]
        said.append(f"{TITLES.get(name, name)}, {len(found)} claims. {capital('; '.join(parts))}.")
    return " ".join(said)


def _stage(found: Sequence[Claim | None]) -> str:
    return next(claim.stage for claim in found if claim is not None)


def _row(found: Sequence[Claim | None]) -> tuple[str, list[tuple[str, str, str] | None]]:
    return _words(found), [None if c is None else (c.verdict, _TONES[c.verdict], c.measured) for c in found]


def _words(found: Sequence[Claim | None]) -> str:
    """The claim; where models have different ones, all of them, what they have in common once."""
    first, *others = dict.fromkeys(claim.claim for claim in found if claim is not None)
    words = [list(zip(other.split(), [*first.split(), *other.split()])) for other in others]
    return " / ".join([first, *(" ".join(a for a, _ in dropwhile(lambda pair: pair[0] == pair[1], w)) for w in words)])


def _rows(claims: Mapping[str, Sequence[Claim]]) -> list[list[Claim | None]]:
    """One row per claim; None where a model has no such claim."""
    keys = list(dict.fromkeys(claim.key for found in claims.values() for claim in found))
    by_key = [{claim.key: claim for claim in found} for found in claims.values()]
    return [[found.get(key) for found in by_key] for key in keys]


def _cell(claim: Claim | None) -> Text:
    if claim is None:
        return Text("no such claim", style="dim")
    return Text.assemble((claim.verdict, _STYLES[_TONES[claim.verdict]]), f": {claim.measured}")
