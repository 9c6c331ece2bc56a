"""S7: what else the loss holds, per token and without its coefficient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.tokens import Tokens

KLS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: -gap,
    "k2": lambda gap: 0.5 * gap**2,
    "k3": lambda gap: gap.clamp(-10.0, 10.0).exp() - gap.clamp(-10.0, 10.0) - 1.0,
}
"""gap = other - logp [M] -> estimate of KL(policy, other) per token (Schulman 2020)"""


def penalty(declared: Any, t: Tokens) -> Tensor:
    """The regulariser per token [M]."""
    return REGULARISERS[type(declared)](declared, t)


def needed(x: Tensor | None, what: str) -> Tensor:
    """A column that the learner must have filled."""
    if x is None:
        raise ValueError(f"this objective reads Tokens.{what}, which is not there")
    return x


def against(name: str, t: Tokens) -> Tensor:
    """Log-probs of the policy a KL is taken against."""
    return {"old": t.old, "sampler": t.sampled}[name] if name != "reference" else needed(t.reference, "reference")


def _kl(r: declare.Kl, t: Tokens) -> Tensor:
    gap = against(r.against, t) - t.logp
    if r.form == "k3_k2":
        value, slope = KLS["k3"](gap), KLS["k2"](gap)
        return value.detach() + slope - slope.detach()
    return KLS[r.form](gap)


def _entropy(r: declare.Entropy, t: Tokens) -> Tensor:
    return -needed(t.entropy, "entropy")


REGULARISERS: dict[type[declare.Kind], Callable[[Any, Tokens], Tensor]] = {
    declare.Kl: _kl,
    declare.Entropy: _entropy,
}
