"""Scores of groups become centred values otherwise than by subtraction: ranks, quantiles, the best alone.

x [U] are scores, g [U] numbers their groups from 0 without gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from agentgym.advantages.declare import AnyTransform, Best, PassAtK, RankNormal, Risk
from agentgym.advantages.groups import extremes, joint, order, quantile, sizes
from agentgym.advantages.table import Ints, Real
from agentgym.errors import RecordError

EPS = 1e-6


class AdvantageState:
    """What advantages remember between steps: the tracked quantiles of each term. Save it with the learner's state."""

    def __init__(self) -> None:
        self.quantiles: dict[str, tuple[float, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """As plain values: {"quantiles": {term: [lower, upper]}}."""
        return {"quantiles": {term: list(pair) for term, pair in self.quantiles.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; raises `RecordError` where it is none."""
        try:
            self.quantiles = {str(k): (float(low), float(high)) for k, (low, high) in state["quantiles"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(f"no state of advantages: {state!r:.80}") from error


def transformed(transform: AnyTransform, x: Real, g: Ints, state: AdvantageState, term: str) -> Real:
    """The values that a transform puts in place of the scores: [U]. `term` names it in the state."""
    if isinstance(transform, Risk):
        return _risk(transform, x, g, state, term)
    if isinstance(transform, RankNormal):
        return rank_normal(x, g, transform.convention)
    by_kind: dict[type, Callable[[Real, Ints], Real]] = {PassAtK: pass_at_k, Best: best}
    return by_kind[type(transform)](x, g)


def rank_normal(x: Real, g: Ints, convention: str = "half") -> Real:
    """Normal quantiles of the ranks in each group, ties with the average of theirs: [U]."""
    by, rank = order(x, g)
    n = sizes(g)[g[by]]
    p = (rank + 0.5) / n if convention == "half" else (rank + 1.0) / (n + 1.0)
    scores = np.empty_like(x)
    scores[by] = normal_quantile(p)
    tie = joint(g, np.unique(x, return_inverse=True)[1])
    found = (np.bincount(tie, scores) / sizes(tie))[tie]
    return np.where(sizes(tie)[tie] == sizes(g)[g], 0.0, found)


def risk(s: Real, low: ArrayLike, high: ArrayLike, declared: Risk) -> Real:
    """The mix of range and tail value at risk of scores `s`, given their quantiles `low` and `high`: see `Risk`."""
    low, high = np.asarray(low), np.asarray(high)
    middle = np.maximum(s - low, 0) - np.maximum(s - high, 0) + declared.natural * (low - high)
    rvar = middle / (declared.upper - declared.lower + EPS)
    tail = np.maximum(s - high, 0) / (1 - declared.upper + EPS)
    cvar = tail if declared.seeking else -np.maximum(low - s, 0) / (declared.lower + EPS)
    mixed: Real = (declared.weight * cvar + rvar) / (declared.weight + 1)
    return mixed


def tracked(q: float, s: Real, alpha: float, lr: float) -> float:
    """One step of a quantile tracker: q + lr (alpha - share of s below q). No scores, no step."""
    return q + lr * (alpha - float((s < q).mean())) if len(s) else q


def _risk(declared: Risk, x: Real, g: Ints, state: AdvantageState, term: str) -> Real:
    alphas = (declared.lower, declared.upper)
    if not declared.track or not len(x):
        low, high = (quantile(x, g, alpha)[g] for alpha in alphas)
        return risk(x, low, high, declared)
    held = state.quantiles.get(term)
    now = held or tuple(float(quantile(x, np.zeros_like(g), alpha)[0]) for alpha in alphas)
    moved = now if held is None else [tracked(q, x, a, declared.lr) for q, a in zip(held, alphas, strict=True)]
    state.quantiles[term] = (moved[0], moved[1])
    return risk(x, now[0], now[1], declared)


def pass_at_k(x: Real, g: Ints) -> Real:
    """The best of each group: what it is ahead of the second best; the others 0: [U]. A group of one: its score."""
    by, rank = order(x, g)
    n = sizes(g)[g[by]]
    second = np.where(n > 1, np.concatenate(([0.0], x[by][:-1])) if len(x) else x, 0.0)
    out = np.zeros_like(x)
    out[by] = np.where(rank == n - 1, x[by] - second, 0.0)
    return out


def best(x: Real, g: Ints) -> Real:
    """The best of each group: its own score, in equal parts where several are best; the others 0: [U]."""
    top = x == extremes(x, g)[1][g]
    return np.where(top, x / np.bincount(g, top)[g], 0.0)


# --- the normal quantile: Wichura's AS 241 (1988), as in Python's statistics.NormalDist -------------------------

_CENTRE = (
    [2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0],
    [5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0],
)  # fmt: skip
_TAIL = (
    [7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0],
    [1.05075007164441684324e-9, 5.4759380849953449460e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0],
)  # fmt: skip


def normal_quantile(p: Real) -> Real:
    """The p quantile of the standard normal distribution for 1e-11 < p < 1 - 1e-11, to 1e-15 relative: [U]."""
    q = p - 0.5
    central = 0.180625 - np.minimum(q * q, 0.180625)
    r = np.sqrt(-np.log(np.minimum(p, 1 - p))) - 1.6
    tail = np.sign(q) * np.polyval(_TAIL[0], r) / np.polyval(_TAIL[1], r)
    found: Real = np.where(
        np.abs(q) <= 0.425, q * np.polyval(_CENTRE[0], central) / np.polyval(_CENTRE[1], central), tail
    )
    return found
