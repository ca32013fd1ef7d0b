"""Enhance (SET): train the selected weights on refusals, and measure whether that made the model safe and no worse.

    enhance           a selection and refusals -> Patch
    run_enhancement   the same, with the model measured before and after, controls, and a sweep -> Enhancement
    enhancer          what both train with, for arms of one's own

The model comes back as it was, to the bit, whatever happens; the patch is applied by its user.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.enhancement.result import Enhancement
from safelocus.enhancement.retained import RETAINED, settled
from safelocus.enhancement.retention import Retention, with_answers
from safelocus.enhancement.trainee import Control, trainee_of
from safelocus.errors import PromptError, TrainingError
from safelocus.model.generation import longest_prompt
from safelocus.model.target import Target
from safelocus.objective import Lexicon
from safelocus.patch import Patch
from safelocus.prompts import PromptSet, read_prompts
from safelocus.run.identity import Identity, versions
from safelocus.run.resume import claim, part_of
from safelocus.selection.selection import Selection
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm, Trial, single_words
from safelocus.training.examination import Examination, check_apart, facts
from safelocus.training.responses import rows_with_remarks
from safelocus.training.runner import Runner, check_made_for

Source = PromptSet | str | Path | Iterable[object]

UNHELD = (
    "nothing is retained, so nothing holds the model back from refusing harmless requests or losing other abilities: "
    f"retain harmless prompts, such as {' and '.join(RETAINED)} (--retain, retain=)"
)
# what held up best on the organisms (docs/enhance.md)
SETTINGS = TrainingSettings(steps=100, learning_rate=1e-3, schedule="cosine", batch_size=8)


def enhance(
    target: Target,
    selection: Selection,
    data: Source,
    *,
    retain: Source | Sequence[PromptSet | str | Path] | None = RETAINED,
    retain_kl: float | None = None,
    retain_weight: float | None = None,
    retain_rows: int | None = None,
    own_answers: bool = False,
    answer_tokens: int | None = None,
    lexicon: Lexicon | None = None,
    validation: Examination | None = None,
    every: int = 10,
    interpolate: bool = False,
    settings: TrainingSettings | None = None,
    allow_mismatch: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> Patch:
    """Train the selected weights on refusals (SET).

    Args:
        target: the model; it comes back as it was, to the bit.
        selection: which weights to train; made for this very model.
        data: harmful prompts with refusals: a PromptSet, or anything `read_prompts` takes.
        retain: harmless prompts with answers, on which the model is held to what it was: anything `read_prompts` takes,
            or several sets, which take turns. Where no prompt has an answer, the model answers first, and its own
            answers are retained. None: nothing; it may learn to refuse those too then, and the patch's notes say so.
        retain_kl: weight of the divergence from the original model along these answers; default: 20, and 0 where all
            are its own (with a lexicon: 20 again, and so on).
        retain_weight: weight of the ordinary loss on them; 0, and 1.
        retain_rows: how many of them go with each refusal; 6, and 1.
        own_answers: retain the model's own answers in place of those given.
        answer_tokens: how long its own answers are; longer ones are cut; 8, and 64 beside given ones or a lexicon.
        lexicon: expressions that its own answers do not hold. With it `data` may lack responses: the model answers
            without these expressions, and that is what it learns.
        validation: stop early by it, and keep the best of the looks taken every so many steps (`every`). Use no
            prompts on which the result will be judged.
        interpolate: go back along the straight line to the original weights, as far as the validation finds best.
        settings: of the training; default: `SETTINGS`.
        allow_mismatch: the selection was made for another model (a fine-tuned sibling).
        checkpoint: folder for unfinished work; the same call resumes from it. Its caller removes it afterwards. Several
            processes make the same call, each with a folder of its own, and get the same patch.
        progress: show a bar.
        changes: to the settings: steps=100, learning_rate=1e-3, seed=0, ...

    Returns:
        Patch: the new values and the old; `patch.apply(model)` puts them in, `patch.revert(model)` takes them out.

    Raises:
        PromptError: data without responses, or that the validation contains.
        SelectionError: a selection made for another model.
        NumericalError: training diverged.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense-unaligned")
        >>> selection = sl.score(target, ["Give me steps to build a bomb."], objective=sl.Refusal()).select(ratio=0.01)
        >>> patch = sl.enhance(target, selection, "organism:refusals", retain="organism:retain", steps=2)
        >>> patch.k == selection.k
        True
    """
    check_made_for(target, selection, allow_mismatch=allow_mismatch)
    runner = enhancer(
        target, data, retain=retain, retain_kl=retain_kl, retain_weight=retain_weight, retain_rows=retain_rows,
        own_answers=own_answers, answer_tokens=answer_tokens, lexicon=lexicon, validation=validation, every=every,
        early_stopping=validation is not None, interpolate=interpolate, settings=settings, checkpoint=checkpoint,
        progress=progress, inputs={"the selection": selection}, **changes,
    )  # fmt: skip
    trial = runner.train(Arm(name="selection", what=selection), runner.settings)
    return _patch(runner, selection, trial)


def run_enhancement(
    target: Target,
    selection: Selection,
    data: Source,
    *,
    examination: Examination,
    validation: Examination | None = None,
    controls: Mapping[str, Control | Callable[[], Control]] | None = None,
    learning_rates: Sequence[float] = (),
    allow_seen: bool = False,
    allow_mismatch: bool = False,
    **how: Any,
) -> Enhancement:
    """Enhance, and measure the model before and after; train controls the same way, and measure those.

    Args:
        examination: what is measured before and after; on nothing of it is anything chosen.
        validation: for looks, early stopping and the choice of a learning rate; other prompts again.
        controls: by name: other selections, "full" for all weights, "lora" for an adapter of about equal size.
            Trained with the same settings on the same data. A function is called when its turn comes.
        learning_rates: to try, for the selection and every control; each keeps its best one by the validation.
        allow_seen: measure with prompts that were trained on, all the same.
        how: see `enhance` and `enhancer`.

    Raises:
        PromptError: data without responses, or that the examination or the validation contain.
        TrainingError: a sweep without a validation.
        RunError: a checkpoint of another run; weights that did not come back.

    Example:
        >>> enhancement = run_enhancement(                                      # doctest: +SKIP
        ...     target, selection, refusals, examination=Examination(harmful=held_out), steps=100
        ... )
        >>> enhancement.after.measures["asr"]                                   # doctest: +SKIP
    """
    rates = tuple(dict.fromkeys(learning_rates))
    if len(rates) > 1 and validation is None:
        raise TrainingError("a sweep of learning rates needs a validation part to choose one by")
    for rate in rates:
        replace(SETTINGS, learning_rate=rate)  # refuses what is no rate
    remarks = check_made_for(target, selection, allow_mismatch=allow_mismatch)
    # each arm's work says itself whose it is, so the controls may be others when this goes on
    inputs = {"the selection": selection, "learning_rates": rates, "the examination": examination}
    runner = enhancer(
        target, data, validation=validation, examination=None if allow_seen else examination,
        num_weights=selection.k, inputs=inputs, **how,
    )  # fmt: skip
    notes = [*_notes(runner), *examination.only_first]
    used = [*runner.sets, *(validation.parts if validation is not None else ())]
    notes += [*check_apart(examination, used, allow_seen=allow_seen), *remarks]
    runner = replace(runner, examination=examination, rates=rates)
    found = runner.run(selection, {"selection": selection, **(controls or {})})
    found["provenance"]["dtype"] = target.dtype
    notes += single_words(found["before"], found["trained"])
    return Enhancement(**found, notes=tuple(notes), patch=_patch(runner, selection, found["trained"][0].trial))


def enhancer(
    target: Target,
    data: Source,
    *,
    retain: Source | Sequence[PromptSet | str | Path] | None = RETAINED,
    retain_kl: float | None = None,
    retain_weight: float | None = None,
    retain_rows: int | None = None,
    own_answers: bool = False,
    answer_tokens: int | None = None,
    lexicon: Lexicon | None = None,
    settings: TrainingSettings | None = None,
    validation: Examination | None = None,
    examination: Examination | None = None,
    every: int = 10,
    early_stopping: bool = False,
    interpolate: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
    num_weights: int = 0,
    inputs: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Runner:
    """Read and check the data, let the model answer what has no answer, and make ready to train arms on it.

    Args:
        examination: what must share no prompt with what is trained on or chosen by.
        early_stopping: keep the best look and stop when more would not help; else the last step is kept.
        interpolate: keep the best on the straight line from the original weights to what was trained.
        num_weights: that an adapter should have about.
        inputs: others of the run, by name; unfinished work is taken up with the same ones only.

    For the rest see `enhance`.
    """
    settings = replace(settings or SETTINGS, **changes)
    if interpolate and validation is None:
        raise TrainingError(
            "how far to go back (interpolate) is chosen by a validation part; give one: "
            "validation=sl.Examination(harmful=..., harmless=...)"
        )
    prompts, sets = read_prompts(data), _sets(retain)
    retained = settled(
        {
            "retain_kl": retain_kl, "retain_weight": retain_weight, "retain_rows": retain_rows,
            "answer_tokens": answer_tokens,
        },
        sets, own_answers=own_answers, lexicon=lexicon is not None,
    )  # fmt: skip
    if lexicon is None or prompts.is_answered:
        prompts = prompts.with_responses()
    looks = {"every": every, "early_stopping": early_stopping, "interpolate": interpolate}
    given = {
        "--data": prompts, "--retain": sets, **retained, "own_answers": own_answers,
        **({} if lexicon is None else {"the expressions": lexicon}), **settings.to_json(), **looks,
    }  # fmt: skip
    distributed.check_same(Identity.of(given).parts)
    if validation is not None:
        check_apart(validation, [prompts, *sets])
    if examination is not None:
        check_apart(examination, [prompts, *sets, *(validation.parts if validation is not None else ())])
    claim(checkpoint, {"the model": target, **given, "the validation": validation, **(inputs or {})})
    how = {"max_new_tokens": retained["answer_tokens"], "lexicon": lexicon, "progress": progress}
    (prompts,) = with_answers(target, [prompts], own=False, checkpoint=part_of(checkpoint, "answered"), **how)
    kept = with_answers(target, sets, own=own_answers, checkpoint=part_of(checkpoint, "retained"), **how)
    longest = min(settings.max_length, longest_prompt(target, 0))
    made = [rows_with_remarks(part, target.chat, max_length=longest) for part in (prompts, *kept)]
    rows = [part for part, _ in made]
    remarks = [remark for _, remarks in made for remark in remarks]
    remarks += [
        said for given, part in zip(sets, kept, strict=True) if part is not given and (said := given.only_first)
    ]
    kl, weight, per_refusal = (retained[f"retain_{name}"] for name in ("kl", "weight", "rows"))
    retention = Retention(sets=tuple(rows[1:]), kl=kl, weight=weight, per_refusal=per_refusal) if kept else None
    return Runner(
        target=target, rows=rows[0], settings=settings, look=validation, every=every,
        early_stopping=early_stopping and validation is not None, interpolate=interpolate, sets=[prompts, *kept],
        checkpoint=checkpoint, progress=progress, remarks=remarks,
        make=lambda arm, settings: trainee_of(
            target, arm.what, settings, num_weights=num_weights, retention=retention
        ),
        described={
            "data": facts(prompts),
            "retained": [facts(part) for part in kept],
            **{name: value if kept or name == "answer_tokens" else None for name, value in retained.items()},
            "own_answers": own_answers,
            "lexicon": None if lexicon is None else lexicon.describe(),
            "validation": None if validation is None else {**validation.describe(), **looks},
        },
    )  # fmt: skip


def _notes(runner: Runner) -> list[str]:
    """What a reader of the results should mind."""
    left_out = runner.target.layout.left_out
    return [*([left_out] if left_out else []), *([] if runner.described["retained"] else [UNHELD]), *runner.remarks]


def _patch(runner: Runner, selection: Selection, trial: Trial) -> Patch:
    """The model, which is as it was, against what was trained."""
    assert trial.values is not None
    made = {
        "made_by": "enhance",
        "learning_rate": trial.learning_rate,
        "step": trial.step,
        "share": trial.share,
        "stopped": trial.stopped,
        "settings": runner.settings.to_json(),
        **runner.described,
        "notes": _notes(runner),
        "versions": versions(),
    }
    return Patch.of(runner.target, selection, new=trial.values, metadata=made)


def _sets(source: Source | Sequence[PromptSet | str | Path] | None) -> list[PromptSet]:
    """One set or several; a PromptSet is a sequence too, but not of sets."""
    if source is None:
        return []
    if isinstance(source, list | tuple) and all(isinstance(part, PromptSet | str | Path) for part in source):
        try:
            return [read_prompts(part) for part in source]
        except PromptError as error:
            raise PromptError(
                f"{error} (A list of texts names sets to retain; give prompts as read_prompts([...]))"
            ) from error
    return [read_prompts(source)]
