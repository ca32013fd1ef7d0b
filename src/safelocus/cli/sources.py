"""What several commands take by name: prompts, tasks, judges, scores and selections."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelocus.cli import options
from safelocus.cli.output import note

if TYPE_CHECKING:
    from safelocus.analysis.acceptance import CardRun
    from safelocus.evaluation.judges import Endpoint, Judge
    from safelocus.evaluation.tasks import Task
    from safelocus.model.target import Target
    from safelocus.objective import Guard, Lexicon, Objective
    from safelocus.prompts import PromptSet
    from safelocus.run.identity import Provenance
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection


def read_sets(
    sources: list[str] | None,
    field: str | None = None,
    where: list[str] | None = None,
    *,
    held_out: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
) -> "list[PromptSet]":
    """Sets of prompts by name; `held_out`: of each the share that `score --held-out` left out."""
    from safelocus.prompts import read_prompts

    found = [read_prompts(source, field=field, where=options.conditions(where)) for source in sources or []]
    found = [each.split(held_out)[1] for each in found] if held_out else found
    return [each.limit(limit, seed=seed) for each in found]


def texts(source: str | None, limit: int | None, seed: int) -> "list[PromptSet]":
    """Prompts with responses whose perplexity is measured, where some are given."""
    from safelocus.prompts import read_prompts

    return [read_prompts(source).with_responses().limit(limit, seed=seed)] if source else []


def fitting(prompts: "PromptSet", target: "Target", max_new_tokens: int = 0, *, openings: bool = False) -> "PromptSet":
    """The prompts that the model has positions for; says how many were left out.

    Args:
        max_new_tokens: of an answer behind each.
        openings: or of a refusal or a compliance, as `Refusal` reads them.

    Raises:
        PromptError: none is left.
    """
    from safelocus.model.generation import longest_prompt
    from safelocus.objective import Refusal
    from safelocus.prompts import only

    room, chat = longest_prompt(target, max_new_tokens), target.chat
    fits = [len(chat.encode_prompt(text)) <= room for text in prompts.texts]
    if openings:
        fits = [each and also for each, also in zip(fits, Refusal().fits(target, prompts.texts), strict=True)]
    beside = f"{max_new_tokens} new tokens" if max_new_tokens else "the refusal openings" if openings else "nothing"
    otherwise = f"{prompts.source}: no prompt fits; {target.name} has positions for {room} tokens and {beside}"
    found = only(prompts, fits, otherwise=otherwise)
    if not all(fits):
        note(f"left out {fits.count(False)} of {len(fits)} prompts: the model has no room for them and {beside}")
    return found


def harmless_prompts(source: str | None, limit: int | None, seed: int) -> "PromptSet | None":
    """The prompts that should be answered, where some are given."""
    from safelocus.prompts import read_prompts

    return read_prompts(source).limit(limit, seed=seed) if source else None


def read_tasks(sources: list[str] | None, limit: int | None, seed: int) -> "list[Task]":
    """Questions with answers; `numeric=FILE` and the like say how answers compare."""
    from safelocus.errors import SafelocusError
    from safelocus.evaluation.matching import MATCHES
    from safelocus.evaluation.tasks import read_task

    tasks: list[Task] = []
    for text in sources or []:
        match, separator, source = text.partition("=")
        given = bool(separator) and match in MATCHES
        task = read_task(source if given else text, match=match if given else None)  # type: ignore[arg-type]
        if task.name in [other.name for other in tasks]:
            task = replace(task, name=task.source)
            if task.name in [other.name for other in tasks]:
                raise SafelocusError(f"--task {text}: given twice; leave one out")
        tasks.append(task.limit(limit, seed=seed))
    return tasks


def load_judges(
    names: Sequence[str],
    *,
    description: Path | None = None,
    of: str | None = None,
    threshold: float = 0.0,
    endpoint: "Endpoint | None" = None,
    **load: Any,
) -> "list[Judge]":
    """Judges by name.

    Args:
        description: of the guard `of`; where that is None, of the one among the names.
        threshold: of guards.
        endpoint: what rubrics are put to.
        load: how to load guards: dtype, device, trust_remote_code.
    """
    from safelocus.evaluation.judges import load_judge

    return [
        load_judge(
            name, threshold=threshold, endpoint=endpoint,
            description=description if _is_described(name, of) else None, **load,
        )
        for name in names
    ]  # fmt: skip


def check_judges(
    names: Sequence[str],
    *,
    description: Path | None = None,
    of: str | None = None,
    endpoint: "Endpoint | None" = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuse judges that `load_judges` cannot make, or that are called alike, before a model is loaded."""
    from safelocus.errors import JudgeError
    from safelocus.evaluation.judges import load_judge

    guards = guards_named(names)
    if description is not None and of is None and len(guards) != 1:
        raise JudgeError(f"--guard-description is of one guard; found {', '.join(guards) or 'none'}")
    called = []
    for name in names:
        if name.startswith("guard:") and name != "guard:":
            guard = name.removeprefix("guard:")
            check_guard(guard, description if _is_described(name, of) else None, trust_remote_code=trust_remote_code)
            called.append(f"guard {guard}")
        else:
            called.append(load_judge(name, endpoint=endpoint).name)
    if repeated := sorted({name for name in called if called.count(name) > 1}):
        raise JudgeError(f"two judges are called {repeated[0]!r}; give each once")


