"""Reward machines: a reward that depends on what has happened so far, as a small declared automaton.

One of the ways to state an objective that 2310.11840 compares. As a table:

    start = "u0"
    terminal = ["done"]

    [[edges]]
    from = "u0"
    to = "u1"
    when = "coffee & !spill"

    [[edges]]
    from = "u1"
    to = "done"
    when = "office"
    reward = 1.0

A letter that fits no edge leaves the machine where it is, without reward; one that fits two is refused when declared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError
from agentgym.rewards.automata import MAX_ATOMS, Automaton
from agentgym.rewards.logic import atoms, holds, parse
from agentgym.rewards.nodes import finite


class Edge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From a state to a state, where the guard `when` is true of the step's propositions."""

    source: str = msgspec.field(name="from")
    to: str
    when: str = "true"
    reward: float = 0.0


class Declared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine as a table."""

    start: str
    edges: tuple[Edge, ...]
    terminal: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RewardMachine:
    """State 0 is the start; letters are numbered as an `Automaton`'s.

    table [states, 2 ** atoms] the next state; rewards [states, 2 ** atoms]; terminal [states]
    """

    states: tuple[str, ...]
    atoms: tuple[str, ...]
    table: NDArray[np.intp]
    rewards: NDArray[np.float64]
    terminal: NDArray[np.bool_]

    @classmethod
    def declared(cls, table: Mapping[str, Any]) -> Self:
        """The machine of a table. Raises `ConfigError` for guards that overlap or cannot be read, and edges out of a
        terminal state."""
        try:
            read = msgspec.convert(table, Declared)
        except msgspec.ValidationError as error:
            raise ConfigError(f"a reward machine: {error}") from error
        return cls(*_compiled(read))

    @classmethod
    def of(cls, automaton: Automaton, *, satisfied: float = 1.0, violated: float = -1.0) -> Self:
        """A formula's automaton that pays once, on the edge after which the verdict cannot change any more."""
        before = (automaton.hopeless, automaton.settled)
        paid = [
            amount * (known[automaton.table] & ~known[:, None])
            for amount, known in zip((violated, satisfied), before, strict=True)
        ]
        names = tuple(f"u{i}" for i in range(len(automaton)))
        return cls(names, automaton.atoms, automaton.table, paid[0] + paid[1], before[0] | before[1])

    def letter(self, propositions: Collection[str]) -> int:
        return sum(1 << i for i, atom in enumerate(self.atoms) if atom in propositions)

    def step(self, state: int, propositions: Collection[str]) -> tuple[int, float]:
        """The next state and the edge's reward: the machine's half of the product with an environment."""
        letter = self.letter(propositions)
        return int(self.table[state, letter]), float(self.rewards[state, letter])

    def run(self, trace: Iterable[Collection[str]]) -> tuple[list[int], list[float]]:
        """The states, the start first [T + 1], and the rewards [T]."""
        states, paid = [0], []
        for propositions in trace:
            state, reward = self.step(states[-1], propositions)
            states.append(state)
            paid.append(reward)
        return states, paid


def _compiled(read: Declared) -> tuple[Any, ...]:
    names = tuple(dict.fromkeys((read.start, *(s for e in read.edges for s in (e.source, e.to)), *read.terminal)))
    guards = [parse(edge.when) for edge in read.edges]
    held = tuple(sorted(frozenset[str]().union(*map(atoms, guards))))
    if len(held) > MAX_ATOMS:
        raise ConfigError(f"a reward machine has at most {MAX_ATOMS} atoms; got {len(held)}")
    letters = [frozenset(a for i, a in enumerate(held) if n >> i & 1) for n in range(1 << len(held))]
    table = np.repeat(np.arange(len(names))[:, None], len(letters), axis=1)
    rewards, taken = np.zeros(table.shape), np.full(table.shape, -1)
    for number, (edge, guard) in enumerate(zip(read.edges, guards, strict=True)):
        if edge.source in read.terminal:
            raise ConfigError(f"state {edge.source!r} is terminal, and an edge leads out of it to {edge.to!r}")
        at = names.index(edge.source), [n for n, letter in enumerate(letters) if holds(guard, letter)]
        if (taken[at] >= 0).any():
            other = read.edges[taken[at].max()]
            raise ConfigError(f"from {edge.source!r} both {other.when!r} and {edge.when!r} fit the same step")
        taken[at], table[at], rewards[at] = number, names.index(edge.to), finite(edge.reward, "an edge's reward")
    return names, held, table, rewards, np.asarray([name in read.terminal for name in names])
