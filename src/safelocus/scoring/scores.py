"""Scores: one non-negative number per eligible weight, with statistics per matrix and provenance.

Input: what `safelocus.score` measured. Output: a frozen `Scores`, from which weights are selected.

A folder on disk:

    scores.json                            layout, statistics, provenance, S per prompt, shard of each tensor
    scores-00001-of-0000N.safetensors      the score tensors, float32, original shapes; optional
    digests.json                           of these files (see `run.files`); compared when they are read

It is written under a temporary name beside its place and renamed when complete. Where several processes
hold the scores (see `distributed`), the first one writes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safelocus import distributed
from safelocus.errors import MALFORMED, NumericalError, RunError, SelectionError, some
from safelocus.model.fingerprint import digest as tensor_digest
from safelocus.model.layout import GRANULARITIES, Layout, Matrix, TensorMapping, canonical_name
from safelocus.run.files import inside, read_json, replacing, require_intact, seal, write_json
from safelocus.run.identity import Provenance, digest
from safelocus.run.tensors import save_tensors
from safelocus.scoring.statistics import MatrixStatistics, matrix_statistics
from safelocus.selection.ratio import count_for_ratio
from safelocus.selection.selection import Selection
from safelocus.selection.topk import Picked, Reduce, Which, pick, pick_groups

__all__ = ["MatrixStatistics", "Provenance", "Scores", "matrix_statistics"]

Where = Callable[[Matrix], bool]

FORMAT_VERSION = 1
_FORMAT = "safelocus.scores"
_JSON = "scores.json"
_SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores(TensorMapping):
    """Scores of all eligible weights of one model: a mapping from tensor names to scores, `tensors` itself.

    Attributes:
        tensors: canonical name -> float32 scores in the tensor's shape, for every eligible tensor in the
            layout's order; empty where only the statistics were kept. Those of a sharded model (FSDP2) are
            sharded as it is, and then every process must call `select` and `save`.
        layout: of the model.
        statistics: one per eligible matrix.
        provenance: what they were made from.
        per_prompt: S of each prompt, for methods with an objective.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    layout: Layout = field(repr=False)
    statistics: list[MatrixStatistics] = field(repr=False)
    provenance: Provenance
    per_prompt: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.tensors:
            return
        eligible = self.layout.eligible_tensors
        if differing := sorted(set(eligible) ^ set(self.tensors)):
            raise SelectionError(
                f"scores must name exactly the model's {len(eligible)} eligible tensors; these are missing "
                f"or not eligible: {some(differing)}"
            )
        for name, value in self.tensors.items():
            expected = self.layout.tensors[name].shape
            if tuple(value.shape) != expected or value.dtype != torch.float32:
                raise SelectionError(
                    f"scores of {name!r} are {value.dtype} {list(value.shape)}; expected torch.float32 {list(expected)}"
                )
        object.__setattr__(self, "tensors", {name: self.tensors[name] for name in eligible})

    def identity(self) -> dict[str, Any]:
        """Which scores, to the bit; of statistics alone where there are no others."""
        values = {name: tensor_digest(distributed.whole(tensor.detach())) for name, tensor in self.tensors.items()}
        found = {
            "method": self.provenance.method,
            "values": digest(values or [each.to_json() for each in self.statistics]),
        }
        return {**found, "provenance": digest(self.provenance.to_json())}

    @property
    def _held(self) -> Mapping[str, Tensor]:
        return self.tensors

    def __getitem__(self, name: str) -> Tensor:
        """Scores of a tensor, in its shape; the name may be wrapped."""
        name = canonical_name(name)
        if name not in self.tensors:
            why = "is not an eligible tensor of this model" if self.tensors else "has none: only statistics were kept"
            raise SelectionError(f"{name!r} {why} ({self.layout.family})")
        return self.tensors[name]

    def select(
        self,
        ratio: float | Fraction | Decimal = 0.01,
        *,
        of: Literal["model", "eligible"] = "model",
        which: Which = "top",
        granularity: str = "weight",
        reduce: Reduce = "mean",
        seed: int = 0,
        where: Where | None = None,
    ) -> Selection:
        """Select K = floor(ratio * weights) coordinates.

        Args:
            ratio: in (0, 1]; read as it is written in decimal.
            of: of all the model's parameters (as in the paper), or of those that may be selected.
            which: "top", "bottom", or "random" without replacement (the controls, of exactly the same size unless
                groups are taken).
            granularity: "weight", or whole groups: row, column, head, neuron, expert, matrix, layer. Groups
                are taken by rank until the next would exceed K: `selection.k` then is K or less.
            reduce: rank groups by the "mean" or the "sum" of their scores.
            seed: of the random draw.
            where: select only from matrices for which this is true, e.g. `lambda m: m.component == "down"`.

        Returns:
            Selection: ties are broken by tensor order, then flat index. Where weights of score zero come into it, its
                `provenance.extra["remarks"]` say so.

        Raises:
            SelectionError: a ratio that is out of range or larger than what is eligible, a group that does
                not fit into K, or scores saved without tensors.
            NumericalError: NaN, infinite or negative scores, naming the tensor; scores that are all zero. Not for
                "random", which looks at no scores but a group's.

        Example:
            >>> top = scores.select(ratio=0.01)                             # doctest: +SKIP
            >>> control = scores.select(ratio=0.01, which="random", seed=1)  # doctest: +SKIP
        """
        if which not in ("top", "bottom", "random"):
            raise SelectionError(f"which={which!r}: expected 'top', 'bottom' or 'random'")
        if granularity not in GRANULARITIES:
            raise SelectionError(f"granularity {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if reduce not in ("mean", "sum"):
            raise SelectionError(f"reduce={reduce!r}: expected 'mean' or 'sum'")
        if not self.tensors:
            raise SelectionError(
                "only the statistics of these scores were kept, so no weights can be selected. Score again "
                "and keep the tensors (--save-scores)."
            )
        if which != "random" and self.statistics and not any(matrix.max for matrix in self.statistics):
            raise self._all_zero(self.provenance.model)
        candidates = self.tensors if where is None else _Restricted(self.tensors, self.layout, where)
        num_eligible = candidates.num_eligible if isinstance(candidates, _Restricted) else None
        k = count_for_ratio(self.layout, ratio, of=of, num_eligible=num_eligible)
        if granularity == "weight":
            picked = pick(candidates, k, which=which, seed=seed)
        else:
            picked = self._pick_groups(candidates, k, granularity, which, reduce, seed)
        extra = dict(self.provenance.extra)
        if isinstance(candidates, _Restricted):
            extra["where"] = candidates.describe()
        if which != "random" and (num_zero := sum(int((value == 0).sum()) for value in picked.scores.values())):
            if which == "top" and num_zero == picked.num_weights:
                raise self._all_zero(f"the {k:,} weights that rank first")
            extra["remarks"] = [
                *extra.get("remarks", ()),
                f"{num_zero:,} of the {picked.num_weights:,} weights selected have a score of zero, as all have of "
                "an expert that no token reached",
            ]
        return Selection(
            coordinates=picked.indices,
            scores=picked.scores,
            layout=self.layout,
            provenance=replace(self.provenance, extra=extra),
            which=which,
            granularity=granularity,
            ratio=float(ratio),
            of=of,
            num_requested=k,
            seed=seed if which == "random" else None,
        )

    def _all_zero(self, what: str | None) -> NumericalError:
        return NumericalError(
            f"every {self.provenance.method} score of {what} is zero: nothing to select. Does the objective depend on "
            "the weights, do the answers end, and does a token reach these experts? Score with another one, longer "
            "answers, or more prompts"
        )

    def _pick_groups(
        self,
        candidates: Mapping[str, Tensor],
        k: int,
        granularity: str,
        which: Which,
        reduce: Reduce,
        seed: int,
    ) -> Picked:
        groups = self.layout.groups(granularity)
        picked = pick_groups(candidates, k, groups, which=which, reduce=reduce, seed=seed)
        if not picked.num_weights:
            smallest, largest = int(groups.sizes.min()), int(groups.sizes.max())
            raise SelectionError(
                f"a {granularity} holds {smallest:,} to {largest:,} weights, and the first by rank is "
                f"more than the {k:,} asked for. Use a larger ratio or a finer granularity."
            )
        return picked

    def save(
        self,
        folder: str | Path,
        *,
        tensors: bool = True,
        shard_bytes: int = _SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Write the folder; it appears complete or not at all.

        `tensors=False` keeps the statistics only. Raises RunError when the folder is taken (unless
        `overwrite`, which replaces earlier scores and nothing else) or cannot be written.
        """
        folder = Path(folder)
        if not distributed.is_main():
            if tensors and distributed.any_sharded(self.tensors):
                for tensor in self.tensors.values():
                    distributed.whole(tensor)  # hands the main process its rows
            return
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or overwrite)):
            raise RunError(f"{folder}: exists already; choose another folder, or overwrite it")
        if folder.exists() and any(folder.iterdir()) and not (folder / _JSON).is_file():
            raise RunError(f"{folder}: holds no scores ({_JSON} is missing), so it is not replaced")
        try:
            with replacing(folder) as partial:
                self._write(partial, tensors, shard_bytes)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder}: cannot be written ({error}); choose another folder") from error

    def _write(self, folder: Path, tensors: bool, shard_bytes: int) -> None:
        shards = list(_shards(self.tensors, shard_bytes)) if tensors else []
        files = [f"scores-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, names in zip(files, shards, strict=True):
            save_tensors({name: distributed.whole(self.tensors[name]).detach().cpu() for name in names}, folder / file)
        values = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": self.provenance.to_json(),
            "per_prompt": self.per_prompt,
            "shards": dict(zip(files, shards, strict=True)),
            "statistics": [statistic.to_json() for statistic in self.statistics],
            "layout": self.layout.to_json(),
        }
        write_json(folder / _JSON, values)
        seal(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read scores; RunError for anything that is not a whole folder of them."""
        folder = Path(folder)
        values = _read_json(folder / _JSON)
        tensors: dict[str, Tensor] = {}
        try:
            for file, names in values["shards"].items():
                shard = load_file(require_intact(inside(folder, file)))  # mapped into memory
                tensors |= {name: shard[name] for name in names}
            return cls(
                tensors=tensors,
                layout=Layout.from_json(values["layout"]),
                statistics=[MatrixStatistics.from_json(statistic) for statistic in values["statistics"]],
                provenance=Provenance.from_json(values["provenance"]),
                per_prompt=values["per_prompt"],
            )
        except (SafetensorError, OSError) as error:
            raise RunError(f"{folder}: a shard is missing or cut short ({error}). Copy or score again.") from error
        except MALFORMED as error:
            raise RunError(f"{folder}: inconsistent scores ({error}). Copy or score again.") from error


class _Restricted(Mapping[str, Tensor]):
    """The scores of some matrices; the others' weights in a shared tensor are -inf, which is never picked."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, where: Where) -> None:
        self._tensors, self._layout, self._where = tensors, layout, where
        kept = {name: [where(matrix) for matrix in layout.tensors[name].matrices] for name in tensors}
        self._kept = {name: flags for name, flags in kept.items() if any(flags)}
        if not self._kept:
            raise SelectionError("`where` is true for none of the model's eligible matrices")

    @property
    def num_eligible(self) -> int:
        return sum(
            matrix.num_weights
            for name, flags in self._kept.items()
            for matrix, is_kept in zip(self._layout.tensors[name].matrices, flags, strict=True)
            if is_kept
        )

    def describe(self) -> str:
        num_matrices = sum(len(self._layout.tensors[name].matrices) for name in self._tensors)
        return f"{sum(map(sum, self._kept.values()))} of {num_matrices} matrices"

    def __getitem__(self, name: str) -> Tensor:
        flags, tensor = self._kept[name], self._tensors[name]
        if all(flags):
            return tensor
        masked = distributed.whole(tensor.detach()).clone()
        for matrix, is_kept in zip(self._layout.tensors[name].split(masked), flags, strict=True):
            if not is_kept:
                matrix.fill_(-torch.inf)
        return distributed.sharded_like(masked, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard, in order; a tensor larger than a shard has one of its own."""
    names: list[str] = []
    num_bytes = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if names and num_bytes + size > shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    if names:
        yield names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except OSError as error:
        raise RunError(
            f"{path.parent}: no scores here ({_JSON}: {error.strerror}). Expected the folder `scores` of a "
            "run of `safelocus score`."
        ) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise RunError(f"{path}: not a file of scores (format {_FORMAT!r} is missing)")
    if (version := values.get("format_version")) != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise RunError(
            f"{path}: format version {version}, but this safelocus reads version {FORMAT_VERSION}. "
            f"{'Upgrade safelocus, or score' if newer else 'Score'} again."
        )
    return values
