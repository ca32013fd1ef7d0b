"""Families of architectures as data: rules that turn a named tensor into a `TensorLayout`.

A family is a TOML file (`families/*.toml`, or the user's own):

    model_types = ["phi3"]                  # of the configuration
    by_names = false                        # nothing in its tensors' names tells it: only for these types
    extends = "base"                        # a family whose rules follow this one's
    layers = "(model.|)layers.{layer}."     # what the names in [layer] begin with
    layer_of = { "model.{stack}.layers.{layer}." = "llama" }  # whose [layer] counts under another beginning, or several
    [sizes]                                 # names for the axes' sizes, over those of `sizes_of`
    head_dim = "hidden // heads"
    [layer]                                 # tensors of a layer
    "self_attn.q_proj.weight" = { component = "query", axes = "(head dim) in" }
    "self_attn.kv_proj.weight" = { axes = "(part dim) in", parts = { key = "kv_heads", value = "kv_heads" } }
    "mlp.gate_up_proj.weight" = { axes = "part in", parts = ["gate", "up"] }
    "mlp.down_proj.weight" = "down"
    [model]                                 # all others
    "(model.|)embed_tokens.weight" = "embedding"

The first rule whose pattern is the whole name wins: the family's own before those of `layer_of`, these before those it
extends, and [layer] before [model]. A pattern knows {layer}, {expert} (numbers), {stack} (encoder, decoder, ...),
(a|b), `*` (within one dotted segment) and `**` (anything). A rule is a component, or a table of
`component` or `parts`, `axes`, `shared_expert`, `block` (a name for one MLP whose tensors lie in
several modules) and `when` (a condition on the configuration), or a list of such tables of which
the first whose condition holds counts.

`axes` says how each axis of the tensor divides, outermost first: roles as in `tensor`, a
tensor's axis of several roles in parentheses, with `role=size` where the size is not the usual one
(expert: experts; head: heads or kv_heads, by component; dim: head_dim; part: the sum of its parts;
out and in: whatever remains). The default is "out in". Sizes are integer arithmetic over the
configuration's numbers; {stack} in a size stands for what it matched. Extents that do not multiply
to the axis are an error.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelocus.errors import MALFORMED, LayoutError
from safelocus.model.layout.sizes import Sizes, listed_by_layer, sizes_of, text_config
from safelocus.model.layout.tensor import COMPONENTS, ELIGIBLE, ROLES, TensorLayout

_PLACEHOLDERS = {
    "{layer}": r"(?P<layer>\d+)",
    "{expert}": r"(?P<expert>\d+)",
    "{stack}": r"(?P<stack>encoder|decoder|local_encoder|global_transformer|local_decoder|L_module|H_module)",
    "**": r".*",
    "*": r"[^.]*",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a family: which names, and how such a tensor divides."""

    pattern: str
    regex: re.Pattern[str]
    component: str | None
    parts: dict[str, str] | list[str] | None  # component -> extent, or components of equal extents
    axes: tuple[tuple[tuple[str, str | None], ...], ...] | None  # per axis of the tensor: (role, size)
    shared_expert: bool
    block: str | None
    when: str | None

    @classmethod
    def parse(cls, pattern: str, value: Any, *, where: str) -> Rule:
        table = {"component": value} if isinstance(value, str) else value
        if not isinstance(table, dict) or unknown_keys(table, "component parts axes shared_expert block when"):
            raise LayoutError(
                f'{where}: rule "{pattern}" is neither a component nor a table of component, parts, axes, '
                f"shared_expert, block and when: {value!r}"
            )
        component, parts = table.get("component"), table.get("parts")
        if (component is None) == (parts is None):
            raise LayoutError(f'{where}: rule "{pattern}" needs a component or parts, and not both')
        for name in parts if parts is not None else [component]:
            if name not in COMPONENTS:
                raise LayoutError(
                    f'{where}: rule "{pattern}" has component {name!r}; choose one of {", ".join(COMPONENTS)}'
                )
        axes = _parse_axes(table["axes"], f'{where}: rule "{pattern}"') if "axes" in table else None
        roles = [role for axis in axes or () for role, _ in axis]
        if ("part" in roles) != (parts is not None):
            raise LayoutError(f'{where}: rule "{pattern}": `parts` and a `part` in `axes` go together')
        return cls(
            pattern=pattern,
            regex=re.compile(_regex(pattern)),
            component=component,
            parts=parts,
            axes=axes,
            shared_expert=bool(table.get("shared_expert", False)),
            block=table.get("block"),
            when=table.get("when"),
        )

    def apply(self, name: str, shape: tuple[int, ...], sizes: Sizes) -> TensorLayout | None:
        """The tensor's layout; None when the name (or the condition) is not this rule's."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        found = match.groupdict()
        layer = int(found["layer"]) if found.get("layer") else None
        sizes = sizes.of_layer(layer)
        if self.when is not None and not sizes.evaluate(self.when):
            return None
        stack = found.get("stack")
        axes = self.axes or _plain(len(shape) if self.component not in ELIGIBLE else 2)
        if len(axes) != len(shape):
            raise self._mismatch(name, f"{len(axes)} axes", shape)
        view: list[int] = []
        for axis, length in zip(axes, shape, strict=True):
            filled = tuple((role, size and size.replace("{stack}", str(stack))) for role, size in axis)
            view += self._divide(filled, length, name, shape, sizes)
        roles = tuple(role for axis in axes for role, _ in axis)
        parts = self._parts(view[roles.index("part")] if "part" in roles else view[0] if view else 1, sizes)
        return TensorLayout(
            name=name,
            shape=shape,
            layer=layer,
            stack=stack,
            expert=int(found["expert"]) if found.get("expert") else None,
            shared_expert=self.shared_expert,
            view=tuple(view),
            axes=roles,
            source=tuple(number for number, axis in enumerate(axes) for _ in axis),
            parts=parts,
            block=f"{stack} {layer} {self.block}" if self.block else name.removesuffix(".weight").rpartition(".")[0],
        )

    def _divide(
        self,
        axis: tuple[tuple[str, str | None], ...],
        length: int,
        name: str,
        shape: tuple[int, ...],
        sizes: Sizes,
    ) -> list[int]:
        """Extents of one axis of the tensor, with the one that is left open filled in."""
        extents = [self._size(role, size, sizes) for role, size in axis]
        if extents.count(None) > 1 and isinstance(self.parts, list):
            # "(out part)": interleaved one by one
            extents[[role for role, _ in axis].index("part")] = len(self.parts)
        known = math.prod(extent for extent in extents if extent is not None)
        if None in extents and known and length % known == 0:
            extents[extents.index(None)] = length // known
        whole = [extent for extent in extents if extent is not None]
        if len(whole) < len(extents) or math.prod(whole) != length:
            written = " x ".join(
                f"{role} {'?' if extent is None else extent}" for (role, _), extent in zip(axis, extents, strict=True)
            )
            raise self._mismatch(name, f"{length} = {written}", shape)
        for (role, _), extent in zip(axis, whole, strict=True):
            if role == "part" and isinstance(self.parts, list) and extent % len(self.parts):
                raise self._mismatch(name, f"{len(self.parts)} equal parts of {extent}", shape)
        return whole

    def _size(self, role: str, size: str | None, sizes: Sizes) -> int | None:
        if size is None and role in ("out", "in", "part"):
            if role == "part" and isinstance(self.parts, dict):
                return sum(sizes.evaluate(extent) for extent in self.parts.values())
            return None
        kv = self.component in ("key", "value")
        usual = {"expert": "experts", "head": "kv_heads" if kv else "heads", "dim": "head_dim"}
        value = sizes.evaluate(size if size is not None else usual[role])
        if not isinstance(value, int):
            raise LayoutError(f'rule "{self.pattern}": size {size!r} is not an integer but {value!r}')
        return value

    def _parts(self, extent: int, sizes: Sizes) -> tuple[tuple[str, int], ...]:
        if isinstance(self.parts, dict):
            extents = {component: sizes.evaluate(size) for component, size in self.parts.items()}
            return tuple(
                (component, extent) for component, extent in extents.items() if extent
            )  # GLM-5 Next: no rotary key
        components = self.parts if self.parts is not None else [str(self.component)]
        return tuple((component, extent // len(components)) for component in components)

    def _mismatch(self, name: str, expected: str, shape: tuple[int, ...]) -> LayoutError:
        return LayoutError(
            f"{name}: the rule for it does not fit its shape.\n"
            f'  rule:     "{self.pattern}" with axes "{_written(self.axes) if self.axes else "out in"}"\n'
            f"  expected: {expected}\n"
            f"  found:    shape {shape}\n"
            "If the model stores this tensor in another way, describe it in a file and give it with --layout."
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """All rules of one architecture, in order of precedence."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    sizes: dict[str, str]
    by_names: bool = True

    def find(self, name: str, shape: tuple[int, ...], sizes: Sizes) -> TensorLayout | None:
        """Layout by the first rule that knows the name; `sizes` are those of `sizes_for`."""
        for rule in self.rules:
            found = rule.apply(name, shape, sizes)
            if found is not None:
                return found
        return None

    def sizes_for(self, config: Any) -> Sizes:
        """`sizes_of` the configuration with the family's own, and those of each layer where they differ."""
        text = text_config(config)
        layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else None
        listed = listed_by_layer(text) or [{}] * len(layers or ())
        sizes = self._sizes(config, listed[0] if listed else {})
        if listed:
            sizes.layers = [self._sizes(config if layers is None else layers[n], more) for n, more in enumerate(listed)]
        return sizes

    def _sizes(self, config: Any, more: dict[str, Any]) -> Sizes:
        sizes = Sizes(sizes_of(config) | more)
        for name, expression in self.sizes.items():
            sizes[name] = sizes.evaluate(expression)
        return sizes


