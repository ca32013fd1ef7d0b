"""The story: every stage, told as it happens, one page of all runs, and the claims at the end.

    runs/demo/
        run.toml, results.json      sizes; the claims of the paper, judged
        report.html                 one page of everything
        smollm2/score, enhance      run folders, as the commands write them; or, of the two organisms,
        dense/score, verify, score-unaligned, enhance, freeze, preserve
        moe/...

Where there are two cores, the second organism's stages run ahead in a process of their own. An interrupted demo
resumes: finished stages are read, and an unfinished one goes on where its verb does.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from safelocus.analysis.claims import Claim
from safelocus.demo import chat
from safelocus.demo.ahead import num_cores, running_ahead
from safelocus.demo.sizes import ChatSizes, OrganismSizes
from safelocus.demo.stages import Found, Place, Stage, calibrate, disturb, enhance, freeze, locate
from safelocus.errors import RunError
from safelocus.report.page import PAGE, write_page
from safelocus.report.runs import ReportRun
from safelocus.run.files import sealed, unsealed, write_json
from safelocus.run.folder import CHECKPOINT, OWN_NAMES

RESULTS = "results.json"
ORGANISMS = {"dense": "dense organism", "moe": "mixture-of-experts organism"}
RUNS: Sequence[str] = ("score", "verify", "score-unaligned", "enhance", "freeze", "preserve")
HEADING = "safelocus demo: the paper's claims on two tiny models"
CHAT_RUNS: Sequence[str] = ("score", "enhance")
CHAT_HEADING = "safelocus demo: a chat model learns to refuse with 1 % of its weights"


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A stage and the words before it."""

    key: str
    title: str
    why: str
    stage: Stage


