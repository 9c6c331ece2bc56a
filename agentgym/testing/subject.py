"""The environment under test, and what several checks share about it: its tasks, its policies, one set of traces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from agentgym.env import CAPABILITIES, Environment, task_list
from agentgym.errors import AgentGymError, unknown
from agentgym.policy import Policy, Session
from agentgym.testing.actions import RandomActions
from agentgym.testing.drive import Trace, drive
from agentgym.testing.report import NotClaimed, Skipped
from agentgym.types import Episode, Task


class Mixed:
    """Random actions and the rungs of the environment's ladder in turn: so that episodes get deep and differ.

    Which one plays a task depends on the task's place in the list.
    """

    def __init__(self, env: Environment, tasks: Sequence[Task], seed: int) -> None:
        self.rungs: list[Policy] = [RandomActions(env, seed), *rungs(env).values()]
        self.place = {task.id: i for i, task in enumerate(tasks)}

    def of(self, task: Task) -> Policy:
        return self.rungs[self.place.get(task.id, 0) % len(self.rungs)]

    def session(self, episode: Episode, agent: str) -> AbstractAsyncContextManager[Session]:
        return self.of(episode.task).session(episode, agent)


def rungs(env: Environment) -> dict[str, Policy]:
    """The ladder, empty where it is not claimed."""
    return env.ladder() if "ladder" in env.capabilities else {}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is tried and how long it may take; see `check_env`."""

    episodes: int = 8
    seed: int = 0
    processes: bool = True
    seconds: float = 30.0
    patience: float = 5.0
    steps: int = 64


class Subject:
    """An environment under test with the settings of the run. `env` is the prototype: only its spawns are played."""

    def __init__(self, env: Environment, settings: Settings) -> None:
        self.env = env
        self.episodes, self.seed, self.processes = settings.episodes, settings.seed, settings.processes
        self.seconds, self.patience, self.steps = settings.seconds, settings.patience, settings.steps
        self.traces: list[Trace] = []

    @property
    def name(self) -> str:
        return self.env.id or type(self.env).__name__

    def tasks(self, count: int | None = None, split: str = "train", seed: int | None = None) -> list[Task]:
        """The first `count` tasks (as many as the episodes) of a split."""
        return task_list(self.env, split, self.seed if seed is None else seed, count or self.episodes)

    def policy(self) -> Mixed:
        return Mixed(self.env, self.tasks(), self.seed)

    async def play(self, task: Task, policy: Policy) -> Trace:
        return await drive(self.env, task, policy, seed=self.seed, steps=self.steps, patience=self.patience)

    async def baseline(self) -> list[Trace]:
        """One trace of each task under `Mixed`, driven one after the other; made once."""
        if not self.traces:
            policy = self.policy()
            self.traces = [await self.play(task, policy) for task in self.tasks()]
        return self.traces

    def require(self, capability: str) -> None:
        """`NotClaimed` unless the environment declares it."""
        unheard = set(self.env.capabilities) - set(CAPABILITIES)
        if unheard:
            raise unknown("capability", sorted(unheard)[0], CAPABILITIES)
        if capability not in self.env.capabilities:
            raise NotClaimed(f"{self.name} does not claim {capability!r}")


class Budget:
    """Seconds a check may spend on repetition; false when they are over."""

    def __init__(self, seconds: float) -> None:
        self.until = time.perf_counter() + seconds

    def __bool__(self) -> bool:
        return time.perf_counter() < self.until


def splits(env: Environment) -> list[str]:
    """The splits that can be asked for: those the environment names, else the usual names it does not refuse."""
    named = getattr(env, "splits", None) or ("train", "validation", "test")
    found = []
    for split in named:
        try:
            next(iter(env.tasks(split, 0)), None)
        except (AgentGymError, KeyError, ValueError):
            continue
        found.append(str(split))
    if not found:
        raise Skipped(f"none of the splits {', '.join(named)} exists")
    return found
