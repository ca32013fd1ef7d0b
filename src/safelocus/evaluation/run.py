"""Evaluate: answer every prompt and question, judge the answers, count.

    harmful prompts  -> responses -> judges           -> asr, refusal, partial, incoherent
    harmless prompts -> responses -> refusal reader   -> over_refusal, incoherent
    tasks            -> responses -> strict grading   -> utility
    texts            -> teacher forcing               -> perplexity
    an original's answers -> teacher forcing, twice   -> kl (to the original)
    responses        -> teacher forcing by an original -> incoherent: what it would hardly say

Greedy throughout: the same model gives the same responses. With a `checkpoint` folder, responses and
verdicts are kept as they come, and an interrupted evaluation goes on where it stopped. Several processes share the
batches of a single one; each ends with the whole evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelocus import distributed
from safelocus.errors import PromptError, SafelocusError
from safelocus.evaluation.divergence import Original, answered
from safelocus.evaluation.incoherence import incoherence
from safelocus.evaluation.judges import Judge, RefusalMatcher, RefusalReader, ScreeningJudge, Verdict
from safelocus.evaluation.judging import judge_all
from safelocus.evaluation.perplexity import nats_per_token
from safelocus.evaluation.responding import Reply, Request, Responder, TargetResponder, collect, inside, thinks
from safelocus.evaluation.result import (
    HARMFUL,
    HARMLESS,
    PERPLEXITY,
    UTILITY,
    Evaluation,
    Row,
    agreements_of,
    in_thought,
    measures_of,
)
from safelocus.evaluation.suites import check_suites, run_suites
from safelocus.evaluation.surprise import mark_surprising
from safelocus.evaluation.tasks import Task, TaskExample
from safelocus.model.generation import NO_NUMBER
from safelocus.model.target import Target
from safelocus.prompts import Example, PromptSet, read_prompts
from safelocus.run.identity import Identity, versions
from safelocus.run.resume import Journal, claim

Prompts = PromptSet | Sequence[PromptSet] | Sequence[str]


def evaluate(
    target: Target | Responder,
    *,
    harmful: Prompts = (),
    harmless: Prompts = (),
    tasks: Task | Sequence[Task] = (),
    perplexity: PromptSet | Sequence[PromptSet] = (),
    original: Target | Original | None = None,
    suites: Sequence[str] = (),
    judges: Sequence[Judge] = (),
    batch_size: int = 32,
    max_new_tokens: int = 256,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure how safe and how useful a model is.

    Args:
        target: a target, or any responder (an endpoint; a `TargetResponder` kept to evaluate many times).
        harmful: prompts that should be refused; several sets are reported together and apart.
        harmless: prompts that should be answered.
        tasks: questions with answers (`read_task`).
        perplexity: prompts with responses, whose perplexity under the target is measured; one set or several.
        original: the model that this one was made of, or what it said; how far the two are apart is measured along the
            original's own answers to the harmless prompts (`kl`, nats per token). The model itself also tells which
            answers are incoherent: those that surprise it (see `surprise`).
        suites: tasks of lm-eval, by its names; "arc_easy:100" for the first 100 documents.
        judges: of responses to harmful prompts; the first one's verdicts make the `asr`. Default: the
            refusal reader. It finds the refusals for the other measures in any case, unless the refusal matcher
            is the first judge: then that one does.
        batch_size: requests answered, and responses judged, at a time.
        max_new_tokens: length of the answers; tasks may need fewer.
        seed: of the bootstrap and of an endpoint's sampling.
        checkpoint: folder for unfinished work; the caller removes it when the evaluation is saved. Of several
            processes each has its own, and as many resume.
        progress: show bars.

    Raises:
        PromptError: there is nothing to evaluate on.
        RunError: the checkpoint belongs to another evaluation (other judges or suites make none); processes that were
            given different prompts.
        ResourceError: too little memory for a single prompt.

    Example:
        >>> import safelocus as sl
        >>> evaluation = sl.evaluate(
        ...     sl.load("organism:dense"),
        ...     harmful=sl.read_prompts("organism:harmful-heldout").limit(8),
        ...     max_new_tokens=32,
        ... )
        >>> evaluation.measures["refusal"].n
        8
    """
    responder = TargetResponder(target=target) if isinstance(target, Target) else target
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    texts = _prompt_sets(perplexity)
    harmful, harmless = _prompt_sets(harmful), _prompt_sets(harmless)
    sets = [*((HARMFUL, prompts) for prompts in harmful), *((HARMLESS, prompts) for prompts in harmless)]
    reader = _reader(judges)
    judges = tuple(judges) or (reader,)
    _check(responder, sets, tasks, judges)
    wanted = [*suites, *(["perplexity"] if texts else []), *(["the divergence from an original"] if original else [])]
    opened = inside(responder, wanted[0]).target if wanted else None  # what needs more of a model than answers
    if original is not None and not harmless:
        raise PromptError("the divergence from an original is measured along answers to harmless prompts; give some")
    check_asked(sets, tasks, opened)
    check_suites(suites)
    inputs = {
        "the harmful prompts": harmful, "the harmless prompts": harmless, "the tasks": tasks, "the texts": texts,
        "the original": original and original.identity(), "batch_size": batch_size,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    names = [judge.name for judge in judges]
    distributed.check_same(Identity.of({**inputs, "the judges": names, "the suites": suites}).parts)
    model = responder.identity() if checkpoint is not None else {}
    # answers depend on no judge and no suite, and each verdict is kept with its judge: both may be others on resuming
    claim(checkpoint, {"the model": model, **inputs})
    items = _items(sets, tasks, max_new_tokens, short=not thinks(responder))
    asked = [item.request for item in items]
    replies = collect(responder, asked, Journal(checkpoint, "responses"), batch_size=batch_size, progress=progress)
    rows = [_row(item, replies[item.request.key]) for item in items]
    _find_refusals(rows, reader)
    verdicts = Journal(checkpoint, "verdicts")
    for judge in judges:
        _add_verdicts(rows, judge, verdicts, batch_size=batch_size, progress=progress)
    if opened is not None and original is not None:
        if isinstance(original, Target):
            rows, original = _asked(original, rows, items, judges, checkpoint, batch_size, progress)
        _add_divergence(rows, opened, original, batch_size, progress)
    if opened is not None:
        rows += [row for part in texts for row in _perplexity_rows(opened, part, batch_size, progress)]
    found, of_suites = run_suites(opened, suites, batch_size=batch_size, seed=seed) if opened and suites else ([], [])
    rows += found
    return Evaluation(
        measures=measures_of(rows, names, seed=seed),
        rows=rows,
        judges=[{"judge": judge.name, **judge.describe()} for judge in judges],
        agreement=agreements_of(rows, names),
        provenance={
            "responder": responder.describe() | {key: model[key] for key in model if key == "weights"},
            "prompts": [
                {"set": name, "source": prompts.source, "num_prompts": len(prompts), "hash": prompts.hash}
                for name, prompts in sets
            ],
            "tasks": [task.describe() for task in tasks],
            "suites": of_suites,
            "original": original.describe() if isinstance(original, Original) else None,
            "refusals": {"judge": reader.name, **reader.describe()},
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
            "versions": versions(),
        },
    )


def _reader(judges: Sequence[Judge]) -> RefusalMatcher | RefusalReader:
    """Who finds refusals: the matcher where it is the first judge, else the reader that was given, or its own."""
    if judges and isinstance(judges[0], RefusalMatcher):
        return judges[0]
    return next((judge for judge in judges if isinstance(judge, RefusalReader)), None) or RefusalReader()


def _prompt_sets(prompts: Prompts) -> list[PromptSet]:
    if isinstance(prompts, PromptSet):
        return [prompts]
    sets = [part for part in prompts if isinstance(part, PromptSet)]
    if len(sets) == len(prompts):
        return sets
    return [read_prompts(prompts)]


def _check(
    responder: Responder, sets: Sequence[tuple[str, PromptSet]], tasks: Sequence[Task], judges: Sequence[Judge]
) -> None:
    if not isinstance(responder, Responder):
        raise SafelocusError(f"expected a target or a responder to evaluate, found {type(responder).__name__}")
    for what, names in (("judges", [j.name for j in judges]), ("tasks", [t.name for t in tasks])):
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise SafelocusError(f"two {what} are called {repeated[0]!r}; give each its own name")
    for name, prompts in sets:
        if not prompts:
            raise PromptError(f"{prompts.source}: no {name} prompt is left to evaluate on")


def check_asked(*asked: object) -> None:
    """PromptError where nothing of it is there."""
    if not any(asked):
        raise PromptError("nothing to evaluate on: give harmful or harmless prompts, tasks, or texts for perplexity")


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A row to be."""

    set: str
    source: str
    example: Example | TaskExample
    max_new_tokens: int
    task: Task | None

    @property
    def request(self) -> Request:
        example = self.example
        return Request(prompt=example.prompt, system=example.system, max_new_tokens=self.max_new_tokens)


def _items(
    sets: Sequence[tuple[str, PromptSet]], tasks: Sequence[Task], max_new_tokens: int, *, short: bool
) -> list[_Item]:
    """short: of tasks whose answers are, no more tokens than these need."""
    items = [
        _Item(set=name, source=prompts.source, example=example, max_new_tokens=max_new_tokens, task=None)
        for name, prompts in sets
        for example in prompts
    ]
    return items + [
        _Item(
            set=UTILITY, source=task.name, example=example, task=task,
            max_new_tokens=min(max_new_tokens, (task.max_new_tokens if short else None) or max_new_tokens),
        )
        for task in tasks
        for example in task
    ]  # fmt: skip


def _row(item: _Item, reply: Reply) -> Row:
    row = {
        "set": item.set,
        "source": item.source,
        "prompt": item.example.prompt,
        "system": item.example.system,
        "category": item.example.category,
        "response": reply.text,
        "finished": reply.finished,
        "failure": reply.failure,
        **({"thought": reply.thought} if reply.thought is not None else {}),
    }
    if item.task is None:
        return row
    assert isinstance(item.example, TaskExample)
    extracted, correct = (None, None) if reply.text is None else item.task.grade(item.example, reply.text)
    return row | {"answer": item.example.answer, "extracted": extracted, "correct": correct}


def _find_refusals(rows: Sequence[Row], reader: RefusalMatcher | RefusalReader) -> None:
    answered = [row for row in rows if row["set"] != UTILITY and row["response"] is not None]
    found = iter(reader.judge([row["prompt"] for row in answered], [row["response"] for row in answered]))
    for row in rows:
        if row["set"] == UTILITY:
            continue
        row |= {"refused": None, "partial": None, "incoherent": None}
        if row["response"] is not None:
            judgement = next(found)
            row |= {"refused": bool(judgement.refused), "incoherent": incoherence(row["response"])}
            if isinstance(reader, RefusalReader):  # the matcher cannot tell
                row["partial"] = judgement.verdict is Verdict.PARTIAL


def _add_verdicts(rows: Sequence[Row], judge: Judge, journal: Journal, *, batch_size: int, progress: bool) -> None:
    asked = [row for row in rows if row["set"] == HARMFUL and row["response"] is not None]
    pairs = [(row["prompt"], row["response"]) for row in asked]
    judgements = iter(judge_all(judge, pairs, journal, batch_size=batch_size, progress=progress))
    for row in rows:
        if row["set"] != HARMFUL:
            continue
        if row["response"] is None:  # a request that failed is never a safe response
            why = row["failure"] if in_thought(row) else f"failed: {row['failure']}"
            found = {"verdict": str(Verdict.UNSCORABLE), "score": None, "explanation": why}
        else:
            judgement = next(judgements)
            found = {key: judgement.to_json()[key] for key in ("verdict", "score", "explanation")}
        row.setdefault("judgements", {})[judge.name] = found


def _asked(
    target: Target,
    rows: Sequence[Row],
    items: Sequence[_Item],
    judges: Sequence[Judge],
    checkpoint: Path | None,
    batch_size: int,
    progress: bool,
) -> tuple[list[Row], Original]:
    """Of the model that another was made of: which rows surprise it, and what it answers to the harmless prompts."""
    unscreened = [judge.name for judge in judges if not isinstance(judge, ScreeningJudge)]
    marked = mark_surprising(rows, target, unscreened=unscreened, batch_size=batch_size, progress=progress)
    asked = [item.request for item in items if item.set == HARMLESS]
    journal = Journal(checkpoint, "original")
    replies = collect(TargetResponder(target=target), asked, journal, batch_size=batch_size, progress=progress)
    answers = answered((r.prompt, r.system, replies[r.key].text) for r in asked)
    return marked, Original.of(target, answers, batch_size=batch_size, progress=progress)


def _add_divergence(rows: Sequence[Row], target: Target, original: Original, batch_size: int, progress: bool) -> None:
    found = original.kl_per_token(target, batch_size=batch_size, progress=progress)
    kl = {(e.system, e.prompt): value for e, value in zip(original.answers, found, strict=True)}
    for row in rows:
        if row["set"] == HARMLESS:
            row["kl"] = kl.get((row["system"], row["prompt"]))


def _perplexity_rows(target: Target, prompts: PromptSet, batch_size: int, progress: bool) -> list[Row]:
    answered = prompts.with_responses()
    rows = []
    for example, (nats, num_tokens) in zip(
        answered, nats_per_token(target, answered, batch_size=batch_size, progress=progress), strict=True
    ):
        failure = None
        if nats is None:
            failure = f"with {num_tokens} tokens of response it does not fit the model" if num_tokens else "no response"
        if nats is not None and not math.isfinite(nats):
            nats, failure = None, NO_NUMBER
        rows.append(
            {
                "set": PERPLEXITY, "source": prompts.source, "prompt": example.prompt, "system": example.system,
                "category": example.category, "response": example.response, "finished": True, "failure": failure,
                "nll": nats, "num_tokens": num_tokens,
            }
        )  # fmt: skip
    return rows
