"""Views of a ledger: which turn a term counts for, what a turn is owed, terms that are worked out or added, a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, RecordError
from agentgym.types import RewardTerm, Trajectory, Turns, iterate

if TYPE_CHECKING:
    from agentgym.rewards.compose import Composed

POTENTIAL_SUFFIXES = (".before", ".after", ".drift")
DERIVED = "policy."
"""Terms whose names begin so are worked out, never emitted by an environment."""


def carried(trajectory: Trajectory) -> list[tuple[int, RewardTerm]]:
    """(index of the turn that carries it, term) for all of `trajectory.rewards`; columns need not build their turns."""
    turns = trajectory.turns
    if isinstance(turns, Turns):
        return [(i, term) for i, turn in enumerate(turns.items) for term in turn.rewards]
    amounts = {agent: {n: x.numpy().tolist() for n, x in c.rewards.items()} for agent, c in turns.agents.items()}
    return [
        (i, RewardTerm(name=name, value=values[row], turn=i, agent=agent))
        for i, (_, agent, row) in enumerate(turns.order)
        for name, values in amounts[agent].items()
        if values[row] == values[row]
    ]


def turn_of(trajectory: Trajectory, extra: Sequence[RewardTerm] = ()) -> NDArray[np.intp]:
    """The turn each term of `trajectory.rewards`, then of `extra`, counts for: the one it names, else the one that
    carries it (the last one for an extra term). [terms]

    Raises `RecordError` where a term names a turn that does not exist.
    """
    turns = len(trajectory.turns)
    lines = (*carried(trajectory), *((turns - 1, term) for term in extra))
    found = np.asarray([i if term.turn < 0 else term.turn for i, term in lines], np.intp)
    if len(found) and not 0 <= found.min() <= found.max() < turns:
        raise RecordError(f"a reward term names turn {found.max()}, the trajectory has {turns}")
    return found


def by_turn(composed: Composed, trajectory: Trajectory) -> NDArray[np.float64]:
    """The shares summed by turn: [turns]. Their sum is value - base; the base belongs to no turn."""
    turns = turn_of(trajectory, composed.extra)
    if len(turns) != len(composed.shares):
        raise RecordError(f"{len(composed.shares)} shares for the {len(turns)} reward terms of this trajectory")
    return np.bincount(turns, np.asarray(composed.shares), minlength=len(trajectory.turns)).astype(
        np.float64, copy=False
    )


def derived(trajectory: Trajectory, kl: Sequence[float] | None = None) -> tuple[RewardTerm, ...]:
    """Facts of each turn as terms of level "turn":

    policy.tokens     sampled tokens of the turn's action
    policy.truncated  1 where they were cut off by the token limit
    policy.kl         log pi - log pi_ref summed over them; only with `kl`, one number per turn. The trainer
                      knows it and hands it on by `Composer.trajectory(..., extra=...)`
    """
    if kl is not None and len(kl) != len(trajectory.turns):
        raise RecordError(f"{len(kl)} divergences for the {len(trajectory.turns)} turns of {trajectory.episode.id}")
    found: list[RewardTerm] = []
    for i, turn in enumerate(iterate(trajectory.turns)):
        span = turn.action.span
        amounts = {"tokens": len(span.ids) if span else 0, "truncated": bool(span and span.finish == "length")}
        facts = amounts if kl is None else {**amounts, "kl": kl[i]}
        found += [RewardTerm(name=DERIVED + n, value=float(v), turn=i, agent=turn.agent) for n, v in facts.items()]
    return tuple(found)


def with_terms(trajectory: Trajectory, terms: Iterable[RewardTerm]) -> Trajectory:
    """The trajectory with more lines in its ledger, each with the turn it names (else the last): what judges found.

    Raises `RecordError` where that turn does not exist, `ConfigError` for columns (pass those terms as `extra`).
    """
    added = tuple(terms)
    if not added:
        return trajectory
    if not isinstance(trajectory.turns, Turns):
        raise ConfigError(
            "terms cannot be added to the columns of a numeric episode; pass them to the composer as extra"
        )
    turns = list(trajectory.turns.items)
    for term in added:
        at = len(turns) - 1 if term.turn < 0 else term.turn
        if not 0 <= at < len(turns):
            raise RecordError(f"reward term {term.name!r} names turn {at}, {trajectory.episode.id} has {len(turns)}")
        turns[at] = turns[at].replace(rewards=(*turns[at].rewards, term.replace(turn=at, by="judge")))
    richer: Trajectory = trajectory.replace(turns=Turns(items=tuple(turns)))
    return richer


def explain(composed: Composed, terms: Iterable[RewardTerm]) -> str:
    """The composed ledger as a table for people: every term (extra ones last), what it was and what it is owed."""
    rows = [("turn", "agent", "term", "value", "share")]
    for term, share in zip((*terms, *composed.extra), composed.shares, strict=True):
        name = term.name if term.cause == "policy" else f"{term.name} ({term.cause})"
        where = "" if term.turn < 0 else str(term.turn)
        rows.append((where, term.agent, name, f"{term.value:.4g}", f"{share:+.4g}"))
    rows += [("", "", "base", "", f"{composed.base:+.4g}"), ("", "", "value", "", f"{composed.value:+.4g}")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
