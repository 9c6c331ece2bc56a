"""Statistics of groups, all at once: x [U] are scores, g [U] numbers their groups from 0 without gaps (G groups)."""

from __future__ import annotations

import numpy as np

from agentgym.advantages.table import Ints, Real
from agentgym.errors import ConfigError


def joint(*columns: Ints) -> Ints:
    """One number for each combination of the columns (none negative), from 0 without gaps: [U]."""
    found = np.zeros_like(columns[0])
    for column in columns:
        base = int(column.max(initial=0)) + 1
        found = np.unique(found * base + column, return_inverse=True)[1]
    return found


def total(index: Ints, amounts: Real | Ints, size: int) -> Real:
    """The amounts summed by index: [size]."""
    return np.bincount(index, amounts, size).astype(np.float64, copy=False)


def sizes(g: Ints) -> Real:
    """Members of each group: [G]."""
    return np.bincount(g).astype(np.float64)


def extremes(x: Real, g: Ints) -> tuple[Real, Real]:
    """Least and greatest score of each group: [G] each."""
    count = int(g.max(initial=-1)) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, g, x)
    np.maximum.at(high, g, x)
    return low, high


def mean(x: Real, g: Ints, weights: Real) -> Real:
    """Weighted mean of each group [G]; exactly the common value where all are equal, so that those give exact zeros.

    A group without any weight has its plain mean.
    """
    weights = np.where(np.bincount(g, weights)[g] > 0, weights, 1.0)
    low, high = extremes(x, g)
    found = np.bincount(g, weights * x) / np.bincount(g, weights)
    return np.where(low == high, low, found)


def deviation(x: Real, g: Ints, weights: Real, ddof: int) -> Real:
    """Standard deviation of each group [G], a member counted `weights` times; 0 where all are equal."""
    residual = x - mean(x, g, weights)[g]
    count = np.bincount(g, weights)
    spread: Real = np.sqrt(np.bincount(g, weights * residual**2) / np.maximum(count - ddof, 1))
    return spread


def others(x: Real, g: Ints, owner: Ints, run: Ints) -> Real:
    """Mean over the group's units that have another owner: [U].

    Where there are none, what it was at the latest earlier unit of the same `run` [U] that had some (units of a run
    are in order of time); NaN where there is none of these either. It never reads a score of its own owner.
    """
    centre = mean(x, g, np.ones_like(x))[g]
    rest = x - centre
    mine = joint(g, owner)
    count = sizes(g)[g] - sizes(mine)[mine]
    total = np.bincount(g, rest)[g] - np.bincount(mine, rest)[mine]
    known = np.where(count > 0, centre + total / np.maximum(count, 1), np.nan)
    order = np.argsort(run, kind="stable")
    places = np.arange(len(x))
    latest = np.maximum.accumulate(np.where(count[order] > 0, places, -1))
    begins = np.searchsorted(run[order], run[order])
    out = np.empty_like(x)
    out[order] = np.where(latest >= begins, known[order][latest], np.nan)
    return out


def order(x: Real, g: Ints) -> tuple[Ints, Ints]:
    """(units sorted by group and score, rank of each of these in its group from 0): [U] each."""
    by = np.lexsort((x, g))
    starts = np.concatenate(([0], np.cumsum(np.bincount(g))))
    return by, np.arange(len(x)) - starts[g[by]]


def quantile(x: Real, g: Ints, alpha: float) -> Real:
    """The `alpha` quantile of each group, interpolated linearly: [G]."""
    by, _ = order(x, g)
    count = np.bincount(g)
    place = alpha * (count - 1)
    low = np.floor(place).astype(np.intp)
    first = np.cumsum(count) - count
    below, above = x[by][first + low], x[by][first + np.minimum(low + 1, count - 1)]
    found: Real = below + (place - low) * (above - below)
    return found


def whiten(x: Real, weights: Real, ddof: int, eps: float) -> Real:
    """(x - mean) / (std + eps), units counted by weight; zeros where there is no spread to divide by."""
    count = weights.sum()
    if len(x) and not count:
        raise ConfigError("there are no sampled tokens to whiten by; whiten by trajectories or turns")
    if count <= ddof:
        return np.zeros_like(x)
    one = np.zeros(len(x), np.intp)
    centred = x - mean(x, one, weights)[0]
    spread = np.sqrt((weights * centred**2).sum() / (count - ddof))
    return centred / (spread + eps) if spread > 0 else np.zeros_like(x)
