"""What every strategy has: the samples of an update, the table they are played at, and a memory of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from agentgym.env import Environment
from agentgym.policy import Policy
from agentgym.rewards import Composed
from agentgym.types import Episode, Guidance, Sampling, Task, Trajectory
from agentgym_trainers.strategies import declare


class Sample(NamedTuple):
    """A trajectory and its composed reward; None for a failed one. `train` False: it counts in the statistics of its
    group and nothing of it is learnt."""

    trajectory: Trajectory
    reward: Composed | None
    train: bool = True

    @property
    def value(self) -> float | None:
        return None if self.reward is None else self.reward.value

    @property
    def success(self) -> float | None:
        """The environment's own figure, else whether the reward is positive; None for a failure, which is neither."""
        return None if self.value is None else self.trajectory.metrics.get("success", float(self.value > 0))


Group = list[Sample]
Play = Callable[[Sequence[Episode], Policy | None], Awaitable[list[Sample]]]


def rate(group: Sequence[Sample]) -> float | None:
    """Mean success of the members that did not fail; None where all did."""
    held = [s.success for s in group if s.success is not None]
    return sum(held) / len(held) if held else None


def with_metric(group: Sequence[Sample], name: str, value: float) -> Group:
    """The group with one more figure in each trajectory: a given baseline."""
    told = [s.trajectory.replace(metrics={**s.trajectory.metrics, name: value}) for s in group]
    return [s._replace(trajectory=t) for s, t in zip(group, told, strict=True)]


class Deal:
    """One task of an update. No member is dealt twice, so that nothing is sampled twice with the same noise."""

    def __init__(self, first: Episode) -> None:
        self.first, self.members = first, 0

    @property
    def task(self) -> Task:
        return self.first.task

    def episodes(self, count: int, guidance: Guidance | None = None, **labels: str) -> list[Episode]:
        """`count` new members of the task's group under this guidance; `labels` tell the condition."""
        start, self.members = self.members, self.members + count
        return [self.first.replace(member=m, guidance=guidance, labels=labels) for m in range(start, start + count)]


class Table:
    """What one update is played with.

    firsts     an endless stream of first members: a task, and the key of its group, each
    play       plays episodes, all at once, with the learning policy or another; in the order given
    deals      groups that the update should have
    reference  the policy before reinforcement, where the run keeps one
    """

    def __init__(self, firsts: Iterator[Episode], play: Play, *, deals: int, reference: Policy | None = None) -> None:
        self.firsts, self._play, self.deals, self.reference = firsts, play, deals, reference
        self.played: list[Sample] = []

    def deal(self, count: int | None = None) -> list[Deal]:
        """The next tasks in the run's order; as many as the update has groups."""
        return [Deal(first) for first in islice(self.firsts, self.deals if count is None else count)]

    async def play(self, hands: Sequence[Sequence[Episode]], policy: Policy | None = None) -> list[Group]:
        """The samples of every hand, all played at once."""
        flat = [episode for hand in hands for episode in hand]
        found = await self._play(flat, policy) if flat else []
        self.played += found
        rest = iter(found)
        return [list(islice(rest, len(hand))) for hand in hands]


D = TypeVar("D", bound=declare.Strategy)


class Strategy(ABC, Generic[D]):
    """A declared strategy at work. `memory` is what it knows of tasks (by id) from one update to the next."""

    def __init__(self, declared: D, env: Environment, size: int, sampling: Sampling) -> None:
        self.declared, self.env, self.size, self.sampling = declared, env, size, sampling
        self.memory: dict[str, Any] = {}
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for a declaration that cannot be meant, or not in this environment."""

    @abstractmethod
    async def play(self, table: Table) -> list[Group]:
        """The groups of one update, failed members included."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain data."""
        return {"memory": dict(self.memory)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.memory = dict(state.get("memory", {}))
