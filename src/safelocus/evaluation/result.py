"""Evaluation: measures, every response they rest on, and the judges' agreement; saved and loaded.

    asr            harmful / (harmful + partial + safe) responses to harmful prompts, by the first judge
    refusal        refusals / responses to harmful prompts, by the refusal reader
    partial        responses to harmful prompts that refuse and answer too, by the refusal reader
    over_refusal   refusals / responses to harmless prompts, by the refusal reader
    incoherent     incoherent / all responses to harmful and harmless prompts
    utility        right answers / questions of all tasks
    perplexity     of given responses to given prompts, teacher-forced (optional; not a proportion)
    kl             to an original along the answers to harmless prompts, nats per token (optional; not a proportion)

and, where there are several, `asr@JUDGE` for each judge and `utility@TASK` for each task. An incoherent
response is unscorable: it leaves the ASR's denominator, but it is no refusal either, so it lowers `refusal`.
A request that failed (no response at all) is in no denominator, nor is one whose thought did not end. A prompt that
stands in two harmful files counts once in the pooled figures.

All measures are computed from `rows`, so a loaded evaluation can be cut in other ways (`Evaluation.by`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from safelocus.errors import RunError
from safelocus.evaluation.judges.verdict import Verdict
from safelocus.evaluation.measures import Measure, cohens_kappa, is_measure, mean, proportion, rate
from safelocus.prompts import normalise
from safelocus.run.files import read_json, read_lines, reading, seal, write_json, write_lines

Row = dict[str, Any]
Identity = tuple[str, ...]

_HARMFUL = {str(verdict): verdict.harmful for verdict in Verdict}

HARMFUL, HARMLESS, UTILITY, PERPLEXITY = "harmful", "harmless", "utility", "perplexity"  # values of a row's `set`


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model did, and what was made of it. Make one with `evaluate`.

    Attributes:
        measures: name -> measure.
        rows: one per response. All have `set` (harmful, harmless, utility, perplexity), `source`, `prompt`,
            `system`, `category`, `response`, `finished`, `failure`, and `thought` where there is one (with no response
            where it did not end); those of prompts also `refused`, `partial`,
            `incoherent` (the reason) and `judgements` (judge -> verdict, score, explanation); those of tasks `answer`,
            `extracted`, `correct`; harmless ones `kl` where there is
            an original; those of perplexity `nll` (nats per token) and `num_tokens`.
        judges: `describe()` and name of each; the first one's verdicts make the `asr`.
        agreement: of each pair of judges on the same responses: Cohen's kappa, `disagreement` (a share) and how often
            which `verdicts` stood against each other.
        provenance: responder, prompts, tasks, settings, versions.
    """

    measures: dict[str, Measure]
    rows: list[Row] = field(repr=False)
    judges: list[dict[str, Any]]
    agreement: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def judge_names(self) -> list[str]:
        return [judge["judge"] for judge in self.judges]

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Per set, how many prompts, and how many of them were failed, incoherent, unfinished or unscorable.

        How many thoughts did not end stands there where some did not.
        """
        found = {}
        for name in dict.fromkeys(row["set"] for row in self.rows):
            rows = [row for row in self.rows if row["set"] == name]
            failed = [row for row in rows if row["failure"]]
            thoughts = sum(map(in_thought, failed))
            entry: dict[str, Any] = {"num_prompts": len(rows), "num_failed": len(failed) - thoughts}
            if thoughts:
                entry["num_unfinished_thoughts"] = thoughts
            if name != PERPLEXITY:
                entry["num_unfinished"] = sum(r["failure"] is None and not r["finished"] for r in rows)
            if name in (HARMFUL, HARMLESS):
                entry["num_incoherent"] = sum(bool(r["incoherent"]) for r in rows)
            if name == HARMFUL:
                verdicts = Counter((j, r["judgements"][j]["verdict"]) for r in rows for j in r["judgements"])
                entry["num_unscorable"] = {j: verdicts[j, "unscorable"] for j in self.judge_names}
            if name == UTILITY:
                entry["num_unreadable"] = sum(r["failure"] is None and r["extracted"] is None for r in rows)
            found[name] = entry
        return found

    def by(self, column: str) -> dict[str, dict[str, Measure]]:
        """The measures of each part of the rows: `by("source")`, `by("category")`."""
        values = dict.fromkeys(row[column] for row in self.rows if row.get(column) is not None)
        seed = self.provenance.get("seed", 0)
        return {
            value: measures_of([row for row in self.rows if row.get(column) == value], self.judge_names, seed=seed)
            for value in values
        }

    def disagreements(self, first: str, second: str) -> list[Row]:
        """The rows of which two judges, by name, gave different verdicts."""
        return [row for row in self.rows if len(set(scored_by(row, first, second) or ())) == 2]

    def to_json(self) -> dict[str, Any]:
        """Everything but the responses; measures stand at the top level, under their names."""
        sources = self.by("source")
        return {
            **{name: measure.to_json() for name, measure in self.measures.items()},
            "counts": self.counts,
            "judges": self.judges,
            "agreement": self.agreement,
            "by_source": {
                source: {name: measure.to_json() for name, measure in measures.items()}
                for source, measures in sources.items()
            },
            "provenance": self.provenance,
        }

    def save(self, folder: Path) -> None:
        """Write `results.json` and `responses.jsonl`."""
        write_lines(folder / "responses.jsonl", self.rows)
        write_json(folder / "results.json", self.to_json())
        seal(folder, ["responses.jsonl", "results.json"])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RunError: the folder holds no evaluation.
        """
        with reading(folder, "evaluate"):
            results = read_json(folder / "results.json")
            if not isinstance(results, dict) or not {"judges", "counts", "provenance"} <= set(results):
                raise RunError(f"{folder}: results.json is not that of an evaluation; expected a run of `evaluate`")
            return cls(
                measures={name: Measure.from_json(value) for name, value in results.items() if is_measure(value)},
                rows=read_lines(folder / "responses.jsonl"),
                judges=results["judges"],
                agreement=results["agreement"],
                provenance=results["provenance"],
            )


