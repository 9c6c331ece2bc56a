"""Pairs of trajectories of one prompt, the better one first, out of groups of samples.

found = build(samples, declared)
found.pairs, found.counts               # what is left out is counted by reason
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import RecordError
from agentgym.rewards import Composed
from agentgym.types import Trajectory, iterate
from agentgym_trainers.preference.declare import AllPairs, Builder, Judged, Preference

Samples = Sequence[tuple[Trajectory, Composed | None]]


class Pair(NamedTuple):
    """Two trajectories of one prompt. `margin` is the difference of their rewards, `rates` each one's win-rate against
    the other members of its group (a tie is half a win)."""

    chosen: Trajectory
    rejected: Trajectory
    margin: float
    rates: tuple[float, float]


class Pairs(NamedTuple):
    """`counts`: trajectories left out ("failed", "empty": nothing in it was sampled) and groups without a pair
    ("single", "tied", "unbalanced", "infeasible")."""

    pairs: tuple[Pair, ...]
    counts: Counter[str]


class _Group(NamedTuple):
    """The members of one prompt that may be compared; numbers are [n]."""

    trajectories: list[Trajectory]
    composed: list[Composed]
    values: NDArray[np.float64]
    lengths: NDArray[np.int64]

    def rates(self) -> NDArray[np.float64]:
        """The share of the others that each one beats."""
        wins = (np.sign(self.values[:, None] - self.values) + 1.0) / 2.0
        rates: NDArray[np.float64] = (wins.sum(1) - 0.5) / (len(self.values) - 1)
        return rates

    def balanced(self, ratio: float) -> NDArray[np.bool_]:
        """[n, n]: whether two members are about as long as each other."""
        longer, shorter = np.maximum.outer(self.lengths, self.lengths), np.minimum.outer(self.lengths, self.lengths)
        fits: NDArray[np.bool_] = longer <= ratio * shorter if ratio else np.ones(longer.shape, bool)
        return fits


def build(samples: Samples, declared: Preference) -> Pairs:
    """The pairs of these samples, groups in the order of their first member.

    Raises `RecordError` for a reward that is not finite and for a judge that is not in the ledger.
    """
    counts: Counter[str] = Counter()
    found: list[Pair] = []
    for group in _groups(samples, counts):
        places = _places(group, declared.pairs) if len(group.values) > 1 else "single"
        if isinstance(places, str):
            counts[places] += 1
        else:
            found += _pairs(group, places)
    return Pairs(tuple(found), counts)


def _groups(samples: Samples, counts: Counter[str]) -> list[_Group]:
    held: defaultdict[tuple[str, str, int], list[tuple[Trajectory, Composed, int]]] = defaultdict(list)
    for trajectory, composed in samples:
        length = sampled(trajectory)
        if trajectory.status == "failed" or composed is None:
            counts["failed"] += 1
        elif not length:
            counts["empty"] += 1
        else:
            held[trajectory.prompt].append((trajectory, _finite(trajectory, composed), length))
    return [_group(members) for members in held.values()]


def _group(members: Sequence[tuple[Trajectory, Composed, int]]) -> _Group:
    trajectories, composed, lengths = (list(x) for x in zip(*members, strict=True))
    return _Group(trajectories, composed, np.asarray([c.value for c in composed]), np.asarray(lengths, np.int64))


def _finite(trajectory: Trajectory, composed: Composed) -> Composed:
    if not math.isfinite(composed.value):
        raise RecordError(
            f"the reward of {trajectory.episode.id} is {composed.value}; only finite ones can be compared"
        )
    return composed


def sampled(trajectory: Trajectory) -> int:
    """Tokens that are trained on."""
    spans = (turn.action.span for turn in iterate(trajectory.turns))
    return sum(len(span.ids) for span in spans if span is not None)


# --- which two --------------------------------------------------------------------------------------------------


def _places(group: _Group, declared: Builder) -> NDArray[np.intp] | str:
    """(chosen, rejected) [n, 2], or the reason why there is none."""
    if isinstance(declared, Judged):
        return _judged(group, declared)
    gaps = group.values[:, None] - group.values
    above = gaps > declared.margin
    fits = above & group.balanced(declared.length_ratio)
    if not fits.any():
        return "unbalanced" if above.any() else "tied"
    if isinstance(declared, AllPairs):
        return np.argwhere(fits)
    return np.argwhere(fits & (gaps == gaps[fits].max()))[:1]


def _judged(group: _Group, declared: Judged) -> NDArray[np.intp] | str:
    pairs = zip(group.trajectories, group.composed, strict=True)
    feasible = np.asarray([_feasible(t, c, declared) for t, c in pairs])
    if not feasible.any():
        return "infeasible"
    against = ~feasible if (~feasible).any() else feasible
    best = int(np.where(feasible, group.values, -np.inf).argmax())
    worst = int(np.where(against, group.values, np.inf).argmin())
    if feasible[worst] and group.values[best] == group.values[worst]:
        return "tied"
    return np.asarray([[best, worst]]) if group.balanced(declared.length_ratio)[best, worst] else "unbalanced"


def _feasible(trajectory: Trajectory, composed: Composed, declared: Judged) -> bool:
    """Whether every constraint holds; the world's terms are never counted."""
    totals: defaultdict[str, float] = defaultdict(float)
    for term in (*trajectory.rewards, *composed.extra):
        if term.cause == "policy":
            totals[term.name] += term.value
    for name in declared.constraints:
        if name not in totals:
            raise RecordError(
                f"{trajectory.episode.id} has no reward term {name!r}, which pairs 'judged' need; it has "
                f"{', '.join(sorted(totals)) or 'none'}"
            )
    return all(totals[name] >= declared.at_least for name in declared.constraints)


def _pairs(group: _Group, places: NDArray[np.intp]) -> list[Pair]:
    rates = group.rates()
    return [
        Pair(
            chosen=group.trajectories[good],
            rejected=group.trajectories[bad],
            margin=float(group.values[good] - group.values[bad]),
            rates=(float(rates[good]), float(rates[bad])),
        )
        for good, bad in places.tolist()
    ]
