"""The composition: ratio -> gate -> behaviour weights -> aggregation -> regularisers; and its figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import aggregate
from agentgym_trainers.objective.behaviours import weights
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.objective.gates import gated
from agentgym_trainers.objective.ratios import ratio_of
from agentgym_trainers.objective.regularisers import KLS, penalty
from agentgym_trainers.objective.tokens import Tokens, Totals


def loss(objective: Objective, tokens: Tokens, total: Totals) -> tuple[Tensor, dict[str, float]]:
    """The micro-batch's part of the loss, and sums over its tokens for the statistics (see `summarise`)."""
    parts = ratio_of(objective.ratio, tokens)
    gained = weights(objective.behaviour, tokens) * gated(objective.gate, tokens, parts)
    found = -aggregate(objective.aggregation, gained, tokens, total)
    for r in objective.regularisers:
        if r.coef:
            found = found + r.coef * aggregate(objective.aggregation, penalty(r, tokens), tokens, total)
    return found, _sums(objective, tokens, parts.ratio().detach())


def _sums(objective: Objective, t: Tokens, ratio: Tensor) -> dict[str, float]:
    gate, clipped = objective.gate, torch.zeros(())
    if isinstance(gate, declare.Clip):
        up = (t.advantages > 0) & (ratio > 1 + gate.high)
        down = (t.advantages < 0) & (ratio < 1 - gate.low)
        clipped = (up | down).sum()
    found: dict[str, Any] = {
        "nll": -t.logp.detach().sum(),
        "ratio": ratio.sum(),
        "ratio_max": ratio.max() if len(ratio) else 0.0,
        "ratio_variance": ((ratio - 1) ** 2).sum(),
        "clipped": clipped,
        "kl": KLS["k3"]((t.logp - t.old).detach()).sum(),
        "mismatch": (t.old - t.sampled).abs().sum(),
    }
    if t.entropy is not None:
        found["entropy"] = t.entropy.detach().sum()
    if t.reference is not None:
        found["kl_reference"] = KLS["k3"](t.reference - t.logp.detach()).sum()
    return {name: float(value) for name, value in found.items()}


def summarise(sums: list[dict[str, float]], total: Totals) -> dict[str, float]:
    """Sums of micro-batches to figures per token; `ratio_max` is the largest."""
    names = {name for part in sums for name in part}
    return {
        name: max(part.get(name, 0.0) for part in sums)
        if name.endswith("_max")
        else sum(part.get(name, 0.0) for part in sums) / max(total.tokens, 1)
        for name in sorted(names)
    }
