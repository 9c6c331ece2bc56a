"""Advantages that read the current log-probs, so that they are formed when the loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.tokens import Tokens, greatest, needed, per_sequence, per_token, pool


def contrasted(declared: Any, t: Tokens) -> Tokens:
    """The tokens with the advantages of the contrast; as they are without one."""
    if declared is None:
        return t
    return replace(t, advantages=CONTRASTS[type(declared)](declared, t).detach())


def _discriminative(d: declare.Discriminative, t: Tokens) -> Tensor:
    """DRPO's gradient weights [M]. Sequences without a reward or without tokens take no part."""
    reward = needed(t.reward, "reward")
    groups, group = needed(t.group, "group").unique(return_inverse=True)
    present = reward.isfinite() & (t.lengths > 0)
    right, wrong = present & (reward > d.threshold), present & (reward <= d.threshold)
    shortness = (1.0 - t.lengths / d.max_length) / d.length_temperature
    likely = per_sequence(t.logp.detach(), t, mean=True) / d.tau
    weight = _softmax(shortness.to(likely.dtype), right, group, len(groups))
    weight = weight - _softmax(likely, wrong, group, len(groups))
    sides = [pool(side.to(likely.dtype), group, len(groups), mean=False) > 0 for side in (right, wrong)]
    return per_token(weight * (sides[0] & sides[1])[group], t)


def _softmax(x: Tensor, among: Tensor, group: Tensor, groups: int) -> Tensor:
    """The softmax over the members of each group that are `among`, 0 for the others: [S]."""
    top = greatest(torch.where(among, x, -torch.inf), group, groups)
    shares = torch.where(among, (x - top[group]).exp(), 0.0)
    return shares / pool(shares, group, groups, mean=False)[group].clamp(min=1.0)


CONTRASTS: dict[type[declare.Kind], Callable[[Any, Tokens], Tensor]] = {
    declare.Discriminative: _discriminative,
    declare.Custom: call,
}
"""(contrast, tokens) -> advantages [M]"""
