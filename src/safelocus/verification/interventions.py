"""What is done to selected weights to see whether they matter.

    noise        theta_i + noise * sigma(W) * z_i      z_i standard normal; sigma of the weight's own logical matrix
    zero         0
    transplant   the weight that another model of the same shape has there

z_i depends on the seed, the tensor's name and the flat index alone: the same on every device, in any order,
and for a weight that lies in several selections. It comes from SplitMix64 as a counter-based generator
(Steele, Lea and Flood 2014), so K numbers cost O(K) wherever in a tensor they lie.

In several processes every one makes all values, and a sharded model (FSDP2) takes those of its rows: a disturbed
model is the same, to the bit, however many processes hold it.

Input: the old values at a selection's coordinates. Output: the new ones; `intervening` writes them within
`sparse.restoring`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import xxhash
from scipy.special import ndtri
from torch import Tensor, nn

from safelocus.distributed import whole
from safelocus.errors import SafelocusError, SelectionError
from safelocus.model.fingerprint import Fingerprint
from safelocus.model.layout import Layout
from safelocus.model.target import Target
from safelocus.scoring.run import sigma
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import gather, restoring, scatter, selected_parameters

_CHUNK = 1 << 22  # normals made at once: each takes a few float64 of scratch


class Intervention(Protocol):
    """Anything with these is an intervention.

    Attributes:
        name: for tables and results, e.g. "noise".
        noise: its strength in sigma, where it has one.
        is_random: whether seeds make a difference; if not, one is enough.
    """

    @property
    def name(self) -> str: ...
    @property
    def noise(self) -> float | None: ...
    @property
    def is_random(self) -> bool: ...

    def values(
        self, weights: Mapping[str, Tensor], selection: Selection, sigmas: "Sigmas", seed: int
    ) -> dict[str, Tensor]:
        """New values for the old ones: name -> [k of this tensor], any float dtype."""
        ...


class Sigmas:
    """sigma of each logical matrix of a model as it is now: computed once, when first asked for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._found: dict[str, Tensor] = {}

    def of(self, selection: Selection, name: str) -> Tensor:
        """sigma of the matrix of every selected weight of one tensor: float32 [k], on the CPU."""
        layout = self._target.layout.tensors[name]
        return self._found[name][layout.matrix_of(selection[name])]

    def prepare(self, selection: Selection) -> None:
        """Measure what is not known yet. Call it while the weights are as they were."""
        for name, parameter in selected_parameters(self._target.model, selection).items():
            if name not in self._found:
                self._found[name] = sigma(self._target.layout.tensors[name], whole(parameter.detach())).cpu()


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of `noise` times each weight's sigma (paper: 0.38)."""

    noise: float
    name: str = field(default="noise", init=False)
    is_random: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.noise < float("inf"):
            raise SafelocusError(f"noise is a positive number of sigmas, found {self.noise}")

    def values(
        self, weights: Mapping[str, Tensor], selection: Selection, sigmas: Sigmas, seed: int
    ) -> dict[str, Tensor]:
        # added in fp32 on the CPU, and rounded to the weights' dtype only once
        return {
            name: value.float().cpu() + self.noise * sigmas.of(selection, name) * normals(name, selection[name], seed)
            for name, value in weights.items()
        }


@dataclass(frozen=True)
class Zero:
    """The weights are removed."""

    name: str = field(default="zero", init=False)
    noise: None = field(default=None, init=False)
    is_random: bool = field(default=False, init=False)

    def values(
        self, weights: Mapping[str, Tensor], selection: Selection, sigmas: Sigmas, seed: int
    ) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in weights.items()}


@dataclass(frozen=True, eq=False)
class Transplant:
    """The weights of another model: an unaligned sibling's, say. What they carry comes along."""

    source: nn.Module = field(repr=False)
    name: str = field(default="transplant", init=False)
    noise: None = field(default=None, init=False)
    is_random: bool = field(default=False, init=False)

    def identity(self) -> dict[str, str]:
        """Of the source's weights, so that an interrupted run goes on with no others."""
        return {"name": self.name, "source": Fingerprint.of(self.source, Layout.of(self.source, skip_unknown=True)).id}

    def values(
        self, weights: Mapping[str, Tensor], selection: Selection, sigmas: Sigmas, seed: int
    ) -> dict[str, Tensor]:
        return gather(self.source, selection)


@contextmanager
def intervening(
    target: Target, selection: Selection, intervention: Intervention, *, seed: int = 0, sigmas: Sigmas | None = None
) -> Iterator[None]:
    """Within: the selected weights of the target are changed. Afterwards they have their old bits again.

    Args:
        sigmas: of the target, kept over several interventions.

    Example:
        >>> with intervening(target, selection, Noise(3.0), seed=1):           # doctest: +SKIP
        ...     generate(target, prompts)
    """
    sigmas = Sigmas(target) if sigmas is None else sigmas
    sigmas.prepare(selection)
    with restoring(target.model, selection) as weights:
        scatter(target.model, selection, intervention.values(weights, selection, sigmas, seed))
        yield


def normals(name: str, flat_index: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that belong to (seed, tensor, flat index): int64 [k] -> float32 [k], on the CPU."""
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()))
    made = np.empty(flat_index.numel(), dtype=np.float32)
    index = flat_index.cpu().numpy().astype(np.uint64)
    for start in range(0, index.size, _CHUNK):
        bits = _splitmix64(key, index[start : start + _CHUNK])
        # 53 bits, moved by half a step: never 0 or 1, whose normals are infinite
        made[start : start + _CHUNK] = ndtri(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    return torch.from_numpy(made)


def _splitmix64(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """Output number `counter` of the generator that starts at `key`; uint64 arithmetic wraps."""
    z = counter * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def make_interventions(
    names: tuple[str | Intervention, ...], noises: tuple[float, ...], transplant_from: Target | nn.Module | None = None
) -> list[Intervention]:
    """ "noise" (once per strength), "zero", "transplant" or your own objects -> interventions.

    Raises:
        SafelocusError: an unknown name, "noise" without strengths, "transplant" without a model.
    """
    made: list[Intervention] = []
    for name in names:
        if not isinstance(name, str):
            made.append(name)
        elif name == "noise":
            if not noises:
                raise SafelocusError("the intervention noise needs strengths in sigma: noises=(1.0, 3.0), --noise 3")
            made += [Noise(noise) for noise in noises]
        elif name == "zero":
            made.append(Zero())
        elif name == "transplant":
            if transplant_from is None:
                raise SelectionError(
                    "the intervention transplant needs a model to take weights from (--transplant-from)"
                )
            made.append(Transplant(transplant_from.model if isinstance(transplant_from, Target) else transplant_from))
        else:
            raise SafelocusError(f"intervention {name!r}: expected noise, zero or transplant")
    if not made:
        raise SafelocusError("no intervention was given: expected noise, zero or transplant")
    return made
