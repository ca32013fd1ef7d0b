"""How far a selection depends on what it was made with: prompts, seeds, objective, ratio.

    prompts      scores from one random half of the prompts against scores from the other half
    seeds        the same prompts, another seed of the objective's relaxation (Gumbel noise)
    objectives   the same prompts, another objective (guard, classifier, refusal, your own)

Agreement is the intersection over union of the top weights at each ratio, beside its level by chance for two
selections of these sizes, and Spearman's rank correlation of all scores. (Across ratios, selections from the
same scores are nested by construction, so there is nothing to measure: ratios are columns here.)

Input: a target, prompts and objectives. Output: a frozen `Stability`.
"""

import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from safelocus.errors import PromptError, SelectionError
from safelocus.model.target import Target
from safelocus.objective import Objective, describe
from safelocus.progress import track
from safelocus.prompts import PromptSet, read_prompts
from safelocus.run.files import read_json, reading, seal, write_json
from safelocus.run.resume import claim, part_of
from safelocus.scoring.comparison import Overlap, compare, correlate
from safelocus.scoring.run import Method, score
from safelocus.scoring.scores import Scores
from safelocus.selection.ratio import count_for_ratio


@dataclass(frozen=True, kw_only=True)
class ScoreAgreement:
    """Two sets of scores that differ in one thing.

    Attributes:
        kind: "prompts", "seeds" or "objectives": what differs.
        a, b: what each was made with, in words.
        ratio: of the top weights compared.
        overlap: of these, with the chance level.
        rho: Spearman's rank correlation over all eligible weights; None where one side is constant.
    """

    kind: str
    a: str
    b: str
    ratio: float
    overlap: Overlap
    rho: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """All agreements, and what they were measured with.

    Attributes:
        agreements: one per pair and ratio.
        provenance: model, prompts, objectives, settings.
        notes: what was left out, in whole sentences.
    """

    agreements: list[ScoreAgreement] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def summary(self) -> list[dict[str, Any]]:
        """Per kind, pair of objectives and ratio: mean, lowest and highest IoU, chance, and mean rho."""
        groups: dict[tuple[str, str, float], list[ScoreAgreement]] = {}
        for agreement in self.agreements:
            groups.setdefault((agreement.kind, _group(agreement), agreement.ratio), []).append(agreement)
        rows = []
        for (kind, what, ratio), members in groups.items():
            ious = [a.overlap.iou or 0.0 for a in members]
            chances = [a.overlap.expected_iou or 0.0 for a in members]
            rhos = [a.rho for a in members if a.rho is not None]
            rows.append(
                {
                    "kind": kind,
                    "what": what,
                    "ratio": ratio,
                    "num_pairs": len(members),
                    "iou": sum(ious) / len(ious),
                    "lowest": min(ious),
                    "highest": max(ious),
                    "chance": sum(chances) / len(chances),
                    "rho": sum(rhos) / len(rhos) if rhos else None,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary(),
            "agreements": [agreement.to_json() for agreement in self.agreements],
            "notes": list(self.notes),
            "provenance": self.provenance,
        }

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        write_json(folder / "results.json", self.to_json())
        seal(folder, ["results.json"])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; RunError for anything else."""
        with reading(folder, "stability"):
            values = read_json(Path(folder) / "results.json")
            agreements = [
                ScoreAgreement(**{**row, "overlap": Overlap(**row["overlap"])}) for row in values["agreements"]
            ]
            return cls(agreements=agreements, provenance=values["provenance"], notes=tuple(values["notes"]))


def stability(
    target: Target,
    prompts: PromptSet | Iterable[object] | str | Path,
    *,
    objectives: Mapping[str, Objective],
    ratios: Sequence[float] = (0.003, 0.01, 0.03),
    method: Method = "esi",
    splits: int = 3,
    seeds: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Stability:
    """Measure how much selections agree when prompts, seeds or the objective change.

    Args:
        target: the model under study.
        prompts: harmful prompts, whatever `read_prompts` takes; halves of them are compared, so give twice as many as
            you would score with.
        objectives: name -> objective; the first is split by prompts and seeds too.
        ratios: sizes of the selections compared.
        method: esi, gradient or snip.
        splits: random halvings of the prompts; 0 for none.
        seeds: seeds of the objective's Gumbel noise, where it has that; 0 for none.
        seed: of the halvings.
        batch_size: of scoring.
        checkpoint: folder in which finished and unfinished scores are kept, and from which an interrupted call resumes;
            4 bytes per eligible weight for each.
        progress: show a bar.

    Raises:
        PromptError: too few prompts to halve.
        SelectionError: nothing to compare; a ratio that gives no selection. Both before anything is scored.
        RunError: the checkpoint belongs to other inputs.

    Example:
        >>> import safelocus as sl
        >>> found = stability(                                                # doctest: +SKIP
        ...     target, prompts, objectives={"guard": guard, "refusal": sl.Refusal()}
        ... )
    """
    prompts = read_prompts(prompts)
    for ratio in ratios:
        count_for_ratio(target.layout, ratio)
    if splits and len(prompts) < 2:
        raise PromptError(f"{prompts.source}: {len(prompts)} prompt cannot be halved; give more")
    main, objective = next(iter(objectives.items()))
    notes = []
    noisy = hasattr(objective, "gumbel_seed") and is_dataclass(objective)
    if seeds > 1 and not noisy:
        notes.append(f"{main} has no random relaxation: it gives the same scores for every seed.")

    jobs: list[tuple[str, str, Objective, PromptSet]] = []  # (kind, label, objective, prompts)
    pairs: list[tuple[int, int]] = []  # numbers of jobs: halves of one split; seeds and objectives, every two
    for number in range(splits):
        pairs.append((len(jobs), len(jobs) + 1))
        for half, part in zip("ab", _halves(prompts, seed=seed + number), strict=True):
            jobs.append(("prompts", f"split {number} half {half}", objective, part))
    first = len(jobs)
    for number in range(seeds if noisy and seeds > 1 else 0):
        seeded: Any = replace(objective, gumbel_seed=number)  # type: ignore[type-var]
        jobs.append(("seeds", f"Gumbel seed {number}", seeded, prompts))
    pairs += combinations(range(first, len(jobs)), 2)
    if len(objectives) > 1:
        first = len(jobs)
        jobs += [("objectives", name, other, prompts) for name, other in objectives.items()]
        pairs += combinations(range(first, len(jobs)), 2)
    if not pairs:
        raise SelectionError("nothing to compare: give splits, seeds of an objective that has some, or two objectives")
    inputs = {"the model": target, "--prompts": prompts, "method": method}
    inputs |= {f"the objective {name}": each for name, each in objectives.items()}
    numbers = {"splits": splits, "seeds": seeds, "seed": seed, "batch_size": batch_size}
    claim(checkpoint, {**inputs, **numbers})
    kept = _scored(target, jobs, method, batch_size, checkpoint, progress)
    return Stability(
        agreements=list(_agreements([job[:2] for job in jobs], pairs, kept, ratios)),
        notes=tuple(notes),
        provenance={
            "model": target.name,
            "fingerprint": target.fingerprint().id,
            "prompts": prompts.source,
            "prompts_hash": prompts.hash,
            "num_prompts": len(prompts),
            "objectives": {name: describe(each) for name, each in objectives.items()},
            "method": method,
            "splits": splits,
            "seeds": seeds,
            "seed": seed,
        },
    )


def _scored(
    target: Target, jobs: Sequence[tuple[str, str, Objective, PromptSet]], method: Method, batch_size: int,
    checkpoint: Path | None, progress: bool,
) -> list[Scores | Path]:  # fmt: skip
    """On disk, where there is a checkpoint: they are as large as the model."""
    kept: list[Scores | Path] = []
    for number, (_, _, used, part) in enumerate(track(jobs, "scoring", enabled=progress)):
        sums, finished = (part_of(checkpoint, f"{what}-{number}") for what in ("sums", "scores"))
        if finished is None or not finished.is_dir():
            scores = score(
                target, part, objective=used, method=method, batch_size=batch_size, checkpoint=sums, progress=False
            )  # fmt: skip
            if finished is None or sums is None:
                kept.append(replace(scores, tensors={n: t.cpu() for n, t in scores.tensors.items()}))
                continue
            scores.save(finished)
            shutil.rmtree(sums)
            del scores
        kept.append(finished)
    return kept


def _halves(prompts: PromptSet, *, seed: int) -> tuple[PromptSet, PromptSet]:
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    first, second = (
        replace(prompts, examples=tuple(prompts.examples[i] for i in sorted(part)))
        for part in (order[:middle], order[middle:])
    )
    return first, second


def _agreements(
    jobs: Sequence[tuple[str, str]],
    pairs: Iterable[tuple[int, int]],
    kept: Sequence[Scores | Path],
    ratios: Sequence[float],
) -> Iterator[ScoreAgreement]:
    """Every pair at every ratio; two scores are held at most, and ranked once for all ratios.

    Args:
        jobs: kind and label of each of the scores.
        pairs: numbers of jobs.
    """
    held: dict[int, Scores] = {}
    for i, j in pairs:
        held = {number: scores for number, scores in held.items() if number in (i, j)}
        for number in {i, j} - set(held):
            found = kept[number]
            held[number] = Scores.load(found) if isinstance(found, Path) else found
        rho = correlate(held[i], held[j]).rho
        for ratio in ratios:
            overlap = compare(held[i].select(ratio), held[j].select(ratio)).overall
            yield ScoreAgreement(kind=jobs[i][0], a=jobs[i][1], b=jobs[j][1], ratio=ratio, overlap=overlap, rho=rho)


def _group(agreement: ScoreAgreement) -> str:
    if agreement.kind == "objectives":
        return f"{agreement.a} against {agreement.b}"
    return {"prompts": "random halves of the prompts", "seeds": "Gumbel seeds"}[agreement.kind]
