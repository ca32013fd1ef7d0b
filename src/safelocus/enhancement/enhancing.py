"""Enhance (SET): train the selected weights on refusals, and measure whether that made the model safe and no worse.

    enhance           a selection and refusals -> Patch
    run_enhancement   the same, with the model measured before and after, controls, and a sweep -> Enhancement

The model comes back as it was, to the bit, whatever happens; the patch is applied by its user.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelocus.enhancement.enhancement import Enhancement, Trained
from safelocus.enhancement.lesson import ANSWER_TOKENS, Control, Lesson, Source, maker, part_of
from safelocus.enhancement.looks import cost
from safelocus.enhancement.tuning import Tuning
from safelocus.errors import RunError, TrainingError
from safelocus.evaluation import TargetResponder
from safelocus.patch import Patch
from safelocus.prompts import PromptSet
from safelocus.scoring import versions
from safelocus.selection import Selection
from safelocus.target import Target
from safelocus.training import TrainingSettings
from safelocus.training.examination import Examination, check_apart

# what held up best on the organisms (docs/enhance.md)
SETTINGS = TrainingSettings(steps=100, learning_rate=1e-3, schedule="cosine", batch_size=8)


def enhance(
    target: Target,
    selection: Selection,
    data: Source,
    *,
    retain: Source | Sequence[PromptSet] | None = None,
    retain_kl: float = 20.0,
    retain_weight: float = 0.0,
    retain_rows: int = 6,
    own_answers: bool = False,
    answer_tokens: int = ANSWER_TOKENS,
    validation: Examination | None = None,
    every: int = 10,
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
        retain: harmless prompts with answers, on which the model is held to what it was; several sets take turns.
            Without any it may learn to refuse those too, and the patch's notes say so. Where no prompt has an answer,
            the model answers first, and its own answers are retained.
        retain_kl: weight of the divergence from the original model along these answers.
        retain_weight: weight of the ordinary loss on them.
        retain_rows: how many of them go with each refusal.
        own_answers: retain the model's own answers in place of those given.
        answer_tokens: how long its own answers are; longer ones are cut.
        validation: stop early by it, and keep the best of the looks taken every so many steps (`every`). Use no
            prompts on which the result will be judged.
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
        >>> patch = sl.enhance(target, selection, "organism:refusals", steps=2)
        >>> patch.k == selection.k
        True
    """
    lesson = Lesson.of(
        target, data, retain=retain, retain_kl=retain_kl, retain_weight=retain_weight, retain_rows=retain_rows,
        own_answers=own_answers, answer_tokens=answer_tokens, validation=validation, every=every,
        early_stopping=validation is not None, settings=replace(settings or SETTINGS, **changes),
        checkpoint=checkpoint, progress=progress,
        further={"the selection": selection},
    )  # fmt: skip
    selection.check(target.fingerprint(like=selection.provenance.fingerprint), allow_mismatch=allow_mismatch)
    return lesson.patch(selection, lesson.teach("selection", selection, lesson.settings))


def run_enhancement(
    target: Target,
    selection: Selection,
    data: Source,
    *,
    examination: Examination,
    validation: Examination | None = None,
    every: int = 10,
    early_stopping: bool = False,
    controls: Mapping[str, Control | Callable[[], Control]] | None = None,
    learning_rates: Sequence[float] = (),
    retain: Source | Sequence[PromptSet] | None = None,
    retain_kl: float = 20.0,
    retain_weight: float = 0.0,
    retain_rows: int = 6,
    own_answers: bool = False,
    answer_tokens: int = ANSWER_TOKENS,
    settings: TrainingSettings | None = None,
    allow_seen: bool = False,
    allow_mismatch: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> Enhancement:
    """Enhance, and measure the model before and after; train controls the same way, and measure those.

    Args:
        examination: what is measured before and after; on nothing of it is anything chosen.
        validation: for looks, early stopping and the choice of a learning rate; other prompts again.
        early_stopping: keep the best look and stop when more would not help; else the last step is kept.
        controls: by name: other selections, "full" for all weights, "lora" for an adapter of about equal size.
            Trained with the same settings on the same data. A function is called when its turn comes.
        learning_rates: to try, for the selection and every control; each keeps its best one by the validation.
        allow_seen: measure with prompts that were trained on, all the same.

    For the rest see `enhance`.

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
    settings = replace(settings or SETTINGS, **changes)
    rates = tuple(dict.fromkeys(learning_rates)) or (settings.learning_rate,)
    if len(rates) > 1 and validation is None:
        raise TrainingError("a sweep of learning rates needs a validation part to choose one by")
    lesson = Lesson.of(
        target, data, retain=retain, retain_kl=retain_kl, retain_weight=retain_weight, retain_rows=retain_rows,
        own_answers=own_answers, answer_tokens=answer_tokens, validation=validation, every=every,
        early_stopping=early_stopping, settings=settings, checkpoint=checkpoint, progress=progress,
        further={
            "the selection": selection, "the controls": controls, "learning_rates": rates,
            "the examination": examination,
        },
    )  # fmt: skip
    notes = lesson.notes + check_apart(examination, lesson.sets, allow_seen=allow_seen)
    if validation is not None:
        check_apart(examination, [validation.harmful], allow_seen=allow_seen)
    fingerprint = target.fingerprint()
    own = target.fingerprint(like=selection.provenance.fingerprint)
    notes += selection.check(own, allow_mismatch=allow_mismatch)
    responder = TargetResponder(target=target)
    before = examination.evaluate(responder, checkpoint=part_of(checkpoint, "before"), progress=progress)
    trained = []
    for kind, control in {"selection": selection, **(controls or {})}.items():
        what = control() if callable(control) else control
        tunings = tuple(
            lesson.teach(kind, what, replace(settings, learning_rate=rate), num_weights=selection.k) for rate in rates
        )
        chosen = _choose(tunings)
        with maker(target, what, selection.k)(settings) as trainee:
            trainee.write(tunings[chosen].values)
            after = examination.evaluate(responder, checkpoint=part_of(checkpoint, f"after-{kind}"), progress=progress)
        trained.append(Trained(kind=kind, tunings=tunings, chosen=chosen, after=after))
    if differences := fingerprint.differences(target.fingerprint()):
        raise RunError(
            f"the model did not come back as it was ({'; '.join(differences)}); something else changed its weights "
            "during the training. Load it anew, and begin again with nothing else running on it"
        )
    return Enhancement(
        before=before,
        trained=tuple(trained),
        patch=lesson.patch(selection, trained[0].tuning),
        settings=settings,
        notes=tuple(notes),
        provenance={
            "model": target.name,
            "fingerprint": fingerprint.id,
            "dtype": target.dtype,
            "selection": selection.describe(),
            **lesson.describe(),
            "versions": versions(),
        },
    )


def _choose(tunings: Sequence[Tuning]) -> int:
    """The best by its validation; of equals the gentlest learning rate."""
    if len(tunings) == 1:
        return 0
    return min(
        range(len(tunings)),
        key=lambda i: (cost(tunings[i].point, tunings[i].points[0]), tunings[i].learning_rate),
    )
