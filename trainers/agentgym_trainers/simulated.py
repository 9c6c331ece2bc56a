"""Simulated parts: training without a model, for benchmarks and tests of what lies around one.

    engine = SimulatedEngine(lognormal(0.02), tokens=30, slots=8)      # an engine's door: sessions, publish, load
    player = SimulatedPlayer(pareto(0.02), group=8)                    # a rollout side: whole units, no environment
    learner = SimulatedLearner(0.1, busy=True)                         # takes 0.1 s a step, in a thread of its own

Latencies are functions from a uniform number to seconds (`constant`, `lognormal` and `pareto` in
`agentgym.testing.fakes`). What they are given hangs on a key: one seed, the same latencies, whatever runs beside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import cache, lru_cache

import numpy as np

from agentgym.errors import Fault
from agentgym.policy import Load, Session
from agentgym.rewards import composer
from agentgym.seeding import share
from agentgym.testing.fakes import Latency, SimulatedPolicy, constant
from agentgym.types import (
    Action,
    Episode,
    Failure,
    Floats,
    Ids,
    Observation,
    Sampling,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
    WeightsVersion,
    say,
    terms,
)
from agentgym_trainers.rollouts import Played, Unit
from agentgym_trainers.strategies import Group, Sample

_COMPOSER = composer({"op": "weighted_sum", "of": {"correct": 1.0}})


class SimulatedEngine:
    """`SimulatedPolicy` as an engine serves it: `slots` replies at once, the others wait; weights are published.

    A reply's tokens are spread evenly over its latency, so that a `publish` in its middle changes the version in its
    middle. It serves one event loop.
    """

    deterministic = True

    def __init__(self, latency: Latency | float, tokens: int = 30, *, slots: int, seed: int = 0) -> None:
        self.policy = SimulatedPolicy(latency, tokens, seed=seed)
        self.slots, self.asked = slots, 0
        self.published = [(0.0, 0)]
        self._free = asyncio.Semaphore(slots)

    @property
    def version(self) -> int:
        """The weights of now."""
        return self.published[-1][1]

    @asynccontextmanager
    async def session(self, episode: Episode, agent: str) -> AsyncIterator[Session]:
        async with self.policy.session(episode, agent) as inner:
            yield _Served(self, inner)

    async def publish(self, version: WeightsVersion) -> None:
        """Every token from now on is sampled by this version."""
        self.published.append((time.monotonic(), version.number))

    def load(self) -> Load:
        """Replies that have a slot, and that wait for one."""
        running = min(self.asked, self.slots)
        return Load(running=running, waiting=self.asked - running, slots=self.slots, cache=running / self.slots)

    async def reply(self, inner: Session, observation: Observation, sampling: Sampling | None) -> Action:
        """Wait for a slot, then for the latency; the span says which versions were at work meanwhile."""
        self.asked += 1
        try:
            async with self._free:
                began, known = time.monotonic(), len(self.published)
                action = await inner.act(observation, sampling)
        finally:
            self.asked -= 1
        assert action.span is not None
        return action.replace(span=action.span.replace(versions=self._versions(began, known)))

    def _versions(self, began: float, known: int) -> tuple[VersionRun, ...]:
        """The version that was there when it began, and those that came since, each from the token it met."""
        per_second = self.policy.tokens / max(time.monotonic() - began, 1e-9)
        runs = {0: self.published[known - 1][1]}
        runs |= {int((at - began) * per_second): version for at, version in self.published[known:]}
        return tuple(VersionRun(start=at, version=version) for at, version in runs.items() if at < self.policy.tokens)


class _Served:
    """A session of the policy behind the engine's slots."""

    def __init__(self, engine: SimulatedEngine, inner: Session) -> None:
        self.engine, self.inner = engine, inner

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        return await self.engine.reply(self.inner, observation, sampling)


