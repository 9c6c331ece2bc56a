"""Policy-gradient objectives as compositions: ratio -> gate -> behaviour correction -> aggregation -> regularisers.

Each axis is a table from a name to a small pure function; a method of the literature is a choice from each:

    GRPO     gate = {kind = "clip"}, aggregation = "seq_mean_token_mean", regularisers = [{kind = "kl", coef = 0.001}]
    Dr.GRPO  aggregation = "const_norm"
    DAPO     gate = {kind = "clip", high = 0.28}, aggregation = "token_mean"
    GSPO     ratio = "sequence", gate = {kind = "clip", low = 3e-4, high = 4e-4}, aggregation = "seq_mean_token_mean"
    RLOO     ratio = "none", gate = {kind = "none"}, aggregation = "seq_mean_token_sum"
    AReaL    proximal = "learner", behaviour = {kind = "truncate", cap = 5.0}

Shapes: everything is flat over the M trained tokens of a micro-batch, so masks do not appear; `sequence` [M] says
which of its S sequences a token belongs to. Sequences are never split over micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from agentgym.errors import ConfigError, unknown

CLAMP = 20.0
"""Log-ratios are clamped to +-CLAMP before they are exponentiated (verl, core_algos.py)."""


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the declarations."""


class Gate(Struct, frozen=True, kw_only=True):
    """How far an update may push. `low` / `high` bound the ratio to [1 - low, 1 + high]; `dual` > 1 also bounds the
    loss of a negative advantage at dual x |A| (Ye et al. 2020); 0 switches that off."""

    kind: str = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float = 0.0


class Behaviour(Struct, frozen=True, kw_only=True):
    """Detached weights for the mismatch between sampler and proximal policy.

    truncate: min(w, cap), per token or with one geometric mean per sequence (truncated importance sampling).
    """

    kind: str = "none"
    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0


class Regulariser(Struct, frozen=True, kw_only=True):
    """A summand of the loss with the same denominators. `form` is the estimator of a KL against the frozen reference;
    the entropy bonus is subtracted."""

    kind: str
    coef: float = 0.0
    form: str = "k3"


