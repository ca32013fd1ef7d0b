"""What to say about a model that no family understands: which tensors, and the TOML to describe them.

Names are shown by kind, with their numbers collapsed: model.layers.{layer}.mlp.experts.{expert}.w1.weight.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from safelocus.errors import LayoutError
from safelocus.model.layout.rules import Family, Rule
from safelocus.model.layout.sizes import Sizes
from safelocus.model.layout.tensor import COMPONENTS

Shape = tuple[int, ...]

# what a name tells, most telling first: (pattern of the collapsed name, axes of the tensor, rule)
_QKV = 'parts = { query = "heads", key = "kv_heads", value = "kv_heads" }'
_GATE_UP = 'parts = ["gate", "up"]'
_GUESSES: tuple[tuple[str, int | None, str], ...] = (
    (r"(vision|visual|image|audio)\w*\.", None, '"other"'),
    (r"bias$", None, '"bias"'),
    (r"(norm|ln|layernorm)\w*\.(weight|scale)$", 1, '"norm"'),
    (r"(lm_head|embed_out|output_layer)\.weight$", 2, '"head"'),
    (r"(embed|wte|wpe|word_embeddings)\w*(\.weight)?$", 2, '"embedding"'),
    (r"(router|gate|expert_gate|wg)(\.weight)?$", 2, '"router"'),
    (r"(qkv|query_key_value|c_attn)\w*(\.weight)?$", 2, f'{{ axes = "(part dim) in", {_QKV} }}'),
    (r"(q|wq|query|q_proj)(\.weight)?$", 2, '{ component = "query", axes = "(head dim) in" }'),
    (r"(k|wk|key|k_proj)(\.weight)?$", 2, '{ component = "key", axes = "(head dim) in" }'),
    (r"(v|wv|value|v_proj)(\.weight)?$", 2, '{ component = "value", axes = "(head dim) in" }'),
    (r"att\w*\.(w?o|o(ut)?_proj|dense)(\.weight)?$", 2, '{ component = "output", axes = "out (head dim)" }'),
    (r"(gate_up|w13)\w*(\.weight)?$", 2, f'{{ axes = "part in", {_GATE_UP} }}'),
    (r"(gate_up|w13)\w*(\.weight)?$", 3, f'{{ axes = "expert part in=hidden", {_GATE_UP} }}'),
    (r"(gate_proj|w1|wi_0)(\.weight)?$", 2, '"gate"'),
    (r"(up_proj|w3|wi_1|fc1|fc_in|c_fc|wi|dense_h_to_4h)(\.weight)?$", 2, '"up"'),
    (r"(down_proj|w2|wo|fc2|fc_out|dense_4h_to_h)(\.weight)?$", 2, '"down"'),
    (r"(down_proj|w2)(\.weight)?$", 3, '{ component = "down", axes = "expert out=hidden in" }'),
)  # fmt: skip


def collapse(name: str, stacks: bool) -> str:
    """The kind of a tensor's name, as a rule's pattern; with {stack} in an encoder-decoder model."""
    kind = re.sub(r"(?<=experts\.)\d+(?=\.)", "{expert}", name)
    kind = re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", kind, count=1)
    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", kind)
    if stacks:
        kind = re.sub(r"(?:(?<=^)|(?<=\.))(?:encoder|decoder)(?=\.)", "{stack}", kind, count=1)
    return kind


def describe_unknown(
    config: Any, shapes: Mapping[str, Shape], unknown: Sequence[str], family: Family | None, sizes: Sizes
) -> str:
    """The message about `unknown` tensors; `family` is the one that understands all others, if any."""
    stacks = all(any(f"{stack}." in name for name in shapes) for stack in ("encoder", "decoder"))
    kinds: dict[str, list[str]] = {}
    for name in unknown:
        kinds.setdefault(collapse(name, stacks), []).append(name)
    num_kinds = len({collapse(name, stacks) for name in shapes})
    model_type = getattr(config, "model_type", "unknown")
    but = f" by family {family.name!r}" if family else ""
    width = max(map(len, kinds))
    listing = [f"  {kind:<{width}}  {_shapes(names, shapes)}" for kind, names in kinds.items()]
    rules = [_rule(kind, names, shapes, sizes) for kind, names in kinds.items()]
    extends = [f'extends = "{family.name}"'] if family else []
    return "\n".join(
        [
            f"{len(unknown)} of {len(shapes)} tensors ({len(kinds)} of {num_kinds} kinds) of this model "
            f"(model_type {model_type!r}) are not understood{but}:",
            *listing,
            "Leave them out with --skip-unknown, where the rest is what matters; or "
            f"describe them in a file, say {model_type}.toml, and give it with --layout {model_type}.toml. "
            "A start, guessed from the names: check each line against the modelling code (the order of fused "
            "parts above all), and put a component for each ?.",
            "",
            *extends,
            "[model]",
            *rules,
        ]
    )


def _shapes(names: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    distinct = list(dict.fromkeys(shapes[name] for name in names))
    shown = " ".join(map(str, distinct[:3])) + (" ..." if len(distinct) > 3 else "")
    return f"{shown} x {len(names)}"


def _rule(kind: str, names: Sequence[str], shapes: Mapping[str, Shape], sizes: Sizes) -> str:
    about = f"  # {_shapes(names, shapes)}"
    for pattern, num_axes, value in _GUESSES:
        fits = num_axes is None or all(len(shapes[name]) == num_axes for name in names)
        if fits and re.search(rf"(^|[._]){pattern}", kind):
            for guess in (value, value.split(",")[0].removeprefix("{ component = ")):
                if _applies(kind, guess, names, shapes, sizes):
                    return f'"{kind}" = {guess}{about}'
    return f'"{kind}" = "?"{about}; one of {", ".join(COMPONENTS[:-1])}'


def _applies(kind: str, value: str, names: Sequence[str], shapes: Mapping[str, Shape], sizes: Sizes) -> bool:
    try:
        rule = Rule.parse(kind, tomllib.loads(f"value = {value}")["value"], where="guess")
        return all(rule.apply(name, shapes[name], sizes) is not None for name in names)
    except (LayoutError, tomllib.TOMLDecodeError):
        return False
