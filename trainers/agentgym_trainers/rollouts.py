"""The rollout side of training, and the buffer between it and the learner.

rollouts = Rollouts(config, env, engine)
groups = await rollouts.play(step)            # whole groups, in the order of the tasks
batch = buffer.take(groups, version)          # what may be learnt from; the rest is counted by reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from agentgym.env import Environment
from agentgym.errors import ConfigError, Fault
from agentgym.policy import Policy
from agentgym.rewards import Composed, Composer, composer
from agentgym.rollout import Runner, episodes
from agentgym.seeding import key
from agentgym.types import Task, Trajectory
from agentgym_trainers.config import Config


class Sample(NamedTuple):
    """A trajectory and its composed reward; None for a failed one."""

    trajectory: Trajectory
    reward: Composed | None

    @property
    def value(self) -> float | None:
        return None if self.reward is None else self.reward.value


Group = list[Sample]


class TaskCursor:
    """The training tasks in their order. `position` is all its state; a finite stream begins again, reshuffled."""

    def __init__(self, env: Environment, seed: int) -> None:
        self.env, self.seed = env, seed
        self.position = 0
        self._stream = self._endless()

    def seek(self, position: int) -> None:
        """Go to a position of the stream, from its beginning."""
        self.position = position
        self._stream = islice(self._endless(), position, None)

    def take(self, count: int) -> list[Task]:
        found = list(islice(self._stream, count))
        self.position += len(found)
        return found

    def _endless(self) -> Iterator[Task]:
        epoch = 0
        while True:
            task = None
            for task in self.env.tasks("train", key(self.seed, "tasks", epoch) >> 33):
                yield task
            if task is None:
                raise ConfigError(f"{self.env.id} has no task in the split 'train'")
            epoch += 1


class Rollouts:
    """Plays the tasks of one update after the other with the current policy."""

    def __init__(self, config: Config, env: Environment, policy: Policy) -> None:
        r = config.rollout
        self.config = config
        self.cursor = TaskCursor(env, config.run.seed)
        self.composer: Composer = composer(config.reward or env.reward)
        self.runner = Runner(
            env, policy, concurrency=r.concurrency, limits=r.limits, retries=r.retries, sampling=config.sampling
        )

    async def play(self, step: int) -> list[Group]:
        """The groups of update `step`. Raises `Fault` where every episode failed, with the commonest reason."""
        r = self.config.rollout
        tasks = self.cursor.take(r.tasks_per_step)
        found = await self.runner.collect(episodes(tasks, r.group_size, key(self.config.run.seed, "rl", step) >> 33))
        self._check(found)
        samples = [Sample(t, self._compose(t)) for t in found]
        return [list(group) for _, group in groupby(samples, key=lambda s: s.trajectory.episode.group)]

    def _compose(self, trajectory: Trajectory) -> Composed | None:
        return None if trajectory.status == "failed" else self.composer.trajectory(trajectory)

    @staticmethod
    def _check(found: Sequence[Trajectory]) -> None:
        failures = Counter(f"{t.failure.kind}: {t.failure.message}" for t in found if t.failure is not None)
        if failures and sum(failures.values()) == len(found):
            reason, count = failures.most_common(1)[0]
            raise Fault(
                f"all {len(found)} episodes of this update failed, {count} of them with {reason!r}; nothing can be "
                "learnt. Repair that and resume the run; it stands at its last checkpoint"
            )


class Buffer:
    """What the rollout side hands over and the learner takes. `max_staleness` counts published versions since the
    oldest token of a trajectory was sampled, at the moment it is consumed. `counts` says what was left out, by reason.
    """

    def __init__(self, max_staleness: int, drop_equal: bool) -> None:
        self.max_staleness, self.drop_equal = max_staleness, drop_equal
        self.counts: Counter[str] = Counter()

    def take(self, groups: Sequence[Group], version: int) -> list[Sample]:
        """The samples to learn from at this version of the weights."""
        return [sample for group in groups for sample in self._admit(group, version)]

    def _admit(self, group: Group, version: int) -> Group:
        good = [s for s in group if s.reward is not None]
        fresh = [s for s in good if version - oldest(s.trajectory, version) <= self.max_staleness]
        self.counts["failed"] += len(group) - len(good)
        self.counts["stale"] += len(good) - len(fresh)
        if self.drop_equal and len({s.value for s in fresh}) <= 1:
            self.counts["equal"] += len(fresh)
            return []
        return fresh


def oldest(trajectory: Trajectory, default: int) -> int:
    """The oldest version of the weights that sampled a token of this trajectory."""
    versions = (run.version for _, span in trajectory.spans for run in span.versions)
    return min(versions, default=default)


def best_of(samples: Sequence[Sample]) -> list[Trajectory]:
    """The best member of each group (the first of equals) where it succeeded: what best-of-n imitates."""
    by_group = groupby(samples, key=lambda s: s.trajectory.episode.group)
    best = (max(group, key=lambda s: s.reward.value if s.reward else 0.0).trajectory for _, group in by_group)
    return [t for t in best if t.metrics.get("success", 1.0) > 0.0]
