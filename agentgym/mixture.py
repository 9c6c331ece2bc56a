"""Several environments as one: a task belongs to a member, the member plays it, and the shares may move meanwhile.

    mixture = Mixture({"easy": make("shopping-v0", hidden=[1, 1]), "hard": make("shopping-v0", hidden=[3, 3])},
                      {"easy": 1.0, "hard": 3.0})

Every task says in `labels["domain"]` whose it is: figures, advantages and objectives that read domains find them there.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from itertools import accumulate, count, islice
from typing import Any, Self

from agentgym.env import Environment
from agentgym.errors import ConfigError, unknown
from agentgym.policy import Policy, Session
from agentgym.rewards import Composer, Declaration, Dual, composer
from agentgym.seeding import key, share
from agentgym.types import Action, Episode, Observation, StepResult, Task, Trajectory

MIXTURE = "mixture"
"""The id of every mixture; it stands in no catalogue, as it is nothing without its members."""
DOMAIN = "domain"
"""The label that names a task's member."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class Mixture(Environment):
    """Environments by name, drawn by weight. It can do (`capabilities`) what all of its members can.

    shares   of each member, as declared; they add up to 1
    weights  the shares of the moment, which a curriculum replaces: `course` reads them at every draw
    rewards  the members' own declarations by name; `reward` is theirs where they agree, else the plain sum

    While an episode runs its instance bears the member's `id` and `version`, so that trajectories do.
    """

    id = MIXTURE

    def __init__(self, members: Mapping[str, Environment], weights: Mapping[str, float] | None = None) -> None:
        self.members = dict(members)
        _check(self.members, weights)
        total = sum(weights.values()) if weights else len(self.members)
        self.shares = {name: (weights[name] if weights else 1.0) / total for name in self.members}
        self.weights: Mapping[str, float] = self.shares
        self.rewards = {name: member.reward for name, member in self.members.items()}
        self._playing: Environment | None = None
        first, *others = self.members.values()
        vars(self).update(
            version=" ".join(f"{m.id}@{m.version}" for m in self.members.values()),
            capabilities=first.capabilities.intersection(*(m.capabilities for m in others)),
            numeric=first.numeric,
            reward=first.reward if all(m.reward == first.reward for m in others) else Environment.reward,
        )

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        """The members' streams of this split and seed, interleaved, each in its own order: of n tasks a member has its
        declared share of n, to within a few.

        A member whose training stream ends begins again with another seed. A stream of another split ends where the
        member whose turn it is has no task left, so that what it held was in the declared shares.
        """
        return self._interleaved(split, seed, Counter(), lambda: self.shares)

    def course(self, seed: int = 0, drawn: Mapping[str, int] | None = None) -> Iterator[Task]:
        """The training tasks by the weights of the moment; `drawn` goes on where so many of each member were taken.

        What comes next depends on the seed, on how many were drawn of each and on the weights, and on nothing else: a
        count of the labels seen is all that a resumed run needs.
        """
        return self._interleaved("train", seed, Counter(drawn), lambda: self.weights)

    def _interleaved(
        self, split: str, seed: int, taken: Counter[str], weights: Callable[[], Mapping[str, float]]
    ) -> Iterator[Task]:
        """Where in the weights a draw falls is a Kronecker sequence: evenly spread over every stretch of draws."""
        streams = {name: islice(self._stream(name, split, seed), taken[name], None) for name in self.members}
        offset = share(seed, MIXTURE, split)
        while True:
            name = at(weights(), (offset + taken.total() * GOLDEN) % 1.0)
            task = next(streams[name], None)
            if task is None:
                return
            taken[name] += 1
            yield task.replace(labels=task.labels | {DOMAIN: name})

    def _stream(self, name: str, split: str, seed: int) -> Iterator[Task]:
        for epoch in count():
            task = None
            for task in self.members[name].tasks(split, key(seed, "again", epoch) >> 33 if epoch else seed):
                yield task
            if task is None:
                raise ConfigError(f"{name} ({self.members[name].id}) has no task in the split {split!r}")
            if split != "train":
                return

    # --- an episode ---

    def spawn(self) -> Self:
        """An instance that spawns the member when it is given a task."""
        twin = copy.copy(self)
        twin._playing = None
        return twin

    async def reset(self, task: Task) -> dict[str, Observation]:
        await self.close()
        member = self.member(task)
        vars(self).update(id=member.id, version=member.version)
        self._playing = member.spawn()
        return await self._playing.reset(task)

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        return await self.playing.step(actions)

    async def close(self) -> None:
        if self._playing is not None:
            await self._playing.close()
            self._playing = None

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._playing = self.playing.fork()
        return twin

    @property
    def playing(self) -> Environment:
        """The member's instance of the running episode."""
        if self._playing is None:
            raise ConfigError("no episode is running: await env.reset(task) first")
        return self._playing

    # --- what the members know ---

    def member(self, task: Task) -> Environment:
        """The member that a task belongs to; `UnknownName` for a task of another mixture, or of none."""
        name = domain_of(task)
        if name not in self.members:
            raise unknown("member", name, self.members, "a mixture plays the tasks that it gives")
        return self.members[name]

    def hidden_twin(self, task: Task) -> Task:
        twin = self.member(task).hidden_twin(task)
        labelled: Task = twin.replace(labels=twin.labels | {DOMAIN: task.labels[DOMAIN]})
        return labelled

    def hint(self, task: Task, level: int) -> str:
        return self.member(task).hint(task, level)

    def answer(self, task: Task) -> str:
        return self.member(task).answer(task)

    def ladder(self) -> dict[str, Policy]:
        """The rungs that every member has: each plays the member's own of that name."""
        return self._together(lambda member: member.ladder())

    def demonstrations(self) -> dict[str, Policy]:
        """The teachers that every member has; a member without demonstrations has its ladder."""
        return self._together(lambda member: getattr(member, "demonstrations", member.ladder)())

    def vocabulary(self) -> list[str]:
        """The words of all members, in their order; `ConfigError` where a member has no closed vocabulary."""
        for name, member in self.members.items():
            if not hasattr(member, "vocabulary"):
                raise ConfigError(
                    f"a closed vocabulary of a mixture is that of all its members, and {name} ({member.id}) has no "
                    "method vocabulary(); set model.tokenizer = 'bpe', or model.path to a model's folder"
                )
        words: list[list[str]] = [getattr(member, "vocabulary")() for member in self.members.values()]  # noqa: B009
        return list(dict.fromkeys(word for held in words for word in held))

    def _together(self, known: Callable[[Environment], Mapping[str, Policy]]) -> dict[str, Policy]:
        held = {name: known(member) for name, member in self.members.items()}
        first, *others = held.values()
        common = [rung for rung in first if all(rung in other for other in others)]
        return {rung: ByDomain({name: policies[rung] for name, policies in held.items()}) for rung in common}


