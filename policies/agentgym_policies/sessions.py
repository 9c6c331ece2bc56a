"""The session of an engine that takes token ids and gives token ids: what every such engine shares.

An engine adds two small things, in a subclass of `TokenSession`: `sample`, a reply for a context, and `release`. The
conversation, what was told and hinted, branches, noise keys and the record of each call are here, once.
"""

from __future__ import annotations

import contextlib
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Literal, Protocol, Self, TypeVar

from agentgym import seeding
from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling.renderer import Conversation, Prompt, Renderer, with_hint
from agentgym.policy import left
from agentgym.types import Action, Episode, Floats, Guidance, Ids, Observation, Sampling, TokenSpan, VersionRun
from agentgym_policies.sampling import check


class Engine(Protocol):
    """What a session asks of its engine besides replies. `max_length` bounds context and reply together, in tokens."""

    renderer: Renderer
    sampling: Sampling
    seed: int
    max_length: int


@dataclass(slots=True, kw_only=True)
class Call:
    """One reply to sample.

    `context` holds all ids so far; the first `keep` of them are as the last call left them. `key` is the noise of this
    reply, `room` the most tokens to sample. The reply begins with the ids of `begin`, which are not drawn: the first
    was decided on with log-probability `said`, the others follow from it.
    """

    context: list[int]
    keep: int
    sampling: Sampling
    key: int
    room: int
    begin: tuple[int, ...] = ()
    said: float = 0.0


