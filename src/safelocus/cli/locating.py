"""The weights that a command acts on.

They come as a file (`--selection`), or are found first (`--guard G`, `--refusal` or `--lexicon F`, with `--prompts P`
and `--ratio R`). Either way further scores of the same kind, for controls, can be made from the same prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safelocus.cli import options
from safelocus.cli.sources import (
    check_guard,
    check_judges_for,
    check_lexicon,
    check_objective,
    check_whole,
    fitting,
    guard_among,
    guard_of,
    make_objective,
)

if TYPE_CHECKING:
    from safelocus.evaluation.judges import Judge
    from safelocus.model.target import Target
    from safelocus.objective import Guard
    from safelocus.prompts import PromptSet
    from safelocus.run.identity import Provenance
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Located:
    """The weights to act on, and how to find others like them.

    Attributes:
        selection: the weights.
        scores: method -> scores of all weights, made from the same prompts and objective.
    """

    selection: "Selection"
    scores: "Callable[[str], Scores]"

    def control(self, target: "Target", kind: str, *, seed: int = 0) -> "Selection":
        """As many weights, chosen otherwise: "random", "bottom" of the same scores, or the top of other ones."""
        from fractions import Fraction

        from safelocus.verification.plan import random_selection

        if kind == "random":
            return random_selection(target, self.selection.k, seed=seed)
        method = self.selection.provenance.method if kind == "bottom" else kind
        share = Fraction(self.selection.k, self.selection.layout.num_weights)  # exactly as many
        return self.scores(method).select(share, which="bottom" if kind == "bottom" else "top")


def check_located(given: options.LocateOptions) -> None:
    """Refuse a choice of weights that is incomplete or contradicts itself, before anything is loaded."""
    from safelocus.errors import SelectionError

    ways = (
        "give --selection S (a file, or the run folder of `score`), or --guard G (or --refusal, or --lexicon FILE) "
        "with --prompts P"
    )
    found = given.guard is not None or given.refusal or given.lexicon is not None
    if given.selection is None and (given.prompts is None or not found):
        raise SelectionError(f"nothing says which weights to act on: {ways}")
    if given.selection is not None and (given.prompts is not None or given.refusal or given.ratio is not None):
        raise SelectionError(f"--selection says already which weights to act on; {ways}")
    if given.selection is None:
        check_objective(given, what="finding the weights")
    else:
        check_lexicon(given)
        selection_file(given.selection)


def check_training(given: options.TrainOptions, *kinds: str) -> tuple[str, ...]:
    """The controls asked for; refuses options that contradict one another, before anything is loaded.

    Args:
        kinds: of controls that are no other weights, but trained otherwise.
    """
    from safelocus.scoring.run import METHODS
    from safelocus.selection.selection import Selection

    known = ("random", "bottom", *kinds, *(method for method in METHODS if method != "random"))
    wanted = options.words(given.controls, "--controls", known)
    given.settings()
    check_whole(given, {f"--controls {name}": name in wanted for name in ("lora", "wanda")})
    check_located(given)
    if given.selection is not None:
        file = selection_file(given.selection)
        provenance = Selection.load(file).provenance
        for name in wanted:
            if name not in ("random", *kinds):
                check_like(
                    name, provenance, file, guard=given.guard, guard_description=given.guard_description,
                    trust_remote_code=given.trust_remote_code,
                )  # fmt: skip
    check_judges_for(given)
    if given.guard is not None and given.judge:  # finds the weights, and does not judge
        check_guard(given.guard, given.guard_description, trust_remote_code=given.trust_remote_code)
    return wanted


def locate_for(given: options.TrainOptions, target: "Target", folder: Path, judges: "Sequence[Judge]") -> Located:
    """`locate` by the options of a training, resumed from its unfinished run; with the guard that judges, if it is."""
    from safelocus.run.folder import CHECKPOINT

    return locate(
        target, batch_size=given.score_batch_size or 8, max_new_tokens=given.max_new_tokens,
        checkpoint=folder / CHECKPOINT / "scores", progress=not given.json, load=given.guards,
        reader=guard_among(judges, given.guard, given.guard_description),
        **given.part(options.LocateOptions) | {"ratio": given.share},
    )  # fmt: skip


def locate(
    target: "Target",
    *,
    selection: Path | None = None,
    guard: str | None = None,
    guard_description: Path | None = None,
    prompts: str | None = None,
    ratio: float = 0.01,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    checkpoint: Path | None = None,
    progress: bool = True,
    load: Mapping[str, Any] = MappingProxyType({}),
    reader: "Guard | None" = None,
    **objective_options: Any,
) -> Located:
    """Load a selection, or score the target and select (`check_located` says what may be given together).

    Args:
        checkpoint: folder for the scoring, unfinished and finished; an interrupted command finds it again. Of several
            processes each has its own.
        load: how to load the guard: dtype, device, trust_remote_code.
        reader: the guard, where it is loaded already.
        objective_options: `refusal`, `lexicon`, `similarity`.
    """
    from safelocus import distributed
    from safelocus.prompts import read_prompts
    from safelocus.run.resume import claim, part_of
    from safelocus.scoring.run import NEEDS_OBJECTIVE, score
    from safelocus.selection.selection import Selection

    if selection is not None:
        file = selection_file(selection)
        found = Selection.load(file)

        how = {name: value for name, value in load.items() if name != "dtype"}

        @cache
        def like(method: str) -> "Scores":
            return score_like(
                target, method, found.provenance, beside=file, guard=guard, guard_description=guard_description,
                progress=progress, reader=reader, checkpoint=part_of(checkpoint, method), **how,
            )  # fmt: skip

        return Located(selection=found, scores=like)
    assert prompts is not None
    objective = make_objective(
        guard=guard, guard_description=guard_description, load=load, reader=reader, max_new_tokens=max_new_tokens,
        **objective_options,
    )  # fmt: skip
    openings = bool(objective_options.get("refusal"))
    prompt_set = fitting(read_prompts(prompts), target, 0 if openings else max_new_tokens, openings=openings)

    @cache
    def scores(method: str) -> "Scores":
        return score(
            target, prompt_set, objective=objective if method in NEEDS_OBJECTIVE else None, method=method,  # type: ignore[arg-type]
            batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress,
            checkpoint=checkpoint / "sums" if checkpoint is not None and method == "esi" else None,
        )  # fmt: skip

    if checkpoint is None:
        return Located(selection=scores("esi").select(ratio), scores=scores)
    inputs = {"--prompts": prompt_set, "the objective": objective, "--ratio": ratio, "--score-batch-size": batch_size}
    claim(checkpoint, {"the model": target, **inputs, "--max-new-tokens": max_new_tokens})
    file = checkpoint / "selection.safetensors"
    if not distributed.in_all(file.is_file()):
        scores("esi").select(ratio).save(file)
    return Located(selection=Selection.load(file), scores=scores)


def score_like(
    target: "Target",
    method: str,
    provenance: "Provenance",
    *,
    beside: Path,
    guard: str | None = None,
    guard_description: Path | None = None,
    progress: bool = True,
    reader: "Guard | None" = None,
    checkpoint: Path | None = None,
    **load: Any,
) -> "Scores":
    """Scores by some method, from the same prompts, objective and settings as earlier ones, or those themselves.

    Args:
        provenance: of the earlier scores.
        beside: the run folder, or a file or folder in it, that they or a selection were read from.
        guard, guard_description: how to read that guard, where it is the same; else as in that run.
        reader: a guard that is loaded already; used where it is theirs.
        load: how to load their guard: device, trust_remote_code.
        checkpoint: folder for the sums, from which an interrupted scoring goes on.

    Raises:
        SafelocusError: what they were made with is not recorded, or is not what it was.
    """
    from safelocus.objective import remake
    from safelocus.scoring.run import NEEDS_OBJECTIVE, score
    from safelocus.scoring.scores import Scores

    run = _run_of(beside)
    if _has_scores(method, provenance, run):
        own = Scores.load(run / "scores")
        if own.tensors and replace(own.provenance, extra={}) == replace(provenance, extra={}):
            return own
    prompts, known = _prompts_like(method, provenance), provenance.extra
    objective = None
    if method in NEEDS_OBJECTIVE:
        path = _description(provenance, beside, guard, guard_description)
        objective = remake(provenance.objective or {}, description=path, reader=reader, **load)
    return score(
        target.talking_as(known["chat"]), prompts, objective=objective, method=method,  # type: ignore[arg-type]
        batch_size=known["batch_size"], max_new_tokens=known["max_new_tokens"], progress=progress,
        checkpoint=checkpoint if method in NEEDS_OBJECTIVE else None,
    )  # fmt: skip


def check_like(
    kind: str,
    provenance: "Provenance",
    beside: Path,
    *,
    guard: str | None = None,
    guard_description: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a control that cannot be made like the weights, before the long work: "bottom", or a method.

    Raises:
        SafelocusError: as for `score_like`, but for what only the guard's weights tell.
    """
    from safelocus.errors import ModelError
    from safelocus.model.target import load_config
    from safelocus.objective import remake
    from safelocus.scoring.run import NEEDS_OBJECTIVE

    method = provenance.method if kind == "bottom" else kind
    if _has_scores(method, provenance, _run_of(beside)):
        return
    _prompts_like(method, provenance)
    described = provenance.objective or {}
    if method not in NEEDS_OBJECTIVE:
        return
    if (reads := described.get("kind")) not in ("guard", "classifier"):
        remake(described)  # loads nothing
        return
    recorded = ["name", "dtype", "max_new_tokens", "tau", "gumbel_seed", "transfer"]
    for name in [*recorded, "unsafe"] if reads == "classifier" else recorded:
        if name not in described:
            raise ModelError(f"the {reads} objective's {name!r} is not recorded, so it cannot be made anew")
    if reads == "guard":
        description = _description(provenance, beside, guard, guard_description)
        check_guard(described["name"], description, trust_remote_code=trust_remote_code)
    else:
        load_config(described["name"])


