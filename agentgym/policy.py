"""The door of policies: who acts. A `Policy` opens one `Session` per agent and episode.

    async with policy.session(episode, agent) as session:
        action = await session.act(observation, sampling)

A session owns what the policy must remember of the episode: a cache slot, a history, a recurrent state. Leaving it,
also by cancellation, always releases that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import msgspec

from agentgym.errors import EngineFault
from agentgym.types import Action, Draft, Episode, Observation, Sampling, WeightsVersion


class Session(Protocol):
    """One agent in one episode."""

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        """The next action. `observation` holds only what is new since the last call of this session."""
        ...


class Drafts(Protocol):
    """What a session may have besides `act`: the policy calls of a turn that did not become its action."""

    def drafts(self) -> tuple[Draft, ...]:
        """Those since the last call of this method; the runner asks once after each step and records them."""
        ...


class Tells(Protocol):
    """What a session may have besides `act`: it hears of actions that were taken without it (`Guidance.start`).

    A session without this method is simply not told: its first `act` then gets the observation after them.
    """

    async def tell(self, observation: Observation, action: Action) -> None:
        """At `observation`, this action was taken. What follows is a turn later, in noise and memory alike."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Whoever acts: an engine, an endpoint, a script, a person."""

    def session(self, episode: Episode, agent: str) -> AbstractAsyncContextManager[Session]:
        """Lease what one agent needs for one episode."""
        ...


@runtime_checkable
class Publishes(Protocol):
    """A policy whose weights can be replaced while it runs."""

    async def publish(self, version: WeightsVersion) -> None:
        """From now on act with these weights; live caches of older ones are invalidated."""
        ...


HELD = 0.95
"""Share of an engine's cache from which on it counts as held."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy an engine is: replies being sampled and waiting for a slot, slots in all, and the share [0, 1] of its
    cache that live sessions hold."""

    running: int = 0
    waiting: int = 0
    slots: int = 1
    cache: float = 0.0

    @property
    def full(self) -> bool:
        """Whether further episodes would only wait: a whole round of replies does already, or some do and live sessions
        hold all of the cache, so that each newcomer would cost somebody theirs."""
        return self.waiting >= self.slots or (self.waiting > 0 and self.cache >= HELD)


@runtime_checkable
class Loaded(Protocol):
    """A policy that says how busy it is; rollouts admit no further work while it is full."""

    def load(self) -> Load:
        """Now. Cheap, and callable from any thread."""
        ...


class Scripted:
    """A policy from a function, for baselines and tests. The function makes a fresh act-function per session.

        Scripted(lambda episode, agent: lambda observation: Action(text="hello"))

    The act-function may be async. It may read `episode.task.payload`: that is what an oracle does. Of an action taken
    without it, it is asked all the same and its answer dropped: what it counts stays in step, and a script that is
    told what it would have said itself goes on as if it had.
    """

    def __init__(self, script: Callable[[Episode, str], Callable[[Observation], Action | Awaitable[Action]]]) -> None:
        self.script = script

    def session(self, episode: Episode, agent: str) -> ScriptedSession:
        return ScriptedSession(self.script(episode, agent))


def left() -> EngineFault:
    """What a session raises when it is asked to act after it was left."""
    return EngineFault("this session was left and acts no more; open another one with policy.session(...)")


def _left(observation: Observation) -> Action:
    raise left()


class ScriptedSession:
    """The session of a `Scripted` policy. Left, it forgets its act-function and refuses to act."""

    __slots__ = ("decide",)

    def __init__(self, decide: Callable[[Observation], Action | Awaitable[Action]]) -> None:
        self.decide = decide

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decide = _left

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        found = self.decide(observation)
        return found if isinstance(found, Action) else await found

    async def tell(self, observation: Observation, action: Action) -> None:
        await self.act(observation)
