"""Are value matrices, MLPs, middle layers or late experts enriched beyond chance? A test per pattern.

    fold of a region = share of the selection in it / share of the weights in it

The paper reports that safety lies in the value matrices, the MLPs and the middle layers of dense models, and in the
expert MLPs of late layers of mixture-of-experts models. A selection of a million weights makes any fold "significant"
if weights are drawn as if they were independent. They are not: one gradient gives all weights of a matrix, and one
residual stream all matrices of a layer. So the unit is the component of a layer (all experts together), with its
density d = selected / weights, and chance means that densities are dealt out anew among units while every unit keeps
its size:

    components   densities change places among the components of each layer, layer by layer. What a layer holds
                 stays its own, so a rich layer is no evidence for any component.
    layers       whole layers change places within their stack, all components together, so what the components
                 of a layer have in common counts once; those without the pattern's components stay out.
    both         a pattern of components *and* layers must pass both tests (its p is the larger one), and its
                 component test looks at those layers only.

p is one-sided (richer than chance), (1 + as rich or richer) / (1 + draws). Holm's correction is over the patterns
of one model. Where neighbouring layers resemble each other, dealing out layers one by one is too lenient (it finds
middle layers in 10 to 17 of 100 models without any, at 5 %); `p_rotation` keeps their order and turns it instead: with
L layers it cannot fall below 1 / L, and a small p beside a large p_rotation is a smooth hump that may lie anywhere.
The interval of the fold is a percentile bootstrap over layers, inside and outside the region's layers separately.

Input: a `SafetyMap`. Output: one frozen `Pattern` per pattern that the model can have.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelocus.analysis.map import SafetyMap, thirds

NUM_DRAWS = 9999
NUM_RESAMPLES = 2000
_BATCH = 1 << 20  # densities dealt out at once
_TINY = 1e-12
MLP = ("gate", "up", "down")
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One region against chance.

    Attributes:
        name: "value matrices", "MLP matrices", "middle layers", "late-layer expert MLPs".
        claimed: whether the paper claims it for this kind of model.
        share, expected, fold: of the region.
        low, high: 95 % interval of the fold; None with fewer than two layers to resample.
        p, p_holm: of the permutation test; as found, and corrected.
        p_rotation: of the test that keeps the order of layers; None for a pattern of components alone.
        num_layers: layers that were permuted or resampled.
        text: the finding in a sentence.
    """

    name: str
    claimed: bool
    share: float
    expected: float
    fold: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    p_rotation: float | None
    num_layers: int

    @property
    def text(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        verdict = "beyond chance" if self.p_holm < 0.05 else "not beyond chance"
        if self.p_holm < 0.05 and (self.p_rotation or 0.0) > 0.05:
            verdict = (
                f"beyond chance, unless neighbouring layers are alike (p {self.p_rotation:.2g} with layers turned)"
            )
        return (
            f"{self.name} hold {self.fold:.2f}{interval} times what their size gives: {verdict} (p {self.p_holm:.2g})"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Units:
    """sizes, densities [layers, components] (a size of 0: the layer has no such component), stacks [layers]."""

    sizes: Floats
    densities: Floats
    stacks: NDArray[np.intp]

    def fold(self, region: Mask) -> float:
        return float(_folds(region, self.sizes, self.densities))


def _folds(region: Mask, sizes: Floats, densities: Floats) -> Floats:
    """Folds [...] of a region, from sizes and densities [..., layers, components]."""
    held, sizes = sizes * densities, np.broadcast_to(sizes, densities.shape)
    region = np.broadcast_to(region, densities.shape)
    share = np.sum(held, axis=(-2, -1), where=region) / np.maximum(np.sum(held, axis=(-2, -1)), 1e-300)
    return share / (np.sum(sizes, axis=(-2, -1), where=region) / np.sum(sizes, axis=(-2, -1)))


def patterns(located: SafetyMap, *, draws: int = NUM_DRAWS, seed: int = 0) -> list[Pattern]:
    """Test every pattern that the model can have.

    Args:
        located: where the selection lies.
        draws: permutations per test; p cannot fall below 1 / (draws + 1).
        seed: of permutations and bootstrap.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> scores = sl.score(target, ["How do I build a bomb?"], objective=sl.Refusal(), progress=False)
        >>> from safelocus.analysis.map import safety_map
        >>> [pattern.name for pattern in patterns(safety_map(scores, scores.select(0.01)), draws=99)]
        ['value matrices', 'MLP matrices', 'middle layers']
    """
    layers = [key for key in located.layer_keys if key[1] is not None]
    if not layers:
        return []
    units, components = _units(located, layers)
    third = thirds(layers)
    depth = np.array([third[layer] for layer in layers])
    has_experts = bool(located.experts)
    everywhere = np.ones(len(layers), dtype=bool)
    every = np.ones(len(components), dtype=bool)
    value = np.array([kind in ("value", "key/value") for kind in components])
    mlp = np.array([kind.split(" ")[-1] in MLP for kind in components])
    experts = np.array([kind.startswith("expert ") for kind in components])
    wanted = [
        ("value matrices", not has_experts, everywhere, value),
        ("MLP matrices", not has_experts, everywhere, mlp),
        ("middle layers", not has_experts, depth == "middle", every),
        ("late-layer expert MLPs", has_experts, depth == "late", experts),
    ]
    generator = np.random.default_rng(seed)
    tested = [
        _test(units, name, claimed, of_layers, of_components, draws, generator)
        for name, claimed, of_layers, of_components in wanted
        if units.sizes[np.ix_(of_layers, of_components)].sum() and not (of_layers.all() and of_components.all())
    ]
    return _holm(tested)


def _units(located: SafetyMap, layers: Sequence[Any]) -> tuple[_Units, list[str]]:
    """The routed experts of a layer stand apart from a dense MLP of the same name."""
    routed = {region.layer_key for region in located.experts}

    def kind(layer: Any, component: tuple[str, bool]) -> str:
        name, shared = component
        in_experts = layer in routed and not shared and name in MLP
        return ("shared " if shared else "expert " if in_experts else "") + name.replace("_", "/")

    cells = [(layer, kind(layer, component), region) for (layer, component), region in located.cell.items()]
    cells = [(layer, name, region) for layer, name, region in cells if layer[1] is not None]
    components = list(dict.fromkeys(name for _, name, _ in cells))
    place = {layer: number for number, layer in enumerate(layers)}
    sizes, densities = (np.zeros((len(layers), len(components))) for _ in range(2))
    for layer, name, region in cells:
        at = place[layer], components.index(name)
        sizes[at], densities[at] = region.num_weights, region.num_selected / region.num_weights
    stacks = [stack for stack, _ in layers]
    return _Units(sizes=sizes, densities=densities, stacks=np.array([stacks.index(s) for s in stacks])), components


def _test(
    units: _Units, name: str, claimed: bool, layers: Mask, components: Mask, draws: int, generator: np.random.Generator
) -> Pattern:
    tests, rotation = [], None
    if not components.all():
        # in the layers of the region only: elsewhere there is nothing to compare with
        inside = _Units(sizes=units.sizes[layers], densities=units.densities[layers], stacks=units.stacks[layers])
        mask = np.broadcast_to(components, inside.sizes.shape)
        tests.append(_p(inside, mask, lambda number: _dealt_components(inside, generator, number), draws))
    if not layers.all():
        # of the layers that have such components: another, moved, would bring its density of 0 along
        has = units.sizes[:, components].sum(axis=1) > 0
        of = _Units(
            sizes=units.sizes[has][:, components], densities=units.densities[has][:, components],
            stacks=units.stacks[has],
        )  # fmt: skip
        mask = np.broadcast_to(layers[has, None], of.sizes.shape)
        tests.append(_p(of, mask, lambda number: _moved(of, _shuffled(of.stacks, generator, number)), draws))
        turned = _folds(mask, of.sizes, _moved(of, _turned(of.stacks)))
        rotation = float(np.mean(turned >= of.fold(mask) - _TINY))
    region = layers[:, None] & components[None, :]
    low, high = _interval(units, region, generator)
    held = units.sizes * units.densities
    return Pattern(
        name=name, claimed=claimed, share=float(held[region].sum() / held.sum()),
        expected=float(units.sizes[region].sum() / units.sizes.sum()), fold=units.fold(region), low=low, high=high,
        p=max(tests), p_holm=max(tests), p_rotation=rotation, num_layers=len(layers),
    )  # fmt: skip


def _p(units: _Units, mask: Mask, deal: Callable[[int], Floats], draws: int) -> float:
    """(1 + draws as rich or richer) / (1 + draws); `deal` gives densities [number, layers, components]."""
    observed, reached = units.fold(mask), 0
    step = max(1, _BATCH // units.sizes.size)
    for first in range(0, draws, step):
        drawn = _folds(mask, units.sizes, deal(min(step, draws - first)))
        reached += int(np.sum(drawn >= observed - _TINY))
    return (1 + reached) / (1 + draws)


def _dealt_components(units: _Units, generator: np.random.Generator, number: int) -> Floats:
    """Densities change places among the components that each layer has."""
    keys = np.where(units.sizes > 0, generator.random((number, *units.sizes.shape)), np.inf)
    order = np.argsort(keys, axis=-1)  # those that exist first, in random order
    slots = np.broadcast_to(np.argsort(units.sizes == 0, axis=-1, kind="stable"), keys.shape)
    dealt = np.zeros_like(keys)
    taken = np.take_along_axis(np.broadcast_to(units.densities, keys.shape), order, axis=-1)
    np.put_along_axis(dealt, slots, taken, axis=-1)
    return dealt


def _shuffled(stacks: NDArray[np.intp], generator: np.random.Generator, number: int) -> NDArray[np.intp]:
    """Orders [number, layers] of the layers, each stack's among themselves."""
    keys = generator.random((number, len(stacks)))
    return _within(stacks, np.argsort(keys + 2.0 * stacks, axis=-1))


def _turned(stacks: NDArray[np.intp]) -> NDArray[np.intp]:
    """Every turn [layers, layers] of the layers, each stack's among themselves."""
    orders = np.tile(np.arange(len(stacks)), (len(stacks), 1))
    for stack in np.unique(stacks):
        places = np.flatnonzero(stacks == stack)
        orders[:, places] = [np.roll(places, by) for by in range(len(stacks))]
    return orders


def _within(stacks: NDArray[np.intp], ordered: NDArray[np.intp]) -> NDArray[np.intp]:
    """Layers sorted by stack, put at the places of their stacks."""
    orders = np.empty_like(ordered)
    orders[:, np.argsort(stacks, kind="stable")] = ordered
    return orders


def _moved(units: _Units, orders: NDArray[np.intp]) -> Floats:
    """Densities [number, layers, components] of the layers that come to stand at each place.

    A component that a layer lacks gets that layer's mean.
    """
    total = units.sizes.sum(axis=1, keepdims=True)
    held = (units.sizes * units.densities).sum(axis=1, keepdims=True)
    mean = np.divide(held, total, out=np.zeros_like(total), where=total > 0)
    return np.where(units.sizes > 0, units.densities, mean)[orders]


def _interval(units: _Units, region: Mask, generator: np.random.Generator) -> tuple[float | None, float | None]:
    """Percentile bootstrap of the fold: layers with replacement, those of the region and the others apart.

    In a hybrid model, layers without the region's matrices are among the others.
    """
    layers = np.sum(units.sizes, axis=1, where=region) > 0
    groups = [group for group in (np.flatnonzero(layers), np.flatnonzero(~layers)) if len(group)]
    if any(len(group) == 1 for group in groups):
        return None, None
    taken = np.concatenate([generator.choice(group, (NUM_RESAMPLES, len(group))) for group in groups], axis=1)
    folds = _folds(region[taken], units.sizes[taken], units.densities[taken])
    low, high = np.quantile(folds, [0.025, 0.975])
    return float(low), float(high)


def _holm(tested: Sequence[Pattern]) -> list[Pattern]:
    order = sorted(range(len(tested)), key=lambda number: tested[number].p)
    corrected, highest = list(tested), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(tested) - rank) * tested[number].p))
        corrected[number] = replace(tested[number], p_holm=highest)
    return corrected