CHAPTERS: Sequence[Chapter] = (
    Chapter(
        key="locate", title="Locate", stage=locate,
        why="The model answers harmful prompts and a guard says how safe the answers are. The gradient of that, times "
        "the spread of each matrix, is each weight's Expected Safety Impact (ESI). Where do the top 1 % lie?",
    ),
    Chapter(
        key="verify", title="Verify", stage=disturb,
        why="If these weights carry the refusals, noise on them must break refusals, and the same noise on as many "
        "random or low-scored weights must not. Harmless answers and ordinary questions are watched too.",
    ),
    Chapter(
        key="enhance", title="Enhance (SET)", stage=enhance,
        why="The unaligned twin answers everything. Only its own top 1 % are trained, on refusals; then as many "
        "random weights the same way. Does it refuse, and does it still do the rest?",
    ),
    Chapter(
        key="freeze", title="Preserve (SPA) by freezing", stage=freeze,
        why="The aligned model learns a new, harmless task. That wears refusals away. The paper's remedy is to "
        "freeze the top weights; here even the top 10 %. The same training without protection stands beside it.",
    ),
    Chapter(
        key="preserve", title="Preserve (SPA) with calibration", stage=calibrate,
        why="Frozen weights keep their values while everything around them moves. So the same weights now take small "
        "steps of their own, towards the original model's answers; the task never trains them.",
    ),
)  # fmt: skip
CHAT_CHAPTERS: Sequence[Chapter] = (
    Chapter(
        key="locate", title="Locate", stage=chat.locate,
        why="How much likelier is it that the model opens with a refusal than with compliance? The gradient of that, "
        "times the spread of each matrix, is each weight's Expected Safety Impact (ESI). Where do the top 1 % lie?",
    ),
    Chapter(
        key="enhance", title="Enhance (SET)", stage=chat.enhance,
        why="Only these weights are trained, on short refusals, and on how the model itself begins to answer "
        "harmless requests, ordinary and alarming ones. Does it refuse harm now, and does it still answer the rest?",
    ),
    Chapter(
        key="apply", title="Apply the patch", stage=chat.apply,
        why="What was learned is a small file of new values, which anyone can put into the model and take out again.",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Story:
    """What the demo found.

    Attributes:
        claims: organism, or other model -> the paper's claims, judged.
        sizes: of everything.
        runs: folders of the runs, inside that of the demo.
        seconds: from the beginning, or from the last interruption.
    """

    claims: Mapping[str, list[Claim]]
    sizes: OrganismSizes | ChatSizes
    runs: tuple[str, ...]
    seconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "claims": {name: [claim.to_json() for claim in claims] for name, claims in self.claims.items()},
            "shortened": self.sizes.shortened,
            "sizes": self.sizes.to_json(),
            "runs": list(self.runs),
            "seconds": round(self.seconds, 1),
        }


def tell(
    folder: Path,
    sizes: OrganismSizes | ChatSizes,
    *,
    final: Path,
    model: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Story:
    """Run every stage, and write the runs, `results.json` and the page.

    Args:
        folder: to write into, an unfinished run's (see `run_folder`).
        sizes: how much of everything.
        final: what it will be called when all is done.
        model: a chat model, with `ChatSizes`; default: both organisms.
        seed: of everything random.
        console: tells the story; None for silence, bars too.

    Raises:
        RunError: the folder holds an unfinished demo of other sizes.
    """
    began = time.monotonic()
    checkpoint = _checkpoint(folder, {"model": model, "sizes": sizes.to_json(), "seed": seed})
    finished = {file.stem for file in checkpoint.iterdir()}
    if model is None:
        titles, chapters, runs, heading = ORGANISMS, CHAPTERS, RUNS, HEADING
    else:
        titles, chapters, runs, heading = {_key(model): model}, CHAT_CHAPTERS, CHAT_RUNS, CHAT_HEADING
    places = [
        Place(
            organism=organism, other=model, folder=folder / organism, final=final / organism, sizes=sizes, seed=seed,
            checkpoint=checkpoint, progress=console is not None,
        )
        for organism in titles
    ]  # fmt: skip
    first, second = places[0], places[-1]
    claims: dict[str, list[Claim]] = {}
    with ExitStack() as stack:
        following = None
        if second is not first and num_cores() > 1:
            stages = [partial(play, chapter) for chapter in chapters if second.mark(chapter.key) not in finished]
            following = stack.enter_context(running_ahead(stages, replace(second, progress=False)))
        for number, (at, chapter) in enumerate((at, chapter) for at in places for chapter in chapters):
            if console is not None:
                title = f"{number + 1}/{len(places) * len(chapters)}  {chapter.title}: {titles[at.organism]}"
                console.print(Rule(f"[bold]{title}[/]"))
            if at.mark(chapter.key) in finished:
                found = _read(chapter, at)
            else:
                if console is not None:
                    console.print(f"{chapter.why}\n", highlight=False)
                found = play(chapter, at) if at is first or following is None else _wait(following, console)
            claims.setdefault(at.organism, []).extend(found.claims)
            if console is not None:
                _show(found, console)
    story = Story(
        claims=claims, sizes=sizes, seconds=time.monotonic() - began,
        runs=tuple(f"{organism}/{name}" for organism in titles for name in runs),
    )  # fmt: skip
    write_json(folder / RESULTS, story.to_json())
    write_page([ReportRun.read(folder, place=final)], folder / PAGE, heading=heading)
    return story


def _key(model: str) -> str:
    """What the folder of a model is called: no name that leads elsewhere, or that the demo's own files have."""
    path = Path(model)
    name = re.sub(r"[^\w.-]+", "-", (path.resolve() if path.exists() else path).name)
    is_taken = name.lower() in ("", *OWN_NAMES, RESULTS, PAGE)
    return f"model-{name}" if is_taken or name.startswith(".") else name


def play(chapter: Chapter, at: Place) -> Found:
    """Run a stage, and remember what it found."""
    found = chapter.stage(at)
    write_json(_file(chapter, at), sealed([claim.to_json() for claim in found.claims]))
    return found


def _read(chapter: Chapter, at: Place) -> Found:
    claims = unsealed(_file(chapter, at).read_bytes(), _file(chapter, at))
    return Found(
        claims=[Claim.from_json(values) for values in claims], tables=(), lines=("Finished before the interruption.",)
    )  # fmt: skip


def _wait(following: Callable[[], Found], console: Console | None) -> Found:
    """What the process that went ahead has found, or will."""
    with nullcontext() if console is None else console.status("still at work, in a process of its own"):
        return following()


def _file(chapter: Chapter, at: Place) -> Path:
    return at.checkpoint / f"{at.mark(chapter.key)}.json"


def _show(found: Found, console: Console) -> None:
    for table in found.tables:
        console.print(table.rich())
    for line in found.lines:
        console.print(line, highlight=False, markup=False)
    console.print()


def _checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """The folder of finished stages; RunError where it is that of another demo."""
    checkpoint = folder / CHECKPOINT
    file = checkpoint / "demo.json"
    if file.is_file() and unsealed(file.read_bytes(), file) != config:
        raise RunError(
            f"{folder}: holds an unfinished demo of other sizes or another seed; run that one to its end, or forget it "
            "with --overwrite"
        )
    checkpoint.mkdir(exist_ok=True)
    write_json(file, sealed(dict(config)))
    return checkpoint
