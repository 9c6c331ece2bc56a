"""A step's records as columns: the only place where advantages walk over trajectories, turns and reward terms.

P trajectories that did not fail, K turns, L lines of their ledgers; each family of columns is read when first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from math import nan
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.rewards import DERIVED, POTENTIAL_SUFFIXES, Composed, carried
from agentgym.types import Columns, RewardTerm, Trajectory, Turn

Real = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]
Sample = tuple[Trajectory, Composed | None]

TEAM = ("team", "episode")
"""Levels of reward terms that every agent of a step shares."""


class Ledger(NamedTuple):
    """Lines in order of the records: the turn each counts for [L], its share of the composed reward [L], itself."""

    turn: Ints
    share: Real
    terms: list[RewardTerm]


class Table:
    """The trajectories of a step that did not fail, each with its composed reward.

    Raises `RecordError` where one has no composed reward, or a reward is not finite.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = [(t, c) for t, c in samples if t.status != "failed" and c is not None]
        stray = next((t.episode.id for t, c in samples if t.status != "failed" and c is None), None)
        if stray is not None:
            raise RecordError(f"episode {stray} did not fail, and yet has no composed reward")
        self.size = len(self.samples)
        counts = np.asarray([len(t.turns) for t, _ in self.samples], np.intp)
        self.bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.intp)
        self.owner = np.repeat(np.arange(self.size), counts)
        self.value = np.asarray([c.value for _, c in self.samples], float)
        self.finite(self.value, np.arange(self.size), "the composed reward")

    @property
    def turns(self) -> int:
        """K."""
        return int(self.bounds[-1])

    @property
    def index(self) -> Ints:
        """The place of each turn in its trajectory: [K]."""
        return np.arange(self.turns) - self.bounds[self.owner]

    @cached_property
    def step(self) -> Ints:
        """[K]."""
        return _ints(self._each(attrgetter("step"), lambda c: [step for step, _, _ in c.order]))

    @cached_property
    def moment(self) -> Ints:
        """The step of each turn, numbered through all trajectories in order: [K]."""
        step = self.step - self.step.min(initial=0)
        return np.unique(self.owner * (step.max(initial=0) + 1) + step, return_inverse=True)[1]

    @cached_property
    def agents(self) -> list[str]:
        """Who decided in each turn: [K]."""
        return self._each(attrgetter("agent"), lambda c: [agent for _, agent, _ in c.order])

    @cached_property
    def agent(self) -> Ints:
        """The same as numbers: [K]."""
        return _numbered(self.agents)

    @cached_property
    def chains(self) -> tuple[Ints, Ints]:
        """The turns sorted by chain, the turns of one agent in one trajectory, chains in the order of their first
        turns: [K]; and the chains' bounds: [C + 1]."""
        part = np.unique(self.owner * (self.agent.max(initial=0) + 1) + self.agent, return_inverse=True)[1]
        _, first = np.unique(part, return_index=True)
        counts = np.bincount(part)[np.argsort(first)]
        return np.argsort(first[part], kind="stable"), np.concatenate(([0], np.cumsum(counts))).astype(np.intp)

    @cached_property
    def tokens(self) -> Real:
        """Sampled tokens of each turn's action, 0 for a numeric one: [K]."""
        return np.asarray(self._each(_tokens, lambda c: [0] * len(c)), float)

    @cached_property
    def recorded(self) -> Real:
        """The value that each action recorded, NaN without one: [K]."""
        return np.asarray(self._each(attrgetter("action.value"), _values), float)

    @cached_property
    def anchor(self) -> Ints:
        """The state of each turn as a number, a turn without an anchor being a state of its own: [K].

        Raises `ConfigError` where an environment names none.
        """
        names = self._each(attrgetter("observation.anchor"), lambda c: [""] * len(c))
        named = np.asarray(names, bool)
        bare = np.flatnonzero((np.bincount(self.owner, named, self.size) == 0) & (np.diff(self.bounds) > 0))
        if len(bare):
            raise ConfigError(f"the key 'anchor' needs Observation.anchor; {self.samples[bare[0]][0].env} gives none")
        return np.where(named, _numbered(names), len(names) + np.arange(len(names)))

    def _each(self, of_turn: Callable[[Turn], Any], of_columns: Callable[[Columns], list[Any]]) -> list[Any]:
        """A fact of every turn; columns need not build their turns: [K]."""
        found: list[Any] = []
        for t, _ in self.samples:
            found.extend(of_columns(t.turns) if isinstance(t.turns, Columns) else map(of_turn, t.turns.items))
        return found

    @cached_property
    def ledger(self) -> Ledger:
        lines: list[tuple[int, RewardTerm]] = []
        for t, composed in self.samples:
            own = [*carried(t), *((len(t.turns) - 1, term) for term in composed.extra)]
            if len(own) != len(composed.shares):
                raise RecordError(
                    f"{len(composed.shares)} shares for the {len(own)} reward terms of episode {t.episode.id}"
                )
            lines += own
        shares = [composed.shares for _, composed in self.samples]
        owner = np.repeat(np.arange(self.size), _ints(list(map(len, shares))))
        turn = _ints([term.turn if term.turn >= 0 else carrier for carrier, term in lines]) + self.bounds[owner]
        found = Ledger(turn, np.fromiter(chain.from_iterable(shares), float), [term for _, term in lines])
        self._within(turn, owner)
        self.finite(found.share, self.owner[found.turn], "the share of a reward term")
        return found

    def _within(self, turn: Ints, owner: Ints) -> None:
        """Raise `RecordError` for the first line that counts for a turn its trajectory does not have."""
        bad = np.flatnonzero((turn < self.bounds[owner]) | (turn >= self.bounds[owner + 1]))
        if len(bad):
            p = owner[bad[0]]
            raise RecordError(
                f"a reward term of episode {self.samples[p][0].episode.id} names turn {turn[bad[0]] - self.bounds[p]}, "
                f"the trajectory has {self.bounds[p + 1] - self.bounds[p]}"
            )

    @cached_property
    def names(self) -> NDArray[np.str_]:
        """The name of each line, "" where the world brought it about: [L]."""
        return np.asarray([r.name if r.cause == "policy" else "" for r in self.ledger.terms], str)

    @cached_property
    def amounts(self) -> Real:
        """The raw amount of each line: [L]."""
        found = np.asarray([r.value for r in self.ledger.terms], float)
        self.finite(found, self.owner[self.ledger.turn], "a reward term")
        return found

    def whose(self, which: str) -> Bools:
        """Lines that are the team's, the own of the turn's agent, or all: [L]."""
        terms = self.ledger.terms
        if which == "all":
            return np.ones(len(terms), bool)
        team: Bools = np.asarray([r.level in TEAM for r in terms], bool)
        if which == "team":
            return team
        at = self.ledger.turn.tolist()
        own: Bools = np.asarray([r.agent in ("", self.agents[k]) for r, k in zip(terms, at, strict=True)], bool)
        return own & ~team

    @cached_property
    def prompt(self) -> Ints:
        """The prompt of each trajectory, numbered in the order of the step: [P]."""
        return _numbered([t.prompt for t, _ in self.samples])

    @cached_property
    def domain(self) -> Ints:
        return _numbered([t.labels.get("domain", t.env) for t, _ in self.samples])

    def label(self, name: str) -> Ints:
        """The label of each trajectory as a number: [P]. Raises `UnknownName` where one has none."""
        missing = next((t for t, _ in self.samples if name not in t.labels), None)
        if missing is not None:
            raise unknown(f"label of episode {missing.episode.id}:", name, missing.labels)
        return _numbered([t.labels[name] for t, _ in self.samples])

    def metric(self, name: str) -> Real:
        """`metrics[name]` of each trajectory: [P]. Raises `UnknownName` where one has none."""
        missing = next((t for t, _ in self.samples if name not in t.metrics), None)
        if missing is not None:
            raise unknown(f"metric (the given baseline) of episode {missing.episode.id}:", name, missing.metrics)
        found = np.asarray([t.metrics[name] for t, _ in self.samples], float)
        self.finite(found, np.arange(self.size), f"the metric {name!r}")
        return found

    def given(self, values: Sequence[NDArray[np.floating] | None], agents: Ints) -> tuple[Real, Real]:
        """Given values of each trajectory as (of each turn [K], NaN where missing; after the last turn of each of its
        `agents` [P]: 0 where not given or not truncated)."""
        at, end = [np.zeros(0)], [np.zeros(0)]
        for (t, _), array, count in zip(self.samples, values, agents.tolist(), strict=True):
            turns = len(t.turns)
            held = np.full(turns, np.nan) if array is None else np.asarray(array, float)
            if len(held) not in (turns, turns + count):
                raise RecordError(
                    f"{len(held)} values for episode {t.episode.id}; it has {turns} turns, and {count} agents whose "
                    f"values after the end may follow"
                )
            at.append(held[:turns])
            end.append(held[turns:] if len(held) > turns and t.status == "truncated" else np.zeros(count))
        return np.concatenate(at), np.concatenate(end)

    def components(self) -> list[str]:
        """Names of reward terms that the key "component" tells apart: no potentials, nothing the trainer worked out."""
        names = set(np.unique(self.names).tolist()) - {""}
        return sorted(n for n in names if not n.endswith(POTENTIAL_SUFFIXES) and not n.startswith(DERIVED))

    def finite(self, numbers: Real, owner: Ints, what: str) -> None:
        """Raise `RecordError` that names the episode of the first number that is not finite."""
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            episode = self.samples[owner[bad[0]]][0].episode.id
            raise RecordError(f"{what} of episode {episode} is {numbers[bad[0]]}; rewards and values are finite")


def sampled(trajectory: Trajectory) -> Ints:
    """Sampled tokens of each turn's action: [turns]. Numeric actions have none."""
    turns = trajectory.turns
    return np.zeros(len(turns), np.intp) if isinstance(turns, Columns) else _ints(list(map(_tokens, turns.items)))


def _tokens(turn: Turn) -> int:
    span = turn.action.span
    return 0 if span is None else len(span.ids)


def _values(columns: Columns) -> list[float]:
    held = {agent: None if c.values is None else c.values.numpy().tolist() for agent, c in columns.agents.items()}
    rows = ((held[agent], row) for _, agent, row in columns.order)
    return [nan if values is None else values[row] for values, row in rows]


def _numbered(keys: Iterable[Hashable]) -> Ints:
    """Equal keys as equal numbers, from 0 in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return _ints([numbers.setdefault(key, len(numbers)) for key in keys])


def _ints(values: Sequence[int]) -> Ints:
    return np.asarray(values, np.intp)
