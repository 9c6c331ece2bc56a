"""S5: detached weights for the mismatch between sampler and proximal policy, w = pi_proximal / pi_sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.tokens import CLAMP, Tokens, per_sequence


def weights(declared: Sequence[Any], t: Tokens) -> Tensor:
    """The product of the corrections that are declared, in their order: [M], 1 without any."""
    found = torch.ones_like(t.old)
    for behaviour in declared:
        found = BEHAVIOURS[type(behaviour)](behaviour, t, found)
    return found


def pooled(level: str, t: Tokens) -> Tensor:
    """log w [M] per token, or one figure a sequence: its mean ("geometric") or sum ("product")."""
    gap = (t.old - t.sampled).detach()
    if level != "token":
        gap = per_sequence(gap, t, mean=level == "geometric")[t.sequence]
    return gap.clamp(-CLAMP, CLAMP)


def _truncate(b: declare.Truncate, t: Tokens, before: Tensor) -> Tensor:
    return before * pooled(b.level, t).exp().clamp(max=b.cap)


BEHAVIOURS: dict[type[declare.Kind], Callable[[Any, Tokens, Tensor], Tensor]] = {declare.Truncate: _truncate}
"""(correction, tokens, weights so far) -> weights [M]"""
