"""The model that a run is planned for: its numbers, from its configuration alone.

    active weights per token = weights - experts' weights * (1 - experts per token / experts) - embedding (looked up)

Input: a configuration. Output: a `Subject`, which can be rehearsed (see `rehearsal`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from safelocus.model.auto import auto_class
from safelocus.model.layout import Layout
from safelocus.model.layout.sizes import text_config
from safelocus.model.layout.tensor import TensorLayout
from safelocus.model.target import Dtype, load_config
from safelocus.resources.rehearsal import Rehearsal

# how many experts each token is given, by its names
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model without its weights.

    Attributes:
        name: folder, hub id or `organism:NAME`.
        config: of transformers.
        layout: of its tensors.
        dtype: its weights will have.
    """

    name: str
    config: Any = field(repr=False)
    layout: Layout = field(repr=False)
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: Dtype = "auto",
        layout: Path | None = None,
        skip_unknown: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Subject":
        """Read the configuration.

        Raises:
            ModelError, LayoutError: as for `load`.

        Example:
            >>> Subject.load("organism:dense").num_weights
            1267328
        """
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        return cls.of(name, config, dtype=dtype, layout=layout, skip_unknown=skip_unknown)

    @classmethod
    def of(
        cls, name: str, config: Any, *, dtype: Dtype = "auto", layout: Path | None = None, skip_unknown: bool = False
    ) -> "Subject":
        """Of a configuration at hand; "auto" is the dtype that it names, else fp32, as loading does."""
        kind = (getattr(config, "dtype", None) or text_config(config).dtype) if dtype == "auto" else dtype
        kind = getattr(torch, kind) if isinstance(kind, str) else kind
        understood = Layout.from_config(config, file=layout, skip_unknown=skip_unknown)
        return cls(name=name, config=config, layout=understood, dtype=kind or torch.float32)

    @property
    def num_weights(self) -> int:
        return self.layout.num_weights

    @property
    def num_eligible(self) -> int:
        return self.layout.num_eligible

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return self.num_weights * self.weight_bytes

    @property
    def largest_tensor(self) -> int:
        """Weights of the largest eligible tensor."""
        return max(self.layout.tensors[name].num_weights for name in self.layout.eligible_tensors)

    @property
    def largest_layer(self) -> int:
        """Weights of the largest layer, or of embedding and head where these are larger."""
        sizes: dict[Any, int] = {}
        for tensor in self.layout.tensors.values():
            sizes[tensor.stack, tensor.layer] = sizes.get((tensor.stack, tensor.layer), 0) + tensor.num_weights
        return max(sizes.values())

    @property
    def experts_per_token(self) -> int | None:
        """Of the routed experts; None in a dense model."""
        found = (getattr(text_config(self.config), name, None) for name in _PER_TOKEN)
        return next((number for number in found if isinstance(number, int)), None)

    @property
    def num_routed(self) -> int:
        """Weights of routed experts."""
        return sum(tensor.num_weights for tensor in self.layout.tensors.values() if _is_routed(tensor))

    @cached_property
    def share_of_experts(self) -> float:
        """Of the routed experts' weights that one token uses."""
        numbers = {m.expert for t in self.layout.tensors.values() if _is_routed(t) for m in t.matrices}
        per_token = self.experts_per_token
        return min(per_token / len(numbers), 1.0) if numbers and per_token else 1.0

    @property
    def num_active(self) -> int:
        """Weights that one token is multiplied with."""
        looked_up = [t for t in self.layout.tensors.values() if "embedding" in t.components]
        tied = not any("head" in t.components for t in self.layout.tensors.values())
        embedding = 0 if tied else sum(t.num_weights for t in looked_up)
        return round(self.num_weights - embedding - self.num_routed * (1 - self.share_of_experts))

    def read_per_step(self, batch: int) -> int:
        """Bytes of weights that one generated token of a whole batch needs: more rows, more experts."""
        missed = (1 - self.share_of_experts) ** batch
        return round((self.num_active - self.num_routed * self.share_of_experts) * self.weight_bytes) + round(
            self.num_routed * (1 - missed) * self.weight_bytes
        )

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """This model without data."""
        return self.wrapped(None)

    def wrapped(self, wrap: Callable[[Any], Any] | None) -> Rehearsal:
        """The same with an adapter, say, that `wrap` puts on it."""
        return Rehearsal(self.config, auto_class(self.config), dtype=self.dtype, wrap=wrap)


def _is_routed(tensor: TensorLayout) -> bool:
    return not tensor.shared_expert and (tensor.fused_experts or tensor.expert is not None)
