"""Rollouts: thousands of concurrent episodes on one event loop, without lockstep.

    runner = Runner(env, policy, concurrency=1024, limits=Limits(turn_seconds=60, max_turns=12))
    async for trajectory in runner.run(episodes(tasks, group_size=8)):
        ...

A slot is one asyncio task that plays one episode after the other; it waits for its own policy and environment only.
One watchdog scans the slots for passed deadlines, so that a turn pays two attribute writes for them. A fault is
retried with the same task and seed and, where it persists, becomes a failed trajectory, never a reward.

An episode's `guidance` begins it with actions already taken, and may replace the sampling: see `types.Guidance`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from math import inf, isfinite
from time import perf_counter
from typing import Any, get_args

import msgspec

from agentgym import __version__
from agentgym.env import Environment
from agentgym.errors import ConfigError, DeadlineExceeded, EngineFault, EnvironmentFault, Fault, unknown
from agentgym.policy import Policy, Session
from agentgym.record import Recorder
from agentgym.seeding import key
from agentgym.types import (
    Action,
    Draft,
    Episode,
    Failure,
    FailureKind,
    Guidance,
    Observation,
    Sampling,
    Status,
    StepResult,
    Task,
    Trajectory,
)

log = logging.getLogger("agentgym")

STAGGER = 32
"""Slots started between two passes of the event loop: 16,000 resets at once would stall it for a second."""
BREATH = 0.005
"""Seconds that slots which never wait may keep the event loop, all together."""
BACKOFF = 0.05
"""Seconds before the first retry; doubled for each further one."""
GRACE = 10.0
"""Seconds for releasing sessions and closing an environment."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines in seconds and the turn budget; `math.inf` or None switch one off.

    `turn_seconds` bounds a reset, and an act with the step that follows; `episode_seconds` one attempt at an episode.
    Both end in a failure of kind "timeout" and are enforced to about a twentieth of the shorter one (10 to 250 ms).
    Seconds in which the event loop itself was held (a learner's step between two trajectories) do not count.
    `max_turns` counts steps of the environment (agents that act at once take one); the episode is then truncated.
    """

    turn_seconds: float = 300.0
    episode_seconds: float = 3600.0
    max_turns: int | None = None

    def __post_init__(self) -> None:
        if not (self.turn_seconds > 0 and self.episode_seconds > 0):
            raise ConfigError(f"deadlines are positive seconds (math.inf for none); got {self}")
        if self.max_turns is not None and self.max_turns < 1:
            raise ConfigError(f"max_turns is at least 1 (None for no budget); got {self.max_turns}")

    @property
    def scan(self) -> float:
        """Seconds between two looks of the watchdog."""
        return min(max(min(self.turn_seconds, self.episode_seconds) / 20, 0.01), 0.25)


def episodes(tasks: Iterable[Task], group_size: int = 1, seed: int = 0) -> Iterator[Episode]:
    """`group_size` episodes of each task, adjacent; members of a group share task and seed. Lazy."""
    if group_size < 1:
        raise ConfigError(f"group_size is at least 1; got {group_size}")
    for number, task in enumerate(tasks):
        drawn = key("episode", seed, number) >> 11
        for member in range(group_size):
            yield Episode(task=task, seed=drawn, member=member, group=f"{seed}.{number}")


class Runner:
    """Plays episodes of one environment with one policy, or with one policy for each agent.

    `counts` grows over all runs: "terminated", "truncated", "failed", "failed.<kind>", "retries", "retries.<kind>" and
    "unclean" (an environment or session that failed to close; logged, the record stands). `env` is never played
    itself, only what it spawns. A run belongs to the event loop it was started on.
    """

    def __init__(
        self,
        env: Environment,
        policy: Policy | Mapping[str, Policy],
        *,
        concurrency: int = 256,
        limits: Limits | None = None,
        retries: int = 2,
        sampling: Sampling | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0:
            raise ConfigError(f"concurrency is at least 1 and retries at least 0; got {concurrency} and {retries}")
        self.env = env
        self.policy = policy
        self.concurrency = concurrency
        self.limits = limits or Limits()
        self.retries = retries
        self.sampling = sampling
        self.counts: Counter[str] = Counter()

    async def run(self, episodes: Iterable[Episode]) -> AsyncGenerator[Trajectory, None]:
        """Trajectories in the order they end. Closing the iterator cancels what is under way and cleans up.

        Leave it early through `contextlib.aclosing`: a bare `break` cleans up only when the garbage collector comes.
        """
        async with aclosing(_Run(self, episodes).stream()) as stream:
            async for _, trajectory in stream:
                yield trajectory

    async def collect(self, episodes: Iterable[Episode]) -> list[Trajectory]:
        """Every trajectory, in the order of the episodes."""
        async with aclosing(_Run(self, episodes).stream()) as stream:
            found = [item async for item in stream]
        return [trajectory for _, trajectory in sorted(found, key=lambda item: item[0])]

    async def groups(self, episodes: Iterable[Episode]) -> AsyncGenerator[list[Trajectory], None]:
        """Whole groups in the order they are complete, failed members included. Members must be adjacent."""
        book = _Groups()
        async with aclosing(_Run(self, book.watch(episodes)).stream()) as stream:
            async for index, trajectory in stream:
                for group in book.add(index, trajectory):
                    yield group
        for group in book.complete():
            yield group

    def run_sync(self, episodes: Iterable[Episode]) -> list[Trajectory]:
        """`collect` for a script without an event loop; in a notebook write `await runner.collect(...)`."""
        return asyncio.run(self.collect(episodes))

    def policy_of(self, agent: str) -> Policy:
        """Who plays this agent; an `UnknownName` where nobody was given for it."""
        if not isinstance(self.policy, Mapping):
            return self.policy
        if agent not in self.policy:
            raise unknown("policy for agent", agent, self.policy)
        return self.policy[agent]

    def count(self, trajectory: Trajectory) -> None:
        self.counts[trajectory.status] += 1
        if trajectory.failure is not None:
            self.counts[f"failed.{trajectory.failure.kind}"] += 1


class _Collector:
    """Makes the garbage collector's passes rarer while runs are under way, in proportion to their slots.

    A full pass visits every object of every slot: with 16,000 of them it holds the loop for a tenth of a second and,
    at Python's threshold of 700 new objects, comes twenty times while they start. Nothing of an episode needs it.
    The thresholds found by the first run are put back after the last.
    """

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.found = (0, 0, 0)

    @contextmanager
    def eased(self, slots: int) -> Iterator[None]:
        if not self.slots:
            self.found = gc.get_threshold()
        self.slots.append(slots)
        self._set()
        try:
            yield
        finally:
            self.slots.remove(slots)
            self._set()

    def _set(self) -> None:
        young, *older = self.found
        gc.set_threshold(young and max([young, *(32 * n for n in self.slots)]), *older)


_collector = _Collector()


class _Groups:
    """Which groups are complete: all pulled members arrived, and the source has moved on to another group."""

    def __init__(self) -> None:
        self.pulled: Counter[str] = Counter()
        self.arrived: dict[str, list[tuple[int, Trajectory]]] = {}
        self.open: str | None = None

    def watch(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        for number, episode in enumerate(episodes):
            self.open = episode.group or f"#{number}"
            self.pulled[self.open] += 1
            yield episode
        self.open = None

    def add(self, index: int, trajectory: Trajectory) -> Iterator[list[Trajectory]]:
        group = trajectory.episode.group or f"#{index}"
        self.arrived.setdefault(group, []).append((index, trajectory))
        return self.complete()

    def complete(self) -> Iterator[list[Trajectory]]:
        whole = [g for g, found in self.arrived.items() if g != self.open and len(found) == self.pulled[g]]
        for group in whole:
            yield [t for _, t in sorted(self.arrived.pop(group), key=lambda item: item[0])]


class _Slot:
    """What the watchdog must know of one asyncio task: until when, and how often it was cancelled for that."""

    __slots__ = ("cancels", "deadline", "episode_deadline", "phase", "since", "step", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.deadline = inf
        self.episode_deadline = inf
        self.phase = "idle"
        self.step = 0
        self.cancels = 0
        self.since = 0.0

    def begin(self, now: float, limits: Limits) -> None:
        self.phase, self.step = "reset", 0
        self.episode_deadline = now + limits.episode_seconds
        self.deadline = min(now + limits.turn_seconds, self.episode_deadline)

    def expire(self) -> None:
        self.cancels += 1
        self.task.cancel()

    def expired(self) -> bool:
        """Whether every cancellation so far was the watchdog's; takes them back. False: somebody else wants an end."""
        cancels, self.cancels = self.cancels, 0
        if not cancels or self.task.cancelling() > cancels:
            return False
        for _ in range(cancels):
            self.task.uncancel()
        return True


class _Seat:
    """One agent's open session, its methods bound once. `drafts` is optional: see `agentgym.policy.Drafts`."""

    __slots__ = ("act", "drafts")

    def __init__(self, session: Session, guide: _Guide | None) -> None:
        self.act = session.act if guide is None else guide.leading(session)
        self.drafts: Callable[[], tuple[Draft, ...]] | None = getattr(session, "drafts", None)


class _Guide:
    """What an episode's guidance makes of its sessions. Without guidance there is none, and nothing is paid for it.

    The actions already taken are played in the order of the turns, whoever's turn it is, and recorded without what a
    policy knew of them (span, log-prob, value): nothing of them is trained on. See `agentgym.policy.Tells`.
    """

    __slots__ = ("sampling", "taken")

    def __init__(self, guidance: Guidance) -> None:
        self.taken, self.sampling = deque(guidance.start), guidance.sampling

    def leading(self, session: Session) -> Callable[..., Awaitable[Action]]:
        """The session's `act` behind the actions already taken."""
        tell = getattr(session, "tell", None)

        async def act(observation: Observation, sampling: Sampling | None = None) -> Action:
            if not self.taken:
                return await session.act(observation, self.sampling or sampling)
            action = _checked("guidance.start", self.taken.popleft())
            if tell is not None:
                await tell(observation, action)
            return Action(text=action.text, tool_calls=action.tool_calls, array=action.array)

        return act


class _Run:
    """One pass over a source of episodes: slots, the watchdog, and the queue between them and the caller."""

    def __init__(self, runner: Runner, source: Iterable[Episode]) -> None:
        self.runner = runner
        self.source = self._numbered(source)
        self.dry = False
        self.slots: set[_Slot] = set()
        self.live: set[asyncio.Task[None]] = set()
        self.done: deque[tuple[int, Trajectory]] = deque()
        self.backlog = 2 * runner.concurrency
        self.wake = asyncio.Event()
        self.room = asyncio.Event()
        self.error: BaseException | None = None
        self.running: _Slot | None = None

    def _numbered(self, source: Iterable[Episode]) -> Iterator[tuple[int, Episode]]:
        yield from enumerate(source)
        self.dry = True

    # --- the caller's side ---

    async def stream(self) -> AsyncGenerator[tuple[int, Trajectory], None]:
        """(number of the episode, trajectory) in the order they end; always leaves with every slot cleaned up."""
        watchdog = asyncio.create_task(self._watch())
        with _collector.eased(self.runner.concurrency):
            try:
                self._start(self._launch())
                while self.live or self.done:
                    while self.done:
                        yield self.done.popleft()
                    self.room.set()
                    if self.live:
                        await self.wake.wait()
                        self.wake.clear()
                    if self.error is not None:
                        raise self.error
            finally:
                await self._stop()
                watchdog.cancel()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.live.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.live.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.error = self.error or task.exception()
        self.wake.set()

    async def _stop(self) -> None:
        """Cancel the slots and wait until each has released what it held; the watchdog bounds that by `GRACE`."""
        left = list(self.live)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # --- the slots' side ---

    async def _launch(self) -> None:
        for number in range(1, self.runner.concurrency + 1):
            if self.dry:
                return
            self._start(self._work())
            if number % STAGGER == 0:
                await asyncio.sleep(0)

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        slot = _Slot(task)
        self.slots.add(slot)
        try:
            for number, episode in self.source:
                trajectory = await self._complete(slot, episode)
                self.runner.count(trajectory)
                self.done.append((number, trajectory))
                self.wake.set()
                while len(self.done) >= self.backlog:
                    self.room.clear()
                    await self.room.wait()
        finally:
            self.slots.discard(slot)

    async def _watch(self) -> None:
        """Cancel what is past its deadline. Time in which somebody held the whole loop counts for nobody."""
        interval = self.runner.limits.scan
        while True:
            began = perf_counter()
            await asyncio.sleep(interval)
            now = perf_counter()
            held = now - began - interval
            for slot in self.slots if held > interval else ():
                slot.deadline += held
                slot.episode_deadline += held
            for slot in [s for s in self.slots if s.deadline < now]:
                slot.expire()

    async def breathe(self, slot: _Slot, now: float) -> None:
        """Let the loop turn when this slot has run without a wait for its share of `BREATH`."""
        if self.running is not slot:
            self.running, slot.since = slot, now
        elif now - slot.since > BREATH / len(self.slots):
            await asyncio.sleep(0)
            slot.since = perf_counter()

    # --- one episode ---

    async def _complete(self, slot: _Slot, episode: Episode) -> Trajectory:
        """Play it, again after a fault, with the same task and seed, until it is an outcome or no retry is left."""
        counts, retries = self.runner.counts, self.runner.retries
        for attempt in range(1, retries + 2):
            play = _Play(self, slot, episode)
            failure = await play.attempt()
            if failure is None or attempt > retries:
                break
            counts["retries"] += 1
            counts[f"retries.{failure.kind}"] += 1
            await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
        return play.trajectory(failure.replace(attempts=attempt) if failure else None)


class _Play:
    """One attempt at one episode: its instance of the environment, its sessions and its record."""

    __slots__ = ("begun", "env", "episode", "final", "guide", "metrics", "recorder", "run", "seats", "slot", "status")

    def __init__(self, run: _Run, slot: _Slot, episode: Episode) -> None:
        self.run = run
        self.slot = slot
        self.episode = episode
        self.recorder = Recorder()
        self.seats: dict[str, _Seat] = {}
        self.guide = None if episode.guidance is None else _Guide(episode.guidance)
        self.metrics: dict[str, float] = {}
        self.final: dict[str, Observation] = {}
        self.status: Status = "terminated"
        self.begun = perf_counter()
        self.env = run.runner.env

    def trajectory(self, failure: Failure | None) -> Trajectory:
        env = self.env
        return Trajectory(
            env=env.id,
            env_version=env.version,
            episode=self.episode,
            turns=self.recorder.columns() if env.numeric else self.recorder.turns(),
            status="failed" if failure else self.status,
            failure=failure,
            final=self.final,
            metrics=self.metrics,
            labels=self.episode.task.labels | self.episode.labels,
            seconds=perf_counter() - self.begun,
            code_version=__version__,
        )

    async def attempt(self) -> Failure | None:
        """Play to the end; None, or the fault that stopped it. Sessions and environment are closed either way."""
        slot, runner = self.slot, self.run.runner
        slot.begin(self.begun, runner.limits)
        stack = AsyncExitStack()
        try:
            self.env = runner.env.spawn()
            stack.push_async_callback(self.env.close)
            await self._play(stack)
        except Fault as fault:
            return self._failure(fault.kind, fault)
        except asyncio.CancelledError as error:
            return self._cancelled(error)
        except Exception as error:
            if slot.phase == "setup":
                raise
            return self._failure("engine" if slot.phase == "act" else "environment", error)
        finally:
            await self._release(stack)
        return None

    def _failure(self, kind: str, error: BaseException) -> Failure:
        log.debug("%s failed in %s", self.episode.id, self.slot.phase, exc_info=error)
        message = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        fields = {
            "kind": kind if kind in get_args(FailureKind) else "environment",
            "message": f"{self.slot.phase}: {message}"[:2000],
            "step": self.slot.step,
        }
        return msgspec.convert(fields, Failure)

    def _cancelled(self, error: asyncio.CancelledError) -> Failure:
        """A deadline, or a cancellation from inside the environment or policy, is a failure; ours goes on upwards."""
        slot, limits = self.slot, self.run.runner.limits
        whole = slot.deadline == slot.episode_deadline
        if slot.expired():
            what = f"the episode's {limits.episode_seconds:g} s" if whole else f"the turn's {limits.turn_seconds:g} s"
            return self._failure("timeout", DeadlineExceeded(f"{what} were over"))
        if slot.task.cancelling():
            raise error
        return self._failure("cancelled", error)

    async def _release(self, stack: AsyncExitStack) -> None:
        """Close the sessions, then the environment. A cancellation that comes meanwhile is passed on afterwards."""
        slot = self.slot
        slot.deadline = perf_counter() + GRACE
        try:
            await stack.aclose()
        except (Exception, asyncio.CancelledError) as error:
            self.run.runner.counts["unclean"] += 1
            log.warning("%s was not closed cleanly: %r", self.episode.id, error)
        slot.deadline = inf
        if not slot.expired() and slot.task.cancelling():
            raise asyncio.CancelledError

    async def _play(self, stack: AsyncExitStack) -> None:
        """The walk: observe, act, step, record. All that a turn costs above its policy and environment is here."""
        slot, env, recorder, seats, begun = self.slot, self.env, self.recorder, self.seats, self.begun
        sampling, limits = self.run.runner.sampling, self.run.runner.limits
        turn_seconds = limits.turn_seconds
        observations = await env.reset(self.episode.task)
        if not observations:
            raise EnvironmentFault("reset gave nobody an observation: nobody can act")
        _require_seen(observations)
        while True:
            now = perf_counter()
            slot.deadline = min(now + turn_seconds, slot.episode_deadline)
            slot.phase = "act"
            if len(observations) == 1:
                ((agent, observation),) = observations.items()
                seat = seats.get(agent) or await self._seat(agent, stack)
                actions = {agent: _checked(agent, await seat.act(observation, sampling))}
            else:
                agent, actions = "", await self._act_together(observations, stack)
            acted = perf_counter()
            slot.phase = "step"
            result = await env.step(actions)
            stepped = perf_counter()
            clock = (now - begun, acted - now, stepped - acted)
            for name, action in actions.items():
                drafts = seats[name].drafts
                recorder.add(slot.step, name, observations[name], action, clock, drafts() if drafts else ())
            recorder.pay(result.rewards, agent)
            slot.step += 1
            if self._over(result, limits.max_turns):
                return
            observations = result.observations
            await self.run.breathe(slot, stepped)

    def _over(self, result: StepResult, budget: int | None) -> bool:
        """Whether the episode ended with this step; terminated goes before truncated."""
        if result.metrics:
            self.metrics.update(_finite(result.metrics))
        _require_seen(result.observations)
        if not (result.terminated or result.truncated):
            if not result.observations:
                raise EnvironmentFault("the step ended nothing and gave nobody an observation: nobody can act next")
            if budget is None or self.slot.step < budget:
                return False
        self.status = "terminated" if result.terminated else "truncated"
        self.final = result.observations
        return True

    async def _seat(self, agent: str, stack: AsyncExitStack) -> _Seat:
        """Open the agent's session, in the slot's own task, so that it is closed where it was opened."""
        self.slot.phase = "setup"
        policy = self.run.runner.policy_of(agent)
        self.slot.phase = "act"
        session = await stack.enter_async_context(policy.session(self.episode, agent))
        seat = self.seats[agent] = _Seat(session, self.guide)
        return seat

    async def _act_together(self, observations: Mapping[str, Observation], stack: AsyncExitStack) -> dict[str, Action]:
        """Every agent acts at once; when one fails the others are cancelled."""
        for agent in observations:
            if agent not in self.seats:
                await self._seat(agent, stack)
        sampling = self.run.runner.sampling
        asked = [asyncio.ensure_future(self.seats[a].act(o, sampling)) for a, o in observations.items()]
        try:
            found = await asyncio.gather(*asked)
        except BaseException:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            raise
        return {agent: _checked(agent, action) for agent, action in zip(observations, found, strict=True)}


def _require_seen(observations: Mapping[str, object]) -> None:
    for agent, seen in observations.items():
        if not isinstance(seen, Observation):
            raise EnvironmentFault(f"{agent!r} was given {type(seen).__name__}, not an Observation")


def _finite(metrics: Mapping[str, float]) -> Mapping[str, float]:
    for name, value in metrics.items():
        if not isfinite(value):
            raise EnvironmentFault(f"metric {name!r} is {value}: a metric is a finite number")
    return metrics


def _checked(agent: str, action: object) -> Action:
    if not isinstance(action, Action):
        raise EngineFault(f"the policy of {agent!r} answered {type(action).__name__}, not an Action")
    return action
