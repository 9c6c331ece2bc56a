"""The rollout side of training, and the buffer between it and the learner.

rollouts = Rollouts(config, env, engine)
played = await rollouts.play(unit)           # whole groups, in the order of the tasks, as the strategy has them
batch = buffer.take(played.groups, version)  # what may be learnt from; the rest is counted by reason
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import Any

import msgspec

from agentgym.env import Environment
from agentgym.errors import ConfigError, Fault
from agentgym.mixture import Mixture, domain_of
from agentgym.policy import Load, Loaded, Policy, Publishes
from agentgym.rewards import Composed, derived, judges
from agentgym.rollout import Runner
from agentgym.seeding import key
from agentgym.types import Episode, Failure, Record, Task, Trajectory, Turns, WeightsVersion, decode, encode
from agentgym_trainers import strategies
from agentgym_trainers.config import Config
from agentgym_trainers.mixtures import reward_of
from agentgym_trainers.strategies import Group as Group
from agentgym_trainers.strategies import Sample as Sample
from agentgym_trainers.strategies import Table


class TaskCursor:
    """The training tasks in their order; a finite stream begins again, reshuffled. A mixture's order hangs on the
    weights of the moment too. `drawn`, how many were taken of each domain ("" without domains), is all its state."""

    def __init__(self, env: Environment, seed: int, drawn: Mapping[str, int] | None = None) -> None:
        self.env, self.seed = env, seed
        self.drawn = Counter(drawn)
        self._stream: Iterator[Task] | None = None

    def take(self, count: int) -> list[Task]:
        """The next tasks."""
        if self._stream is None:
            self._stream = self._from_here()
        found = list(islice(self._stream, count))
        self.drawn.update(map(domain_of, found))
        return found

    def skip(self, tasks: Sequence[Task]) -> None:
        """These were taken already."""
        self.drawn.update(map(domain_of, tasks))
        self._stream = None

    def endless(self) -> Iterator[Task]:
        """The stream from its beginning, whatever was taken."""
        epoch = 0
        while True:
            task = None
            for task in self.env.tasks("train", key(self.seed, "tasks", epoch) >> 33):
                yield task
            if task is None:
                raise ConfigError(f"{self.env.id} has no task in the split 'train'")
            epoch += 1

    def _from_here(self) -> Iterator[Task]:
        if isinstance(self.env, Mixture):
            return self.env.course(key(self.seed, "tasks", 0) >> 33, self.drawn)
        return islice(self.endless(), self.drawn.total(), None)


class Unit(Record, frozen=True, kw_only=True, tag=True):
    """What is played and handed over at once: its tasks, the weights it began under, and where in the run it stands:
    the `index`-th of the units of update `step`, of which there are `stride`. Its play hangs on nothing else."""

    number: int
    version: int
    tasks: tuple[Task, ...]
    step: int
    index: int = 0
    stride: int = 1


class Played(Record, frozen=True, kw_only=True, tag=True):
    """What a unit came to: whole groups, in the order of its tasks, and what was played and not handed over (rejected,
    probing and reference episodes). `memory` is the strategy's afterwards; `began`, `ended` in seconds since the epoch.
    """

    number: int
    groups: list[Group]
    aside: list[Sample] = msgspec.field(default_factory=list)
    memory: dict[str, Any] = msgspec.field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0

    @property
    def handed(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    @property
    def everything(self) -> list[Sample]:
        return [*self.handed, *self.aside]

    def oldest(self, default: int) -> int:
        """The oldest version of the weights that sampled a token of it."""
        return min((oldest(s.trajectory, default) for s in self.handed), default=default)


class Rollouts:
    """Plays units with the current policy, as the run's strategy says; as many at once as it is asked to.

    `reference` is the policy before reinforcement, where the strategy needs it (`strategies.needs_reference`). Derived
    terms are composed as far as a trajectory alone gives them: the learner, who has the models, adds `policy.kl`.
    """

    def __init__(self, config: Config, env: Environment, policy: Policy, *, reference: Policy | None = None) -> None:
        if strategies.needs_reference(config.strategy) and reference is None:
            raise ConfigError(
                f"the strategy {config.strategy.kind!r} has the initial policy play; give it as reference="
            )
        self.config, self.env, self.policy, self.reference = config, env, policy, reference
        self.composers = reward_of(config, env)
        self.judge = judges.declared(config.judge)
        self.strategy = strategies.make(
            config.strategy, env, group_size=config.rollout.group_size, sampling=config.sampling
        )

    async def play(self, unit: Unit) -> Played:
        """The groups of a unit, in the order of its tasks."""
        began = time.time()
        table = Table(self._firsts(unit), self._play, deals=len(unit.tasks), reference=self.reference)
        groups = await self.strategy.play(table)
        handed = {s.trajectory.episode.id for group in groups for s in group}
        return Played(
            number=unit.number,
            groups=groups,
            aside=[s for s in table.played if s.trajectory.episode.id not in handed],
            memory=self.strategy.state(),
            began=began,
            ended=time.time(),
        )

    def reprice(self, multipliers: Mapping[str, Any]) -> None:
        """What is played from now on is rewarded under this state of the reward's multipliers."""
        self.composers.multipliers.restore(multipliers)

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Go on with what the strategy knew after a unit."""
        self.strategy.restore(memory)

    def load(self) -> Load:
        """How busy the policy is."""
        return self.policy.load() if isinstance(self.policy, Loaded) else Load()

    async def publish(self, version: WeightsVersion) -> None:
        """Whoever plays acts with the learner's weights of now; the policy from before reinforcement never does."""
        if self.policy is not self.reference and isinstance(self.policy, Publishes):
            await self.policy.publish(version)

    async def close(self) -> None:
        """The reference engine goes; the other is the run's own."""
        if self.reference is not None and hasattr(self.reference, "close"):
            self.reference.close()

    def _firsts(self, unit: Unit) -> Iterator[Episode]:
        """The first member of each group: of the unit's own tasks, then of further ones for a strategy that asks."""
        seed = self.config.run.seed
        more = TaskCursor(self.env, key(seed, "further", unit.number)).endless()
        key_ = key(seed, "rl", unit.step) >> 33
        for place, task in enumerate(chain(unit.tasks, more)):
            number = unit.index + place * unit.stride
            yield Episode(task=task, seed=key("episode", key_, number) >> 11, group=f"{key_}.{number}")

    async def _play(self, found: Sequence[Episode], policy: Policy | None) -> list[Sample]:
        r = self.config.rollout
        collected = [readable(t) for t in await self._runner(policy or self.policy).collect(found)]
        played = await judges.judged(self.judge, collected, concurrency=r.concurrency, retries=r.retries)
        return [Sample(t, None if t.status == "failed" else self._composed(t)) for t in played]

    def _composed(self, trajectory: Trajectory) -> Composed:
        composer = self.composers.of(trajectory)
        extra = derived(trajectory, [0.0] * len(trajectory.turns)) if composer.derived else ()
        return composer.trajectory(trajectory, extra=extra)

    def _runner(self, policy: Policy) -> Runner:
        r = self.config.rollout
        sampling = self.config.sampling
        return Runner(
            self.env, policy, concurrency=r.concurrency, limits=r.limits, retries=r.retries, sampling=sampling
        )


