"""S7: what else the loss holds, per token [M], with its coefficient. It is aggregated as the objective is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.tokens import Tokens, needed, per_token, within


def _k3(gap: Tensor) -> Tensor:
    return gap.expm1() - gap


KLS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: -gap,
    "k2": lambda gap: 0.5 * gap**2,
    "k3": lambda gap: _k3(within(gap, -10.0, 10.0)),
}
"""gap = other - logp [M] -> estimate of KL(policy, other) per token (Schulman 2020)"""


def penalty(declared: Any, t: Tokens) -> Tensor:
    """The regulariser per token [M], to be minimised."""
    return REGULARISERS[type(declared)](declared, t)


def against(name: str, t: Tokens) -> Tensor:
    """Log-probs of the policy a KL is taken against."""
    return {"old": t.old, "sampler": t.sampled}[name] if name != "reference" else needed(t.reference, "reference")


def rewarded(threshold: float, t: Tokens) -> Tensor:
    """1 for tokens of sequences with reward >= threshold, else 0 (also where there is no reward): [M]."""
    reward = needed(t.reward, "reward")
    return per_token((reward >= threshold).to(t.logp.dtype), t)


def _kl(r: declare.Kl, t: Tokens) -> Tensor:
    gap = against(r.against, t) - t.logp
    if r.form == "k3_k2":
        value, slope = KLS["k3"](gap), KLS["k2"](gap)
        return r.coef * (value.detach() + slope - slope.detach())
    return r.coef * KLS[r.form](gap)


def _kl_hinge(r: declare.KlHinge, t: Tokens) -> Tensor:
    kl = KLS["k3"](against(r.against, t) - t.logp)
    mean = kl.detach().sum() / max(len(kl), 1)
    return r.coef * (mean - r.bound).clamp(min=0.0) * kl


def _entropy(r: declare.Entropy, t: Tokens) -> Tensor:
    return -r.coef * needed(t.entropy, "entropy")


def _entropy_band(r: declare.EntropyBand, t: Tokens) -> Tensor:
    entropy = needed(t.entropy, "entropy")
    return r.coef * ((r.low - entropy).clamp(min=0.0) + (entropy - r.high).clamp(min=0.0))


def _perception(r: declare.Perception, t: Tokens) -> Tensor:
    masked = needed(t.masked, "masked")
    gap = masked - t.logp if r.form == "code" else t.logp - masked
    return -r.coef * KLS["k3"](gap) - r.clean * t.logp - r.masked * masked


def _distillation(r: declare.Distillation, t: Tokens) -> Tensor:
    return r.coef * rewarded(r.threshold, t) * needed(t.divergence, "divergence")


def _sft(r: declare.Sft, t: Tokens) -> Tensor:
    return -r.coef * rewarded(r.threshold, t) * t.logp


def _custom(r: declare.CustomPenalty, t: Tokens) -> Tensor:
    return r.coef * call(r, t)


REGULARISERS: dict[type[declare.Kind], Callable[[Any, Tokens], Tensor]] = {
    declare.Kl: _kl,
    declare.KlHinge: _kl_hinge,
    declare.Entropy: _entropy,
    declare.EntropyBand: _entropy_band,
    declare.Perception: _perception,
    declare.Distillation: _distillation,
    declare.Sft: _sft,
    declare.CustomPenalty: _custom,
}