class SimulatedPlayer:
    """The rollout side without environment, runner and engine (`pipeline.Player`): a unit is whole groups of `group`
    episodes that begin at once, each lasting a latency of its own, so the unit lasts as long as its slowest episode.

    Its records are real: `turns` turns of `tokens` sampled ids under the unit's version. The episodes of units in
    `failed` are failures; the play of those in `raises` raises `Fault`. It serves any number of units at once.
    `seconds(number, tasks=1)` is how long a unit lasts: known before it is played, so a simulation can count with it.
    """

    def __init__(
        self,
        latency: Latency | float,
        *,
        group: int = 8,
        turns: int = 4,
        tokens: int = 30,
        seed: int = 0,
        failed: Collection[int] = (),
        raises: Collection[int] = (),
    ) -> None:
        self.latency = latency if callable(latency) else constant(latency)
        self.group, self.turns, self.tokens, self.seed = group, turns, tokens, seed
        self.failed, self.raises = failed, raises
        self.running = 0
        self.seconds, self._groups = cache(self._seconds), lru_cache(maxsize=64)(self._made)

    async def play(self, unit: Unit) -> Played:
        """What the unit came to, after its latency. Raises `Fault` where it was told to."""
        began = time.time()
        self.running += 1
        try:
            await asyncio.sleep(self.seconds(unit.number, len(unit.tasks)))
        finally:
            self.running -= 1
        if unit.number in self.raises:
            raise Fault(f"unit {unit.number} was told to raise")
        found = self._groups(unit.version, unit.number in self.failed)
        return Played(number=unit.number, groups=[found] * len(unit.tasks), began=began, ended=time.time())

    def _seconds(self, number: int, tasks: int = 1) -> float:
        return max(self.latency(share("unit", self.seed, number, member)) for member in range(self.group * tasks))

    def load(self) -> Load:
        """Nothing ever waits here: how many units are played at once is the pipeline's `most`."""
        return Load(running=self.running, slots=self.running + 1)

    def _made(self, version: int, failed: bool) -> Group:
        """A group under this version; units share it, as records never change."""
        fault = Failure(kind="engine", message="told to fail") if failed else None
        task = Task(env="simulated-v0", seed=self.seed)
        turns = Turns(items=tuple(self._turn(step, version) for step in range(self.turns)))
        made = [
            Trajectory(
                env=task.env,
                episode=Episode(task=task, member=member),
                turns=turns,
                status="failed" if failed else "terminated",
                failure=fault,
            )
            for member in range(self.group)
        ]
        return [Sample(t, None if failed else _COMPOSER.trajectory(t)) for t in made]

    def _turn(self, step: int, version: int) -> Turn:
        span = TokenSpan(
            prompt=Ids(range(2 * self.tokens)),
            ids=Ids(range(self.tokens)),
            logprobs=Floats([-1.0] * self.tokens),
            versions=(VersionRun(start=0, version=version),),
        )
        action = Action(text="y" * 110, span=span)
        return Turn(step=step, observation=say("x" * 220), action=action, rewards=terms({"correct": 1.0}))


class SimulatedLearner:
    """Takes `seconds` a step (a number, or a distribution keyed by the step), off the event loop as the real one does.

    Idle it only sleeps, as one that computes on another machine; `busy` it keeps a core at work for so long.
    """

    def __init__(self, seconds: Latency | float, *, busy: bool = False, seed: int = 0) -> None:
        self.latency = seconds if callable(seconds) else constant(seconds)
        self.busy, self.seed = busy, seed

    def seconds(self, step: int) -> float:
        """How long this step lasts."""
        return self.latency(share("step", self.seed, step))

    async def learn(self, step: int) -> None:
        """One step."""
        if self.busy:
            await asyncio.to_thread(_burn, self.seconds(step))
        else:
            await asyncio.sleep(self.seconds(step))


def _burn(seconds: float) -> None:
    """Matrix products for so long; they leave the interpreter to other threads, as a learner's do."""
    end, held = time.monotonic() + seconds, np.ones((256, 256), np.float32)
    while time.monotonic() < end:
        held = np.tanh(held @ held)
