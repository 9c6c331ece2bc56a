"""The door of environments: `Environment`, and `SingleAgentEnv` for the common case of one agent."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from agentgym.errors import ConfigError
from agentgym.types import AGENT, Action, Observation, StepResult, Task, only

if TYPE_CHECKING:
    from agentgym.policy import Policy

CAPABILITIES = ("replay", "fork", "ladder", "hidden_twin", "hints", "answer")


class Environment(ABC):
    """A world in which one or more agents act in turns.

    An instance is one episode at a time. Everything heavy and immutable (catalogue, index, page set) is loaded once
    and shared by all that `spawn` makes, so that a thousand concurrent episodes cost a thousand small states.

    A policy's mistake (malformed call, illegal action, nonsense) is an outcome: answer it, reward it, never raise.
    Raise `EnvironmentFault` or `ToolFault` only when the environment itself is broken; the runner retries those.
    Never block the event loop: a step that computes for more than a millisecond or waits belongs in a thread.
    """

    id: ClassVar[str] = ""
    version: ClassVar[str] = "0"
    capabilities: ClassVar[frozenset[str]] = frozenset()
    """Those of `CAPABILITIES` that hold: `check_env` tests them, and prints the others as not claimed."""
    reward: ClassVar[dict[str, Any]] = {"op": "sum"}
    """The default composer (see `agentgym.rewards`) that turns this environment's ledger into a return."""
    numeric: ClassVar[bool] = False
    """True: observations and actions are arrays, and episodes are stored as columns."""

    @abstractmethod
    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        """An endless (or finite) stream of tasks of this split; the same (split, seed) gives the same stream."""

    @abstractmethod
    async def reset(self, task: Task) -> dict[str, Observation]:
        """Begin this task; the agents in the answer act first. The start state depends on the task alone."""

    @abstractmethod
    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        """Advance by the actions of the agents that were asked to act."""

    async def close(self) -> None:  # noqa: B027 - most environments hold nothing
        """Release what the episode holds. Called once per instance, also after a fault or a cancellation."""

    def spawn(self) -> Self:
        """A fresh instance for one more concurrent episode, sharing everything immutable with this one."""
        return copy.copy(self)

    def fork(self) -> Self:
        """An independent copy of the running episode (capability "fork")."""
        raise ConfigError(f"{self.id} does not claim the capability 'fork'")

    def ladder(self) -> dict[str, Policy]:
        """Reference policies from worst to best, among them "random" and "oracle" (capability "ladder")."""
        return {}

    def hidden_twin(self, task: Task) -> Task:
        """A task that differs only in what the agent has not been told (capability "hidden_twin")."""
        raise ConfigError(f"{self.id} does not claim the capability 'hidden_twin'")

    def hint(self, task: Task, level: int) -> str:
        """A help for this task that never gives its answer away (capability "hints").

        Level 1 says least; a level beyond the strongest gives the strongest. It reads what the agent may not, so it is
        for training alone: `Guidance.hint`.
        """
        raise ConfigError(f"{self.id} does not claim the capability 'hints'")

    def answer(self, task: Task) -> str:
        """The text of the task's known answer, with all that the agent has to find out (capability "answer").

        It reads what the agent may not, so it is for training alone: InTRO's y.
        """
        raise ConfigError(f"{self.id} does not claim the capability 'answer'")


class SingleAgentEnv(Environment):
    """An environment with one agent: write `begin` and `act`, and forget the keys."""

    @abstractmethod
    async def begin(self, task: Task) -> Observation:
        """Begin this task: the agent's first observation."""

    @abstractmethod
    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        """Answer one action: the next observation (None at the end) and the rest of the result without it."""

    async def reset(self, task: Task) -> dict[str, Observation]:
        return {AGENT: await self.begin(task)}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        observation, result = await self.act(only(actions))
        if observation is None:
            return result
        found: StepResult = result.replace(observations={AGENT: observation})
        return found


def require(env: Environment, capability: str, purpose: str) -> None:
    """Refuse, with the reason, what an environment does not claim."""
    if capability not in env.capabilities:
        claims = ", ".join(sorted(env.capabilities)) or "none"
        raise ConfigError(f"{purpose} needs the capability {capability!r}; {env.id} claims {claims}")


def task_list(env: Environment, split: str, seed: int, count: int) -> list[Task]:
    """The first `count` tasks of a split (fewer when the split is finite and smaller)."""
    from itertools import islice

    return list(islice(env.tasks(split, seed), count))


Config = Mapping[str, Any]