def domain_of(found: Task | Trajectory) -> str:
    """The domain that its labels name; "" where they name none."""
    return found.labels.get(DOMAIN, "")


def at(weights: Mapping[str, float], place: float) -> str:
    """The name whose part of the weights, laid end to end, holds this place in [0, 1)."""
    edges = list(accumulate(weights.values()))
    return list(weights)[min(bisect(edges, place * edges[-1]), len(edges) - 1)]


def _check(members: Mapping[str, Environment], weights: Mapping[str, float] | None) -> None:
    if not members:
        raise ConfigError("a mixture has at least one member")
    nested = [name for name, member in members.items() if isinstance(member, Mixture)]
    if nested:
        raise ConfigError(f"{nested[0]} is a mixture itself, whose domains would be lost; name its members here")
    if len({member.numeric for member in members.values()}) > 1:
        kinds = ", ".join(f"{name}: numeric = {member.numeric}" for name, member in members.items())
        raise ConfigError(f"the members of a mixture all speak or all have arrays ({kinds}); no policy plays both")
    if weights is not None:
        check_weights(weights)
        for name in weights.keys() ^ members.keys():
            raise ConfigError(f"every member has one weight; {name!r} is among {[*members]} or {[*weights]} alone")


def check_weights(weights: Mapping[str, float]) -> None:
    """`ConfigError` for a weight that is not above 0 and finite."""
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ConfigError(f"the weight of {name} is above 0 and finite; got {weight}. Leave out what has no share")


class ByDomain:
    """A policy that plays each episode by the one of its task's domain."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies

    def session(self, episode: Episode, agent: str) -> AbstractAsyncContextManager[Session]:
        return self.policies[episode.task.labels[DOMAIN]].session(episode, agent)


class Composers:
    """The composer of each episode: that of its domain where domains have declarations of their own, else the
    default's, with the `multipliers` of the moment. `derived` are the derived terms that any of them reads."""

    def __init__(self, default: Declaration, own: Mapping[str, Declaration] | None = None) -> None:
        self.multipliers = Dual(default)
        self.own: dict[str, Composer] = {name: composer(declared) for name, declared in (own or {}).items()}
        read = [name for made in self.own.values() or (self.multipliers.composer,) for name in made.derived]
        self.derived = tuple(dict.fromkeys(read))

    def of(self, found: Trajectory | Task) -> Composer:
        """Of this trajectory or task, by its label."""
        return self.own.get(domain_of(found), self.multipliers.composer)


def composers(env: Environment) -> Composers:
    """What an environment declares itself; a mixture's members each for itself."""
    return Composers(env.reward, env.rewards if isinstance(env, Mixture) else None)


def part_of(config: Mapping[str, Any], trajectory: Trajectory) -> Mapping[str, Any]:
    """Of a run's config what holds `env` and `reward` of this episode: its component of a mixture, else the whole."""
    domain = domain_of(trajectory)
    parts = (part for part in config.get(MIXTURE, ()) if domain == (part.get("name") or part["env"]["id"]))
    return next(parts, config)
