"""S3: the ratio of the policy to the proximal one, as parts. A gate works on what they combine to, or on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.tokens import CLAMP, Tokens, per_sequence


class Parts(NamedTuple):
    """Log-ratios [M] and how they combine: "sum" adds them before the exponential (one part: itself); "mix" is
    v exp(first) + (1 - v) exp(second) with v = `weight`."""

    logs: tuple[Tensor, ...]
    combine: Literal["sum", "mix"] = "sum"
    weight: Tensor | float = 1.0

    def ratio(self) -> Tensor:
        """rho [M]."""
        if self.combine == "mix":
            first, second = (log.exp() for log in self.logs)
            return self.weight * first + (1.0 - self.weight) * second
        return sum(self.logs[1:], self.logs[0]).clamp(-CLAMP, CLAMP).exp()


def ratio_of(declared: Any, t: Tokens) -> Parts:
    """The ratio that is declared."""
    return RATIOS[type(declared)](declared, t)


def _none(declared: declare.NoRatio, t: Tokens) -> Parts:
    return Parts((t.logp - t.logp.detach(),))


def _token(declared: declare.Token, t: Tokens) -> Parts:
    return Parts(((t.logp - t.old).clamp(-CLAMP, CLAMP),))


def _sequence(declared: declare.Geometric, t: Tokens) -> Parts:
    mean = per_sequence(t.logp.detach() - t.old, t, mean=True)[t.sequence]
    return Parts(((mean + t.logp - t.logp.detach()).clamp(-10.0, 10.0),))


RATIOS: dict[type[declare.Kind], Callable[[Any, Tokens], Parts]] = {
    declare.NoRatio: _none,
    declare.Token: _token,
    declare.Geometric: _sequence,
}
