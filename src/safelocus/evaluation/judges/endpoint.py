"""Any OpenAI-compatible chat endpoint (vLLM, llama.cpp, a hosted API): conversations in, answers out.

An answer or a failure per conversation, never an exception for one of them: timeouts, 408, 409, 429, 5xx
and bodies that hold no answer are tried again, after what Retry-After says or with growing pauses; then
that one conversation has failed. What would fail for every conversation (wrong key, address or model, no
credit, a parameter the model does not take) stops at once with one `JudgeError`; so does an address at
which nobody ever listened, after its attempts.
"""

import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safelocus.errors import JudgeError
from safelocus.evaluation.judges.cache import AnswerCache, digest
from safelocus.inert import without_secrets
from safelocus.model.thought import UNFINISHED, Split, split

if TYPE_CHECKING:
    import openai

Message = dict[str, str]

_SECRET = 12  # characters, from which a key is no word of an answer
_PASSING = {408, 409, 425, 429}  # and 5xx
_OF_ONE_REQUEST = {400, 413, 422, 451}  # too long, filtered, ...
_HOPELESS_CODES = {
    "insufficient_quota", "invalid_api_key", "model_not_found", "unsupported_parameter", "unsupported_value",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the endpoint answered.

    Attributes:
        text: what follows the thought; never empty.
        complete: False where it was cut off at the limit of tokens.
        prompt_tokens, completion_tokens: as the endpoint counted; None where it does not say.
        thought: None where there is none; whether the endpoint sends it apart or before the answer.
    """

    text: str
    complete: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    thought: str | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer; and the thought, where that is all there is.

    Attributes:
        is_empty: whether the model ended its turn without a word, at every attempt.
    """

    reason: str
    thought: str | None = None
    is_empty: bool = False


@dataclass(kw_only=True)
class Usage:
    """What was asked and spent so far. Tokens count answers that came over the wire, not those that are kept: cached,
    or in the journal of the run.
    """

    answered: int = 0
    cached: int = 0
    failed: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


class _Retry(Exception):
    """A passing failure; `wait` is what the server asked for, in seconds. An empty answer may have a thought."""

    def __init__(
        self,
        reason: str,
        wait: float | None = None,
        *,
        nobody_there: bool = False,
        is_empty: bool = False,
        thought: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.nobody_there = nobody_there
        self.is_empty = is_empty
        self.thought = thought


class _GivenUp(Exception):
    """A failure of this one request that another attempt would repeat."""

    def __init__(self, reason: str, thought: str | None = None) -> None:
        super().__init__(reason)
        self.thought = thought


@dataclass(kw_only=True, eq=False)
class Endpoint:
    """A chat endpoint.

    Attributes:
        model: its name at the endpoint.
        base_url: address ending in /v1; None takes OPENAI_BASE_URL or OpenAI's own.
        api_key: None takes OPENAI_API_KEY; servers of your own often need none. Never shown or saved.
        parameters: sent with every request, e.g. `max_completion_tokens` for models that want that.
        concurrency: requests under way at a time.
        timeout: seconds for one request.
        num_attempts: requests per conversation, at most.
        first_pause, longest_pause: seconds between attempts, doubling; Retry-After is kept up to the longest.
        cache: folder of answers (`default_cache()`), or None to ask anew every time.
        prices: US dollars per million prompt and completion tokens, for `usage.cost`.
        usage: what was asked and spent so far.
    """

    model: str
    base_url: str | None = field(default=None, repr=False)  # may hold a password; `address` does not
    api_key: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 1024})
    concurrency: int = 8
    timeout: float = 120.0
    num_attempts: int = 5
    first_pause: float = 1.0
    longest_pause: float = 60.0
    cache: Path | None = None
    prices: tuple[float, float] | None = None
    usage: Usage = field(default_factory=Usage, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        _import_openai()  # who has it not installed should know before any other work
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise JudgeError(f"{self.address}: not an address; expected one like http://localhost:8000/v1")
        if not self.model:
            raise JudgeError(f"{self.address}: the endpoint needs the name of a model")
        if self.concurrency < 1 or self.num_attempts < 1:
            raise JudgeError("an endpoint needs at least one request at a time and one attempt")

    @property
    def address(self) -> str:
        """The base URL without a name or password in it."""
        return without_secrets(self.base_url or "")

    def describe(self) -> dict[str, Any]:
        """For provenance (JSON): no key."""
        return {"model": self.model, "base_url": self.address, "parameters": dict(self.parameters)}

    def with_parameters(self, parameters: Mapping[str, Any]) -> "Endpoint":
        """The same endpoint, asked with other parameters: both count in one `usage`."""
        other = replace(self, parameters=parameters)
        other.usage, other._lock = self.usage, self._lock
        return other

    def ask(self, conversations: Sequence[Sequence[Message]]) -> list[Answer | Failure]:
        """An answer or a failure per conversation, in order; equal conversations are asked once.

        Raises:
            JudgeError: what would fail for every conversation. Answers that came before are in the cache.
        """
        keys = [digest({**self.describe(), "messages": list(messages)}) for messages in conversations]
        known = self._read_cache(keys)
        pending = {key: list(messages) for key, messages in zip(keys, conversations, strict=True) if key not in known}
        found: dict[str, Answer | Failure] = {**known, **(self._ask_all(pending) if pending else {})}
        return [found[key] for key in keys]

    @property
    def _has_answered(self) -> bool:
        """Ever: also a run that was interrupted, or another whose answers are kept."""
        return bool(self.usage.answered or self.usage.cached)

    def _read_cache(self, keys: Sequence[str]) -> dict[str, Answer]:
        if self.cache is None:
            return {}
        cache, known = AnswerCache(folder=Path(self.cache)), {}
        for key in dict.fromkeys(keys):
            with suppress(TypeError):  # fields of another version: ask again
                if (value := cache.read(key)) is not None:
                    known[key] = Answer(**value)
        self.usage.cached += len(known)
        return known

    def _ask_all(self, pending: Mapping[str, list[Message]]) -> dict[str, Answer | Failure]:
        openai = _import_openai()
        stop = threading.Event()
        # Attempts are counted and paused here, where the pause can be broken off.
        with openai.OpenAI(
            base_url=self.base_url, api_key=self._key(), timeout=self.timeout, max_retries=0
        ) as client, ThreadPoolExecutor(self.concurrency) as pool:  # fmt: skip

            def ask(key: str, messages: list[Message]) -> Answer | Failure:
                try:
                    return self._ask_one(client, key, messages, stop)
                except BaseException:
                    stop.set()  # here, not in the waiting thread: by the time that one runs others have been asked
                    raise

            futures = {key: pool.submit(ask, key, messages) for key, messages in pending.items()}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what stopped it
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return {key: future.result() for key, future in futures.items()}

    def _key(self) -> str:
        key = self.api_key or os.environ.get("OPENAI_API_KEY")
        if not key and (urlsplit(self.base_url or "").hostname or "").endswith("openai.com"):
            raise JudgeError(f"{self.address}: no key; set OPENAI_API_KEY, or give the address of your own server")
        return key or "none"

    def _discreet(self, text: str, least: int = 1) -> str:
        """What the server says, without our key and password: some send back what they were sent.

        Args:
            least: characters of a secret. Shorter ones may be words of an answer: servers of one's own take any.
        """
        parts = urlsplit(self.base_url or "")
        for secret in (self._key(), parts.password, parts.query):
            if secret and secret != "none" and len(secret) >= least:
                text = text.replace(secret, "***")
        return text

    def _ask_one(self, client: Any, key: str, messages: list[Message], stop: threading.Event) -> Answer | Failure:
        reason, thought, is_empty = "stopped", None, False
        for attempt in range(self.num_attempts):
            if stop.is_set():
                break
            try:
                answer = self._request(client, messages)
            except _Retry as error:
                reason, pause = self._discreet(str(error)), error.wait
                thought, is_empty = error.thought, error.is_empty
                if attempt + 1 < self.num_attempts:
                    growing = self.first_pause * 2**attempt * random.uniform(0.75, 1.25)  # not all at once
                    stop.wait(min(growing if pause is None else max(pause, 0.0), self.longest_pause))
                elif error.nobody_there and not self._has_answered:
                    raise JudgeError(f"{self.address}: {reason}. Is the address right, and the server up?") from error
            except _GivenUp as error:
                reason, thought, is_empty = str(error), error.thought, False
                break
            else:
                self._count(answer)
                if self.cache is not None:
                    AnswerCache(folder=Path(self.cache)).write(key, asdict(answer))
                return answer
        else:
            reason = f"{reason} (after {self.num_attempts} attempts)"
        with self._lock:
            self.usage.failed += 1
        return Failure(reason=reason, thought=thought, is_empty=is_empty)

    def _request(self, client: Any, messages: list[Message]) -> Answer:
        openai = _import_openai()
        with self._lock:
            self.usage.requests += 1
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **self.parameters
            )
        except openai.APITimeoutError as error:
            raise _Retry(f"no answer within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            nobody_there = type(cause).__name__ == "ConnectError"  # refused, or no such host
            raise _Retry(f"cannot be reached: {_short(str(cause))}", nobody_there=nobody_there) from error
        except openai.APIStatusError as error:
            raise self._sorted(error) from error
        body = raw.http_response.text
        answer = _read_answer(body, shown=_short(self._discreet(body)))
        thought = None if answer.thought is None else self._discreet(answer.thought, least=_SECRET)
        return replace(answer, text=self._discreet(answer.text, least=_SECRET), thought=thought)

    def _sorted(self, error: "openai.APIStatusError") -> Exception:
        """Which kind of failure a status is: passing, of this request, or of all."""
        status = error.status_code
        message = f"HTTP {status}: {_short(self._discreet(error.message))}"
        of_all = JudgeError(f"{self.address}, model {self.model!r}: {message}. {_advice(status, error.code)}")
        if error.code in _HOPELESS_CODES:
            return of_all
        if status in _PASSING or status >= 500:
            return _Retry(message, _retry_after(error.response.headers))
        if status in _OF_ONE_REQUEST or (status == 403 and self._has_answered):  # the key works: it is the content
            return _GivenUp(message)
        return of_all

    def _count(self, answer: Answer) -> None:
        with self._lock:
            self.usage.answered += 1
            self.usage.prompt_tokens += answer.prompt_tokens or 0
            self.usage.completion_tokens += answer.completion_tokens or 0
            if self.prices is not None:
                spent = self.usage.prompt_tokens * self.prices[0] + self.usage.completion_tokens * self.prices[1]
                self.usage.cost = spent / 1e6


def _read_answer(body: str, *, shown: str) -> Answer:
    """The answer in a response's body; `shown` is the body as errors may quote it."""
    try:
        data = json.loads(body)
    except ValueError as error:
        raise _Retry(f"the body is not JSON: {shown}") from error
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal")
        apart = message.get("reasoning_content") or message.get("reasoning")
        usage = data.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"the body holds no answer: {shown}") from error
    found = split(text) if isinstance(text, str) else Split(thought=None, start=0)
    thought = apart if isinstance(apart, str) else found.thought
    text = text[found.start :] if isinstance(text, str) else ""
    if not text.strip():
        if thought and (reason == "length" or not found.finished):
            raise _GivenUp(UNFINISHED, thought)
        if reason in ("length", "content_filter"):
            raise _GivenUp(f"an empty answer, ended by {reason!r}")
        is_empty = reason == "stop"
        raise _Retry(f"an empty answer: {shown}", is_empty=is_empty, thought=thought if is_empty else None)
    return Answer(
        text=text,
        complete=reason != "length",
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
        completion_tokens=completion_tokens if isinstance(completion_tokens, int) else None,
        thought=thought,
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date; None where it does not say."""
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(value)
        return seconds if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError, OverflowError):
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return None


def _advice(status: int, code: str | None) -> str:
    if code == "insufficient_quota" or status == 402:
        return "The account has no credit left."
    if code in ("unsupported_parameter", "unsupported_value"):
        return "Give the endpoint's `parameters` without it, e.g. max_completion_tokens instead of max_tokens."
    if status == 401:
        return "Expected a valid key in OPENAI_API_KEY."
    if status == 404 or code == "model_not_found":
        return "Expected an address that ends in /v1 and the name of a model that is served there."
    return "Every request would meet this."


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise JudgeError(
            "judging through an endpoint needs the openai package; install it with: pip install 'safelocus[endpoint]'"
        ) from error
    return openai
