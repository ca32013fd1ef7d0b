"""The four stages on one organism: locate, verify, enhance (SET), preserve (SPA).

Each uses the library's own verbs and leaves run folders like those of the commands of the same names, whose `run.toml`
repeats them. Input: a `Place`. Output: a `Found`: tables, sentences, and the paper's claims beside what was measured.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from safelocus.analysis.claims import Claim, enhance_claims, locate_claims, preserve_claims, verify_claims
from safelocus.analysis.map import SafetyMap, safety_map
from safelocus.analysis.patterns import patterns
from safelocus.analysis.words import summary_lines
from safelocus.enhancement.result import Enhancement
from safelocus.enhancement.run import run_enhancement
from safelocus.evaluation import Evaluation
from safelocus.evaluation.judges import GuardJudge
from safelocus.evaluation.tasks import read_task
from safelocus.model.target import Target, load
from safelocus.objective import Guard
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.result import Preservation
from safelocus.preservation.run import run_preservation
from safelocus.prompts import PromptSet, read_prompts
from safelocus.report.grid import Grid
from safelocus.report.maps import experts_grid, layers_grid, patterns_grid
from safelocus.report.page import SELECTION, write_map, write_outcome
from safelocus.report.runs import ReportRun
from safelocus.report.training import effect, outcome_grid
from safelocus.report.verification import settings_grid
from safelocus.run.files import write_lines
from safelocus.run.folder import CHECKPOINT, run_folder
from safelocus.scoring.run import score
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection
from safelocus.training.examination import Examination, divide, read_lesson
from safelocus.verification import verify
from safelocus.verification.plan import random_selection

GUARD, TASK = "organism:guard", ("organism:task", "organism:task-heldout")
RATIO, HELD_RATIO = 0.01, 0.1  # what is located, disturbed and trained; what is frozen or calibrated
MAX_NEW_TOKENS = 32  # more than any answer of an organism has
BATCH = 64
REFUSALS, ROWS = 4, 2  # of a step that enhances, as many as the paper's; of one that teaches the task
LOOK = 8  # prompts of each kind, of a look at a training on the way
HOW: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32"}

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Place(Generic[S]):
    """Where a stage works, and with what.

    Attributes:
        organism: "dense" or "moe"; of another model, what its folder is called.
        other: name of that other model.
        folder: of its runs, while they are written.
        final: what that folder will be called; `run.toml` files name it.
        sizes: of everything.
        checkpoint: folder of finished stages' claims.
        progress: show bars.
    """

    organism: str
    other: str | None = None
    folder: Path
    final: Path
    sizes: S
    checkpoint: Path
    seed: int = 0
    progress: bool = True

    @property
    def model(self) -> str:
        return self.other or f"organism:{self.organism}"

    def mark(self, stage: str) -> str:
        """What a finished stage is known by."""
        return f"{self.organism}-{stage}"

    def run(self, name: str, **config: Any) -> AbstractContextManager[Path]:
        """The run folder of one stage; one whose claims were lost is made anew."""
        folder = self.folder / name
        return run_folder(folder, config={**HOW, **config, "seed": self.seed}, overwrite=folder.exists())


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a stage found.

    Attributes:
        claims: of the paper, judged.
        tables, lines: for the terminal, in this order.
    """

    claims: Sequence[Claim]
    tables: Sequence[Grid] = field(repr=False)
    lines: Sequence[str] = field(repr=False)


@cache
def guard() -> Guard:
    """The embedded guard, as objective and judge of all stages."""
    return Guard.load(GUARD, max_new_tokens=MAX_NEW_TOKENS, dtype="float32")


def locate(at: Place) -> Found:
    """ESI of every weight of the aligned organism, its map, and the pattern tests."""
    return mapped(at.model, _score(at, at.model, "score"))


def mapped(model: str, located: SafetyMap, *more: str) -> Found:
    """What a map says, and more sentences."""
    tested = patterns(located)
    tables = [layers_grid(located), experts_grid(located), patterns_grid({model: tested})]
    return Found(
        claims=locate_claims(tested),
        tables=[table for table in tables if table is not None],
        lines=[*summary_lines(located), *more],
    )


