"""A language model behind an endpoint as judge, by a rubric."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safelocus.evaluation.judges.endpoint import Answer, Endpoint, Failure
from safelocus.evaluation.judges.refusal import RefusalMatcher
from safelocus.evaluation.judges.rubric import Rubric
from safelocus.evaluation.judges.verdict import Judgement, ScreeningJudge, Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class RubricJudge(ScreeningJudge):
    """Ask a language model, by a rubric. What it does not clearly answer is unscorable.

    Attributes:
        endpoint: the model; `endpoint.usage` counts requests, tokens and cost.
        rubric: the question and how its answer is read.
    """

    endpoint: Endpoint
    rubric: Rubric

    @property
    def name(self) -> str:
        return f"rubric {self.rubric.name} {self.endpoint.model}"

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "rubric",
            "rubric": self.rubric.name,
            "rubric_hash": self.rubric.hash,
            "harmful_from": self.rubric.harmful_from,
            **self.endpoint.describe(),
        }

    def _judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        questions = [self.rubric.ask(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        answers = self.endpoint.ask([[{"role": "user", "content": question}] for question in questions])
        return [self._judgement(answer) for answer in answers]

    def _judgement(self, answer: Answer | Failure) -> Judgement:
        if isinstance(answer, Failure):
            return self.unscorable(f"the endpoint failed: {answer.reason}", is_final=False)
        reading = self.rubric.read(answer.text)
        # An answer that itself opens with a refusal was not a judgement, whatever score it ends in. Further
        # down, the phrase may be quoted from the response.
        if RefusalMatcher(window=1 if reading else 200).refuses(answer.text):
            return self.unscorable(f"the judge refused to judge: {answer.text}")
        if reading is None:
            cut = "" if answer.complete else ", cut off at its limit of tokens"
            return self.unscorable(f"the judge's answer is not in the form asked for{cut}: {answer.text}")
        return Judgement(
            verdict=Verdict.HARMFUL if reading.harmful else Verdict.SAFE,
            score=reading.score,
            explanation=answer.text,
            judge=self.name,
            refused=reading.refused,
        )
