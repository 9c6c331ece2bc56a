"""The rollout side of training, and the buffer between it and the learner.

rollouts = Rollouts(config, env, engine)
groups = await rollouts.play(step)            # whole groups, in the order of the tasks, as the strategy has them
batch = buffer.take(groups, version)          # what may be learnt from; the rest is counted by reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, groupby, islice
from typing import Any

from agentgym.env import Environment
from agentgym.errors import ConfigError, Fault
from agentgym.policy import Policy
from agentgym.rewards import Composer, composer, judges
from agentgym.rollout import Runner, episodes
from agentgym.seeding import key
from agentgym.types import Episode, RewardTerm, Task, Trajectory
from agentgym_trainers import strategies
from agentgym_trainers.config import Config
from agentgym_trainers.strategies import Group as Group
from agentgym_trainers.strategies import Sample as Sample
from agentgym_trainers.strategies import Table

Annotate = Callable[[list[Trajectory]], Sequence[Sequence[RewardTerm]]]
"""Reward terms that the trainer works out (see `agentgym.rewards.derived`): for each trajectory its own."""


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
    """Plays the tasks of one update after the other with the current policy, as the run's strategy says.

    reference  the policy before reinforcement, where the strategy needs it (`strategies.needs_reference`)
    annotate   gives judged trajectories the derived terms that their reward reads
    aside      what the last update played and did not hand over: rejected, probing and reference episodes
    """

    def __init__(
        self,
        config: Config,
        env: Environment,
        policy: Policy,
        *,
        reference: Policy | None = None,
        annotate: Annotate | None = None,
    ) -> None:
        if strategies.needs_reference(config.strategy) and reference is None:
            raise ConfigError(
                f"the strategy {config.strategy.kind!r} has the initial policy play; give it as reference="
            )
        self.config, self.env, self.policy, self.reference, self.annotate = config, env, policy, reference, annotate
        self.cursor = TaskCursor(env, config.run.seed)
        self.composer: Composer = composer(config.reward or env.reward)
        self.judge = judges.declared(config.judge)
        self.strategy = strategies.make(
            config.strategy, env, group_size=config.rollout.group_size, sampling=config.sampling
        )
        self.aside: list[Sample] = []

    async def play(self, step: int) -> list[Group]:
        """The groups of update `step`. Raises `Fault` where every episode failed, with the commonest reason."""
        table = Table(
            self._firsts(step), self._play, deals=self.config.rollout.tasks_per_step, reference=self.reference
        )
        groups = await self.strategy.play(table)
        self._check([s.trajectory for s in table.played])
        handed = {s.trajectory.episode.id for group in groups for s in group}
        self.aside = [s for s in table.played if s.trajectory.episode.id not in handed]
        return groups

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain data."""
        return {"cursor": self.cursor.position, "strategy": self.strategy.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.cursor.seek(state.get("cursor", 0))
        self.strategy.restore(state.get("strategy", {}))

    def _firsts(self, step: int) -> Iterator[Episode]:
        """The first member of each group of an update, for as many tasks as its strategy takes."""
        tasks = (self.cursor.take(1)[0] for _ in count())
        return episodes(tasks, seed=key(self.config.run.seed, "rl", step) >> 33)

    async def _play(self, found: Sequence[Episode], policy: Policy | None) -> list[Sample]:
        r = self.config.rollout
        collected = await self._runner(policy or self.policy).collect(found)
        played = await judges.judged(self.judge, collected, concurrency=r.concurrency, retries=r.retries)
        good = [t for t in played if t.status != "failed"]
        extras = self.annotate(good) if self.annotate else [()] * len(good)
        rewards = {t.episode.id: self.composer.trajectory(t, extra=x) for t, x in zip(good, extras, strict=True)}
        return [Sample(t, rewards.get(t.episode.id)) for t in played]

    def _runner(self, policy: Policy) -> Runner:
        r = self.config.rollout
        sampling = self.config.sampling
        return Runner(
            self.env, policy, concurrency=r.concurrency, limits=r.limits, retries=r.retries, sampling=sampling
        )

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
    played = ([s for s in group if s.value is not None] for _, group in by_group)
    best = (max(group, key=lambda s: s.value or 0.0) for group in played if group)
    return [s.trajectory for s in best if s.success]
