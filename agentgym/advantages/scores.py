"""What a term scores: whole trajectories, the reward of a turn, what is still to come, generalised advantages.

P trajectories, K turns, C chains: the turns of one agent in one trajectory, in order of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentgym.advantages.declare import Term
from agentgym.advantages.gae import gae, inner, scan
from agentgym.advantages.groups import total
from agentgym.advantages.table import Bools, Ints, Real, Sample, Table
from agentgym.errors import ConfigError, RecordError

Values = Sequence[NDArray[np.floating] | None]


def counted(term: Term, table: Table) -> tuple[Ints, Real]:
    """(turn, amount) of the ledger's lines that count for a term: raw ones of its component, else shares."""
    ledger = table.ledger
    kept = table.whose(term.whose)
    if not term.component:
        return ledger.turn[kept], ledger.share[kept]
    kept = kept & (table.names == term.component)
    return ledger.turn[kept], table.amounts[kept]


def totals(term: Term, table: Table) -> Real:
    """What each trajectory got in all: [P]."""
    if not term.component and term.whose == "all":
        return table.value
    turn, amount = counted(term, table)
    return total(table.owner[turn], amount, table.size)


def earned(term: Term, table: Table) -> Real:
    """What each turn got: [K]. What the team got in a step, every turn of the step got."""
    turn, amount = counted(term, table)
    if term.whose != "team":
        return total(turn, amount, table.turns)
    return total(table.moment[turn], amount, table.turns)[table.moment]


def paid(term: Term, table: Table) -> Bools:
    """Turns that got a reward of the component, be it 0: [K]."""
    turn, _ = counted(term, table)
    found = np.zeros(table.turns, bool)
    found[turn] = True
    return found if term.whose != "team" else np.isin(table.moment, table.moment[turn])


def to_go(term: Term, table: Table) -> Real:
    """G_k = sum over j >= k of gamma^(step_j - step_k) r_j: [K].

    j runs over the later turns of the episode; with `whose` "agent" over those of the agent. The team's rewards count
    from the turn's step on, whoever's turn carries them: each step's turns are as one.
    """
    rewards = earned(term, table)
    if term.whose == "team":
        _, first = np.unique(table.moment, return_index=True)
        bounds = np.searchsorted(table.owner[first], np.arange(table.size + 1))
        return scan(rewards[first], _discounts(term, table, first, bounds))[table.moment]
    order, bounds = table.chains if term.whose == "agent" else (np.arange(table.turns), table.bounds)
    found = np.empty(table.turns)
    found[order] = scan(rewards[order], _discounts(term, table, order, bounds))
    return found


def _discounts(term: Term, table: Table, order: Ints, bounds: Ints) -> Real:
    """gamma^(steps to the next turn) along the turns in this order, 0 at the end of each sequence."""
    gap = np.diff(table.step[order], append=0)
    return inner(bounds, term.gamma ** np.maximum(gap, 0))


# --- with values ------------------------------------------------------------------------------------------------


class Critic(NamedTuple):
    """Values: `at` each turn [K], and `end` behind the last turn of each chain [C] (0 where the episode came to its
    own end)."""

    at: Real
    end: Real


def critic_of(table: Table, samples: Sequence[Sample], values: Values | None) -> Critic:
    """The given values, else those that the actions recorded. Raises `RecordError` where one is missing."""
    order, bounds = table.chains
    owner = table.owner[order][bounds[:-1]]
    found = Critic(table.recorded, np.zeros(len(owner)))
    if values is not None:
        held = [v for (t, _), v in zip(samples, values, strict=True) if t.status != "failed"]
        found = Critic(*table.given(held, np.bincount(owner, minlength=table.size)))
    missing = np.flatnonzero(np.isnan(found.at))
    if len(missing):
        turn, episode = table.index[missing[0]], table.samples[table.owner[missing[0]]][0].episode.id
        raise RecordError(
            f"turn {turn} of episode {episode} has no value for credit 'gae'; pass values=, or play a policy that "
            f"records Action.value"
        )
    table.finite(found.at, table.owner, "a value")
    table.finite(found.end, owner, "the value after the end")
    return found


def advantages_of(term: Term, table: Table, critic: Critic) -> Real:
    """Generalised advantages along each chain: [K]."""
    order, bounds = table.chains
    if term.whose == "all" and len(bounds) - 1 > np.count_nonzero(np.diff(table.bounds)):
        raise ConfigError("credit 'gae' with several agents: set whose = 'agent' or 'team', as the values foresee")
    discount = _discounts(term, table, order, bounds)
    # the reward between two turns of an agent is what is to come, less what is to come from the next turn on
    ahead = to_go(term, table)[order]
    rewards = ahead - discount * np.append(ahead[1:], 0.0)[: len(ahead)]
    ends = np.where(discount == 0, term.gamma, discount)
    found = np.empty(table.turns)
    found[order] = gae(rewards, critic.at[order], np.ones(table.turns), bounds, ends, term.lam, critic.end)
    return found
