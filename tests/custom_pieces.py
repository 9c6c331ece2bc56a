"""Pieces of an objective as an outsider would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from agentgym_trainers.objective.ratios import Parts
from agentgym_trainers.objective.tokens import Tokens, Totals

NUMBER = 3


def squared(t: Tokens) -> Parts:
    return Parts((2.0 * (t.logp - t.old),))


def halved(t: Tokens, parts: Parts, *, by: float = 2.0) -> Tensor:
    return parts.ratio * t.advantages / by


def clip_like(t: Tokens, parts: Parts) -> Tensor:
    """A sequence clip wide enough that a plain declaration of it would be refused."""
    return torch.minimum(parts.ratio * t.advantages, parts.ratio.clamp(0.9, 1.15) * t.advantages)


def doubled(t: Tokens, before: Tensor) -> Tensor:
    return 2.0 * before


def summed(x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return x.sum() / max(total.sequences, 1)


def distance(t: Tokens) -> Tensor:
    return (t.logp - t.old) ** 2


def ones(t: Tokens) -> Tensor:
    return torch.ones_like(t.logp)


def bonus(t: Tokens, parts: Parts) -> Tensor:
    assert t.entropy is not None
    return parts.ratio * t.advantages + 0.01 * t.entropy


def lost(t: Tokens) -> Tensor:
    return torch.full_like(t.logp, torch.nan)


def strange(tokens: Tokens, parts: Parts) -> Tensor:
    """A gate that is no number."""
    return parts.ratio * tokens.advantages * float("nan")
