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

COUNT = ".count"
"""Ends the name of a sum that another one is divided by, instead of by all tokens."""


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
        **_apart(t),
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


def _apart(t: Tokens) -> dict[str, Tensor]:
    """What tells the sampler's numerics from the age of its weights, with the counts of the tokens that show it.

    mismatch       |log-prob of sampler and learner under the same weights|: of the version that sampled where that was
                   worked out again, else on tokens that the weights of now sampled
    staleness_kl   KL from the version that sampled (the sampler's word for it where nothing else is known, numerics
                   included) to the policy at the start of the update, on tokens of older versions
    age, age_max   updates since the token was sampled
    """
    if t.age is None or not (known := t.age.isfinite()).any():
        return {}
    found = {**_counted("age", t.age, known), "age_max": t.age[known].max()}
    then = t.sampled if t.behaviour is None else t.behaviour
    if t.behaviour is not None:
        found |= _counted("mismatch", (t.behaviour - t.sampled).abs(), known)
    elif t.own is not None:
        found |= _counted("mismatch", (t.own - t.sampled).abs(), t.age == 0)
    if t.own is not None:
        found |= _counted("staleness_kl", KLS["k3"](t.own - then), t.age > 0)
    return found


def _counted(name: str, x: Tensor, where: Tensor) -> dict[str, Tensor]:
    """The sum of what is finite of `x` there, and how much of it there is."""
    x = x[where & x.isfinite()]
    return {name: x.sum(), name + COUNT: x.new_tensor(len(x))}


def summarise(sums: list[dict[str, float]], total: Totals) -> dict[str, float]:
    """Sums of micro-batches to figures per token (or per token that shows one, and none where no token does); a name on
    `_max` is the largest, `ess` the effective share of the tokens under the behaviour weights, (sum w)^2 / (M sum w^2).
    """
    names = sorted({name for part in sums for name in part if not name.endswith(COUNT)})
    held = {name: [part[name] for part in sums if name in part] for name in names}
    counts = {name: sum(part.get(name + COUNT, 0.0) for part in sums) for name in names}
    found = {
        name: max(xs) if name.endswith("_max") else sum(xs) / (counts[name] or max(total.tokens, 1))
        for name, xs in held.items()
        if counts[name] or not any(name + COUNT in part for part in sums)
    }
    if squared := found.pop("weight_squared", 0.0):
        found["ess"] = found["weight"] ** 2 / squared
    return found