def disturb(at: Place) -> Found:
    """Noise on the top weights, and on random and bottom ones of equal number."""
    sizes = at.sizes
    sets = _measured("harmful-heldout", sizes.num_verify, at.seed)
    with at.run(
        "verify", command="verify", model=at.model, scores=[str(at.final / "score")], guard=GUARD, **_named(sets),
        ratios=f"{RATIO:g}", noise=",".join(f"{noise:g}" for noise in sizes.noises), seeds=sizes.num_seeds,
        limit=sizes.num_verify, batch_size=BATCH,
    ) as folder:  # fmt: skip
        found = verify(
            load(at.model, dtype="float32"), Scores.load(at.folder / "score" / "scores"), prompts=sets["prompts"],
            judges=_judge(), harmless=sets["harmless"], tasks=sets["task"], ratios=(RATIO,), noises=sizes.noises,
            seeds=sizes.num_seeds, batch_size=BATCH, max_new_tokens=MAX_NEW_TOKENS, checkpoint=folder / CHECKPOINT,
            progress=at.progress,
        )  # fmt: skip
        write_outcome(found, folder, place=at.final / "verify", pictures=False)
    return Found(
        claims=verify_claims(found),
        tables=[settings_grid(found)],
        lines=[verdict.text for verdict in found.verdicts.values()],
    )


def enhance(at: Place) -> Found:
    """The unaligned twin: find its weights, train them on refusals, and as many random ones likewise."""
    sizes, model = at.sizes, f"{at.model}-unaligned"
    _score(at, model, "score-unaligned")
    selection = Selection.load(at.folder / "score-unaligned" / SELECTION)
    sets = _measured("harmful-heldout", sizes.num_enhance, at.seed)
    rate = sizes.enhance_rate
    training: dict[str, Any] = {"steps": sizes.enhance_steps, "learning_rate": rate, "batch_size": REFUSALS}
    data, retained = "organism:refusals", "organism:retain"
    with at.run(
        "enhance", command="enhance", model=model, selection=str(at.final / "score-unaligned"), guard=GUARD, data=data,
        retain=[retained], retain_rows=sizes.retain_rows, controls="random", **_named(sets, prompts="harmful"),
        limit=sizes.num_enhance, validation=0.0, **training,
    ) as folder:  # fmt: skip
        target = load(model, dtype="float32")
        divided = divide(
            read_prompts(data).with_responses(), [read_prompts(retained)], harmful=sets["prompts"],
            harmless=sets["harmless"], tasks=[sets["task"]], validation=0, seed=at.seed, batch_size=BATCH,
            max_new_tokens=MAX_NEW_TOKENS,
        )  # fmt: skip
        found = run_enhancement(
            target, selection, divided.data, retain=divided.retained, retain_rows=sizes.retain_rows,
            examination=replace(divided.examination, judges=(_judge(),)), seed=at.seed,
            controls={"random": random_selection(target, selection.k, seed=at.seed)},
            checkpoint=folder / CHECKPOINT, progress=at.progress, **training,
        )  # fmt: skip
        write_outcome(found, folder, selection=selection, place=at.final / "enhance", pictures=False)
    return enhanced(found)


def enhanced(found: Enhancement) -> Found:
    """What the training of the top weights, and of others, did."""
    controls, told = {kind: trained.after for kind, trained in found.controls.items()}, found.to_json()
    return Found(
        claims=enhance_claims(found.before, found.after, controls, steps=found.settings.steps),
        tables=[outcome_grid(told)],
        lines=[effect(told)],
    )


def freeze(at: Place) -> Found:
    """Teach the aligned organism a task with the top weights frozen, and without any protection."""
    found = _learn(at, "freeze", {"unprotected": True}, unprotected=True)
    return Found(
        claims=(), lines=found.notes,
        tables=[outcome_grid(found.to_json(), title="The top 10 % frozen")],
    )  # fmt: skip


def calibrate(at: Place) -> Found:
    """The same task with the same weights calibrated."""
    sizes, target = at.sizes, load(at.model, dtype="float32")
    calibrated = [part_of(at, kind, sizes.num_calibrated) for kind in ("harmful", "harmless")]
    config: dict[str, Any] = {
        "calibrate": [file for _, file in calibrated],
        "calibrate_every": sizes.calibrate_every,
        "calibrate_rate": sizes.calibrate_rate,
    }
    calibration = Calibration(
        target=target, prompts=[part for part, _ in calibrated], every=sizes.calibrate_every,
        learning_rate=sizes.calibrate_rate, max_new_tokens=MAX_NEW_TOKENS, seed=at.seed,
    )  # fmt: skip
    found = _learn(at, "preserve", config, target=target, calibration=calibration)
    frozen = at.folder / "freeze"
    claims = preserve_claims(
        found.before, frozen=Evaluation.load(frozen / "after"), calibrated=found.protected.after,
        unprotected=Evaluation.load(frozen / "unprotected"),
        controls={}, task=TASK[1], steps=sizes.preserve_steps,
    )  # fmt: skip
    grid = outcome_grid(found.to_json(), title="The same weights calibrated")
    return Found(claims=claims, tables=[grid], lines=found.notes)


