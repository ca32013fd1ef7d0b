"""The stages on a chat model as it is: locate, enhance (SET), apply the patch and take it out again.

No guard: weights are found by refusal openings, refusals are told by the refusal reader. Everything that is asked and
trained on is embedded (`embedded:NAME`), and nothing is measured with that was found or trained with.
"""

from dataclasses import replace
from shlex import join
from typing import Any

from safelocus.analysis.map import safety_map
from safelocus.analysis.words import count
from safelocus.demo.sizes import ChatSizes
from safelocus.demo.stages import RATIO, Found, Place, enhanced, mapped, part_of
from safelocus.enhancement.result import PATCH
from safelocus.enhancement.run import run_enhancement
from safelocus.errors import RunError
from safelocus.evaluation import Evaluation
from safelocus.model.target import load
from safelocus.objective import Refusal
from safelocus.patch import Patch
from safelocus.prompts import read_prompts
from safelocus.report.grid import Grid
from safelocus.report.page import SELECTION, write_map, write_outcome
from safelocus.run.folder import CHECKPOINT
from safelocus.scoring.run import score
from safelocus.selection.selection import Selection
from safelocus.training.examination import divide

REFUSALS, RETAINED = "embedded:refusals", ("ordinary", "alarming")
BATCH = 8  # prompts scored at a time
SHOWN, LENGTH = 4, 110  # examples of each kind; characters of an answer


def locate(at: Place[ChatSizes]) -> Found:
    """ESI of every weight by the log-odds of refusing, its map, and the pattern tests."""
    num = at.sizes.num_scored
    with at.run(
        "score", command="score", model=at.model, prompts=REFUSALS, refusal=True, limit=num, ratio=RATIO,
        batch_size=BATCH, dtype="auto",
    ) as folder:  # fmt: skip
        scores = score(
            load(at.model), read_prompts(REFUSALS).limit(num), objective=Refusal(), batch_size=BATCH, seed=at.seed,
            progress=at.progress,
        )  # fmt: skip
        selection = scores.select(RATIO)
        selection.save(folder / SELECTION)
        located = safety_map(scores, selection)
        write_map(folder, [(at.model, located)], place=at.final / "score")
    return mapped(at.model, located, f"As pictures: {at.final / 'score'}/*.svg")


def enhance(at: Place[ChatSizes]) -> Found:
    """Train the top weights on refusals, and on how the model itself begins to answer harmless requests."""
    sizes = at.sizes
    retained = [part_of(at, kind, sizes.num_retained, prefix="embedded") for kind in RETAINED]
    harmful = part_of(at, "refusals-heldout", sizes.num_harmful, prefix="embedded")
    harmless = part_of(at, "harmless-heldout", sizes.num_harmless, prefix="embedded")
    training: dict[str, Any] = {"steps": sizes.steps, "learning_rate": sizes.rate, "batch_size": sizes.refusals}
    with at.run(
        "enhance", command="enhance", model=at.model, selection=str(at.final / "score"), data=REFUSALS,
        retain=[file for _, file in retained], harmful=harmful[1], harmless=harmless[1], validation=0.0,
        max_new_tokens=sizes.max_new_tokens, dtype="auto", **training,
    ) as folder:  # fmt: skip
        selection = Selection.load(at.folder / "score" / SELECTION)
        divided = divide(
            read_prompts(REFUSALS), [prompts for prompts, _ in retained], harmful=harmful[0], harmless=harmless[0],
            validation=0, max_new_tokens=sizes.max_new_tokens,
        )  # fmt: skip
        found = run_enhancement(
            load(at.model), selection, divided.data, retain=divided.retained, examination=divided.examination,
            seed=at.seed, checkpoint=folder / CHECKPOINT, progress=at.progress, **training,
        )  # fmt: skip
        write_outcome(found, folder, selection=selection, place=at.final / "enhance")
    return enhanced(found)


def apply(at: Place[ChatSizes]) -> Found:
    """The patch in the model and out again, to the bit; and some of what the model said without and with it."""
    folder, target = at.folder / "enhance", load(at.model)
    patch, original = Patch.load(folder / PATCH), target.fingerprint()
    patch.apply(target)
    applied = target.fingerprint()
    patch.revert(target)
    if applied == original or target.fingerprint() != original:
        raise RunError(f"{folder / PATCH}: did not change the model, or did not give it back; please report this")
    size = (folder / PATCH).stat().st_size / 1e6
    before, after = (Evaluation.load(folder / part) for part in ("before", "after"))
    return Found(
        claims=(), tables=[replace(examples(before, after), title="What it says")],
        lines=[
            f"The patch ({size:.1f} MB) holds new values for {count(patch.k)} weights; taken out, the model is what "
            "it was, bit for bit.",
            "Apply it: "
            + join(["safelocus", "patch", "apply", str(at.final / "enhance" / PATCH), at.model, "-o", "FOLDER"]),
        ],
    )  # fmt: skip


def examples(before: Evaluation, after: Evaluation) -> Grid:
    """Some requests, and the answers to the harmless ones; of those to harmful ones only refusals are shown."""
    known = {row["prompt"]: row for row in before.rows}
    rows = []
    for kind in ("harmful", "harmless"):
        asked = [row for row in after.rows if row["set"] == kind and row["category"] != "self-harm"]
        for row in asked[:SHOWN]:
            rows.append((row["prompt"], *(_said(each) for each in (known[row["prompt"]], row))))
    return Grid(
        title="", headings=("request", "before", "with the patch"), rows=tuple(rows), num_labels=3,
        sections=(min(SHOWN, sum(row["set"] == "harmful" for row in after.rows)),),
        caption="answers to harmful requests are not shown, unless they refuse",
    )  # fmt: skip


def _said(row: dict[str, Any]) -> str:
    """An answer's beginning; of a refusal of a harmful request its first sentence."""
    if row["set"] == "harmful" and not row["refused"]:
        return "(no refusal)"
    text = " ".join((row["response"] or "").split())
    if row["set"] == "harmful":
        text = text.partition(". ")[0]
    return text if len(text) <= LENGTH else f"{text[:LENGTH].rpartition(' ')[0]} ..."
