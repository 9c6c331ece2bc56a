"""Advantages: every term scores its units, compares them within their groups, and the terms are summed turn by turn.

P trajectories that did not fail, K turns, U units of a term. All numpy; the walk over the records is table.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agentgym.advantages import groups
from agentgym.advantages.compare import Scores, bundled, compared
from agentgym.advantages.declare import TURN_KEYS, Term
from agentgym.advantages.scores import Critic, Values, advantages_of, counted, critic_of, earned, to_go, totals
from agentgym.advantages.table import Real, Sample, Table, sampled
from agentgym.advantages.transforms import AdvantageState
from agentgym.advantages.units import Units, groups_of, units_of
from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.types import Trajectory

WHITEN = ("none", "trajectories", "turns", "tokens")


def advantages(
    samples: Sequence[Sample],
    terms: Sequence[Term],
    *,
    whiten: Literal["none", "trajectories", "turns", "tokens"] = "none",
    state: AdvantageState | None = None,
    values: Values | None = None,
) -> list[Real]:
    """The weighted sum of the terms: per trajectory one value per turn [turns], and [0] for a failed one.

    whiten  normalises the sum once more over the batch (ddof 1, eps 1e-6): every trajectory counts once, or every
            turn, or every sampled token
    state   what terms remember from step to step; moved by this call. Without it every call is a first step
    values  for credit "gae": per sample [turns], or [turns + agents] with the value after the end of a truncated
            episode (one for each agent, in the order of their first turns); without it what the actions recorded

    A failed trajectory enters no statistic and has no advantage, which is not an advantage of zero. Raises
    `RecordError` where a reward or a value is missing or not finite, naming the episode.
    """
    if whiten not in WHITEN:
        raise unknown("way to whiten", whiten, WHITEN)
    table, held = Table(samples), state or AdvantageState()
    critic = critic_of(table, samples, values) if any(term.credit == "gae" for term in terms) else None
    total = np.zeros(table.turns)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, term in enumerate(terms):
            for part in _split(term, table):
                total += part.weight * _per_turn(part, table, held, f"{i}.{part.component}".rstrip("."), critic)
        if whiten != "none":
            total = groups.whiten(total, _counts(table, whiten), 1, 1e-6)
    table.finite(total, table.owner, "the advantage")
    return _by_sample(samples, table, total)


def critic_targets(samples: Sequence[Sample], term: Term, *, values: Values | None = None) -> list[Real]:
    """What a critic should have said at each turn, the lambda-return of a term with credit "gae": as `advantages`."""
    if term.credit != "gae":
        raise ConfigError(f"a critic learns the returns of a term with credit 'gae', not {term.credit!r}")
    table = Table(samples)
    critic = critic_of(table, samples, values)
    return _by_sample(samples, table, advantages_of(term, table, critic) + critic.at)


def to_tokens(trajectory: Trajectory, per_turn: Real) -> NDArray[np.float32]:
    """A value per turn, repeated for each token that the turn's action sampled: [sampled tokens]."""
    if len(per_turn) != len(trajectory.turns):
        raise RecordError(f"{len(per_turn)} values for the {len(trajectory.turns)} turns of {trajectory.episode.id}")
    return np.repeat(per_turn, sampled(trajectory)).astype(np.float32)


def _by_sample(samples: Sequence[Sample], table: Table, per_turn: Real) -> list[Real]:
    found = (per_turn[start:stop] for start, stop in pairwise(table.bounds.tolist()))
    return [np.zeros(0) if t.status == "failed" else next(found) for t, _ in samples]


def _counts(table: Table, whiten: str) -> Real:
    """How much each turn counts, so that every trajectory, turn or sampled token counts once: [K]."""
    if whiten == "tokens":
        return table.tokens
    if whiten == "turns":
        return np.ones(table.turns)
    found: Real = 1.0 / np.diff(table.bounds)[table.owner]
    return found


def _split(term: Term, table: Table) -> list[Term]:
    """A term with the key "component" is one term for every reward name of the batch."""
    if "component" not in term.parts:
        return [term]
    key = tuple(part for part in term.parts if part != "component") or "batch"
    return [term.replace(key=key, component=name) for name in table.components()]


def _per_turn(term: Term, table: Table, state: AdvantageState, name: str, critic: Critic | None) -> Real:
    """A term's advantage of each turn [K]; 0 for turns that are none of its units."""
    units = units_of(term, table)
    if not (table.turns and len(units.owner)):
        return np.zeros(table.turns)
    x = _scores(term, table, units, critic)
    if "bundle" in term.parts:
        return bundled(term, table, x, state, name)[units.of]
    found = compared(term, _gathered(term, table, units, x), state, name)
    return np.where(units.of >= 0, found[units.of], 0.0)


def _scores(term: Term, table: Table, units: Units, critic: Critic | None) -> Real:
    """The score of each unit: [U]."""
    if term.whole and term.whose == "agent" and "agent" in term.parts:
        turn, amount = counted(term, table)
        return groups.total(units.of[turn], amount, len(units.owner))
    if term.whole:
        return totals(term, table)[units.owner]
    if term.credit == "gae" and critic is not None:
        return advantages_of(term, table, critic)
    return (earned if term.credit == "turn" else to_go)(term, table)[units.turn]


def _gathered(term: Term, table: Table, units: Units, x: Real) -> Scores:
    """The scores with what this term compares them by; columns it does not read stay 0."""
    none, run = np.zeros_like(x), units.owner
    if term.centre == "others":
        coarse = groups_of([part for part in term.parts if part not in TURN_KEYS], table, units)
        run = groups.joint(units.owner, coarse)
    weighed = term.centre == "length_weighted" or term.scale == "tokens"
    turns = np.diff(table.bounds)[units.owner].astype(np.float64)
    return Scores(
        x=x,
        group=groups_of(term.parts, table, units),
        owner=units.owner,
        run=run,
        tokens=_lengths(table, units) if weighed else none,
        weight=turns if term.count == "turns" else np.ones_like(x),
        given=table.metric(term.given)[units.owner] if term.centre == "given" else none,
    )


def _lengths(table: Table, units: Units) -> Real:
    """Sampled tokens of each unit: [U]."""
    some = units.of >= 0
    return groups.total(units.of[some], table.tokens[some], len(units.owner))
