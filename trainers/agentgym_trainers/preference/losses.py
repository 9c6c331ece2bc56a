"""Losses over pairs: (declaration, sums of log-probs) -> [P], to be minimised in the mean. Pure functions.

What a loss means, and where it is from, stands with its declaration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from agentgym_trainers.objective.declare import Kind
from agentgym_trainers.preference import declare

CHOSEN, REJECTED = 0, 1
BETTER, KEPT_WORSE, WORSE, KEPT_BETTER = 2, 3, 4, 5
"""Rows of conditional sums: (y+ | y-), (y- | y-), (y- | y+), (y+ | y+)."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Log-probs of P pairs, summed over the sampled tokens of a trajectory. [2, P]: chosen, rejected; [6, P] with the
    conditional ones behind them, where a loss reads those.

    policy     carries gradient
    reference, previous   of the frozen reference, of the policy when the update began; None where nobody reads them
    tokens     sampled tokens [2, P]
    rates      win-rates in the group [2, P]
    per_pair   chosen tokens of the whole step over its pairs; None: of these
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None
    previous: Tensor | None = None
    rates: Tensor | None = None
    per_pair: float | None = None


def pair_loss(declared: declare.Loss, s: Sums) -> Tensor:
    """The loss of every pair [P]."""
    return LOSSES[type(declared)](declared, s)


def gap(x: Tensor) -> Tensor:
    """Chosen minus rejected [P]."""
    return x[CHOSEN] - x[REJECTED]


def log_ratio(s: Sums, against: str = "reference") -> Tensor:
    """log of policy over `against`, in every row of `policy`."""
    return s.policy - _needed(getattr(s, against), against)


def _needed(x: Tensor | None, what: str) -> Tensor:
    if x is None:
        raise ValueError(f"this loss reads Sums.{what}, which is not there")
    return x


def _dpo(d: declare.DPO, s: Sums) -> Tensor:
    return -logsigmoid(d.beta * gap(log_ratio(s, d.against)))


def _rpo(d: declare.RPO, s: Sums) -> Tensor:
    preferred = -logsigmoid(d.beta * gap(log_ratio(s)))
    if d.form == "paper":
        return preferred - d.eta * d.beta * s.policy[CHOSEN]
    per_pair = s.tokens[CHOSEN].mean() if s.per_pair is None else s.per_pair
    return preferred - d.eta * s.policy[CHOSEN] / per_pair


def _inpo(d: declare.INPO, s: Sums) -> Tensor:
    share = d.tau / d.eta
    anchor = share * _needed(s.reference, "reference") + (1.0 - share) * _needed(s.previous, "previous")
    return (gap(s.policy - anchor) - 1.0 / (2.0 * d.eta)) ** 2


def _dno(d: declare.DNO, s: Sums) -> Tensor:
    target = torch.sigmoid(gap(_needed(s.rates, "rates")))
    found = d.eta * gap(log_ratio(s, "previous"))
    return -(target * logsigmoid(found) + (1.0 - target) * logsigmoid(-found))


def _srpo(d: declare.SRPO, s: Sums) -> Tensor:
    return (1.0 - d.mix) * improvement(d.beta, log_ratio(s)) + d.mix * robustness(d.beta, log_ratio(s))


def improvement(beta: float, ratio: Tensor, p: float = 1.0) -> Tensor:
    """How far the policy is from improving a trajectory it reads, [6, P] -> [P]; `p` that the chosen one is better."""
    up = (beta * (ratio[BETTER] - ratio[KEPT_WORSE]) - (p - 0.5)) ** 2
    down = (beta * (ratio[WORSE] - ratio[KEPT_BETTER]) + (p - 0.5)) ** 2
    return 0.5 * (up + down)


def robustness(beta: float, ratio: Tensor, p: float = 1.0) -> Tensor:
    """How far it is from leaving nothing to improve, [6, P] -> [P]."""
    return (0.5 * beta * (gap(ratio) + ratio[BETTER] - ratio[WORSE]) - (p - 0.5)) ** 2


def _codpo(d: declare.CODPO, s: Sums) -> Tensor:
    return -logsigmoid(d.beta * gap(log_ratio(s))) - d.sft * s.policy[CHOSEN] / s.tokens[CHOSEN]


LOSSES: dict[type[Kind], Callable[[Any, Sums], Tensor]] = {
    declare.DPO: _dpo,
    declare.RPO: _rpo,
    declare.INPO: _inpo,
    declare.DNO: _dno,
    declare.SRPO: _srpo,
    declare.CODPO: _codpo,
}
