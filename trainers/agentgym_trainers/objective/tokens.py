"""What a loss sees: the trained tokens of a micro-batch (or of a whole step), flat, so that masks do not appear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from agentgym.errors import RecordError

CLAMP = 20.0
"""Log-ratios are clamped to +-CLAMP before they are exponentiated (verl, core_algos.py)."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """M trained tokens of S sequences, in the order of the sequences. [M] unless said otherwise.

    logp        of the policy; carries gradient, as do `entropy`, `masked` and `divergence`
    old         of the proximal policy
    sampled     of the distribution the sampler drew from; NaN where it was not recorded
    own         of the learner at the start of the update; None where nothing has worked it out
    behaviour   of the version of the weights that sampled, worked out by the learner; NaN where that is not known
    age         updates since that version; NaN where it is not known
    sequence    which of the S sequences a token belongs to, ascending
    turn, segment     turn index; index into `labels`
    group, domain     [S] hashes: sequences with equal ones share a prompt, a domain
    reward      [S] composed reward of the trajectory; NaN where there is none
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
    own: Tensor | None = None
    behaviour: Tensor | None = None
    age: Tensor | None = None
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

    @cached_property
    def lengths(self) -> Tensor:
        """Trained tokens of each sequence: [S]."""
        every = torch.arange(self.sequences + 1, device=self.sequence.device)
        return torch.searchsorted(self.sequence, every).diff()


@dataclass(frozen=True)
class Totals:
    """Counts over all micro-batches of one optimiser step and all ranks: the denominators of every mean.

    `parts` counts the tokens of each part of a "segments" aggregation.
    """

    tokens: int
    sequences: int
    parts: dict[str, int] = field(default_factory=dict)


def needed(x: Tensor | None, what: str) -> Tensor:
    """A column that whoever made the tokens must have filled; `RecordError` where it is not there."""
    if x is None:
        raise RecordError(f"this objective reads Tokens.{what}, which is not there")
    return x


def pool(x: Tensor, index: Tensor, count: int, *, mean: bool) -> Tensor:
    """Sums or means of [M] over `count` bins: [count]; 0 for an empty one."""
    total = x.new_zeros(count).index_add(0, index, x)
    if not mean:
        return total
    return total / torch.bincount(index, minlength=count).clamp(min=1)


def per_sequence(x: Tensor, t: Tokens, *, mean: bool) -> Tensor:
    """Sums or means over each sequence: [S]."""
    total = torch.segment_reduce(x, "sum", lengths=t.lengths, unsafe=True)
    return total / t.lengths.clamp(min=1) if mean else total


def per_token(x: Tensor, t: Tokens) -> Tensor:
    """What each sequence has [S], given to its tokens: [M]."""
    found: Tensor = _PerToken.apply(x, t)
    return found


class _PerToken(torch.autograd.Function):
    """`x[t.sequence]`, whose derivative uses that a sequence's tokens lie together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tokens) -> Tensor:
        ctx.t = t
        return x.index_select(0, t.sequence)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return per_sequence(slope, ctx.t, mean=False), None


def within(x: Tensor, low: float, high: float) -> Tensor:
    """`x.clamp(low, high)`, with a derivative that costs one pass instead of five (0 at the very bounds)."""
    return hardtanh(x, low, high)


def greatest(x: Tensor, index: Tensor, count: int) -> Tensor:
    """The greatest of [M] in each of `count` bins: [count]; the least number there is for an empty one."""
    least = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    return x.new_full((count,), least).scatter_reduce(0, index, x, "amax")


def prefixes(x: Tensor, t: Tokens, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`of` (an associative function such as torch.minimum) over all tokens of the sequence up to and including this
    one: [M]. A scan in log2(longest sequence) passes; takes no gradient."""
    x, reach, longest = x.detach(), 1, int(t.lengths.max()) if t.sequences else 0
    while reach < longest:
        same = t.sequence[reach:] == t.sequence[:-reach]
        x = torch.cat([x[:reach], torch.where(same, of(x[reach:], x[:-reach]), x[reach:])])
        reach *= 2
    return x
