"""Discounted sums and generalised advantage estimation over packed sequences, without a loop over positions.

N positions, S sequences: sequence s is bounds[s]:bounds[s+1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agentgym.advantages.table import Bools, Ints, Real

Discount = float | Real
Mask = NDArray[np.bool_ | np.integer | np.floating]


def scan(x: Real, carry: Real) -> Real:
    """y_n = x_n + carry_n y_(n+1): [N]. `carry` is 0 at the last position of each sequence.

    By doubling: after pass i, y_n holds the terms of 2^i positions, so the longest sequence takes log2 passes.
    """
    y, c, reach = np.array(x, np.float64), np.array(carry, np.float64), 1
    while c.any():
        y[:-reach] += c[:-reach] * y[reach:]
        c[:-reach] *= c[reach:]
        c[-reach:] = 0.0
        reach *= 2
    return y


def inner(bounds: Ints, discount: Discount) -> Real:
    """The discount from each position to the next one of its sequence, 0 at the last: [N]."""
    found = np.array(np.broadcast_to(discount, int(bounds[-1])), np.float64)
    found[bounds[1:][np.diff(bounds) > 0] - 1] = 0.0
    return found


def gae(
    rewards: Real,
    values: Real,
    mask: Mask,
    bounds: Ints,
    gamma: Discount = 1.0,
    lam: float = 0.95,
    final: Real | None = None,
) -> Real:
    """Generalised advantages (1506.02438) [N], before any whitening:

        d_n = r_n + gamma V_(n+1) - V_n,  A_n = d_n + gamma lam A_(n+1)

    rewards, values [N]; mask [N]: where it is 0 nothing was decided, and value and advantage of the next decision are
    carried over it unchanged (rewards there are not counted; verl's form). gamma is one number or [N], the discount
    from a position to the next decision. final [S]: the value after the last position, for a sequence that was cut
    off; 0 without it.
    """
    kept = np.asarray(mask) != 0
    before = np.concatenate(([0], np.cumsum(kept)))
    inside = before[bounds]
    discount = np.array(np.broadcast_to(gamma, len(rewards)), np.float64)[kept]
    v = np.asarray(values, np.float64)[kept]
    ahead = _ahead(v, inside, final)
    delta = np.asarray(rewards, np.float64)[kept] + discount * ahead - v
    return _carried(scan(delta, inner(inside, discount * lam)), kept, bounds, before)


def returns(
    rewards: Real,
    values: Real,
    mask: Mask,
    bounds: Ints,
    gamma: Discount = 1.0,
    lam: float = 0.95,
    final: Real | None = None,
) -> Real:
    """What a critic should have said, the lambda-return A + V: [N]. Arguments as of `gae`."""
    return gae(rewards, values, mask, bounds, gamma, lam, final) + values


def _ahead(values: Real, bounds: Ints, final: Real | None) -> Real:
    """The value of the next position of the sequence, `final` behind the last: [N]."""
    ahead = np.concatenate((values[1:], np.zeros(min(len(values), 1))))
    some = np.diff(bounds) > 0
    ahead[bounds[1:][some] - 1] = 0.0 if final is None else np.asarray(final, np.float64)[some]
    return ahead


def _carried(found: Real, kept: Bools, bounds: Ints, before: Ints) -> Real:
    """Values of the kept positions, each also written over the positions that were left out just before it: [N]."""
    stop = np.repeat(before[bounds[1:]], np.diff(bounds))
    following = before[:-1]
    padded = np.concatenate((found, [0.0]))
    return np.where(following < stop, padded[following], 0.0)
