"""S4b: bounds that a gate does not fix itself, found once for the whole step from detached ratios and advantages."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.ratios import Parts
from agentgym_trainers.objective.tokens import Tokens, pool


def bounded(gate: Any, t: Tokens, parts: Parts) -> Any:
    """The gate with its bounds found; gates with fixed bounds as they are."""
    if not isinstance(gate, declare.Clip) or gate.adaptive is None:
        return gate
    low, high = adapted(gate.adaptive, parts.ratio.detach(), t.advantages)
    return msgspec.structs.replace(gate, low=1.0 - low, high=high - 1.0, adaptive=None)


def adapted(declared: declare.Adaptive, ratio: Tensor, advantages: Tensor) -> tuple[float, float]:
    """BAPO's (c_low, c_high) (2510.18927): first c_low, then c_high rises step by step until the positive part P of
    the objective balances the negative part N; the widest bounds where it never does.

    With count = "value" a higher c_low makes N larger, although it takes the gradient from the tokens that it clips:
    so the released code counts.
    """
    lows, highs = _grid(*declared.low, declared.step[0]), _grid(*declared.high, declared.step[1])
    up, down = (side.nonzero().squeeze(1) for side in (advantages > 0, advantages < 0))
    positive = _positive(ratio[up].double(), advantages[up].double(), highs, declared.count)
    negative = _negative(ratio[down].double(), -advantages[down].double(), lows, declared.count)
    path = [(i, 0) for i in range(len(lows))] + [(len(lows) - 1, j) for j in range(1, len(highs))]
    for i, j in path:
        against = negative[i] + (positive[j] if declared.balance == "share" else 0.0)
        if positive[j] >= declared.target * against:
            break
    return lows[i], highs[j]


def _grid(start: float, end: float, step: float) -> list[float]:
    """From start by step; the last one is end."""
    return [min(start + i * step, end) for i in range(math.ceil((end - start) / step - 1e-9) + 1)]


def _positive(ratio: Tensor, a: Tensor, highs: list[float], count: str) -> list[float]:
    """sum min(rho, c) A for every c of `highs`, or over the tokens with rho <= c alone, in one pass."""
    bin = torch.bucketize(ratio, ratio.new_tensor(highs))
    free, held = (pool(x, bin, len(highs) + 1, mean=False) for x in (ratio * a, a))
    above = held.sum() - held.cumsum(0)[:-1]
    clipped = above * ratio.new_tensor(highs) if count == "value" else 0.0
    return (free.cumsum(0)[:-1] + clipped).tolist()


def _negative(ratio: Tensor, a: Tensor, lows: list[float], count: str) -> list[float]:
    """sum max(rho, c) |A| for every c of `lows`, or over the tokens with rho >= c alone, in one pass."""
    bin = torch.bucketize(ratio, ratio.new_tensor(lows), right=True)
    free, held = (pool(x, bin, len(lows) + 1, mean=False) for x in (ratio * a, a))
    below = held.cumsum(0)[:-1]
    clipped = below * ratio.new_tensor(lows) if count == "value" else 0.0
    return (free.sum() - free.cumsum(0)[:-1] + clipped).tolist()
