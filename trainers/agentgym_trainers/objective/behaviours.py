"""S5: detached weights for the mismatch between sampler and proximal policy, w = pi_proximal / pi_sampler.

A token whose sampler log-prob is NaN (not recorded) has w = 1. Corrections are multiplied in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.regularisers import KLS
from agentgym_trainers.objective.tokens import CLAMP, Tokens, greatest, per_sequence, per_token


def weights(declared: Sequence[Any], t: Tokens) -> Tensor:
    """The product of the corrections that are declared, in their order: [M], 1 without any."""
    found = torch.ones_like(t.old)
    for behaviour in declared:
        found = BEHAVIOURS[type(behaviour)](behaviour, t, found)
    return found.detach()


def gap(t: Tokens) -> Tensor:
    """log w of each token [M]."""
    return (t.old - t.sampled).detach().nan_to_num(nan=0.0)


def pooled(level: str, t: Tokens) -> Tensor:
    """w [M] per token, or one figure a sequence: the geometric mean or product of its tokens'."""
    log = gap(t)
    if level != "token":
        log = per_token(per_sequence(log, t, mean=level == "geometric"), t)
    return log.clamp(-CLAMP, CLAMP).exp()


def _truncate(b: declare.Truncate, t: Tokens, before: Tensor) -> Tensor:
    return before * pooled(b.level, t).clamp(max=b.cap)


def _mask(b: declare.Mask, t: Tokens, before: Tensor) -> Tensor:
    w = pooled(b.level, t)
    return before * w * ((w >= b.low) & (w <= b.high))


def _clamp(b: declare.Clamp, t: Tokens, before: Tensor) -> Tensor:
    return before * pooled(b.level, t).clamp(b.low, b.high)


def _veto(b: declare.Veto, t: Tokens, before: Tensor) -> Tensor:
    least = -greatest(-gap(t), t.sequence, t.sequences)
    return before * per_token(least >= (math.log(b.floor) if b.floor else -math.inf), t)


def _reject(b: declare.Reject, t: Tokens, before: Tensor) -> Tensor:
    found = KLS[b.form](gap(t))
    if b.over == "max":
        found = per_token(greatest(found, t.sequence, t.sequences), t)
    elif b.over != "token":
        found = per_token(per_sequence(found, t, mean=b.over == "mean"), t)
    return before * (found <= b.bound)


def _off_policy_mask(b: declare.OffPolicyMask, t: Tokens, before: Tensor) -> Tensor:
    drift = (t.sampled - t.logp).detach().nan_to_num(nan=0.0)
    far = per_token(per_sequence(drift, t, mean=True) > b.threshold, t)
    return before * ~(far & (t.advantages < 0))


def _normalise(b: declare.Normalise, t: Tokens, before: Tensor) -> Tensor:
    """Weights that are all 0 stay 0."""
    mean = before.sum() / max(len(before), 1)
    return before / torch.where(mean > 0, mean, 1.0)


BEHAVIOURS: dict[type[declare.Kind], Callable[[Any, Tokens, Tensor], Tensor]] = {
    declare.Truncate: _truncate,
    declare.Mask: _mask,
    declare.Clamp: _clamp,
    declare.Veto: _veto,
    declare.Reject: _reject,
    declare.OffPolicyMask: _off_policy_mask,
    declare.Normalise: _normalise,
    declare.Custom: call,
}
"""(correction, tokens, weights so far) -> weights [M]"""
