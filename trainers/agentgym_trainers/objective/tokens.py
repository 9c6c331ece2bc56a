"""What a loss sees: the trained tokens of a micro-batch (or of a whole step), flat, so that masks do not appear."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

CLAMP = 20.0
"""Log-ratios are clamped to +-CLAMP before they are exponentiated (verl, core_algos.py)."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """M trained tokens of S sequences, in the order of the sequences. [M] unless said otherwise.

    logp        of the policy; carries gradient, as do `entropy`, `masked` and `divergence`
    old         of the proximal policy
    sampled     of the distribution the sampler drew from
    sequence    which of the S sequences a token belongs to, ascending
    turn, segment     turn index; index into `labels`
    group, domain     [S] hashes: sequences with equal ones share a prompt, a domain
    reward      [S] composed reward of the trajectory
    reference   of the frozen reference policy
    masked      of the policy when observations are masked
    divergence  D(teacher, policy) at this token
    """

    logp: Tensor
    old: Tensor
    sampled: Tensor
    advantages: Tensor
    sequence: Tensor
    sequences: int
    turn: Tensor | None = None
    segment: Tensor | None = None
    labels: tuple[str, ...] = ("",)
    group: Tensor | None = None
    domain: Tensor | None = None
    reward: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None
    masked: Tensor | None = None
    divergence: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Counts over all micro-batches of one optimiser step and all ranks: the denominators of every mean.

    `parts` counts the tokens of each part of a "segments" aggregation.
    """

    tokens: int
    sequences: int
    parts: dict[str, int] = field(default_factory=dict)


def pool(x: Tensor, index: Tensor, count: int, *, mean: bool) -> Tensor:
    """Sums or means of [M] over `count` bins: [count]; 0 for an empty one."""
    total = x.new_zeros(count).index_add(0, index, x)
    if not mean:
        return total
    return total / torch.bincount(index, minlength=count).clamp(min=1)


def per_sequence(x: Tensor, t: Tokens, *, mean: bool) -> Tensor:
    """Sums or means over each sequence: [S]."""
    return pool(x, t.sequence, t.sequences, mean=mean)
