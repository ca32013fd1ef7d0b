"""S from a guard: a causal LM whose verdict tokens say safe or unsafe (paper: Llama-Guard).

    score(x, y) = log P(safe | x, y) - log P(unsafe | x, y)   at the verdict position

The log-odds, not the logit of "safe" alone: a logit also moves when all logits move together.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from safelocus.errors import ModelError
from safelocus.model.forcing import logits_at, pad
from safelocus.model.generation import LOOK_AT_WEIGHTS, NO_NUMBER, Finite, as_used
from safelocus.model.layout.sizes import auto_class
from safelocus.model.target import Dtype, dtype_on, load_config, load_model, load_tokenizer
from safelocus.objective.presets import GuardPreset, find_preset, read_preset, render, verdict_token_ids
from safelocus.objective.text import (
    ReaderInput,
    TextObjective,
    batch_inputs,
    embedding_gradients,
    padding_id,
    tokenize_around,
    without,
)
from safelocus.objective.transfer import GuardReading
from safelocus.run.identity import digest

_VERDICT_BUDGET = 48  # tokens a guard may write before its verdict (WildGuard: two lines)
_SEVERAL = 4
_SAMPLE = (["What is the capital of France?"], ["The capital of France is Paris."])


@dataclass(kw_only=True, eq=False)
class Guard(TextObjective):
    """A guard model as objective. Make one with `Guard.load`.

    Attributes:
        preset: how conversations are rendered for it and where and how its verdict is read.
    """

    preset: GuardPreset
    _verdict_ids: tuple[list[int], list[int]] | None = field(default=None, init=False, repr=False)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        description: Path | None = None,
        dtype: Dtype = "auto",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "Guard":
        """Load a guard from a folder, hub id or `organism:guard`.

        Args:
            name: where the guard is.
            description: TOML file that describes a guard unknown here (docs/guards.md).
            dtype, device, revision, trust_remote_code: as for `load`.
            **options: `max_new_tokens`, `tau`, `gumbel_seed`, `variant`, `on_responses` of the objective.

        Raises:
            ModelError: the guard is unknown, or its vocabulary lacks the verdict tokens.
        """
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(name, **hub)
        preset = read_preset(description) if description else find_preset(str(name), tokenizer)
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        auto = auto_class(config) or AutoModelForCausalLM  # guards that read images too judge text alone
        model = load_model(auto, name, config=config, dtype=dtype_on(device, dtype), device=device, **hub)
        guard = cls(name=str(name), model=model, tokenizer=tokenizer, preset=preset, **options)
        guard.verdict_ids  # noqa: B018 (a guard without verdict tokens fails here, before any long work)
        return guard

    @property
    def verdict_ids(self) -> tuple[list[int], list[int]]:
        """First token of each safe and of each unsafe verdict, as spelled behind the guard's own prompt."""
        if self._verdict_ids is None:
            sample = render(self.tokenizer, self.preset, "A question", "An answer")
            context = sample.prefix + sample.response + sample.suffix + (self.preset.generate_until or "")
            self._verdict_ids = verdict_token_ids(self.tokenizer, self.preset, context)
        return self._verdict_ids

    def read(
        self, prompts: Sequence[str], responses: Sequence[str], *, response_ids: list[list[int]] | None = None
    ) -> GuardReading:
        """As `TextObjective.read`; ModelError where the guard comes to no verdict, not even on a plain conversation."""
        inputs, unread = self._inputs(prompts, responses, response_ids)
        # is the guard or its preset wrong, or are these answers?
        if len(unread) == len(inputs) >= _SEVERAL and self._inputs(*_SAMPLE, None)[1]:
            raise self._without_verdict(len(unread), len(inputs))
        return without(embedding_gradients(self.model, self.tokenizer, inputs, self._log_odds), unread)

    @torch.no_grad()
    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Log-odds of safe against unsafe [B], fp32, of given responses, as one batch; no gradients.

        Raises:
            ModelError: the guard did not come to a verdict.
        """
        inputs, unread = self._inputs(prompts, responses, None)
        if unread:
            raise self._without_verdict(len(unread), len(inputs))
        return self._log_odds(batch_inputs(self.model, self.tokenizer, inputs))

    def _inputs(
        self, prompts: Sequence[str], responses: Sequence[str], response_ids: list[list[int]] | None
    ) -> tuple[list[ReaderInput], list[int]]:
        """Up to the verdicts; and the numbers of those that the guard did not come to."""
        rendered = [render(self.tokenizer, self.preset, p, r) for p, r in zip(prompts, responses, strict=True)]
        suffixes, unread = [part.suffix for part in rendered], list[int]()
        if (marker := self.preset.generate_until) is not None:
            written = self._write([part.prefix + part.response + part.suffix for part in rendered], marker)
            unread = [number for number, text in enumerate(written) if marker not in text]
            suffixes = [s + text.split(marker, 1)[0] + marker for s, text in zip(suffixes, written, strict=True)]
        given: Sequence[list[int] | None] = response_ids if response_ids is not None else [None] * len(responses)
        inputs = [
            tokenize_around(
                self.tokenizer,
                part.prefix,
                part.response,
                suffix,
                add_special_tokens=self.preset.add_special_tokens,
                response_ids=ids,
            )
            for part, suffix, ids in zip(rendered, suffixes, given, strict=True)
        ]
        self._check_positions(inputs)
        return inputs, unread

    def _log_odds(self, batch: dict[str, Tensor]) -> Tensor:
        safe, unsafe = (torch.tensor(ids, device=self.model.device) for ids in self.verdict_ids)
        mask = batch["attention_mask"]
        last = mask.sum(dim=1) - 1 + torch.arange(len(mask), device=mask.device) * mask.shape[1]
        logits = logits_at(self.model, batch, last).float()  # [B, V]
        return torch.logsumexp(logits[:, safe], dim=1) - torch.logsumexp(logits[:, unsafe], dim=1)

    def describe(self) -> dict[str, Any]:
        told = ("name", "matches", "template_contains", "source", "note")  # of whom, not what is asked
        asked = {key: value for key, value in asdict(self.preset).items() if key not in told}
        preset = {"preset": self.preset.name, "preset_hash": digest(asked), **self._template}
        return {"kind": "guard", "name": self.name, **preset, **self._describe_reading()}

    @property
    def _template(self) -> dict[str, str]:
        """Of the tokenizer, where that is what is asked."""
        return {"chat_template": digest(self.tokenizer.chat_template)} if self.preset.format == "chat" else {}

    def identity_of_reader(self) -> dict[str, Any]:
        return {"preset": asdict(self.preset), **self._template, **super().identity_of_reader()}

    @torch.no_grad()
    def _write(self, texts: Sequence[str], marker: str) -> list[str]:
        """What the guard writes behind each text, up to the marker before its verdict."""
        encoded = self.tokenizer(list(texts), add_special_tokens=self.preset.add_special_tokens)["input_ids"]
        padding = padding_id(self.tokenizer)
        ids, mask = pad(encoded, padding, self.model.device, left=True)
        settings = GenerationConfig(
            max_new_tokens=_VERDICT_BUDGET,
            do_sample=False,
            pad_token_id=padding,
            eos_token_id=self.tokenizer.eos_token_id,
            stop_strings=[marker],
        )
        finite = Finite()
        with as_used(self.model):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, tokenizer=self.tokenizer,
                logits_processor=LogitsProcessorList([finite]),
            )  # fmt: skip
        if without := finite.of(len(texts)).count(False):
            raise ModelError(f"{self.name}: {without} of {len(texts)} verdicts are {NO_NUMBER}; {LOOK_AT_WEIGHTS}")
        written: list[str] = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=False)
        return written

    def _without_verdict(self, number: int, among: int) -> ModelError:
        return ModelError(
            f"{self.name}: {number} of {among} verdicts did not contain {self.preset.generate_until!r} within "
            f"{_VERDICT_BUDGET} tokens; is preset {self.preset.name!r} the right one for this guard?"
        )