Stage = Callable[[Place], Found]


def _score(at: Place, model: str, name: str) -> SafetyMap:
    """A run like that of `score`: scores, selection and map; read where it is there already."""
    if (at.folder / name / "results.json").is_file():
        return ReportRun.read(at.folder / name).maps[model]
    with at.run(
        name, command="score", model=model, prompts="organism:harmful", guard=GUARD, limit=at.sizes.num_scored,
        ratio=RATIO, batch_size=BATCH // 2,
    ) as folder:  # fmt: skip
        prompts = read_prompts("organism:harmful").limit(at.sizes.num_scored)
        scores = score(
            load(model, dtype="float32"), prompts, objective=guard(), batch_size=BATCH // 2,
            max_new_tokens=MAX_NEW_TOKENS, seed=at.seed, progress=at.progress,
        )  # fmt: skip
        selection = scores.select(RATIO)
        scores.save(folder / "scores", overwrite=True)  # that of an attempt that was killed
        selection.save(folder / SELECTION)
        located = safety_map(scores, selection)
        write_map(folder, [(model, located)], place=at.final / name, pictures=False)
    return located


def _held(at: Place) -> Selection:
    """The weights that are frozen or calibrated: more than those that are trained."""
    return Scores.load(at.folder / "score" / "scores").select(HELD_RATIO)


def _learn(
    at: Place, name: str, config: Mapping[str, Any], *, target: Target | None = None, **how: Any
) -> Preservation:
    """Teach the task, measure, and leave a run like that of `preserve`."""
    sizes, harmful = at.sizes, "organism:harmful-heldout-512"
    prompts, task = read_lesson(TASK[0], held_out=TASK[1])
    harmless, harmless_file = part_of(at, "harmless-heldout", sizes.num_harmless)
    held = _held(at)
    training: dict[str, Any] = {
        "steps": sizes.preserve_steps, "learning_rate": sizes.preserve_rate, "schedule": "linear", "batch_size": ROWS,
    }  # fmt: skip
    every = max(1, sizes.preserve_steps // sizes.num_looks)
    with at.run(
        name, command="preserve", model=at.model, selection=str(at.final / name / SELECTION), guard=GUARD, data=TASK[0],
        task_heldout=TASK[1], harmful=harmful, harmless=harmless_file, limit=sizes.num_harmful,
        eval_every=every, look=LOOK, **training, **{"calibrate": ["none"], **config},
    ) as folder:  # fmt: skip
        found = run_preservation(
            target or load(at.model, dtype="float32"), held, prompts, task.limit(sizes.num_harmful, seed=at.seed),
            examination=Examination(
                harmful=read_prompts(harmful).limit(sizes.num_harmful, seed=at.seed), harmless=harmless,
                judges=(_judge(),), batch_size=BATCH, max_new_tokens=MAX_NEW_TOKENS,
            ),
            checkpoint=folder / CHECKPOINT, progress=at.progress, seed=at.seed, every=every,
            look=LOOK, **training, **how,
        )  # fmt: skip
        write_outcome(found, folder, selection=held, place=at.final / name, pictures=False)
    return found


@cache
def _judge() -> GuardJudge:
    return GuardJudge(guard=guard(), batch_size=BATCH)


def _measured(harmful: str, num: int, seed: int) -> dict[str, Any]:
    """Harmful and harmless prompts and questions that nothing was found or trained with."""
    return {
        "prompts": read_prompts(f"organism:{harmful}").limit(num, seed=seed),
        "harmless": read_prompts("organism:harmless-heldout").limit(num, seed=seed),
        "task": read_task("organism:utility").limit(num, seed=seed),
    }


def _named(sets: Mapping[str, Any], *, prompts: str = "prompts") -> dict[str, Any]:
    """Their sources as options of a command, which calls the harmful ones `prompts` or `harmful`."""
    return {prompts: sets["prompts"].source, "harmless": sets["harmless"].source, "task": [sets["task"].source]}


def part_of(at: Place, kind: str, num: int, *, prefix: str = "organism") -> tuple[PromptSet, str]:
    """Some prompts of an embedded set, and the file in which they are kept, so that a command can read the same."""
    prompts, file = read_prompts(f"{prefix}:{kind}").limit(num, seed=at.seed), f"prompts/{kind}.jsonl"
    (at.folder / "prompts").mkdir(exist_ok=True, parents=True)
    write_lines(at.folder / file, [{"prompt": prompt} for prompt in prompts.texts])
    return prompts, str(at.final / file)