class Objective(Struct, frozen=True, kw_only=True):
    """The declaration. `proximal` says what the ratio is taken against: the log-probs the sampler recorded
    ("sampler"), or the learner's own at the start of the update ("learner", one more forward pass).

    `horizon` is the constant of "const_norm": tokens that count as one sequence.
    """

    ratio: str = "token"
    gate: Gate = Gate()
    proximal: Literal["sampler", "learner"] = "sampler"
    behaviour: Behaviour = Behaviour()
    aggregation: str = "token_mean"
    horizon: int = 0
    regularisers: tuple[Regulariser, ...] = ()

    def __post_init__(self) -> None:
        axes: list[tuple[str, str, Iterable[str]]] = [
            ("ratio", self.ratio, RATIOS),
            ("gate", self.gate.kind, GATES),
            ("behaviour correction", self.behaviour.kind, BEHAVIOURS),
            ("aggregation", self.aggregation, AGGREGATIONS),
            *(("regulariser", r.kind, ("kl", "entropy")) for r in self.regularisers),
            *(("form of KL", r.form, KLS) for r in self.regularisers),
        ]
        for axis, name, table in axes:
            if name not in table:
                raise unknown(axis, name, table)
        _check(self)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference policy takes part."""
        return any(r.kind == "kl" and r.coef for r in self.regularisers)

    @property
    def needs_entropy(self) -> bool:
        return any(r.kind == "entropy" and r.coef for r in self.regularisers)


def _check(o: Objective) -> None:
    """Refuse combinations that cannot be meant, with the reason."""
    g = o.gate
    if g.low < 0 or g.high < 0 or g.low > 1 or (g.dual and g.dual <= 1):
        raise ConfigError(f"a gate has 0 <= low <= 1, high >= 0, and dual above 1 (0 = off); got {g}")
    if o.proximal == "sampler" and o.behaviour.kind != "none" and o.ratio != "none":
        raise ConfigError(
            f"behaviour = {o.behaviour.kind!r} with proximal = 'sampler' corrects twice: the ratio is taken against "
            "the sampler already. Set proximal = 'learner', or ratio = 'none', or behaviour.kind = 'none'"
        )
    if o.ratio == "none" and g.kind != "none":
        raise ConfigError(f"gate {g.kind!r} has no ratio to act on (ratio = 'none'); set gate.kind = 'none'")
    if (o.aggregation == "const_norm") != (o.horizon > 0):
        raise ConfigError(f"aggregation 'const_norm' and horizon > 0 go together; got {o.aggregation!r}, {o.horizon}")
    if o.behaviour.cap <= 0:
        raise ConfigError(f"behaviour.cap is positive; got {o.behaviour.cap}")
    if o.ratio == "sequence" and g.kind == "clip" and max(g.low, g.high) > 0.05:
        warnings.warn(
            f"a sequence ratio moves by thousandths: clip bounds {g.low}, {g.high} never bind (GSPO: 3e-4, 4e-4)",
            stacklevel=4,
        )


# --- what a loss sees -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The trained tokens of one micro-batch, [M] each; only `logp` and `entropy` carry gradient.

    old: of the proximal policy; sampled: of the distribution the sampler drew from; reference, entropy: where the
    objective needs them. `sequences` = S.
    """

    logp: Tensor
    old: Tensor
    sampled: Tensor
    advantages: Tensor
    sequence: Tensor
    sequences: int
    reference: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Counts over all micro-batches of one optimiser step (and all ranks): the denominators of every mean."""

    tokens: int
    sequences: int


def per_sequence(x: Tensor, sequence: Tensor, sequences: int, mean: bool) -> Tensor:
    """Sums or means of [M] over each sequence: [S]; 0 for a sequence without tokens."""
    total = x.new_zeros(sequences).index_add(0, sequence, x)
    if not mean:
        return total
    return total / torch.bincount(sequence, minlength=sequences).clamp(min=1)


# --- the axes ---------------------------------------------------------------------------------------------------


def _token_ratio(t: Tokens) -> Tensor:
    return (t.logp - t.old).clamp(-CLAMP, CLAMP)


def _sequence_ratio(t: Tokens) -> Tensor:
    """GSPO's token form: the geometric mean of the sequence in value, the token's own log-prob in gradient."""
    mean = per_sequence(t.logp.detach() - t.old, t.sequence, t.sequences, mean=True)[t.sequence]
    return (mean + t.logp - t.logp.detach()).clamp(-10.0, 10.0)


def _no_ratio(t: Tokens) -> Tensor:
    """Zero in value, the log-prob in gradient: exp of it times A is REINFORCE."""
    return t.logp - t.logp.detach()


RATIOS: dict[str, Callable[[Tokens], Tensor]] = {
    "token": _token_ratio,
    "sequence": _sequence_ratio,
    "none": _no_ratio,
}
"""tokens -> log-ratio [M]"""


def _clip(advantages: Tensor, log_ratio: Tensor, gate: Gate) -> Tensor:
    """PPO (Schulman et al. 2017) with separate bounds, and the dual clip for negative advantages."""
    ratio = log_ratio.exp()
    found = torch.minimum(ratio * advantages, ratio.clamp(1 - gate.low, 1 + gate.high) * advantages)
    if gate.dual:
        found = torch.where(advantages < 0, torch.maximum(found, gate.dual * advantages), found)
    return found


def _no_gate(advantages: Tensor, log_ratio: Tensor, gate: Gate) -> Tensor:
    return log_ratio.exp() * advantages


GATES: dict[str, Callable[[Tensor, Tensor, Gate], Tensor]] = {"clip": _clip, "none": _no_gate}
"""(advantages [M], log-ratio [M], bounds) -> objective [M], to be maximised"""


def _no_correction(t: Tokens, behaviour: Behaviour) -> Tensor:
    return torch.ones_like(t.old)


def _truncate(t: Tokens, behaviour: Behaviour) -> Tensor:
    """min(pi_prox / pi_sampler, cap), detached. TIS."""
    gap = (t.old - t.sampled).detach()
    if behaviour.level == "sequence":
        gap = per_sequence(gap, t.sequence, t.sequences, mean=True)[t.sequence]
    return gap.clamp(-CLAMP, CLAMP).exp().clamp(max=behaviour.cap)


BEHAVIOURS: dict[str, Callable[[Tokens, Behaviour], Tensor]] = {"none": _no_correction, "truncate": _truncate}
"""tokens -> detached weights [M]"""


def _token_mean(x: Tensor, t: Tokens, total: Totals, horizon: int) -> Tensor:
    return x.sum() / max(total.tokens, 1)


def _seq_mean_token_mean(x: Tensor, t: Tokens, total: Totals, horizon: int) -> Tensor:
    return per_sequence(x, t.sequence, t.sequences, mean=True).sum() / max(total.sequences, 1)


def _seq_mean_token_sum(x: Tensor, t: Tokens, total: Totals, horizon: int) -> Tensor:
    return x.sum() / max(total.sequences, 1)


def _const_norm(x: Tensor, t: Tokens, total: Totals, horizon: int) -> Tensor:
    return x.sum() / (max(total.sequences, 1) * horizon)


AGGREGATIONS: dict[str, Callable[[Tensor, Tokens, Totals, int], Tensor]] = {
    "token_mean": _token_mean,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "seq_mean_token_sum": _seq_mean_token_sum,
    "const_norm": _const_norm,
}
"""(values [M], tokens, global totals, horizon) -> scalar; over micro-batches the results add up"""

KLS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: -gap,
    "k2": lambda gap: 0.5 * gap**2,
    "k3": lambda gap: gap.clamp(-10.0, 10.0).exp() - gap.clamp(-10.0, 10.0) - 1.0,
}
"""gap = reference - logp [M] -> estimate of KL(policy, reference) per token (Schulman 2020)"""


# --- the composition --------------------------------------------------------------------------------------------


def loss(objective: Objective, tokens: Tokens, total: Totals) -> tuple[Tensor, dict[str, float]]:
    """The micro-batch's part of the loss, and sums over its tokens for the statistics (see `summarise`)."""
    log_ratio = RATIOS[objective.ratio](tokens)
    gained = GATES[objective.gate.kind](tokens.advantages, log_ratio, objective.gate)
    weighted = BEHAVIOURS[objective.behaviour.kind](tokens, objective.behaviour) * gained
    aggregate = AGGREGATIONS[objective.aggregation]
    found = -aggregate(weighted, tokens, total, objective.horizon)
    for r in objective.regularisers:
        if r.coef:
            found = found + r.coef * aggregate(_regulariser(r, tokens), tokens, total, objective.horizon)
    return found, _sums(objective, tokens, log_ratio.detach())


