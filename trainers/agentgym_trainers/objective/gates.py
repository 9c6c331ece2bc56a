"""S4: how far an update may push. (gate, tokens, parts of the ratio) -> objective [M], to be maximised.

A gate is stateless and knows nothing of groups. `clipped` says which tokens it holds back, for the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.ratios import Parts
from agentgym_trainers.objective.tokens import Tokens, per_sequence, per_token, within

Held = tuple[Tensor, Tensor]
"""Tokens held back from moving further up, and down: [M] each."""


def gated(declared: Any, t: Tokens, parts: Parts) -> Tensor:
    """The objective of every token behind the gate that is declared."""
    if isinstance(declared, declare.Custom):
        return call(declared, t, parts)
    return GATES[type(declared)](declared, t, parts)


def clipped(declared: Any, t: Tokens, parts: Parts) -> Held:
    """Which tokens the gate holds back from moving further up, and down: [M] each; all False for one without bounds."""
    if type(declared) in CLIPPED:
        return CLIPPED[type(declared)](declared, t, parts)
    nothing = torch.zeros_like(t.logp, dtype=torch.bool)
    return nothing, nothing


# --- gates of the combined ratio --------------------------------------------------------------------------------


def _none(gate: declare.NoGate, t: Tokens, parts: Parts) -> Tensor:
    return parts.ratio * t.advantages


def _clip(gate: declare.Clip, t: Tokens, parts: Parts) -> Tensor:
    """PPO (1707.06347) with separate bounds, and the dual clip for negative advantages (1912.09729)."""
    ratio = _pessimistic(parts.ratio, gate.low, gate.high, t.advantages)
    if gate.dual:
        far = (t.advantages < 0) & (ratio > gate.dual)
        ratio = ratio * ~far + gate.dual * far.to(ratio)
    return ratio * t.advantages


def _pessimistic(ratio: Tensor, low: float, high: float, a: Tensor) -> Tensor:
    """The ratio in min(rho A, clip(rho, 1 - low, 1 + high) A): [M]."""
    return _fixed(ratio, _stopped(ratio, low, high, a), 1 - low, 1 + high)


def _fixed(x: Tensor, held: Held, low: float, high: float) -> Tensor:
    """x, but a constant where it is held: `high` from moving up, `low` from moving down. By products, whose
    derivative is one pass; those of `where` and `minimum` are several."""
    up, down = held
    return x * ~(up | down) + (high * up.to(x) + low * down.to(x))


def _detached(gate: declare.Detached, t: Tokens, parts: Parts) -> Tensor:
    return parts.ratio.detach().clamp(1 - gate.low, 1 + gate.high) * t.advantages * t.logp


def _soft(gate: declare.Soft, t: Tokens, parts: Parts) -> Tensor:
    tau = torch.where(t.advantages > 0, gate.positive, gate.negative).to(t.logp.dtype)
    return 4.0 / tau * torch.sigmoid(tau * (parts.ratio - 1.0)) * t.advantages


def _quadratic(gate: declare.Quadratic, t: Tokens, parts: Parts) -> Tensor:
    return parts.ratio * t.advantages - gate.coef * (parts.ratio - 1.0) ** 2


def _squared_log(gate: declare.SquaredLog, t: Tokens, parts: Parts) -> Tensor:
    return t.advantages * t.logp - 0.5 * gate.beta * parts.log**2


def _divergence(gate: declare.Divergence, t: Tokens, parts: Parts) -> Tensor:
    up, down = _diverged(gate, t, parts)
    keep = t.advantages * ~(up | down)
    if gate.weight == "ratio":
        return parts.ratio * keep
    return parts.ratio.detach().clamp(max=gate.cap) * keep * t.logp


def _gamma_weight(gate: declare.GammaWeight, t: Tokens, parts: Parts) -> Tensor:
    """log rho is held above log 1e-8, as in the released code."""
    up = t.advantages >= 0
    k, lam = (torch.where(up, *pair) for pair in zip(gate.positive, gate.negative, strict=True))
    log = parts.log.detach().clamp(min=math.log(1e-8))
    return (lam + k * log - lam * log.exp()).exp().to(log.dtype) * t.advantages * t.logp


# --- gates of the parts -----------------------------------------------------------------------------------------


def _log_clip(gate: declare.LogClip, t: Tokens, parts: Parts) -> Tensor:
    log = _fixed(parts.log, _log_clipped(gate, t, parts), -gate.low, gate.high)
    return per_token(per_sequence(log, t, mean=True).exp(), t) * t.advantages


def _levels_clip(gate: declare.LevelsClip, t: Tokens, parts: Parts) -> Tensor:
    logs = _residual(gate, parts)
    held = [within(log, -budget, budget) for log, budget in zip(logs, gate.budgets, strict=True)]
    ratio = sum(held[1:], held[0]).exp()
    found = ratio * t.advantages
    return torch.minimum(parts.ratio * t.advantages, found) if gate.pessimistic else found


def _residual(gate: declare.LevelsClip, parts: Parts) -> tuple[Tensor, ...]:
    """The parts; in variant A the last is the log-ratio less the clipped parts above it."""
    if gate.variant == "B":
        return parts.logs
    above = [within(log, -budget, budget) for log, budget in zip(parts.logs[:-1], gate.budgets, strict=False)]
    return (*parts.logs[:-1], parts.log - sum(above))


def _variation_budget(gate: declare.VariationBudget, t: Tokens, parts: Parts) -> Tensor:
    room = _room(gate, t, parts)
    return (1.0 + (parts.ratio - 1.0).clamp(-room, room)) * t.advantages


def _room(gate: declare.VariationBudget, t: Tokens, parts: Parts) -> Tensor:
    """[T delta - sum over the sequence's other tokens of |rho - 1|]+, detached: [M]."""
    moved = (parts.ratio.detach() - 1.0).abs()
    others = per_token(per_sequence(moved, t, mean=False), t) - moved
    return (per_token(t.lengths, t) * gate.delta - others).clamp(min=0.0)


def _branch_clip(gate: declare.BranchClip, t: Tokens, parts: Parts) -> Tensor:
    def branch(ratio: Tensor, low: float, high: float) -> Tensor:
        if gate.pessimistic:
            return _pessimistic(ratio, low, high, t.advantages)
        return within(ratio, 1 - low, 1 + high)

    token, sequence = branch(parts.each[0], *gate.token), branch(parts.each[1], *gate.sequence)
    return (parts.weight * token + (1.0 - parts.weight) * sequence) * t.advantages


GATES: dict[type[declare.Kind], Callable[[Any, Tokens, Parts], Tensor]] = {
    declare.NoGate: _none,
    declare.Clip: _clip,
    declare.Detached: _detached,
    declare.Soft: _soft,
    declare.Quadratic: _quadratic,
    declare.SquaredLog: _squared_log,
    declare.Divergence: _divergence,
    declare.LogClip: _log_clip,
    declare.GammaWeight: _gamma_weight,
    declare.LevelsClip: _levels_clip,
    declare.VariationBudget: _variation_budget,
    declare.BranchClip: _branch_clip,
}

# --- what they hold back ----------------------------------------------------------------------------------------


def _stopped(ratio: Tensor, low: float, high: float, a: Tensor) -> Held:
    return (a > 0) & (ratio > 1 + high), (a < 0) & (ratio < 1 - low)


def _capped(gate: declare.Detached, t: Tokens, parts: Parts) -> Held:
    return parts.ratio > 1 + gate.high, parts.ratio < 1 - gate.low


def _diverged(gate: declare.Divergence, t: Tokens, parts: Parts) -> Held:
    """By the change of the token's own probability, or by the divergence of (token, any other) in its direction."""
    logp, old = t.logp.detach(), t.old
    change = logp.exp() - old.exp()
    if gate.form == "kl":
        rest, rest_old = ((1.0 - x.exp()).clamp(min=0.0) + 1e-8 for x in (logp, old))
        change = change.sign() * (old.exp() * (old - logp) + rest_old * (rest_old / rest).log())
    return (t.advantages > 0) & (change > gate.high), (t.advantages <= 0) & (change < -gate.low)


def _log_clipped(gate: declare.LogClip, t: Tokens, parts: Parts) -> Held:
    return (t.advantages > 0) & (parts.log > gate.high), (t.advantages < 0) & (parts.log < -gate.low)


def _over_budgets(gate: declare.LevelsClip, t: Tokens, parts: Parts) -> Held:
    pairs = [*zip(_residual(gate, parts), gate.budgets, strict=True)]
    over = [(log > budget, log < -budget) for log, budget in pairs]
    up, down = (reduce(torch.logical_or, side) for side in zip(*over, strict=True))
    return up, down


def _over_room(gate: declare.VariationBudget, t: Tokens, parts: Parts) -> Held:
    room = _room(gate, t, parts)
    return parts.ratio - 1.0 > room, parts.ratio - 1.0 < -room


def _branches_clipped(gate: declare.BranchClip, t: Tokens, parts: Parts) -> Held:
    """Where either branch is held back."""
    pairs = zip(parts.each, (gate.token, gate.sequence), strict=True)
    (up, down), (more_up, more_down) = (_stopped(ratio, *bounds, t.advantages) for ratio, bounds in pairs)
    return up | more_up, down | more_down


CLIPPED: dict[type[declare.Kind], Callable[[Any, Tokens, Parts], Held]] = {
    declare.Clip: lambda gate, t, parts: _stopped(parts.ratio, gate.low, gate.high, t.advantages),
    declare.Detached: _capped,
    declare.Divergence: _diverged,
    declare.LogClip: _log_clipped,
    declare.LevelsClip: _over_budgets,
    declare.VariationBudget: _over_room,
    declare.BranchClip: _branches_clipped,
}
