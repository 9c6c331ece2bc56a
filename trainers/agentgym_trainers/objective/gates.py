"""S4: how far an update may push. (gate, tokens, parts of the ratio) -> objective [M], to be maximised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.ratios import Parts
from agentgym_trainers.objective.tokens import Tokens


def gated(declared: Any, t: Tokens, parts: Parts) -> Tensor:
    """The objective of every token behind the gate that is declared."""
    return GATES[type(declared)](declared, t, parts)


def _none(gate: declare.NoGate, t: Tokens, parts: Parts) -> Tensor:
    return parts.ratio() * t.advantages


def _clip(gate: declare.Clip, t: Tokens, parts: Parts) -> Tensor:
    """PPO (Schulman et al. 2017) with separate bounds, and the dual clip for negative advantages (Ye et al. 2020)."""
    ratio, a = parts.ratio(), t.advantages
    found = torch.minimum(ratio * a, ratio.clamp(1 - gate.low, 1 + gate.high) * a)
    return torch.where(a < 0, torch.maximum(found, gate.dual * a), found) if gate.dual else found


GATES: dict[type[declare.Kind], Callable[[Any, Tokens, Parts], Tensor]] = {
    declare.NoGate: _none,
    declare.Clip: _clip,
}
