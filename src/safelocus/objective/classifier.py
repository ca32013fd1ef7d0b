"""S from a sequence classifier (toxicity-like): minus the log-odds of its unsafe label."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from safelocus.errors import ModelError
from safelocus.model.target import Dtype, dtype_on, load_model, load_tokenizer
from safelocus.objective.text import TextObjective, embedding_gradients, padding_id, tokenize_around, without
from safelocus.objective.transfer import GuardReading

_UNSAFE_LABELS = ("unsafe", "toxic", "toxicity", "harmful", "hate", "offensive")


@dataclass(kw_only=True, eq=False)
class Classifier(TextObjective):
    """A sequence classifier over the response as objective.

    Attributes:
        unsafe: index of the unsafe label.
        multi_label: labels are independent (sigmoid) rather than exclusive (softmax).
    """

    unsafe: int
    multi_label: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # by this a decoder finds the last token of each answer of a batch
        self.model.config.get_text_config().pad_token_id = padding_id(self.tokenizer)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        unsafe: str | None = None,
        multi_label: bool | None = None,
        dtype: Dtype = "auto",
        device: str | None = None,
        **options: Any,
    ) -> "Classifier":
        """Load from a folder or hub id.

        Args:
            unsafe: names the unsafe label where it cannot be told.
            multi_label: None for what its configuration says.

        Raises:
            ModelError: no label says that it is unsafe, or none is called `unsafe`.
        """
        tokenizer = load_tokenizer(name)
        dtype = dtype_on(device, dtype)
        model = load_model(AutoModelForSequenceClassification, name, dtype=dtype, device=device)
        labels = {str(label).lower(): int(i) for i, label in model.config.id2label.items()}
        wanted = [unsafe.lower()] if unsafe else _UNSAFE_LABELS
        index = next((labels[label] for label in wanted if label in labels), None)
        if index is None:
            raise ModelError(
                f"{name}: which label is unsafe? It has {', '.join(labels)}, and not {' or '.join(wanted)}; name one "
                "of them (--unsafe-label, unsafe=LABEL)"
            )
        if multi_label is None:
            multi_label = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        return cls(name=str(name), model=model, tokenizer=tokenizer, unsafe=index, multi_label=multi_label, **options)

    def read(
        self, prompts: Sequence[str], responses: Sequence[str], *, response_ids: list[list[int]] | None = None
    ) -> GuardReading:
        given: Sequence[list[int] | None] = response_ids if response_ids is not None else [None] * len(responses)
        inputs = [
            tokenize_around(self.tokenizer, "", text, "", add_special_tokens=True, response_ids=ids)
            for text, ids in zip(responses, given, strict=True)
        ]
        self._check_positions(inputs)
        unread = [number for number, each in enumerate(inputs) if not each.ids]  # a decoder's, which adds no token

        def score(batch: dict[str, Tensor]) -> Tensor:
            logits = self.model(**batch).logits.float()  # [B, labels]
            unsafe = logits[:, self.unsafe]
            if self.multi_label:
                return -unsafe
            others = torch.cat([logits[:, : self.unsafe], logits[:, self.unsafe + 1 :]], dim=1)
            return torch.logsumexp(others, dim=1) - unsafe

        return without(embedding_gradients(self.model, self.tokenizer, inputs, score), unread)

    def describe(self) -> dict[str, Any]:
        label = self.model.config.id2label[self.unsafe]
        told = {"kind": "classifier", "name": self.name, "unsafe": label, "multi_label": self.multi_label}
        return {**told, **self._describe_reading()}