def readable(trajectory: Trajectory) -> Trajectory:
    """The trajectory, or a failed one without contents where an environment put something into it that a run's folder
    could not give back: one such record would cost all that stand beside it."""
    try:
        decode(encode(trajectory), Trajectory)
    except (msgspec.ValidationError, TypeError) as error:
        failure = Failure(kind="environment", message=f"what it answered is no record: {error}", step=0)
        bare: Trajectory = trajectory.replace(
            status="failed", failure=failure, turns=Turns(items=()), final={}, metrics={}, labels={}
        )
        return bare
    return trajectory


def fruitless(played: Sequence[Played]) -> Fault | None:
    """What to raise where every episode of an update failed: the commonest reason; None where one did not."""
    found = [s.trajectory for unit in played for s in unit.everything]
    failures = Counter(f"{t.failure.kind}: {t.failure.message}" for t in found if t.failure is not None)
    if not failures or sum(failures.values()) < len(found):
        return None
    reason, count = failures.most_common(1)[0]
    return Fault(
        f"all {len(found)} episodes of this update failed, {count} of them with {reason!r}; nothing can be "
        "learnt. Repair that and resume the run; it stands at its last checkpoint"
    )


class Buffer:
    """What the rollout side hands over and the learner takes. `max_staleness` counts published versions since the
    oldest token of a trajectory was sampled, at the moment it is consumed. `counts` says by name what became of every
    trajectory: "consumed", or left out and why.
    """

    def __init__(self, max_staleness: float, drop_equal: bool, counts: Counter[str] | None = None) -> None:
        self.max_staleness, self.drop_equal = max_staleness, drop_equal
        self.counts: Counter[str] = Counter() if counts is None else counts

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
        self.counts["consumed"] += len(fresh)
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
