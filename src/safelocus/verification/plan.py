"""Which cells a verification consists of, in which order, and the selection of each.

Selection by selection, so that each is made once; random ones are shared by all scorers and selections of one size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safelocus.errors import SelectionError
from safelocus.model.target import Target
from safelocus.run.identity import Provenance
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection
from safelocus.selection.topk import random_k
from safelocus.verification.cells import SELECTIONS
from safelocus.verification.interventions import Intervention

Scorer = Scores | Selection


def random_selection(target: Target, k: int, *, seed: int) -> Selection:
    """Exactly k eligible weights, drawn uniformly without replacement."""
    layout = target.layout
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    return Selection(
        coordinates=random_k(sizes, k, seed=seed), layout=layout, which="random", seed=seed, num_requested=k,
        provenance=Provenance(method="random", model=target.name),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """A cell to be."""

    selection: str
    scorer: str | None
    size_of: str  # the scorer whose top selection says how many weights
    ratio: float | None
    k: int | None  # of a selection that was not made by ratio
    intervention: Intervention
    seed: int
    draw: int | None

    @property
    def made_by(self) -> tuple[Any, ...]:
        return (self.selection, self.scorer, self.k, self.ratio, self.draw)

    @property
    def key(self) -> str:
        return json.dumps([*self.made_by, self.intervention.name, self.intervention.noise, self.seed])


@dataclass(frozen=True, kw_only=True)
class Plan:
    scorers: dict[str, Scorer]
    ratios: tuple[float, ...]
    interventions: tuple[Intervention, ...]
    selections: tuple[str, ...]
    num_seeds: int
    random_draws: int

    def __post_init__(self) -> None:
        if "top" not in self.selections or not set(self.selections) <= set(SELECTIONS):
            raise SelectionError(
                f"selections {', '.join(self.selections) or 'none'}: expected top, with bottom or random beside it"
            )
        if not self.scorers:
            raise SelectionError("nothing to verify: give scores or a selection")
        if self.num_seeds < 1 or self.random_draws < 1:
            raise SelectionError(
                f"expected at least one seed and one random draw, found {self.num_seeds} and {self.random_draws}"
            )
        named = [(each.name, each.noise) for each in self.interventions]
        if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
            raise SelectionError(f"two interventions are called {twice[0][0]!r}; give each a name of its own")
        if any(isinstance(scorer, Scores) for scorer in self.scorers.values()) and not self.ratios:
            raise SelectionError("scores are verified at one or more ratios: ratios=(0.01,), --ratios 0.01")

    def steps(self) -> Iterator[Step]:
        """Selection by selection, so that each is made once."""
        seen: set[tuple[Any, ...]] = set()
        for name, scorer in self.scorers.items():
            ratios = self.ratios if isinstance(scorer, Scores) else (None,)
            for ratio in ratios:
                for which in self.selections:
                    if which == "bottom" and not isinstance(scorer, Scores):
                        continue
                    num_draws = self.num_seeds * self.random_draws if which == "random" else 1
                    for draw in range(num_draws):
                        for step in self._disturb(which, name, ratio, draw):
                            # random selections of one size serve all scorers
                            identity = (step.made_by, id(step.intervention), step.seed)
                            if identity not in seen:
                                seen.add(identity)
                                yield step

    def _disturb(self, which: str, scorer: str, ratio: float | None, draw: int) -> Iterator[Step]:
        given = self.scorers[scorer]
        for intervention in self.interventions:
            seeds = range(self.num_seeds) if intervention.is_random else range(1)
            if which == "random":  # one noise seed per draw: both vary at once
                seeds = range(draw // self.random_draws, draw // self.random_draws + 1)
            for seed in seeds:
                yield Step(
                    selection=which, scorer=None if which == "random" else scorer, size_of=scorer, ratio=ratio,
                    k=given.k if isinstance(given, Selection) else None, intervention=intervention, seed=seed,
                    draw=draw if which == "random" else None,
                )  # fmt: skip

    def select(self, target: Target, step: Step) -> Selection:
        scorer = self.scorers[step.size_of]
        if isinstance(scorer, Selection):
            return scorer if step.selection == "top" else random_selection(target, scorer.k, seed=step.draw or 0)
        assert step.ratio is not None
        if step.selection == "random":
            return scorer.select(step.ratio, which="random", seed=step.draw or 0)
        return scorer.select(step.ratio, which=step.selection)  # type: ignore[arg-type]
