"""How good a reward model is: pairs it orders rightly, probabilities that come true."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from agentgym.errors import ConfigError


class Calibration(NamedTuple):
    """`error` is the expected calibration error (0 is perfect), `brier` the mean squared error, `bins` the mean
    probability, the share that came true and the count of every bin that is not empty."""

    error: float
    brier: float
    bins: tuple[tuple[float, float, int], ...]


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> Calibration:
    """Probabilities [n] against outcomes [n] (0 or 1) in `bins` equal intervals of probability."""
    p, y = np.asarray(probabilities, float), np.asarray(outcomes, float)
    if p.shape != y.shape or not p.size:
        raise ConfigError(f"{p.size} probabilities and {y.size} outcomes; there is one for each, and at least one")
    if not ((p >= 0) & (p <= 1)).all():
        raise ConfigError("a probability is from 0 to 1; take the sigmoid of scores first")
    place = np.minimum((p * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights, bins) for weights in (p, y)]
    gap = np.abs(sums[0] - sums[1]).sum() / p.size
    held = [(float(sums[0][b] / n), float(sums[1][b] / n), int(n)) for b, n in enumerate(counts) if n]
    return Calibration(float(gap), float(np.mean((p - y) ** 2)), tuple(held))


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """The share of pairs in which the chosen one scores higher; a tie counts half."""
    difference = np.asarray(chosen, float) - np.asarray(rejected, float)
    if not difference.size:
        raise ConfigError("no pair, no accuracy; there is at least one")
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))
