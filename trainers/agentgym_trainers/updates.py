"""Reinforcement, update by update: take what was played, learn, publish, while play goes on as far as it may.

    updates = Updates(state, env, rollouts, phase, judge)
    figures = await updates.one(step)
    await updates.close()

The learner works in a thread of its own, so that the event loop, and every episode on it, never waits for a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from agentgym.env import Environment
from agentgym.errors import ModelError
from agentgym.modeling.threads import pin
from agentgym.types import WeightsVersion
from agentgym_trainers import figures
from agentgym_trainers.figures import Figures
from agentgym_trainers.journal import Standing
from agentgym_trainers.pipeline import Pipeline
from agentgym_trainers.reinforce import Learned, Reinforcement
from agentgym_trainers.remote import Remote
from agentgym_trainers.rollouts import Played, Rollouts, TaskCursor, fruitless
from agentgym_trainers.schedule import Schedule
from agentgym_trainers.state import State, position

T = TypeVar("T")
Judge = Callable[[str], Awaitable[Any]]
"""Evaluates the policy of now, under a name."""


class Clock:
    """What the learner's side did when: laps of [what, start, stop] in seconds since the epoch."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, float, float]] = []
        self._last = time.time()

    def lap(self, what: str) -> None:
        self.laps.append((what, self._last, now := time.time()))
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """By what was done."""
        return {what: stop - start for what, start, stop in self.laps}


class Updates:
    """The updates of a run from where `state` stands. `judge` evaluates where the config wants it in between."""

    def __init__(
        self, state: State, env: Environment, rollouts: Rollouts | Remote, phase: Reinforcement, judge: Judge
    ) -> None:
        self.state, self.config, self.rollouts, self.phase, self.judge = state, state.config, rollouts, phase, judge
        self.line = _pipeline(state, env, rollouts)
        run = self.config.run
        self.timeline: dict[str, Any] = {}
        self.clock = Clock()
        self.began = time.time()
        self.fruitless = 0
        """Updates in a row in which every episode failed."""
        threads = run.threads or torch.get_num_threads()  # a new thread would begin with those of the engine's
        self._thread = ThreadPoolExecutor(1, "agentgym-learner", initializer=pin, initargs=(threads, run.cores))

    async def one(self, step: int) -> Figures:
        """Update `step` (from 0); `timeline` then says who did what when, since the update before."""
        clock, version = self.clock, self.line.schedule.version
        self.rollouts.reprice(self.phase.multipliers.state())
        played = await self.line.take()
        self._require_outcomes(played)
        clock.lap("waiting")
        with fitting(version + 1):
            learned = await self.off_loop(self.phase.learn, played, version)
        clock.lap("learning")
        await self.rollouts.publish(WeightsVersion(number=version + 1))
        clock.lap("publishing")
        every = self.config.eval.every
        if every and (step + 1) % every == 0:
            await self.judge(f"step {step + 1}")
            clock.lap("evaluating")
        self.rollouts.reprice(self.phase.multipliers.state())
        self.line.advance()
        self._store(played, learned, version + 1)
        self.timeline, self.clock = _timeline(played, version, clock), Clock()
        return self._figures(played, learned, clock)

    async def off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """In the learner's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def close(self) -> None:
        """End play and learning: units under way are cancelled, a step of the learner is waited for."""
        try:
            await self.line.close()
        finally:
            self._thread.shutdown()

    def _require_outcomes(self, played: Sequence[Played]) -> None:
        """Where play overlaps, failures end early and make an update of their own: only one after the other, over the
        whole window of what was begun together, are they the end. What an earlier life of the run met is not: it may
        be repaired, and a resumed run has to pass it."""
        fault = fruitless(played) if any(unit.ended > self.began for unit in played) else None
        self.fruitless = self.fruitless + 1 if fault else 0
        if fault and self.fruitless > self.config.rollout.max_staleness:
            raise fault

    def _store(self, played: Sequence[Played], learned: Learned, number: int) -> None:
        for sample in (*learned.samples, *(s for unit in played for s in unit.aside)):
            self.state.folder.append(sample.trajectory, step=number, value=sample.value)

    def _figures(self, played: Sequence[Played], learned: Learned, clock: Clock) -> Figures:
        everything = [sample for unit in played for sample in unit.everything]
        return {
            **figures.outcomes(learned.samples),
            **learned.figures,
            **figures.staleness(learned.samples, self.line.schedule.version - 1),
            **figures.speed(everything, clock.seconds),
            **figures.busy(self.rollouts.load()),
            "units_running": float(self.line.running),
            "units_ready": float(len(self.line.played)),
            **figures.became(self.phase.buffer.counts),
        }


@contextmanager
def fitting(number: int) -> Iterator[None]:
    """Turns an allocation that failed in a learner's step into one `ModelError` with the way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        raise ModelError(
            f"no memory for update {number}: {str(error).splitlines()[0]:.200}. The run stands at its last checkpoint "
            "and journal; lower optim.micro_tokens in its config.toml (never the result, only memory), and resume it"
        ) from error


def _timeline(played: Sequence[Played], version: int, clock: Clock) -> dict[str, Any]:
    units = [(unit.number, unit.oldest(version), unit.began, unit.ended) for unit in played]
    return {"learner": clock.laps, "units": units}


def _pipeline(state: State, env: Environment, rollouts: Rollouts | Remote) -> Pipeline:
    """Rollouts in the order of the schedule, and what is left of an earlier life of the run."""
    config, r = state.config, state.config.rollout
    whole = (r.unit or ("group" if r.max_staleness else "update")) == "update"
    deals = r.tasks_per_step if whole else 1
    schedule = Schedule(
        batch=1 if whole else r.tasks_per_step,
        max_staleness=r.max_staleness,
        updates=position(config, "rl", config.run.steps),
        version=position(config, "rl", state.steps_done("rl")),
    )
    stood = state.stage.play if state.stage else Standing()
    schedule.next = stood.begun
    cursor, most = TaskCursor(env, config.run.seed, stood.drawn), max(1, r.concurrency // (r.group_size * deals))
    line = Pipeline(rollouts, cursor, schedule, state.journal, deals=deals, most=most)
    line.memory = line.memory or stood.memory
    rollouts.restore(line.memory)
    return line