def guards_named(judges: Sequence[str]) -> list[str]:
    """The guards among judges."""
    return [name.removeprefix("guard:") for name in judges if name.startswith("guard:")]


def _is_described(name: str, of: str | None) -> bool:
    return name.startswith("guard:") if of is None else name == f"guard:{of}"


def check_guard(name: str, description: Path | None, *, trust_remote_code: bool = False) -> None:
    """Refuse a guard that is not there, or that nothing says how to read, before a model is loaded."""
    from safelocus.model.target import load_config, load_tokenizer
    from safelocus.objective.presets import find_preset, read_preset

    load_config(name, trust_remote_code=trust_remote_code)
    if description is not None:
        read_preset(description)
    else:
        find_preset(name, load_tokenizer(name, trust_remote_code=trust_remote_code))


def guard_of(provenance: "Provenance") -> str | None:
    """The guard that scores were made with."""
    return _name_of(provenance, "guard")


def lexicon_of(provenance: "Provenance") -> Path | None:
    """The file of expressions that scores were made with."""
    name = _name_of(provenance, "lexicon")
    return None if name is None else Path(name)


def _name_of(provenance: "Provenance", kind: str) -> str | None:
    objective = provenance.objective or {}
    return str(objective["name"]) if objective.get("kind") == kind and "name" in objective else None


def judge_names(guard: str | None, lexicon: Path | None, named: Sequence[str] = ()) -> list[str]:
    """The guard and the lexicon as judges, where they are given, and between them those that are named."""
    first = [] if guard is None else [f"guard:{guard}"]
    return [*first, *named, *([] if lexicon is None else [f"lexicon:{lexicon}"])]


def guard_among(judges: "Sequence[Judge]", name: str | None, description: Path | None) -> "Guard | None":
    """The guard of that name, and read as it is described, that judges; so that it is loaded once."""
    from safelocus.evaluation.judges import GuardJudge
    from safelocus.objective.presets import read_preset

    preset = None if description is None else read_preset(description)
    found = (each.guard for each in judges if isinstance(each, GuardJudge) and each.guard.name == name)
    return next((guard for guard in found if preset in (None, guard.preset)), None)


def check_lexicon(given: options.ObjectiveOptions) -> None:
    """Refuse a list of expressions that cannot be read, and what says how to take one where there is none."""
    from safelocus.errors import SafelocusError
    from safelocus.wordlist import WordList

    if given.lexicon is not None:
        WordList.read(given.lexicon)
    elif given.similarity is not None:
        raise SafelocusError("--similarity says which words count beside the listed ones; give a list: --lexicon FILE")


def check_objective(given: options.ObjectiveOptions, *, also: Sequence[str] = (), what: str = "") -> None:
    """Refuse none or several objectives before anything is loaded.

    Args:
        also: further options that are objectives of this command.
        what: needs one.
    """
    from safelocus.errors import ModelError

    names = ("guard", *also, "refusal", "lexicon")
    chosen = [f"--{name}" for name in names if getattr(given, name)]
    if len(chosen) != 1:
        ways = ", ".join(f"--{name}" for name in names)
        raise ModelError(f"{what} needs one objective of {ways}; found {' and '.join(chosen) or 'none'}")
    check_lexicon(given)


def make_objective(
    *,
    guard: str | None = None,
    guard_description: Path | None = None,
    refusal: bool = False,
    lexicon: Path | None = None,
    similarity: float | None = None,
    load: Mapping[str, Any],
    relaxed: Mapping[str, Any] | None = None,
    reader: "Guard | None" = None,
    **answers: Any,
) -> "Objective":
    """The objective of `options.ObjectiveOptions`.

    Args:
        load: how to load a guard: dtype, device, trust_remote_code.
        relaxed: how the answers are relaxed for it.
        reader: that guard, where it is loaded already.
        answers: `max_new_tokens`, `on_responses`, for those that read answers.
    """
    from safelocus.objective import Guard, Refusal

    if reader is not None:
        return replace(reader, **(relaxed or {}), **answers)
    if guard is not None:
        return Guard.load(guard, description=guard_description, **load, **(relaxed or {}), **answers)
    if lexicon is not None:
        return _lexicon(lexicon, similarity, **answers)
    assert refusal, "no objective was asked for"
    return Refusal()


