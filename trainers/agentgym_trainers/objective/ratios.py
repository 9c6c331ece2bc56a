"""S3: the ratio of the policy to the proximal one, as parts. A gate works on what they combine to, or on each.

A figure of a whole sequence is given to its tokens in token form, sg(s) pi / sg(pi): the value of s, and the gradient
that the token alone is answerable for. Nested means ("levels") are differentiated as they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.tokens import CLAMP, Tokens, needed, per_sequence, per_token, pool, prefixes, within


@dataclass(frozen=True)
class Parts:
    """Log-ratios [M] and how they combine: "sum" adds them before the exponential (one part: itself); "mix" is
    v exp(first) + (1 - v) exp(second) with v = `weight`."""

    logs: tuple[Tensor, ...]
    combine: Literal["sum", "mix"] = "sum"
    weight: Tensor | float = 1.0

    @cached_property
    def log(self) -> Tensor:
        """log rho [M]."""
        if self.combine == "mix":
            return self.ratio.log()
        return within(sum(self.logs[1:], self.logs[0]), -CLAMP, CLAMP)

    @cached_property
    def ratio(self) -> Tensor:
        """rho [M]."""
        if self.combine == "sum":
            return self.log.exp()
        first, second = self.each
        return self.weight * first + (1.0 - self.weight) * second

    @cached_property
    def each(self) -> tuple[Tensor, ...]:
        """The ratio of each part [M]."""
        return tuple(log.exp() for log in self.logs)


def ratio_of(declared: Any, t: Tokens) -> Parts:
    """The ratio that is declared."""
    return RATIOS[type(declared)](declared, t)


def moved(t: Tokens) -> Tensor:
    """log rho of each token [M]."""
    return within(t.logp - t.old, -CLAMP, CLAMP)


def token_form(log: Tensor, t: Tokens) -> Tensor:
    """The value of `log` with the gradient of the token's own log-prob: [M]."""
    return log.detach() + t.logp - t.logp.detach()


def _none(declared: declare.NoRatio, t: Tokens) -> Parts:
    return Parts((t.logp - t.logp.detach(),))


def _token(declared: declare.Token, t: Tokens) -> Parts:
    return Parts((t.logp - t.old,))


def _turn(declared: declare.TurnProduct, t: Tokens) -> Parts:
    turn = needed(t.turn, "turn")
    turns = int(turn.max()) + 1 if len(turn) else 0
    joint = t.sequence * turns + turn
    total = pool(moved(t).detach(), joint, t.sequences * turns, mean=False)
    return Parts((token_form(total[joint], t),))


def geometric(t: Tokens) -> Tensor:
    """log of the geometric mean over the sequence [M], in token form, at most 10 (verl)."""
    mean = per_token(per_sequence((t.logp - t.old).detach(), t, mean=True), t)
    return within(token_form(mean, t), -torch.inf, 10.0)


def _sequence(declared: declare.Geometric, t: Tokens) -> Parts:
    return Parts((geometric(t),))


def _sequence_product(declared: declare.SequenceProduct, t: Tokens) -> Parts:
    return Parts((token_form(per_token(per_sequence(moved(t).detach(), t, mean=False), t), t),))


def _prefix_product(declared: declare.PrefixProduct, t: Tokens) -> Parts:
    return Parts((token_form(prefixes(moved(t), t, torch.add), t),))


def _prefix_min(declared: declare.PrefixMin, t: Tokens) -> Parts:
    """min_{j<t} rho_j x rho_t, or min_{j<=t} rho_j; before the first token there is nothing: one."""
    own = moved(t).detach()
    least = prefixes(own, t, torch.minimum)
    if not declared.inclusive:
        first = torch.ones_like(t.sequence, dtype=torch.bool)
        first[1:] = t.sequence[1:] != t.sequence[:-1]
        least = least.roll(1).masked_fill(first, 0.0)
    if declared.cap_one:
        least = least.clamp(max=0.0)
    return Parts((token_form(least if declared.inclusive else least + own, t),))


def _mix(declared: declare.Mix, t: Tokens) -> Parts:
    weight: Tensor | float = declared.weight
    if declared.by == "entropy":
        entropy = needed(t.entropy, "entropy").detach()
        greatest = entropy.max() if len(entropy) else entropy.new_zeros(())
        weight = entropy / greatest.clamp(min=1e-12)
    return Parts((moved(t), geometric(t)), "mix", weight)


def _levels(declared: declare.Levels, t: Tokens) -> Parts:
    """Means over domain, prompt and trajectory, each less the one around it; at last the token less its trajectory."""
    delta = moved(t)
    sums = per_sequence(delta, t, mean=False)
    means = [_mean_over(level, sums, t) for level in declared.levels[:-1]]
    if not means:
        return Parts((delta,))
    steps = [means[0], *(inner - outer for outer, inner in pairwise(means))]
    return Parts((*(per_token(step, t) for step in steps), delta - per_token(means[-1], t)))


def _mean_over(level: str, sums: Tensor, t: Tokens) -> Tensor:
    """The mean over the tokens of all sequences that share a domain, a prompt or a trajectory: [S], from [S] sums."""
    if level == "trajectory":
        return sums / t.lengths.clamp(min=1)
    owner = needed(t.domain, "domain") if level == "domain" else needed(t.group, "group")
    names, index = owner.unique(return_inverse=True)
    total, count = (pool(x, index, len(names), mean=False) for x in (sums, t.lengths))
    return (total / count.clamp(min=1))[index]


RATIOS: dict[type[declare.Kind], Callable[[Any, Tokens], Parts]] = {
    declare.NoRatio: _none,
    declare.Token: _token,
    declare.TurnProduct: _turn,
    declare.Geometric: _sequence,
    declare.SequenceProduct: _sequence_product,
    declare.PrefixProduct: _prefix_product,
    declare.PrefixMin: _prefix_min,
    declare.Mix: _mix,
    declare.Levels: _levels,
    declare.Custom: call,
}
