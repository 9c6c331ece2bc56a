"""Differential information: what a preference says of the policy that fulfils it. DID (2505.23761), as read in notes.

The information that turns ref into pi is the differential distribution q = (pi / ref) / sum (pi / ref). DPO with
winners from ref and losers from pi_l has pi* as its optimum exactly where ref / pi_l ~ (pi* / ref)^beta. Distributions
are [..., V] and have mass everywhere, else `ConfigError`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agentgym.errors import ConfigError

Floats = NDArray[np.float64]


def differential(policy: ArrayLike, reference: ArrayLike) -> Floats:
    """q ~ policy / reference [..., V]."""
    return _softmax(_logs(policy) - _logs(reference))


def entropy(q: ArrayLike) -> Floats:
    """In nats [...]. Of a differential distribution: low where a preference teaches facts, high where it aligns."""
    p = np.asarray(q, np.float64)
    found: Floats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return found


def optimal_loser(target: ArrayLike, reference: ArrayLike, beta: float) -> Floats:
    """The pi_l ~ ref (ref / pi*)^beta for which DPO with this beta has pi* as its optimum [..., V]."""
    ref = _logs(reference)
    return _softmax(ref + beta * (ref - _logs(target)))


def departure(loser: ArrayLike, target: ArrayLike, reference: ArrayLike, beta: float) -> Floats:
    """How far the losers' distribution is from the optimal one: KL(loser, optimal), 0 where DPO leads to pi* [...]."""
    logs = _logs(loser)
    found: Floats = (np.exp(logs) * (logs - np.log(optimal_loser(target, reference, beta)))).sum(-1)
    return found


def of_samples(policy: ArrayLike, reference: ArrayLike, tokens: ArrayLike) -> tuple[Floats, float]:
    """An estimate where only S sampled sequences are known, as if there were no others: q over them, and its entropy
    as a share of log S (1 where all differ alike, also for one sequence).

    Log-probs [S] summed over sequences of `tokens` [S]; ratios are per token, so that length does not decide.
    """
    sums = np.asarray(policy, np.float64) - np.asarray(reference, np.float64)
    counts = np.asarray(tokens, np.float64)
    if not len(sums) or not (counts > 0).all() or not np.isfinite(sums).all():
        raise ConfigError(f"sequences have tokens and finite log-probs; got {len(sums)} of {counts.tolist()} tokens")
    q = _softmax(sums / counts)
    return q, float(entropy(q) / np.log(len(q))) if len(q) > 1 else 1.0


def _logs(x: ArrayLike) -> Floats:
    p = np.asarray(x, np.float64)
    if not (p > 0).all() or not np.allclose(p.sum(-1), 1.0, atol=1e-6):
        raise ConfigError("a distribution has mass everywhere here, and sums to 1: ratios are taken of it")
    return np.log(p)


def _softmax(logs: Floats) -> Floats:
    raised = np.exp(logs - logs.max(-1, keepdims=True))
    found: Floats = raised / raised.sum(-1, keepdims=True)
    return found