def lexicon_for(given: options.ObjectiveOptions) -> "Lexicon | None":
    """The list of expressions that is the objective, where one is."""
    return None if given.lexicon is None else _lexicon(given.lexicon, given.similarity)


def _lexicon(file: Path, similarity: float | None, **answers: Any) -> "Lexicon":
    from safelocus.objective import Lexicon

    return Lexicon.load(file, **({} if similarity is None else {"similarity": similarity}), **answers)


def unscored_prompts(
    source: str | None,
    provenance: "Provenance",
    *,
    field: str | None = None,
    where: dict[str, str] | None = None,
    allow_seen: bool = False,
    option: str = "--prompts",
) -> "PromptSet":
    """The prompts given; else what the scores' own source has left. `option`: which gives them.

    Raises:
        PromptError: nothing is left, or the source is not known.
    """
    from safelocus.errors import PromptError
    from safelocus.prompts import only, prompt_hash, read_prompts

    if source is not None:
        return read_prompts(source, field=field, where=where)
    used = provenance.extra.get("prompt_hashes")
    if provenance.prompts is None or used is None or provenance.prompts == "memory":
        raise PromptError(
            f"the scores do not say where their prompts came from; give prompts to measure with: {option}"
        )
    asked = {name: value for name, value in {"field": field, "where": where}.items() if value}
    try:
        prompts = read_prompts(provenance.prompts, **{**provenance.extra.get("read_with", {}), **asked})
    except PromptError as error:
        raise PromptError(f"what the scores were made with: {error} Give prompts to measure with: {option}") from error
    if allow_seen:
        return prompts
    seen = set(used)
    return only(
        prompts, (prompt_hash(each) not in seen for each in prompts.texts),
        otherwise=f"{provenance.prompts}: all {len(prompts)} prompts were used to find these weights; give others to "
        f"measure with ({option}), or leave some out next time (score --held-out 0.5)",
    )  # fmt: skip


def check_whole(place: options.PlaceOptions, given: Mapping[str, bool]) -> None:
    """Refuse what needs a model that is whole in each process, before it is loaded; `given`: option -> whether."""
    from safelocus.errors import SafelocusError
    from safelocus.model.target import default_device

    found = [option for option, is_given in given.items() if is_given]
    if not found or not (place.shard or place.offload):
        return
    if place.shard or default_device().type != "cpu":  # without an accelerator nothing is offloaded
        spread = "--shard" if place.shard else "--offload"
        raise SafelocusError(f"{', '.join(found)} needs the whole model in each process; leave it out, or {spread}")


def check_unscored(prompts: str | None, harmful: "PromptSet", *, allow_seen: bool = False) -> None:
    """Refuse to measure with prompts that weights will be found with, before they are: see `check_unseen`."""
    from safelocus.errors import PromptError
    from safelocus.prompts import read_prompts

    common = set(harmful.prompt_hashes) & set(read_prompts(prompts).prompt_hashes) if prompts is not None else ()
    if common and not allow_seen:
        raise PromptError(
            f"{harmful.source}: {len(common)} of {len(harmful)} prompts are among those to find the weights with "
            "(--prompts); measuring with them would flatter it. Give others, or allow it: --allow-seen"
        )


def judges_for(given: options.TrainOptions) -> "tuple[Judge, ...]":
    """Those named; else the guard and the lexicon that the weights are found with."""
    return tuple(load_judges(judging(given), **given.described, **given.guards))


def check_judges_for(given: options.TrainOptions) -> None:
    """`check_judges` of `judges_for`."""
    check_judges(judging(given), **given.described, trust_remote_code=given.trust_remote_code)


def judging(given: options.TrainOptions) -> list[str]:
    """The judges' names."""
    return given.judge or judge_names(given.guard, given.lexicon)


def runs_for_card(given: options.TrainOptions) -> "list[CardRun]":
    """Those of `--card-with`, read before the long work starts."""
    from safelocus.analysis.acceptance import CardRun

    return [CardRun.load(folder) for folder in given.card_with or ()]


def scores_folder(path: Path) -> Path:
    """The scores inside a run folder, or the folder itself."""
    return path / "scores" if (path / "scores").is_dir() else path


def read_artefact(path: Path) -> "Selection | Scores":
    """A selection file, a scores folder, or the scores of a run folder; its selection, where it kept no scores."""
    from safelocus.errors import RunError
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection

    if not path.exists():
        raise RunError(f"{path}: does not exist; expected a selection, a scores folder or a run folder of `score`")
    if not path.is_dir():
        return Selection.load(path)
    file, folder = path / "selection.safetensors", scores_folder(path)
    if folder == path and file.is_file():
        return Selection.load(file)
    scores = Scores.load(folder)
    return scores if scores.tensors or not file.is_file() else Selection.load(file)
