"""The composition: ratio -> gate -> behaviour weights -> regularisers -> aggregation; and its figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import aggregate
from agentgym_trainers.objective.behaviours import weights
from agentgym_trainers.objective.bounds import bounded
from agentgym_trainers.objective.contrast import contrasted
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.objective.gates import clipped, gated
from agentgym_trainers.objective.ratios import Parts, ratio_of
from agentgym_trainers.objective.regularisers import KLS, penalty
from agentgym_trainers.objective.tokens import Tokens, Totals


def loss(objective: Objective, tokens: Tokens, total: Totals) -> tuple[Tensor, dict[str, float]]:
    """The micro-batch's part of the loss, and sums over its tokens for the statistics (see `summarise`).

    A `coupled` objective is given the tokens of the whole step."""
    t = contrasted(objective.contrast, tokens)
    parts = ratio_of(objective.ratio, t)
    gate = bounded(objective.gate, t, parts)
    w = weights(objective.behaviour, replace(t, old=t.logp.detach()) if objective.bypass else t)
    value = w * gated(gate, t, parts) if objective.behaviour else gated(gate, t, parts)
    for regulariser in objective.regularisers:
        if regulariser.coef or isinstance(regulariser, declare.Perception):
            value = value - penalty(regulariser, t)
    return -aggregate(objective.aggregation, value, t, total), _sums(objective, gate, t, parts, w)


@torch.no_grad()
def _sums(objective: Objective, gate: Any, t: Tokens, parts: Parts, w: Tensor) -> dict[str, float]:
    ratio, (up, down) = parts.ratio, clipped(gate, t, parts)
    found = {
        "nll": -t.logp.sum(),
        "ratio": ratio.sum(),
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
        "ratio_variance": ((ratio - 1) ** 2).sum(),
        "clipped": (up | down).count_nonzero(),
        "clipped_up": up.count_nonzero(),
        "clipped_down": down.count_nonzero(),
        "kl": KLS["k3"](t.logp - t.old).sum(),
        "mismatch": (t.old - t.sampled).nan_to_num(nan=0.0).abs().sum(),
    }
    if objective.behaviour:
        found |= {"weight": w.sum(), "weight_squared": (w**2).sum()}
    if isinstance(gate, declare.Clip) and gate is not objective.gate:
        bounds = w.new_tensor([1 - gate.low, 1 + gate.high]) * len(w)
        found |= {"bound_low": bounds[0], "bound_high": bounds[1]}
    if t.reference is not None:
        found["kl_reference"] = KLS["k3"](t.reference - t.logp).sum()
    found |= {name: x.sum() for name in ("entropy", "divergence") if (x := getattr(t, name)) is not None}
    return dict(zip(found, torch.stack([x.double() for x in found.values()]).tolist(), strict=True))


def summarise(sums: list[dict[str, float]], total: Totals) -> dict[str, float]:
    """Sums of micro-batches to figures per token; `ratio_max` is the largest, `ess` the effective share of the tokens
    under the behaviour weights, (sum w)^2 / (M sum w^2)."""
    names = {name for part in sums for name in part}
    found = {
        name: max(part.get(name, 0.0) for part in sums)
        if name.endswith("_max")
        else sum(part.get(name, 0.0) for part in sums) / max(total.tokens, 1)
        for name in sorted(names)
    }
    if squared := found.pop("weight_squared", 0.0):
        found["ess"] = found["weight"] ** 2 / squared
    return found
