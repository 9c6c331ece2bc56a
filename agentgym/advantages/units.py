"""What a term compares, and with whom: trajectories, an agent's parts of them, or turns, and the groups they form.

P trajectories, K turns, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from agentgym.advantages.declare import Term
from agentgym.advantages.groups import joint
from agentgym.advantages.scores import paid
from agentgym.advantages.table import Ints, Table


class Units(NamedTuple):
    """of [K]: the unit of each turn (-1: none). Of a unit, `owner` [U] is its trajectory and `turn` [U] one of its
    turns (its only one where units are turns; 0 where they are trajectories)."""

    of: Ints
    owner: Ints
    turn: Ints


def units_of(term: Term, table: Table) -> Units:
    """The units of a term. With credit "turn" and a component those turns that carry such a reward."""
    if term.whole and "agent" in term.parts:
        part = joint(table.owner, table.agent)
        _, turn, of = np.unique(part, return_index=True, return_inverse=True)
        return Units(of, table.owner[turn], turn)
    if term.whole:
        return Units(table.owner, np.arange(table.size), np.zeros(table.size, np.intp))
    kept = np.arange(table.turns)
    if term.credit == "turn" and term.component:
        kept = np.flatnonzero(paid(term, table))
    of = np.full(table.turns, -1)
    of[kept] = np.arange(len(kept))
    return Units(of, table.owner[kept], kept)


def groups_of(parts: Sequence[str], table: Table, units: Units) -> Ints:
    """The group of each unit, numbered from 0 without gaps: [U]. Raises `UnknownName` for a label that is missing,
    `ConfigError` where an environment names no anchors."""
    if "none" in parts:
        return np.arange(len(units.owner))
    return joint(np.zeros(len(units.owner), np.intp), *(_column(part, table, units) for part in parts))


def _column(part: str, table: Table, units: Units) -> Ints:
    if part == "anchor":
        return table.anchor[units.turn]
    if part == "turn":
        return table.index[units.turn]
    if part == "agent":
        return table.agent[units.turn]
    if part == "prompt":
        return table.prompt[units.owner]
    if part == "domain":
        return table.domain[units.owner]
    if part.startswith("label:"):
        return table.label(part.removeprefix("label:"))[units.owner]
    return np.zeros(len(units.owner), np.intp)  # "batch"