def _description(
    provenance: "Provenance", beside: Path, guard: str | None, guard_description: Path | None
) -> Path | None:
    """Of the guard that scores were made with: what is given, where it is of that one, else as in that run."""
    own = guard_description if guard is not None and guard == guard_of(provenance) else None
    return own or description_of(beside)


def description_of(beside: Path) -> Path | None:
    """The description of its guard that a run of `score` was given, by the run folder or what is in it."""
    from safelocus.run.folder import read_config

    run = _run_of(beside)
    earlier = read_config(run) if (run / "run.toml").is_file() else {}
    path = earlier.get("guard_description") if earlier.get("command") == "score" else None
    return None if path is None else Path(path)


def _run_of(beside: Path) -> Path:
    """The run folder, of itself or of a file or folder in it."""
    return beside if (beside / "run.toml").is_file() else beside.parent


def _has_scores(method: str, provenance: "Provenance", run: Path) -> bool:
    return method == provenance.method and any((run / "scores").glob("*.safetensors"))


def _prompts_like(method: str, provenance: "Provenance") -> "PromptSet":
    """The prompts that weights were found with, for scores by this method."""
    from safelocus.errors import PromptError, SafelocusError
    from safelocus.prompts import prompt_hash, read_prompts
    from safelocus.scoring.run import METHODS

    if method not in METHODS:
        raise SafelocusError(f"{method!r} is no way to score weights; expected {', '.join(METHODS)}")
    used, known = set(provenance.extra.get("prompt_hashes") or ()), provenance.extra
    if provenance.prompts in (None, "memory") or not used or "chat" not in known:
        raise SafelocusError(
            f"the scores do not say with which prompts and settings they were made, so no {method} scores can be made "
            "like them; score again (safelocus score), and give that run folder"
        )
    assert provenance.prompts is not None
    prompts = read_prompts(provenance.prompts, **known.get("read_with", {}))
    prompts = replace(prompts, examples=tuple(e for e in prompts.examples if prompt_hash(e.prompt) in used))
    if prompts.hash != provenance.prompts_hash:
        raise PromptError(
            f"{provenance.prompts}: the {len(used)} prompts that the weights were found with are not all there as they "
            f"were then, so {method} scores cannot be made like theirs. Bring them back, or score again"
        )
    return prompts


def selection_file(path: Path) -> Path:
    from safelocus.errors import SelectionError

    file = path / "selection.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise SelectionError(f"{file}: does not exist; expected a selection file, or the run folder of `score`")
    return file
