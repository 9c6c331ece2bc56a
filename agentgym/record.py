"""The recorder: what a running episode writes its turns into, and the two storages it can end as.

Rows are plain lists while the episode runs: terms may still arrive for a turn that is over (a board game pays the
loser after the winner's move). Records are built once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite, nan
from typing import Any

import msgspec
import numpy as np

from agentgym.errors import EnvironmentFault
from agentgym.types import (
    Action,
    Array,
    Column,
    Columns,
    Draft,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Timing,
    Turn,
    Turns,
)

Clock = tuple[float, float, float]
"""Seconds: start since the episode's start, in the policy, in the environment."""


class _Row(msgspec.Struct, gc=False):
    """One turn in the making; kept out of the garbage collector's passes like the records it holds."""

    step: int
    agent: str
    observation: Observation
    action: Action
    clock: Clock
    drafts: tuple[Draft, ...]
    rewards: tuple[RewardTerm, ...] = ()


class Recorder:
    """The turns of one episode. `add` each turn of a step, then `pay` the step's reward terms."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: list[_Row] = []

    def add(
        self,
        step: int,
        agent: str,
        observation: Observation,
        action: Action,
        clock: Clock,
        drafts: tuple[Draft, ...] = (),
    ) -> None:
        self.rows.append(_Row(step, agent, observation, action, clock, drafts))

    def pay(self, terms: Iterable[RewardTerm], sole: str) -> None:
        """File each term under its turn and write the turn's index into it.

        A term that names a turn stays there. Else it goes to the latest turn of its agent, and a term without an
        agent (or whose agent never acted) to the last turn; `sole` is the only agent of this step, or "" for several.
        An empty agent is filled in where one agent only can be meant, but never for level "team".
        """
        last = len(self.rows) - 1
        for term in terms:
            if not isfinite(term.value):
                raise EnvironmentFault(f"reward term {term.name!r} is {term.value}: a reward is a finite number")
            agent = term.agent or ("" if term.level == "team" else sole)
            turn = last
            if term.turn >= 0 or agent != sole:
                turn, agent = self._home(term, agent, last)
            self.rows[turn].rewards += (_filed(term, turn, agent),)

    def _home(self, term: RewardTerm, agent: str, last: int) -> tuple[int, str]:
        """(turn, agent) of a term that is not simply the acting agent's latest."""
        if term.turn > last:
            raise EnvironmentFault(f"reward term {term.name!r} names turn {term.turn}; the last so far is {last}")
        if term.turn >= 0:
            return term.turn, term.agent or ("" if term.level == "team" else self.rows[term.turn].agent)
        return next((i for i in range(last, -1, -1) if self.rows[i].agent == agent), last), agent

    def turns(self) -> Turns:
        """A list of turns: holds everything."""
        return Turns(items=tuple(_turn(row) for row in self.rows))

    def columns(self) -> Turns | Columns:
        """Columns, where every row fits into them; else (an action that is no array of the shape, a term of another
        level) the list of turns, which holds the same."""
        by_agent: dict[str, list[_Row]] = {}
        for row in self.rows:
            by_agent.setdefault(row.agent, []).append(row)
        agents = {agent: _column(rows) for agent, rows in by_agent.items()}
        whole = {agent: column for agent, column in agents.items() if column is not None}
        return Columns(agents=whole) if len(whole) == len(agents) else self.turns()


def _filed(term: RewardTerm, turn: int, agent: str) -> RewardTerm:
    """The term with its turn and agent written in (building it is four times faster than `replace`)."""
    return RewardTerm(
        name=term.name,
        value=term.value,
        level=term.level,
        turn=turn,
        agent=agent,
        segment=term.segment,
        cause=term.cause,
    )


def _turn(row: _Row) -> Turn:
    start, policy, environment = row.clock
    return Turn(
        step=row.step,
        agent=row.agent,
        observation=row.observation,
        action=row.action,
        drafts=row.drafts,
        rewards=row.rewards,
        timing=Timing(start=start, policy=policy, environment=environment),
    )


def _column(rows: Sequence[_Row]) -> Column | None:
    """One agent's rows as arrays; None where they do not fit."""
    ledger = _ledger(rows)
    seen, done = [r.observation for r in rows], [r.action for r in rows]
    observations, actions = _stack([o.array for o in seen]), _stack([a.array for a in done])
    plain = all(not (o.messages or o.tools or o.anchor) for o in seen)
    plain = plain and all(not (a.text or a.tool_calls or a.span) for a in done) and not any(r.drafts for r in rows)
    if ledger is None or observations is None or actions is None or not plain:
        return None
    try:
        return Column(
            steps=Ids([r.step for r in rows]),
            observations=observations,
            actions=actions,
            masks=_optional(_stack, [o.action_mask for o in seen]),
            rewards=ledger,
            logprobs=_optional(Floats, [a.logprob for a in done]),
            values=_optional(Floats, [a.value for a in done]),
            states=_optional(_stack, [a.state for a in done]),
        )
    except _Ragged:
        return None


class _Ragged(Exception):
    """Some rows have a value and some do not, or not of one shape."""


def _optional(build: Any, values: Sequence[Any]) -> Any:
    """None when no row has the value, else all of them together."""
    missing = sum(value is None for value in values)
    if missing == len(values):
        return None
    built = None if missing else build(values)
    if built is None:
        raise _Ragged
    return built


def _stack(arrays: Sequence[Array | None]) -> Array | None:
    """Arrays of one dtype and shape under each other, [T, ...], by joining their bytes; None where they differ."""
    first = arrays[0]
    if first is None or any(a is None or a.shape != first.shape or a.dtype != first.dtype for a in arrays):
        return None
    return Array(
        dtype=first.dtype, shape=(len(arrays), *first.shape), data=b"".join(a.data for a in arrays if a is not None)
    )


def _ledger(rows: Sequence[_Row]) -> dict[str, Floats] | None:
    """{term name: [T]}, NaN where a turn has no such term; None for terms that a column cannot hold."""
    amounts: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        for term in row.rewards:
            column = amounts.setdefault(term.name, [nan] * len(rows))
            if term.level != "turn" or term.cause != "policy" or term.segment or term.agent != row.agent:
                return None
            if column[index] == column[index]:
                return None
            column[index] = term.value
    return {name: Floats(np.asarray(values, np.float32)) for name, values in amounts.items()}
