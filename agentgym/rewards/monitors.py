"""Automata and reward machines as judges: labels of an episode's turns go in, reward terms come out.

    monitor = Monitor("paid", "!pay U asked", {"pay": {"tool": "pay"}, "asked": {"action": "(?i)how much"}})

gives, for every episode, the terms

    paid.accepted   1 or 0, at the turn that decided it (the last one, if none did)
    paid.violated   1 at the turn after which nothing can repair it, else 0
    paid.before     how near acceptance was before and after each turn, from 1 (accepting) to 0 (hopeless): a potential
    paid.after      for the `potential` op, which does not change what is optimal; 0 after the end of the task

The ops `monitor` and `machine` put them into a declaration, with the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from agentgym.errors import ConfigError, RecordError
from agentgym.rewards.automata import Automaton, automaton
from agentgym.rewards.machines import RewardMachine
from agentgym.rewards.views import carried, turn_of
from agentgym.types import RewardTerm, Trajectory, Turn, iterate

Labelling = Callable[[Trajectory], Sequence[Collection[str]]]
"""The propositions that are true at each turn: [turns]."""


class Proposition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a proposition is true of a turn; exactly one of the first five.

    action, observation  a regular expression found in what was said, in what was read before it
    tool                 the name of a tool that was called
    term, metric         the turn's reward terms of this name together; a figure of the episode, on its last turn:
                         at_least (1, where neither is given) and at_most
    """

    action: str = ""
    observation: str = ""
    tool: str = ""
    term: str = ""
    metric: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        named = [n for n in ("action", "observation", "tool", "term", "metric") if getattr(self, n)]
        if len(named) != 1:
            raise ConfigError(f"a proposition is read from one of action, observation, tool, term, metric; got {named}")
        bounded = self.at_least is not None or self.at_most is not None
        if bounded and named[0] not in ("term", "metric"):
            raise ConfigError(f"bounds are for a term or a metric, not for {named[0]!r}")
        try:
            re.compile(self.action or self.observation)
        except re.error as error:
            pattern = self.action or self.observation
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error

    def within(self, value: float) -> bool:
        low = 1.0 if self.at_least is None and self.at_most is None else self.at_least
        return (low is None or value >= low) and (self.at_most is None or value <= self.at_most)

    def of(self, trajectory: Trajectory) -> list[bool]:
        """Its truth at every turn."""
        turns = list(iterate(trajectory.turns))
        if self.term:
            return self._of_term(trajectory)
        if self.metric:
            value = trajectory.metrics.get(self.metric)
            return [i == len(turns) - 1 and value is not None and self.within(value) for i in range(len(turns))]
        return [self._of_turn(turn) for turn in turns]

    def _of_turn(self, turn: Turn) -> bool:
        if self.tool:
            return any(call.name == self.tool for call in turn.action.tool_calls)
        if self.action:
            return re.search(self.action, turn.action.text) is not None
        return any(re.search(self.observation, message.text) for message in turn.observation.messages)

    def _of_term(self, trajectory: Trajectory) -> list[bool]:
        found: list[list[float]] = [[] for _ in range(len(trajectory.turns))]
        for at, (_, term) in zip(turn_of(trajectory), carried(trajectory), strict=True):
            if term.name == self.term:
                found[at].append(term.value)
        return [bool(values) and self.within(sum(values)) for values in found]


def labelling(table: Mapping[str, Any]) -> Labelling:
    """A labelling from a table: proposition = {action | observation | tool | term | metric, ...}."""
    try:
        known = {name: msgspec.convert(rule, Proposition) for name, rule in table.items()}
    except msgspec.ValidationError as error:
        raise ConfigError(f"a table of labels: {error}") from error

    def label(trajectory: Trajectory) -> list[frozenset[str]]:
        truth = {name: proposition.of(trajectory) for name, proposition in known.items()}
        return [frozenset(n for n, column in truth.items() if column[i]) for i in range(len(trajectory.turns))]

    return label


def each_turn(function: Callable[[Turn], Collection[str]]) -> Labelling:
    """A labelling from a function of one turn."""
    return lambda trajectory: [function(turn) for turn in iterate(trajectory.turns)]


def _labelled(labels: Labelling | Mapping[str, Any], atoms: Collection[str]) -> Labelling:
    if not isinstance(labels, Mapping):
        return labels
    missing = sorted(set(atoms) - set(labels))
    if missing:
        raise ConfigError(f"no label says when {', '.join(map(repr, missing))} holds; there are {sorted(labels)}")
    return labelling(labels)


def _trace(labels: Labelling, trajectory: Trajectory) -> Sequence[Collection[str]]:
    found = labels(trajectory)
    if len(found) != len(trajectory.turns):
        raise RecordError(f"{len(found)} labels for the {len(trajectory.turns)} turns of {trajectory.episode.id}")
    return found


class Monitor:
    """A formula watched over an episode's turns; a `Judge`. The terms are in the module's text."""

    def __init__(self, name: str, formula: str | Automaton, labels: Labelling | Mapping[str, Any]) -> None:
        self.name = name
        self.names = tuple(f"{name}.{part}" for part in ("accepted", "violated", "before", "after"))
        self.automaton = formula if isinstance(formula, Automaton) else automaton(formula)
        self.labels = _labelled(labels, self.automaton.atoms)
        finite = self.automaton.distance[~self.automaton.hopeless]
        farthest = max(float(finite.max(initial=0.0)) + 1.0, 1.0)
        self.potential = np.where(self.automaton.hopeless, 0.0, 1.0 - self.automaton.distance / farthest)

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        return self.terms(trajectory)

    def terms(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        """The terms of an episode; none for one without turns."""
        states = np.asarray(self.automaton.run(_trace(self.labels, trajectory)))
        if len(states) == 1:
            return ()
        a = self.automaton
        known = (a.hopeless | a.settled)[states[1:]]
        decided = int(known.argmax()) if known.any() else len(known) - 1
        verdict = {"accepted": a.accepting[states[-1]], "violated": a.hopeless[states[-1]]}
        judged = [RewardTerm(name=f"{self.name}.{n}", value=float(v), turn=decided) for n, v in verdict.items()]
        return (*judged, *self._potentials(states, trajectory.status == "terminated"))

    def _potentials(self, states: np.ndarray[Any, Any], ended: bool) -> list[RewardTerm]:
        phi = self.potential[states]
        if ended:
            phi[-1] = 0.0
        return [
            RewardTerm(name=f"{self.name}.{side}", value=float(value), turn=i)
            for side, values in (("before", phi[:-1]), ("after", phi[1:]))
            for i, value in enumerate(values)
        ]


class MachineJudge:
    """A reward machine beside an episode; a `Judge`. One term `name` a turn: what the edge paid."""

    def __init__(
        self, name: str, machine: RewardMachine | Mapping[str, Any], labels: Labelling | Mapping[str, Any]
    ) -> None:
        self.name = name
        self.names: tuple[str, ...] = (name,)
        self.machine = machine if isinstance(machine, RewardMachine) else RewardMachine.declared(machine)
        self.labels = _labelled(labels, self.machine.atoms)

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        return self.terms(trajectory)

    def terms(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        """One term for every turn."""
        _, paid = self.machine.run(_trace(self.labels, trajectory))
        return tuple(RewardTerm(name=self.name, value=amount, turn=i) for i, amount in enumerate(paid))
