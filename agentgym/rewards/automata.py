"""Temporal formulas as deterministic automata over finite traces.

    safe = automaton("G (pay -> asked)")
    safe.accepts([{"asked"}, {"pay", "asked"}])       # True
    safe.hopeless[safe.run([{"pay"}])[-1]]            # True: no continuation can repair it

A formula is progressed: reading one step, it becomes what the rest of the trace has to fulfil. A state is that
obligation in disjunctive normal form over the formula's temporal subformulas, of which there are finitely many, so the
automaton is finite; then it is minimised. Two markers keep the end of a trace exact: X a leaves "a, and there is more"
(true U true), N a leaves "a, or this was all" (false R false).

The meaning of objectives that no sum of step rewards expresses: 2310.11840.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError
from agentgym.rewards.logic import FALSE, TRUE, Formula, atoms, normal, parse

MAX_ATOMS, MAX_CELLS, MAX_CLAUSES = 10, 2**16, 2**10
Letter = frozenset[str]
Clause = frozenset[Formula]
Obligation = frozenset[Clause]
"""A set of clauses, one of which has to be fulfilled whole. No clause contains another."""

_ALWAYS: Obligation = frozenset((frozenset(),))
_NEVER: Obligation = frozenset()
_MORE, _OVER = Formula("U", (TRUE, TRUE)), Formula("R", (FALSE, FALSE))


@dataclass(frozen=True, eq=False)
class Automaton:
    """A minimal deterministic automaton; state 0 is the start.

    atoms      what a letter is made of; letter number n holds atom i where bit i of n is set
    table      [states, 2 ** atoms] the next state
    accepting  [states] whether a trace that ends here fulfils the formula
    distance   [states] the fewest steps to an accepting state; inf where there is no way
    hopeless   [states] rejected whatever comes          settled  [states] accepted whatever comes
    """

    atoms: tuple[str, ...]
    table: NDArray[np.intp]
    accepting: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.table)

    def letter(self, propositions: Collection[str]) -> int:
        """The number of a set of propositions; those that are no atoms do not matter."""
        return sum(1 << i for i, atom in enumerate(self.atoms) if atom in propositions)

    def run(self, trace: Iterable[Collection[str]]) -> list[int]:
        """The states, the start first: [T + 1]."""
        states = [0]
        for propositions in trace:
            states.append(int(self.table[states[-1], self.letter(propositions)]))
        return states

    def accepts(self, trace: Iterable[Collection[str]]) -> bool:
        return bool(self.accepting[self.run(trace)[-1]])

    @functools.cached_property
    def distance(self) -> NDArray[np.float64]:
        return _distance(self.table, self.accepting)

    @functools.cached_property
    def hopeless(self) -> NDArray[np.bool_]:
        return np.isinf(self.distance)

    @functools.cached_property
    def settled(self) -> NDArray[np.bool_]:
        return np.isinf(_distance(self.table, ~self.accepting))


@functools.lru_cache(maxsize=64)
def automaton(formula: str | Formula) -> Automaton:
    """The minimal automaton of an LTLf formula (`agentgym.rewards.logic` has the language).

    Automata of formulas that mean the same over the same atoms are equal array by array. Raises `ConfigError` for text
    that is no formula, more than 10 atoms, or an automaton too large to be meant (2^16 entries of the table).
    """
    read = parse(formula) if isinstance(formula, str) else formula
    names = tuple(sorted(atoms(read)))
    if len(names) > MAX_ATOMS:
        raise ConfigError(f"a formula has at most {MAX_ATOMS} atoms (its table has 2^atoms columns); got {len(names)}")
    letters = [frozenset(a for i, a in enumerate(names) if n >> i & 1) for n in range(1 << len(names))]
    states, rows = _explore(_clauses(normal(read)), letters)
    return Automaton(names, *_minimal(np.asarray(rows, np.intp), np.asarray([_ends(s) for s in states])))


# --- progression ------------------------------------------------------------------------------------------------


def _explore(start: Obligation, letters: Sequence[Letter]) -> tuple[list[Obligation], list[list[int]]]:
    """Every obligation that can be reached, and where each letter leads."""
    number = {start: 0}
    states, rows = [start], []
    for state in states:  # grows while it is read
        row = []
        for after in (_progress(state, letter) for letter in letters):
            if after not in number:
                number[after] = len(states)
                states.append(after)
            row.append(number[after])
        rows.append(row)
        if len(states) * len(letters) > MAX_CELLS:
            raise _large()
    return states, rows


def _large() -> ConfigError:
    return ConfigError("the formula's automaton is too large; say it in several formulas, each judged by itself")


def _clauses(formula: Formula) -> Obligation:
    """Disjunctive normal form of a formula in negation normal form."""
    if formula.op in ("true", "false"):
        return _ALWAYS if formula.op == "true" else _NEVER
    if formula.op in ("&", "|"):
        both = [_clauses(part) for part in formula.parts]
        return _all(*both) if formula.op == "&" else _any(*both)
    return frozenset((frozenset((formula,)),))


def _any(*obligations: Obligation) -> Obligation:
    return _least(frozenset[Clause]().union(*obligations))


def _all(*obligations: Obligation) -> Obligation:
    found = _ALWAYS
    for other in obligations:
        if len(found) * len(other) > MAX_CLAUSES:
            raise _large()
        found = _least(frozenset(a | b for a in found for b in other))
    return found


def _least(clauses: Obligation) -> Obligation:
    """Without clauses that another one makes superfluous, and without those that contradict themselves."""
    sound = [c for c in clauses if not any(e.op == "!" and e.parts[0] in c for e in c)]
    return frozenset(c for c in sound if not any(other < c for other in sound))


def _progress(obligation: Obligation, letter: Letter) -> Obligation:
    """What the rest has to fulfil after this letter."""
    return _any(*(_all(*(_step(element, letter) for element in clause)) for clause in obligation))


@functools.lru_cache(maxsize=65536)
def _step(element: Formula, letter: Letter) -> Obligation:
    op, parts = element.op, element.parts
    if op in ("atom", "!"):
        name = element.name or parts[0].name
        return _ALWAYS if (name in letter) == (op == "atom") else _NEVER
    if op == "X":
        return _all(_clauses(parts[0]), _clauses(_MORE))
    if op == "N":
        return _any(_clauses(parts[0]), _clauses(_OVER))
    first, second = (_progress(_clauses(part), letter) for part in parts)
    again: Obligation = frozenset((frozenset((element,)),))
    return _any(second, _all(first, again)) if op == "U" else _all(second, _any(first, again))


def _ends(obligation: Obligation) -> bool:
    """Whether a trace may end with this obligation."""
    return any(all(element.op in ("N", "R", "!") for element in clause) for clause in obligation)


# --- graphs -----------------------------------------------------------------------------------------------------


def _minimal(table: NDArray[np.intp], accepting: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Moore's refinement, then states numbered in the order of breadth-first search from the start."""
    block = accepting.astype(np.intp)
    while True:
        rows, finer = np.unique(np.column_stack([block, block[table]]), axis=0, return_inverse=True)
        done, block = len(rows) == len(np.unique(block)), finer.reshape(-1)
        if done:
            break
    first = np.unique(block, return_index=True)[1]
    order, place = [int(block[0])], {int(block[0]): 0}
    for here in order:  # grows while it is read
        for there in block[table[first[here]]].tolist():
            if there not in place:
                place[there] = len(order)
                order.append(there)
    renumber = np.argsort(order)
    return renumber[block[table[first[order]]]], accepting[first[order]]


def _distance(table: NDArray[np.intp], goal: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The fewest steps from each state to one of `goal`: [states], inf where there is no way."""
    found = np.where(goal, 0.0, np.inf)
    while True:
        nearer = np.minimum(found, 1.0 + found[table].min(axis=1))
        if np.array_equal(nearer, found):
            return found
        found = nearer
