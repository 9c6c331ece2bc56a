"""A step's records as columns: the only place where advantages walk over trajectories, turns and reward terms.

P trajectories that did not fail, K turns, L lines of their ledgers; each family of columns is read when first needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.rewards import DERIVED, POTENTIAL_SUFFIXES, Composed, carried
from agentgym.types import Columns, RewardTerm, Trajectory, Turns

Real = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]
Sample = tuple[Trajectory, Composed | None]

TEAM = ("team", "episode")
"""Levels of reward terms that every agent of a step shares."""


class TurnColumns(NamedTuple):
    """[K] each; `agent` and `anchor` are numbers (a turn without an anchor is a state of its own)."""

    step: Ints
    agent: Ints
    anchor: Ints
    tokens: Ints
    value: Real


class Ledger(NamedTuple):
    """[L] each: the turn a line counts for, its name as a number of `names` (-1: brought about by the world), its raw
    amount, its share of the composed reward, and whether it is the team's, or the own of the turn's agent."""

    turn: Ints
    name: Ints
    amount: Real
    share: Real
    team: Bools
    own: Bools
    names: tuple[str, ...]


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
    def columns(self) -> TurnColumns:
        rows = [row for t, _ in self.samples for row in _rows(t.turns)]
        step, agent, anchor, tokens, value = zip(*rows, strict=True) if rows else ((),) * 5
        named = np.asarray([a != "" for a in anchor], bool)
        states = np.where(named, _numbered(anchor), len(anchor) + np.arange(len(anchor)))
        return TurnColumns(_ints(step), _numbered(agent), states, _ints(tokens), np.asarray(value, float))

    @cached_property
    def ledger(self) -> Ledger:
        lines = [line for p in range(self.size) for line in self._lines(p)]
        turn, agent, term, share = zip(*lines, strict=True) if lines else ((),) * 4
        names = tuple(dict.fromkeys(r.name for r in term if r.cause == "policy"))
        number = {name: i for i, name in enumerate(names)}
        team = np.asarray([r.level in TEAM for r in term], bool)
        found = Ledger(
            turn=_ints(turn),
            name=_ints([number[r.name] if r.cause == "policy" else -1 for r in term]),
            amount=np.asarray([r.value for r in term], float),
            share=np.asarray(share, float),
            team=team,
            own=~team & np.asarray([r.agent in ("", a) for r, a in zip(term, agent, strict=True)], bool),
            names=names,
        )
        self.finite(found.amount, self.owner[found.turn], "a reward term")
        self.finite(found.share, self.owner[found.turn], "the share of a reward term")
        return found

    def _lines(self, p: int) -> Iterator[tuple[int, str, RewardTerm, float]]:
        """(turn, its agent, term, share) of a trajectory's ledger, terms that only the composer knows last."""
        t, composed = self.samples[p]
        last, first, agents = len(t.turns) - 1, int(self.bounds[p]), _agents(t.turns)
        lines = [*carried(t), *((last, term) for term in composed.extra)]
        if len(lines) != len(composed.shares):
            raise RecordError(
                f"{len(composed.shares)} shares for the {len(lines)} reward terms of episode {t.episode.id}"
            )
        for (carrier, term), share in zip(lines, composed.shares, strict=True):
            at = term.turn if term.turn >= 0 else carrier
            if not 0 <= at <= last:
                raise RecordError(f"a reward term of {t.episode.id} names turn {at}, the trajectory has {last + 1}")
            yield first + at, agents[at], term, share

    @cached_property
    def prompt(self) -> Ints:
        """The prompt of each trajectory, numbered in the order of the step: [P]."""
        return _numbered([(t.env, t.episode.group or t.task.id, t.episode.seed) for t, _ in self.samples])

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

    def anchors(self) -> Ints:
        """The state of each turn as a number: [K]. Raises `ConfigError` where an environment names none."""
        anchor = self.columns.anchor
        named = np.bincount(self.owner, anchor < self.turns, self.size) > 0
        bare = np.flatnonzero(~named & (np.diff(self.bounds) > 0))
        if len(bare):
            raise ConfigError(f"the key 'anchor' needs Observation.anchor; {self.samples[bare[0]][0].env} gives none")
        return anchor

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
        names = self.ledger.names
        return sorted(n for n in names if not n.endswith(POTENTIAL_SUFFIXES) and not n.startswith(DERIVED))

    def finite(self, numbers: Real, owner: Ints, what: str) -> None:
        """Raise `RecordError` that names the episode of the first number that is not finite."""
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            episode = self.samples[owner[bad[0]]][0].episode.id
            raise RecordError(f"{what} of episode {episode} is {numbers[bad[0]]}; rewards and values are finite")


def sampled(turns: Turns | Columns) -> Ints:
    """Sampled tokens of each turn's action: [turns]. Numeric actions have none."""
    if isinstance(turns, Columns):
        return np.zeros(len(turns), np.intp)
    spans = (turn.action.span for turn in turns.items)
    return _ints([0 if span is None else len(span.ids) for span in spans])


def _rows(turns: Turns | Columns) -> Iterator[tuple[int, str, str, int, float]]:
    """(step, agent, anchor, sampled tokens, recorded value or NaN) of each turn; columns build no turns."""
    if isinstance(turns, Columns):
        values = {agent: None if c.values is None else c.values.numpy().tolist() for agent, c in turns.agents.items()}
        for step, agent, row in turns.order:
            held = values[agent]
            yield step, agent, "", 0, nan if held is None else held[row]
        return
    for turn in turns.items:
        action = turn.action
        tokens = 0 if action.span is None else len(action.span.ids)
        value = nan if action.value is None else action.value
        yield turn.step, turn.agent, turn.observation.anchor, tokens, value


def _agents(turns: Turns | Columns) -> list[str]:
    if isinstance(turns, Columns):
        return [agent for _, agent, _ in turns.order]
    return [turn.agent for turn in turns.items]


def _numbered(keys: Iterable[Hashable]) -> Ints:
    """Equal keys as equal numbers, from 0 in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return _ints([numbers.setdefault(key, len(numbers)) for key in keys])


def _ints(values: Sequence[int]) -> Ints:
    return np.asarray(values, np.intp)
