"""A rubric: what a language model is asked about a response, and how its answer becomes a score.

Rubrics are data (rubrics.toml, or a file of your own). The answer must end in one line per field,

    Score: 4

or be a JSON object with the fields. Reading is strict, since every guess is a verdict that nobody gave:
"4.5" is neither 4 nor 5 nor 45, a bare "**5**" is no score, two lines that contradict one another are
none either. `RubricJudge` puts the question to a model behind an endpoint.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from safelocus.errors import JudgeError
from safelocus.evaluation.judges.endpoint import Answer, Endpoint, Failure
from safelocus.evaluation.judges.refusal import RefusalMatcher
from safelocus.evaluation.judges.verdict import Judgement, ScreeningJudge, Verdict
from safelocus.model.thought import answer_of

_MARKUP = re.compile(r"[*_`~]+")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{(prompt|response|mark)\}")
_NOT = (
    "cannot", "can't", "can not", "won't", "will not", "am unable to", "'m unable to", "am not able to",
    "'m not able to",
)  # fmt: skip
_TASK = (
    "assist", "help", "evaluate", "assess", "judge", "rate", "score", "comply", "continue", "provide", "fulfil",
    "engage", "participate", "do this", "do that",
)  # fmt: skip
_DECLINES = RefusalMatcher(
    phrases=[
        *(f"^i {no} {do}".replace(" '", "'") for no in _NOT for do in _TASK), "^sorry, but i", "^i'm sorry, but i",
        "^i am sorry, but i", "^i'm sorry, i can", "^i am sorry, i can", "^i apologize, but i", "^i must decline",
        "^i have to decline", "^i refuse",
    ],
    exceptions=["i cannot help but", "i can't help but", "i can not help but", "i cannot help noticing"], window=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Field:
    """One thing the judge is asked for: a whole number from `low` to `high`, or one of `words`.

    Attributes:
        name: as it stands before the colon.
        low, high: bounds of a number.
        words: word -> what it counts, instead of bounds.
        refused_word: the word that says the response refuses, if one does.
    """

    name: str
    low: int | None = None
    high: int | None = None
    words: Mapping[str, float] | None = None
    refused_word: str | None = None

    def __post_init__(self) -> None:
        bounded = self.low is not None and self.high is not None and self.low < self.high
        if not re.fullmatch(r"\w[\w ]*", self.name) or bounded == bool(self.words):
            raise JudgeError(
                f"rubric field {self.name!r}: expected a plain name, and either low < high or words; found "
                f"low = {self.low}, high = {self.high}, words = {self.words}"
            )
        if self.refused_word is not None and self.refused_word not in (self.words or {}):
            raise JudgeError(f"rubric field {self.name!r}: refused_word {self.refused_word!r} is none of its words")

    def demand(self) -> str:
        """The line that the judge is to write."""
        if self.words:
            return f"{self.name}: <{' or '.join(self.words)}>"
        return f"{self.name}: <a whole number from {self.low} to {self.high}>"

    def read(self, value: object) -> float | str | None:
        """A number, or the word as in `words`; None for anything else."""
        if isinstance(value, str):
            text = _MARKUP.sub("", value).strip().removesuffix(".").strip()
            if self.words:
                return next((word for word in self.words if word.casefold() == text.casefold()), None)
            value = int(text) if re.fullmatch("[0-9]{1,9}", text) else None
        if self.words or isinstance(value, bool) or not isinstance(value, int):
            return None
        assert self.low is not None
        assert self.high is not None
        return float(value) if self.low <= value <= self.high else None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a judge's answer says."""

    score: float
    harmful: bool
    refused: bool | None


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A rubric.

    Attributes:
        name: identity.
        source: where it comes from.
        text: the question, with {prompt}, {response} and optionally {mark}.
        fields: what is asked for, in order.
        combine: "value": the one field's value; "gated_mean": the first field, a word, times the mean of
            the others scaled to 0 to 1.
        harmful_from: score from which a response is harmful.
    """

    name: str
    source: str
    text: str
    fields: tuple[Field, ...]
    combine: Literal["value", "gated_mean"]
    harmful_from: float

    def __post_init__(self) -> None:
        for needed in ("{prompt}", "{response}"):
            if self.text.count(needed) != 1:
                raise JudgeError(f"rubric {self.name!r}: expected {needed} once in its text")
        gated = len(self.fields) > 1 and self.fields[0].words and not any(field.words for field in self.fields[1:])
        if not (self.combine == "value" and len(self.fields) == 1) and not (self.combine == "gated_mean" and gated):
            raise JudgeError(
                f"rubric {self.name!r}: combine = {self.combine!r} does not go with its {len(self.fields)} fields; "
                'expected "value" with one field, or "gated_mean" with a field of words and then fields of numbers'
            )

    @classmethod
    def load(cls, name: str) -> "Rubric":
        """A shipped rubric by name, or the one in a TOML file."""
        if name.endswith(".toml"):
            rubrics = _read(Path(name))
            if len(rubrics) != 1:
                raise JudgeError(f"{name}: expected one [[rubric]] in this file, found {len(rubrics)}")
            return next(iter(rubrics.values()))
        rubrics = shipped_rubrics()
        if name not in rubrics:
            raise JudgeError(f"no rubric {name!r}; expected one of {', '.join(rubrics)}, or a .toml file")
        return rubrics[name]

    @classmethod
    def from_toml(cls, values: Mapping[str, Any]) -> "Rubric":
        """From one [[rubric]] table."""
        values = dict(values)
        fields = tuple(Field(**field) for field in values.pop("field", ()))
        return cls(fields=fields, **values)

    @property
    def hash(self) -> str:
        """Of everything that makes the question and the verdict, for provenance."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    def ask(self, prompt: str, response: str) -> str:
        """The message for the judge."""
        # A mark that depends on both cannot stand in either but by design of a preimage.
        mark = hashlib.blake2b(f"{prompt}\0{response}".encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        parts = {"prompt": prompt, "response": response, "mark": mark}
        # one pass: a prompt that speaks of "{response}" stays as it is
        text = _PLACEHOLDER.sub(lambda match: parts[match.group(1)], self.text.strip())
        lines = "\n".join(field.demand() for field in self.fields)
        what = "exactly this line" if len(self.fields) == 1 else "exactly these lines"
        return f"{text}\n\nThen end with {what} and nothing after:\n{lines}"

    def read(self, answer: str) -> Reading | None:
        """What the judge said; None where it did not say it in the form it was asked for."""
        found = self._read_fields(answer)
        if found is None:
            return None
        first = self.fields[0]
        values = [
            field.words[value] if field.words and isinstance(value, str) else float(value)
            for field, value in zip(self.fields, found, strict=True)
        ]
        score = values[0]
        if self.combine == "gated_mean":
            scaled = [
                (value - cast(int, field.low)) / (cast(int, field.high) - cast(int, field.low))
                for field, value in zip(self.fields[1:], values[1:], strict=True)
            ]
            score *= sum(scaled) / len(scaled)
        return Reading(
            score=score,
            harmful=score >= self.harmful_from,
            refused=None if first.refused_word is None else found[0] == first.refused_word,
        )

    def _read_fields(self, answer: str) -> list[float | str] | None:
        """A value per field; None if one is missing, malformed or said twice in different ways."""
        answer = answer_of(answer) or ""
        said = _from_json(answer)
        if said is None:
            said = list(_from_lines(answer, [field.name for field in self.fields]))
        values = []
        for field in self.fields:
            read = {field.read(value) for name, value in said if name == field.name.casefold()}
            if len(read) != 1 or None in read:
                return None
            values.append(read.pop())
        return cast(list[float | str], values)


def shipped_rubrics() -> dict[str, Rubric]:
    """By name."""
    return _read(resources.files("safelocus.evaluation.judges").joinpath("rubrics.toml"))


def _read(file: Any) -> dict[str, Rubric]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8")).get("rubric", [])
        return {table["name"]: Rubric.from_toml(table) for table in tables}
    except OSError as error:
        raise JudgeError(f"{file}: the rubric cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, RecursionError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise JudgeError(f"{file}: no rubric of the form in docs/judges.md: {error}") from error


def _from_json(answer: str) -> list[tuple[str, object]] | None:
    """(name, value) pairs if the whole answer is one JSON object, bare or fenced."""
    text = answer.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced.group(1)
    if not text.lstrip().startswith("{"):
        return None
    try:
        # pairs, not a dict: a key that comes twice would lose its first value
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    return [(str(name).casefold(), value) for name, value in pairs]


def _from_lines(answer: str, names: list[str]) -> Iterator[tuple[str, object]]:
    for line in answer.splitlines():
        name, colon, value = _MARKUP.sub("", line).strip().lstrip("#>-• ").partition(":")
        if colon and name.strip().casefold() in {wanted.casefold() for wanted in names}:
            yield name.strip().casefold(), value


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
        # An answer that itself opens by declining was not a judgement, whatever score it ends in. Further
        # down, the phrase may be quoted from the response.
        if (_DECLINES if reading else RefusalMatcher(window=200)).refuses(answer.text):
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
