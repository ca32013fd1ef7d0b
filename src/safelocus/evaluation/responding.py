"""Who answers: a target in this process, or a server behind an endpoint; and how a list of requests is answered.

`collect` answers every distinct request once, in batches of like length (little padding), longest first
(memory peaks at once), and keeps each batch in a journal before the next begins. Batches are planned over
*all* requests, whatever is answered already: padding can turn a bit, and a resumed evaluation should repeat
those of an uninterrupted one. Several processes share the batches, and all have all replies in the end.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch

from safelocus import distributed
from safelocus.errors import ResourceError, SafelocusError
from safelocus.evaluation.judges.endpoint import Answer, Endpoint, Failure
from safelocus.model.forcing import batches_by_length
from safelocus.model.generation import NO_NUMBER, generate_from, longest_prompt
from safelocus.model.target import Target
from safelocus.model.thought import UNFINISHED, split
from safelocus.progress import size_of, track
from safelocus.run.resume import Journal, Key


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be answered. `system` replaces the responder's own system prompt where it is given."""

    prompt: str
    system: str | None = None
    max_new_tokens: int

    @property
    def key(self) -> Key:
        return (self.system or "", self.prompt, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer, without a thought before it; None where there was none.
        finished: whether it ended by itself, rather than at the limit of new tokens.
        failure: why there is no answer (the endpoint failed, the prompt does not fit, the thought did not end).
        thought: None where there was none.
    """

    text: str | None
    finished: bool = False
    failure: str | None = None
    thought: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether asking again would give the same: an answer, or a thought that did not end."""
        return self.failure is None or self.thought is not None


@runtime_checkable
class Responder(Protocol):
    """Anything that answers. A failed request is a `Reply` that says so, never an empty answer."""

    @property
    def name(self) -> str: ...

    def length(self, request: Request) -> int:
        """A measure of the prompt's length, for batching."""
        ...

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; all have the same `max_new_tokens`."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that the answers depend on, to the bit where that is known."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this responder is, for provenance."""
        ...


@dataclass(kw_only=True, eq=False)
class TargetResponder:
    """A target in this process, greedy. Keep one to evaluate the same target many times: prompts are encoded once.

    Attributes:
        opening: what every answer is begun with, outside of a thought; the reply is what follows it.
        never: sequences of tokens that no answer holds.
    """

    target: Target
    opening: str = ""
    never: tuple[tuple[int, ...], ...] = ()
    _encoded: dict[tuple[str | None, str], list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.target.name

    def length(self, request: Request) -> int:
        return len(self._encode(request))

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        max_new_tokens = requests[0].max_new_tokens
        room = longest_prompt(self.target, max_new_tokens)
        encoded = [self._encode(request) for request in requests]
        fitting = [ids for ids in encoded if len(ids) <= room]
        target = self.target
        if self.opening:  # behind it no thought is open
            target = replace(target, chat=replace(target.chat, opened=None))
        if not fitting and target.is_sharded:
            generate_from([encoded[0][:1]], target, 1)  # the other processes wait for this one
        responses = iter(generate_from(fitting, target, max_new_tokens, never=self.never) if fitting else [])
        replies = []
        for ids in encoded:
            if len(ids) > room:
                failure = f"the prompt has {len(ids)} tokens; there is room for {room} beside {max_new_tokens} new ones"
                replies.append(Reply(text=None, failure=failure))
            else:
                response = next(responses)
                reply = Reply(text=response.text, finished=response.finished, thought=response.thought)
                if response.in_thought:
                    reply = replace(reply, text=None, failure=UNFINISHED)
                if not response.is_number:
                    reply = Reply(text=None, failure=NO_NUMBER)
                replies.append(reply)
        return replies

    def identity(self) -> dict[str, Any]:
        how = {"the opening of answers": self.opening, "what no answer holds": self.never}
        return self.target.identity() | {name: value for name, value in how.items() if value}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "target",
            "name": self.target.name,
            "dtype": self.target.dtype,
            "chat": self.target.chat.to_json(),
            **({"left_out": self.target.layout.left_out} if self.target.layout.left_out else {}),
        }

    def _encode(self, request: Request) -> list[int]:
        key = (request.system, request.prompt)
        if key not in self._encoded:
            chat = self.target.chat
            if self.opening:
                prompt, opening = chat.encode_pair(request.prompt, self.opening, system=request.system)
                self._encoded[key] = [*prompt, *opening]
            else:
                self._encoded[key] = chat.encode_prompt(request.prompt, system=request.system)
        return self._encoded[key]


def innermost(responder: Responder) -> Responder:
    """Who answers behind all that wraps it: attacks, filters, smoothing."""
    while isinstance(wrapped := getattr(responder, "responder", None), Responder):
        responder = wrapped
    return responder


def thinks(responder: Responder) -> bool:
    """Whether an answer may come behind a thought, for which a short limit leaves no room, as far as that is known."""
    responder = innermost(responder)
    if isinstance(responder, TargetResponder):
        return responder.target.chat.thinking or responder.target.chat.opened is not None
    if isinstance(responder, EndpointResponder):
        given = responder.endpoint.parameters
        switches = [part.get("chat_template_kwargs") or {} for part in (given, given.get("extra_body") or {})]
        return any(part.get(name) for part in switches for name in ("enable_thinking", "thinking"))
    return False


def inside(responder: Responder, what: str) -> TargetResponder:
    """The responder, for what needs more of a model than answers.

    Raises:
        SafelocusError: it only answers.
    """
    if not isinstance(responder, TargetResponder):
        raise SafelocusError(f"{what} needs the model itself, but {responder.name} only answers")
    return responder


@dataclass(frozen=True, kw_only=True, eq=False)
class EndpointResponder:
    """A model behind an OpenAI-compatible endpoint (vLLM, ...), greedy, with the server's own chat template.

    Attributes:
        endpoint: where, and under which name. Its `parameters` are sent, but for the limit of new tokens.
        system: system prompt before every request that brings none of its own.
        seed: sent along, for servers that sample even at temperature 0.
    """

    endpoint: Endpoint
    system: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.endpoint.model} at {self.endpoint.address}"

    def length(self, request: Request) -> int:
        return 0  # requests of any length go together: nothing is padded

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        given = self.endpoint.parameters
        limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
        parameters = {**given, limit: requests[0].max_new_tokens, "seed": self.seed}
        answers = self.endpoint.with_parameters(parameters).ask([self._messages(request) for request in requests])
        return [_reply_of(answer) for answer in answers]

    def identity(self) -> dict[str, Any]:
        return self.describe()

    def describe(self) -> dict[str, Any]:
        described = {"kind": "endpoint", **self.endpoint.describe(), "system": self.system, "seed": self.seed}
        # another limit of new tokens comes with each request
        limits = ("max_tokens", "max_completion_tokens")
        return described | {"parameters": {k: v for k, v in self.endpoint.parameters.items() if k not in limits}}

    def _messages(self, request: Request) -> list[dict[str, str]]:
        system = self.system if request.system is None else request.system
        opening = [{"role": "system", "content": system}] if system else []
        return [*opening, {"role": "user", "content": request.prompt}]


def _reply_of(answer: Answer | Failure) -> Reply:
    if isinstance(answer, Answer):
        return Reply(text=answer.text.strip(), finished=answer.complete, thought=answer.thought)
    if answer.is_empty:  # an answer of a model in this process, and no failure
        return Reply(text="", finished=True, thought=answer.thought)
    return Reply(text=None, failure=answer.reason, thought=answer.thought)


def collect(
    responder: Responder,
    requests: Sequence[Request],
    journal: Journal,
    *,
    batch_size: int,
    progress: bool = True,
) -> dict[Key, Reply]:
    """Replies by `Request.key`; those in the journal are not asked for again, failed ones are.

    In several processes all call it alike; each keeps what it asked for in its own journal.
    """
    distinct = list({request.key: request for request in requests}.values())
    lengths = [responder.length(request) for request in distinct]
    batches: list[list[Request]] = []
    for limit in sorted({request.max_new_tokens for request in distinct}, reverse=True):
        alike = [i for i, request in enumerate(distinct) if request.max_new_tokens == limit]
        for same in batches_by_length([lengths[i] for i in alike], batch_size):
            batches.append([distinct[alike[i]] for i in same])
    replies = {request.key: Reply(**journal[request.key]) for request in distinct if request.key in journal}
    remaining = [[request for request in batch if request.key not in replies] for batch in batches]
    answering = innermost(responder)
    if isinstance(answering, EndpointResponder):  # which can tell by them that it is open to us
        answering.endpoint.usage.cached += len(replies)
    in_step = isinstance(answering, TargetResponder) and answering.target.is_sharded
    own = distributed.share([batch for batch in remaining if batch], in_step=in_step)
    for batch in track(own, "answering", enabled=progress and distributed.is_main(), unit=size_of):
        if batch is None:  # through a sharded model all pass together: along with the others, for nothing
            _respond(responder, batches[-1][-1:])
            continue
        found = dict(zip([request.key for request in batch], _respond(responder, batch), strict=True))
        replies.update(found)
        journal.add([(key, asdict(reply)) for key, reply in found.items() if reply.is_final])
    replies = distributed.merged(replies)
    new = {key: reply for key, reply in replies.items() if reply.is_final and key not in journal}
    journal.learn([(key, asdict(reply)) for key, reply in new.items()])
    return replies


def _told_apart(reply: Reply) -> Reply:
    """Of a responder that leaves the thought in the text."""
    if reply.text is None or reply.thought is not None or (found := split(reply.text)).thought is None:
        return reply
    if not found.finished:
        return replace(reply, text=None, failure=UNFINISHED, thought=found.thought)
    return replace(reply, text=reply.text[found.start :].strip(), thought=found.thought)


def _respond(responder: Responder, batch: Sequence[Request]) -> list[Reply]:
    """Halves of a batch that does not fit into memory do, as a rule."""
    try:
        return [_told_apart(reply) for reply in responder.respond(batch)]
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ResourceError(
                f"out of memory on a single prompt with {batch[0].max_new_tokens} new tokens. Try --dtype bfloat16, "
                "--device auto or fewer --max-new-tokens"
            ) from error
    middle = len(batch) // 2  # outside the handler, whose traceback would keep the memory
    torch.cuda.empty_cache()  # does nothing where there is no such device
    return [*_respond(responder, batch[:middle]), *_respond(responder, batch[middle:])]