def read_family(path: Path) -> Family:
    """A user's own family file."""
    if not path.is_file():
        raise LayoutError(f"no layout file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        return _parse(path.stem, text, where=str(path))
    except LayoutError:
        raise
    except (*MALFORMED, re.error) as error:
        raise LayoutError(f"{path}: not of the form in docs/layouts.md ({error!r})") from error


@functools.cache
def families() -> dict[str, Family]:
    """The families that come with the package, those with the fewest rules first."""
    folder = importlib.resources.files("safelocus.model.layout") / "families"
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    found = [_family(name) for name in names]
    return {family.name: family for family in sorted(found, key=lambda family: len(family.rules))}


@functools.cache
def _family(name: str) -> Family:
    return _parse(name, _text(name), where=f"families/{name}.toml")


def _text(name: str) -> str:
    file = importlib.resources.files("safelocus.model.layout") / "families" / f"{name}.toml"
    return file.read_text(encoding="utf-8")


def _check_known(name: Any, key: str, where: str) -> None:
    known = importlib.resources.files("safelocus.model.layout") / "families"
    if f"{name}.toml" not in [file.name for file in known.iterdir()]:
        raise LayoutError(f"{where}: {key} {name!r}, which is no family")


def _parse(name: str, text: str, *, where: str) -> Family:
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise LayoutError(f"{where} is not TOML: {error}") from error
    unknown = unknown_keys(table, "model_types by_names extends layers layer_of sizes layer model")
    if unknown:
        raise LayoutError(f"{where}: unknown keys {', '.join(unknown)}")
    if table.get("layer") and "layers" not in table:
        raise LayoutError(f"{where}: [layer] needs `layers`, what its names begin with")
    tables = [(table.get("layers", ""), table.get("layer", {})), ("", table.get("model", {}))]
    for prefix, names in table.get("layer_of", {}).items():
        for other in names if isinstance(names, list) else [names]:
            _check_known(other, "layer_of", where)
            tables.append((prefix, tomllib.loads(_text(other)).get("layer", {})))
    rules = [
        Rule.parse(prefix + pattern, value, where=where)
        for prefix, patterns in tables
        for pattern, values in patterns.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    sizes = dict(table.get("sizes", {}))
    if "extends" in table:
        _check_known(table["extends"], "extends", where)
        parent = _family(table["extends"])
        rules += parent.rules
        sizes = {**parent.sizes, **sizes}
    return Family(
        name=name,
        model_types=tuple(table.get("model_types", ())),
        rules=tuple(rules),
        sizes=sizes,
        by_names=bool(table.get("by_names", True)),
    )


def unknown_keys(table: Mapping[str, Any], known: str) -> list[str]:
    return [key for key in table if key not in known.split()]


def _regex(pattern: str) -> str:
    tokens = re.split(r"(\{layer\}|\{expert\}|\{stack\}|\*\*|\*|[()|])", pattern)
    seen: set[str] = set()
    regex = ""
    for token in tokens:
        if token in _PLACEHOLDERS:
            # a second {layer} in a pattern must repeat the first
            regex += f"(?P={token[1:-1]})" if token in seen else _PLACEHOLDERS[token]
            seen |= {token} if token.startswith("{") else set()
        elif token in ("(", ")", "|"):
            regex += {"(": "(?:"}.get(token, token)
        else:
            regex += re.escape(token)
    return regex


def _parse_axes(written: str, where: str) -> tuple[tuple[tuple[str, str | None], ...], ...]:
    axes = []
    for group in re.findall(r"\([^()]*\)|[^\s()]+", written):
        roles = []
        for item in group.strip("()").split():
            role, _, size = item.partition("=")
            if role not in ROLES:
                raise LayoutError(f"{where}: axes {written!r} name {role!r}; the roles are {', '.join(ROLES)}")
            roles.append((role, size or None))
        axes.append(tuple(roles))
    flat = [role for axis in axes for role, _ in axis]
    if not flat or len(set(flat)) < len(flat) or "expert" in flat[1:]:
        raise LayoutError(f"{where}: axes {written!r} repeat a role, or have `expert` after another")
    for axis in axes:
        order = [role for role, _ in axis if role in ("head", "part", "dim")]
        if order != [role for role in ("head", "part", "dim") if role in order] and order != [
            "part",
            "head",
            "dim",
        ]:
            raise LayoutError(f"{where}: axes {written!r} must name head, part and dim in this order")
    return tuple(axes)


def _plain(num_axes: int) -> tuple[tuple[tuple[str, str | None], ...], ...]:
    """ "out in" for a matrix; one more "in" for each further axis of a convolution, say."""
    return tuple((("out" if axis == 0 else "in", None),) for axis in range(num_axes))


def _written(axes: tuple[tuple[tuple[str, str | None], ...], ...]) -> str:
    groups = [" ".join(role + (f"={size}" if size else "") for role, size in axis) for axis in axes]
    return " ".join(f"({group})" if " " in group else group for group in groups)