@dataclass(slots=True, kw_only=True)
class Reply:
    """What was sampled: ids, their log-probs under the raw model and as drawn from, and which version sampled which.

    `stale`: caches of older versions were read. The lists `logprobs` and `processed` are as long as `ids`.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    processed: list[float] = field(default_factory=list)
    versions: list[VersionRun] = field(default_factory=list)
    finish: Literal["stop", "length", ""] = ""
    stale: bool = False


E = TypeVar("E", bound=Engine)


class TokenSession(ABC, Generic[E]):
    """One agent in one episode: its conversation. Leaving it, also by cancellation, releases what the engine holds.

    Of the episode's guidance it reads `hint`, `begin` and `share`. What it is told, and the hint, go into the prompt of
    the next span, so that the spans of a branch hold the whole context.
    """

    def __init__(self, engine: E, episode: Episode, agent: str) -> None:
        self.engine = engine
        self.conversation = engine.renderer.conversation()
        self._noise = (engine.seed, "sampling", episode.seed, episode.member, agent)
        guidance = episode.guidance or Guidance()
        self._hint, self._begin = guidance.hint, (guidance.begin, _log_share(guidance))
        self._bare: Conversation | None = None  # without the hint, from the hint to the span that holds it
        self._held: tuple[int, int] | None = (
            None  # (branch, tokens of it) that spans hold and the context still begins with
        )
        self._keep = sys.maxsize  # what calls without room, which the engine never saw, left of what it did see
        self._turn = 0
        self._torn = self._left = False

    @abstractmethod
    async def sample(self, call: Call) -> Reply:
        """A reply. Cancelled, it stops sampling; what fails is an `EngineFault`."""

    @abstractmethod
    def release(self) -> None:
        """The session is over: let go of what is held for it. An `EngineFault` says that nothing is held any more."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._turn:
            with contextlib.suppress(EngineFault):
                self.release()

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        """Sample a reply to what is new.

        A context that leaves no room is an outcome: an empty reply with finish "length". Only a first prompt that
        does not fit is a `ModelError`. After a cancelled or failed call the session cannot go on (`EngineFault`).
        """
        self._check()
        chosen = self.engine.sampling if sampling is None else check(sampling)
        self._observe(observation, hint=True)
        prompt = self._prompt()
        call = self._call(prompt, chosen)
        self._turn += 1
        if call.room > 0:
            self._torn = True
            reply, self._keep = await self.sample(call), sys.maxsize
            self._torn = False
        else:
            reply, self._keep = Reply(finish="length"), call.keep
        return self._action(prompt, call, reply)

    async def tell(self, observation: Observation, action: Action) -> None:
        """An action that this session did not sample: with a span its exact ids, else its text as the template has it.

        Where its span says that it was sampled behind a hint, so does what the next span's prompt holds of it.
        """
        self._check()
        span = action.span
        self._observe(observation, hint=span is not None and span.context == "hinted")
        ids = self.engine.renderer.ids_of(action) if span is None else list(span.ids)
        for talk in (self.conversation, self._bare):
            if talk is not None:
                talk.reply(ids)
        self._turn += 1

    def _check(self) -> None:
        if self._left:
            raise left()
        if self._torn:
            raise EngineFault("this session lost a reply by cancellation or an engine failure; open a new one")

    def _observe(self, observation: Observation, hint: bool) -> None:
        """Add what is new to the conversation, and the hint if its moment has come."""
        if observation.array is not None:
            raise ModelError("a language model cannot read an array observation; wrap the environment to speak text")
        messages = observation.messages
        if hint and self._hint:
            self._bare = self.conversation.fork()
            messages, self._hint = with_hint(messages, self._hint), ""
        if self._bare is not None:
            self._bare.observe(observation.messages, observation.tools)
        parent = self.conversation.observe(messages, observation.tools).parent
        if parent is not None and self._held is not None:
            self._held = (self._held[0], min(self._held[1], parent[1]))
        length, limit = len(self.conversation.ids), self.engine.max_length
        if not self._turn and length >= limit:
            raise ModelError(
                f"the first prompt has {length} tokens, max_length is {limit}: raise max_length or shorten the prompt"
            )

    def _prompt(self) -> Prompt:
        """What the spans so far do not hold of the context."""
        branch, at = self._held or (self.conversation.branch, 0)
        forked = branch != self.conversation.branch
        return Prompt(self.conversation.ids[at:], self.conversation.branch, (branch, at) if forked else None)

    def _unhinted(self) -> Ids:
        """The same without the hint, said once; empty where there is none."""
        bare, self._bare = self._bare, None
        return Ids() if bare is None else Ids(bare.ids[self._held[1] if self._held else 0 :])

    def _call(self, prompt: Prompt, sampling: Sampling) -> Call:
        context = list(self.conversation.ids)
        (begin, said), self._begin = self._begin, ("", 0.0)
        return Call(
            context=context,
            keep=min(self._keep, len(context) if prompt.parent is None else prompt.parent[1]),
            sampling=sampling,
            key=seeding.key(*self._noise, self._turn),
            room=min(sampling.max_tokens, self.engine.max_length - len(context)),
            begin=tuple(self.engine.renderer.encode(begin)) if begin else (),
            said=said,
        )

    def _action(self, prompt: Prompt, call: Call, reply: Reply) -> Action:
        """The reply with its exact record."""
        text, calls = self.engine.renderer.reply(reply.ids)
        unhinted = self._unhinted()
        span = TokenSpan(
            prompt=Ids(prompt.ids),
            ids=Ids(reply.ids),
            suffix=Ids(self.conversation.reply(reply.ids)),
            logprobs=Floats(reply.logprobs),
            sampled_logprobs=Floats() if call.sampling.plain and not call.begin else Floats(reply.processed),
            versions=tuple(reply.versions),
            segments=self.engine.renderer.segments_of(reply.ids),
            sampling=call.sampling,
            finish=reply.finish,
            branch=prompt.branch,
            parent=prompt.parent,
            context="hinted" if unhinted else "original",
            unhinted=unhinted,
            stale=reply.stale,
        )
        self._held = (self.conversation.branch, len(self.conversation.ids))
        return Action(text=text, tool_calls=calls, span=span)


def _log_share(guidance: Guidance) -> float:
    if not 0 < guidance.share <= 1:
        raise ConfigError(
            f"guidance.share is the probability of beginning with {guidance.begin!r}; got {guidance.share}"
        )
    return math.log(guidance.share)