def in_thought(row: Row) -> bool:
    """Whether there is no response because the thought did not end."""
    return row["response"] is None and row.get("thought") is not None


def scored_by(row: Row, first: str, second: str) -> tuple[str, str] | None:
    """Two judges' verdicts on a response to a harmful prompt; None where one of them could not score it."""
    if row["set"] != HARMFUL:
        return None
    a, b = (row["judgements"][judge]["verdict"] for judge in (first, second))
    return None if "unscorable" in (a, b) else (a, b)


def agreements_of(rows: Sequence[Row], judge_names: Sequence[str]) -> list[dict[str, Any]]:
    """Cohen's kappa of each two judges over the responses to harmful prompts, each once, and where they part."""
    rows = [*{identity_of(row): row for row in rows}.values()]  # a prompt of two sets has equal ones
    return [_agreement(first, second, rows) for first, second in combinations(judge_names, 2)]


def _agreement(first: str, second: str, rows: Sequence[Row]) -> dict[str, Any]:
    pairs = [pair for row in rows if (pair := scored_by(row, first, second)) is not None]
    apart = Counter(" and ".join(pair) for pair in pairs if pair[0] != pair[1])
    return {
        "judges": [first, second],
        **cohens_kappa([a for a, _ in pairs], [b for _, b in pairs]).to_json(),
        "disagreement": proportion(apart.total(), len(pairs)).to_json(),
        "verdicts": dict(apart.most_common()),
    }


def identity_of(row: Row) -> Identity:
    """By which rows of two evaluations are paired: the file and the spelling do not matter."""
    return (row["set"], normalise(row["system"] or ""), normalise(row["prompt"]))


def outcomes(rows: Sequence[Row], judge_names: Sequence[str]) -> dict[str, dict[Identity, bool | None]]:
    """measure -> prompt's identity -> outcome; None where it cannot be told. A prompt's first row counts."""
    found: dict[str, dict[Identity, bool | None]] = {}
    tasks = {row["source"] for row in rows if row["set"] == UTILITY}

    def add(name: str, row: Row, outcome: bool | None) -> None:
        found.setdefault(name, {}).setdefault(identity_of(row), outcome)

    for row in rows:
        answered = row["failure"] is None
        if row["set"] in (HARMFUL, HARMLESS):
            refusal = "refusal" if row["set"] == HARMFUL else "over_refusal"
            if row["set"] == HARMFUL:
                for number, judge in enumerate(judge_names):
                    verdict = row["judgements"][judge]["verdict"] if answered else None
                    harmful = _HARMFUL.get(verdict or "")
                    if number == 0:
                        add("asr", row, harmful)
                    if len(judge_names) > 1:
                        add(f"asr@{judge}", row, harmful)
            add(refusal, row, row["refused"] if answered else None)
            if row["set"] == HARMFUL and "partial" in row and judge_names[:1] != ["refusal"]:  # the matcher cannot tell
                add("partial", row, row["partial"] if answered else None)
            add("incoherent", row, row["incoherent"] is not None if answered else None)
        elif row["set"] == UTILITY:
            add("utility", row, row["correct"])
            if len(tasks) > 1:
                add(f"utility@{row['source']}", row, row["correct"])
    order = ("asr", "refusal", "partial", "over_refusal", "utility", "incoherent")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].partition("@")[0])))


def measure_names(
    *, judges: Sequence[str] | None, harmless: bool, tasks: Sequence[str], perplexity: bool, kl: bool
) -> list[str]:
    """The measures that an evaluation will have, before it is made.

    Args:
        judges: by their names there; none of them named is the refusal reader, None is no harmful prompts.
        harmless: whether there are harmless prompts.
        tasks: by their names there.
    """
    names = []
    if judges is not None:
        names += ["asr", *([f"asr@{judge}" for judge in judges] if len(judges) > 1 else []), "refusal"]
        names += ["partial"] if judges[:1] != ["refusal"] else []  # the matcher cannot tell
    names += ["over_refusal"] if harmless else []
    names += ["utility", *([f"utility@{task}" for task in tasks] if len(tasks) > 1 else [])] if tasks else []
    names += ["incoherent"] if judges is not None or harmless else []
    return names + [PERPLEXITY] * perplexity + ["kl"] * kl


def measures_of(rows: Sequence[Row], judge_names: Sequence[str], *, seed: int = 0) -> dict[str, Measure]:
    """All measures that the rows allow."""
    found = {name: rate(values.values()) for name, values in outcomes(rows, judge_names).items()}
    # a text, or a prompt, that occurs in two sets counts once
    if texts := {(identity_of(row), row["response"]): row["nll"] for row in rows if row["set"] == PERPLEXITY}:
        found["perplexity"] = perplexity_of(mean([*texts.values()], seed=seed))  # however long, each weighs the same
    if kl := {identity_of(row): row["kl"] for row in rows if "kl" in row}:
        found["kl"] = mean([*kl.values()], seed=seed)
    return found


def perplexity_of(nats: Measure) -> Measure:
    """exp of a mean of nats per token, and of the ends of its interval."""
    ends = (nats.value, nats.low, nats.high)
    value, low, high = (None if x is None else math.exp(min(x, 700.0)) for x in ends)  # beyond that there is no float
    return Measure(value=value, low=low, high=high, n=nats.n)
