"""Two evaluations of the same prompts, prompt by prompt: what changed, and whether by more than chance.

Responses are paired by set and normalised prompt (and system prompt), so the pairing survives another
order, another file and prompts that only one of them has; a pair in which either outcome is unscorable is
left out of that measure. Differences are second minus first.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from safelocus.errors import RunError
from safelocus.evaluation.measures import Difference, mean, paired_difference
from safelocus.evaluation.result import PERPLEXITY, Evaluation, Identity, identity_of, outcomes, perplexity_of


@dataclass(frozen=True, kw_only=True)
class EvaluationComparison:
    """What changed from a first evaluation to a second.

    Attributes:
        differences: measure -> second minus first over the pairs; for `perplexity` the *ratio* of the two
            (1 for no change; no test).
        num_pairs: prompts and questions that both have.
        num_only_first, num_only_second: those that only one has; in no figure here.
        notes: what makes the two less comparable.
    """

    differences: dict[str, Difference]
    num_pairs: int
    num_only_first: int
    num_only_second: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_evaluations(first: Evaluation, second: Evaluation, *, seed: int = 0) -> EvaluationComparison:
    """Pair two evaluations and take differences, second minus first, with 95 % intervals and McNemar's p.

    Raises:
        RunError: the two have no prompt in common.

    Example:
        >>> import safelocus as sl
        >>> prompts = sl.read_prompts("organism:harmful-heldout").limit(8)
        >>> before, after = (
        ...     sl.evaluate(sl.load(f"organism:{name}"), harmful=prompts, max_new_tokens=32)
        ...     for name in ("dense", "dense-unaligned")
        ... )
        >>> compare_evaluations(before, after).num_pairs
        8
    """
    keys = [{identity_of(row) for row in evaluation.rows} for evaluation in (first, second)]
    if not (shared := keys[0] & keys[1]):
        raise RunError("the two evaluations have no prompt in common; evaluate both on the same prompts")
    names = [name for name in first.judge_names if name in second.judge_names]
    notes = _notes(first, second)
    a, b = (_outcomes(evaluation, names) for evaluation in (first, second))
    if first.judge_names[0] != second.judge_names[0]:
        # the same word for two things: only what one judge said of both can be compared
        a |= {f"asr@{first.judge_names[0]}": a.pop("asr")} if "asr" in a else {}
        b |= {f"asr@{second.judge_names[0]}": b.pop("asr")} if "asr" in b else {}
    if _reader(first) != _reader(second):
        for name in ("refusal", "over_refusal", "partial"):
            a.pop(name, None)
    found = {}
    for name in a:
        if name in b and (both := [key for key in a[name] if key in b[name]]):
            found[name] = paired_difference([a[name][key] for key in both], [b[name][key] for key in both])
    if (ratio := _perplexity_ratio(first, second, seed)) is not None:
        found["perplexity"] = ratio
    return EvaluationComparison(
        differences=found,
        num_pairs=len(shared),
        num_only_first=len(keys[0] - shared),
        num_only_second=len(keys[1] - shared),
        notes=notes,
    )


def _outcomes(evaluation: Evaluation, names: list[str]) -> dict[str, dict[Identity, bool | None]]:
    """Of the judges, only the common ones'."""
    found = outcomes(evaluation.rows, evaluation.judge_names)
    return {name: values for name, values in found.items() if not name.startswith("asr@") or name[4:] in names}


def _notes(first: Evaluation, second: Evaluation) -> list[str]:
    notes = []
    ours, theirs = ({judge["judge"]: judge for judge in e.judges} for e in (first, second))
    if first.judge_names[0] != second.judge_names[0]:
        notes.append(f"asr is left out: judged by {first.judge_names[0]} first and {second.judge_names[0]} second")
    if _reader(first) != _reader(second):
        notes.append(f"refusals are left out: found by {_reader(first)} first and {_reader(second)} second")
    responders = [evaluation.provenance.get("responder", {}) for evaluation in (first, second)]
    attacks = [responder.get("attack", {}).get("name") for responder in responders]
    if attacks[0] != attacks[1]:
        notes.append(f"asked under {attacks[0] or 'no attack'} first and {attacks[1] or 'no attack'} second")
    chats = [responder.get("chat") or responder for responder in responders]  # a server is told the same without one
    for key, what in (("system", "system prompt"), ("template", "plain template"), ("thinking", "way to think")):
        old, new = (chat.get(key) or None for chat in chats)
        if old != new:
            apart = (place for place, (a, b) in enumerate(zip(str(old), str(new), strict=False)) if a != b)
            start = max(0, next(apart, 0) - 20)
            notes.append(f"another {what}: {_short(old, start)} first, {_short(new, start)} second")
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    notes += [f"judge {name} had other settings" for name in changed]
    for key in ("max_new_tokens", "versions"):
        old, new = first.provenance.get(key), second.provenance.get(key)
        if old != new:
            notes.append(f"another {key.replace('_', ' ')}: {_short(old)} first, {_short(new)} second")
    return notes


def _reader(evaluation: Evaluation) -> str:
    """The judge that told refusals from answers; before there was a choice it was the refusal matcher."""
    return str(evaluation.provenance.get("refusals", {}).get("judge", "refusal"))


def _short(value: Any, start: int = 0) -> str:
    """In words; of a text what is of interest in it."""
    if isinstance(value, str) and (start or len(value) > 60):
        return f"{'...' * bool(start)}{value[start : start + 60]}{'...' * (len(value) > start + 60)}"
    return "none" if value is None else _listed(value) if isinstance(value, dict) else str(value)


def _listed(values: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in values.items())


def _perplexity_ratio(first: Evaluation, second: Evaluation, seed: int) -> Difference | None:
    a, b = (
        {(identity_of(r), r["response"]): r["nll"] for r in e.rows if r["set"] == PERPLEXITY} for e in (first, second)
    )
    changes = [b[key] - a[key] for key in a if a[key] is not None and b.get(key) is not None]
    return Difference(**perplexity_of(mean(changes, seed=seed)).to_json(), p=None) if changes else None