def _regulariser(r: Regulariser, t: Tokens) -> Tensor:
    if r.kind == "entropy":
        assert t.entropy is not None
        return -t.entropy
    assert t.reference is not None
    return KLS[r.form](t.reference - t.logp)


def _sums(objective: Objective, t: Tokens, log_ratio: Tensor) -> dict[str, float]:
    ratio, gate = log_ratio.exp(), objective.gate
    up = (t.advantages > 0) & (ratio > 1 + gate.high)
    down = (t.advantages < 0) & (ratio < 1 - gate.low)
    found: dict[str, Any] = {
        "nll": -t.logp.detach().sum(),
        "ratio": ratio.sum(),
        "ratio_max": ratio.max() if len(ratio) else 0.0,
        "clipped": (up | down).sum() if gate.kind == "clip" else 0.0,
        "kl": KLS["k3"]((t.logp - t.old).detach()).sum(),
        "mismatch": (t.old - t.sampled).abs().sum(),
    }
    if t.entropy is not None:
        found["entropy"] = t.entropy.detach().sum()
    if t.reference is not None:
        found["kl_reference"] = KLS["k3"](t.reference - t.logp.detach()).sum()
    return {name: float(value) for name, value in found.items()}


def summarise(sums: list[dict[str, float]], total: Totals) -> dict[str, float]:
    """Sums of micro-batches to figures per token; `ratio_max` is the largest."""
    names = {name for part in sums for name in part}
    return {
        name: max(part.get(name, 0.0) for part in sums)
        if name.endswith("_max")
        else sum(part.get(name, 0.0) for part in sums) / max(total.tokens, 1)
        for name in sorted(names)
    }
