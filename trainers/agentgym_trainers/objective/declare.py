"""What an objective is declared with: one table an axis, each with a `kind`. No torch here.

    [objective]
    proximal = "learner"
    ratio = {kind = "sequence"}
    gate = {kind = "clip", low = 3e-4, high = 4e-4}
    behaviour = [{kind = "truncate", cap = 2.0}]
    aggregation = {kind = "seq_mean_token_mean"}
    regularisers = [{kind = "kl", coef = 0.001}]
    controllers = [{kind = "adaptive", of = "regularisers.0.coef", watch = "kl_reference", target = 0.01}]

A kind is a class below, its fields are the kind's options. What cannot be meant is refused, with the reason, by
refusals.py. What the kinds compute stands in the module of their axis: ratios, gates, bounds, behaviours,
aggregations, regularisers, contrast.
Symbols: rho the ratio of the policy to the proximal one, A the advantage, w the weight for the sampler's mismatch.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from agentgym_trainers.objective.refusals import check


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the declarations."""


class Kind(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of the choices of an axis."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class Custom(Kind, frozen=True, kw_only=True, tag="custom"):
    """A function of your own, `target` = "package.module:function", with the signature of the axis (custom.py);
    `options` are passed to it as keywords.

    coupled    it reads tokens of other sequences, so that it must see the whole step
    reference  it reads Tokens.reference
    """

    target: str
    options: dict[str, Any] = {}
    coupled: bool = False
    reference: bool = False


# --- S3a: where log-probs come from -----------------------------------------------------------------------------


class Final(Kind, frozen=True, kw_only=True, tag="final"):
    """The model's last layer."""


class Layer(Kind, frozen=True, kw_only=True, tag="layer"):
    """The hidden state after layer `layer` (1 = the first), through the final norm and the unembedding, in updates
    that begin within the first `steps` optimiser steps; the last layer from then on. BuPO (2512.19673)."""

    layer: int
    steps: int = 30


Source = Final | Layer

# --- S3b: the ratio ---------------------------------------------------------------------------------------------


class NoRatio(Kind, frozen=True, kw_only=True, tag="none"):
    """One in value, the log-prob in gradient: REINFORCE."""


class Token(Kind, frozen=True, kw_only=True, tag="token"):
    """rho of each token."""


class TurnProduct(Kind, frozen=True, kw_only=True, tag="turn"):
    """Product over the tokens of a turn: the ratio of a joint action (HRPO's node and edge)."""


class Geometric(Kind, frozen=True, kw_only=True, tag="sequence"):
    """Geometric mean over the sequence, in GSPO's token form sg(s) pi / sg(pi) (2507.18071)."""


class SequenceProduct(Kind, frozen=True, kw_only=True, tag="sequence_product"):
    """Product over the sequence, in token form."""


class PrefixProduct(Kind, frozen=True, kw_only=True, tag="prefix_product"):
    """Product over the tokens up to and including this one; the earlier ones detached."""


class PrefixMin(Kind, frozen=True, kw_only=True, tag="prefix_min"):
    """The least ratio before this token times its own, the prefix detached. MinPRO (2601.22718); form and gradient are
    a reconstruction. (Gate "detached" makes a detached weight of it.)

    inclusive  the least ratio of the prefix with this token, alone, in token form
    cap_one    the prefix's least ratio is at most one
    """

    inclusive: bool = False
    cap_one: bool = False


class Mix(Kind, frozen=True, kw_only=True, tag="mix"):
    """v x token ratio + (1 - v) x sequence ratio, parts gated apart. DHPO (2601.05607).

    by         "constant": v = `weight`; "entropy": v = H / max H of the whole step, detached (a reconstruction)
    """

    weight: float = 0.5
    by: Literal["constant", "entropy"] = "constant"


class Levels(Kind, frozen=True, kw_only=True, tag="levels"):
    """The log-ratio split into nested means, outermost first, the last one "token": parts that sum to it.
    FiberPO, FiberPO-Domain (2603.08239); a reconstruction."""

    levels: tuple[Literal["domain", "prompt", "trajectory", "token"], ...] = ("trajectory", "token")


Ratio = NoRatio | Token | TurnProduct | Geometric | SequenceProduct | PrefixProduct | PrefixMin | Mix | Levels | Custom

# --- S4: the gate -----------------------------------------------------------------------------------------------


class Adaptive(Struct, frozen=True, kw_only=True):
    """BAPO's bounds (2510.18927): from the lowest on, first c_low then c_high rises by `step` until the positive part
    of the step's objective is at least `target` x the negative part (`balance` "ratio"), or that share of the sum
    ("share"). `count` "value" counts as the released code does; "gradient" counts unclipped tokens only.
    Bounds of the ratio itself: rho in [c_low, c_high]."""

    low: tuple[float, float] = (0.6, 0.8)
    high: tuple[float, float] = (1.2, 2.0)
    step: tuple[float, float] = (0.05, 0.05)
    target: float = 1.0
    balance: Literal["ratio", "share"] = "ratio"
    count: Literal["value", "gradient"] = "value"


class NoGate(Kind, frozen=True, kw_only=True, tag="none"):
    """rho A."""


class Clip(Kind, frozen=True, kw_only=True, tag="clip"):
    """min(rho A, clip(rho, 1 - low, 1 + high) A); for A < 0 not below dual x A (0 = off). `adaptive` moves the bounds
    with the balance of the step."""

    low: float = 0.2
    high: float = 0.2
    dual: float = 0.0
    adaptive: Adaptive | None = None


class Detached(Kind, frozen=True, kw_only=True, tag="detached"):
    """sg(clip(rho, 1 - low, 1 + high)) A log pi. CISPO (2506.13585). low = 1 bounds above only, as trl does."""

    low: float = 1.0
    high: float = 0.28


class Soft(Kind, frozen=True, kw_only=True, tag="soft"):
    """(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A. SAPO (2511.20347)."""

    positive: float = 1.0
    negative: float = 1.05


class Quadratic(Kind, frozen=True, kw_only=True, tag="quadratic"):
    """rho A - coef (rho - 1)^2. R2VPO (2601.03320); its dual update is a reconstruction."""

    coef: float = 0.04


class SquaredLog(Kind, frozen=True, kw_only=True, tag="squared_log"):
    """A log pi - beta / 2 (log rho)^2. DRO."""

    beta: float = 0.1


class Divergence(Kind, frozen=True, kw_only=True, tag="divergence"):
    """Keeps a token while its probability moved no further than the bound in the direction of A: A > 0 while
    p - p_old <= high, else while p - p_old >= -low; `form` "kl" compares KL((p_old, 1 - p_old), (p, 1 - p)), which has
    no sign, in that direction.
    weight "detached": sg(min(rho, cap)) A log pi; "ratio": rho A. DPPO (2602.04879)."""

    form: Literal["tv", "kl"] = "tv"
    low: float = 0.2
    high: float = 0.2
    cap: float = 20.0
    weight: Literal["detached", "ratio"] = "detached"


class LogClip(Kind, frozen=True, kw_only=True, tag="log_clip"):
    """Token log-ratios are clipped on the side that A pushes to (A > 0: at most high; A < 0: at least -low), then
    averaged over the sequence and exponentiated. GMPO (2507.20673). Needs ratio "token"."""

    low: float = 0.4
    high: float = 0.4


class GammaWeight(Kind, frozen=True, kw_only=True, tag="gamma_weight"):
    """sg(rho^k exp(lam (1 - rho))) A log pi with (k, lam) by the sign of A. VESPO; ratio "sequence_product"."""

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)


class LevelsClip(Kind, frozen=True, kw_only=True, tag="levels_clip"):
    """Each part of a "levels" ratio is clipped to +-its budget, the sum exponentiated. FiberPO; a reconstruction.

    variant      "B": parts as they are; "A": the last part is what the clipped ones above it leave of the log-ratio
    pessimistic  min with rho A, so that corrective gradients stay
    """

    budgets: tuple[float, ...] = (0.2, 0.2)
    variant: Literal["A", "B"] = "B"
    pessimistic: bool = False


class VariationBudget(Kind, frozen=True, kw_only=True, tag="variation_budget"):
    """rho - 1 clipped to +-max(B, 0), where B = T delta - sum over the sequence's other tokens of |rho - 1|.
    FiberPO's APC objective; a reconstruction from unofficial code. Needs ratio "token"."""

    delta: float = 0.1


class BranchClip(Kind, frozen=True, kw_only=True, tag="branch_clip"):
    """Each branch of a "mix" ratio is clipped within its own (low, high) before mixing; `pessimistic` takes PPO's
    minimum in each branch. DHPO; everything but branch-wise clipping is a reconstruction."""

    token: tuple[float, float] = (0.2, 0.2)
    sequence: tuple[float, float] = (0.1, 0.1)
    pessimistic: bool = True


Gate = (
    NoGate
    | Clip
    | Detached
    | Soft
    | Quadratic
    | SquaredLog
    | Divergence
    | LogClip
    | GammaWeight
    | LevelsClip
    | VariationBudget
    | BranchClip
    | Custom
)

# --- S5: the sampler's mismatch ---------------------------------------------------------------------------------

Pooling = Literal["token", "geometric", "product"]


class Truncate(Kind, frozen=True, kw_only=True, tag="truncate"):
    """min(w, cap). TIS. `level`: per token, or one weight a sequence: geometric mean or product of its tokens' w."""

    level: Pooling = "token"
    cap: float = 2.0


class Mask(Kind, frozen=True, kw_only=True, tag="mask"):
    """w where low <= w <= high, else 0; the denominators still count the token. IcePop (token), MIS, geometric."""

    level: Pooling = "token"
    low: float = 0.5
    high: float = 2.0


class Clamp(Kind, frozen=True, kw_only=True, tag="clamp"):
    """w clamped to [low, high] (slime)."""

    level: Pooling = "token"
    low: float = 0.5
    high: float = 2.0


class Veto(Kind, frozen=True, kw_only=True, tag="veto"):
    """0 for a whole sequence in which any token has w < floor (slime); 1 otherwise."""

    floor: float = 1e-4


class Reject(Kind, frozen=True, kw_only=True, tag="reject"):
    """0 where a divergence of proximal policy and sampler is above `bound`, else 1 (verl's rejection): `form` k1, k2 or
    k3 of log w, of each token or its sum, mean or maximum over the sequence."""

    form: Literal["k1", "k2", "k3"] = "k3"
    over: Literal["token", "sum", "mean", "max"] = "mean"
    bound: float = 0.1


class OffPolicyMask(Kind, frozen=True, kw_only=True, tag="off_policy_mask"):
    """0 for the tokens with A < 0 of a sequence whose mean (log-prob of the sampler - log-prob now) is above
    `threshold`. Named after DeepSeek-V3.2 in trl."""

    threshold: float = 0.3


class Normalise(Kind, frozen=True, kw_only=True, tag="normalise"):
    """Divide the weights found so far by their mean over the step's tokens."""


Behaviour = Truncate | Mask | Clamp | Veto | Reject | OffPolicyMask | Normalise | Custom

# --- S6: aggregation --------------------------------------------------------------------------------------------


class TokenMean(Kind, frozen=True, kw_only=True, tag="token_mean"):
    """Over all tokens of the optimiser step."""


class SeqMeanTokenMean(Kind, frozen=True, kw_only=True, tag="seq_mean_token_mean"):
    """The mean over sequences of each one's token mean."""


class SeqMeanTokenSum(Kind, frozen=True, kw_only=True, tag="seq_mean_token_sum"):
    """The mean over sequences of each one's token sum."""


class ConstNorm(Kind, frozen=True, kw_only=True, tag="const_norm"):
    """The mean over sequences of token sums over a constant `horizon`. Dr.GRPO."""

    horizon: int


class TokenSum(Kind, frozen=True, kw_only=True, tag="token_sum"):
    """The plain sum."""


class Segments(Kind, frozen=True, kw_only=True, tag="segments"):
    """Sum over parts of weight x the part's own mean over its own tokens in the step; a part not named has weight 1.

    by  "first": "first" is a sequence's first trained token, "rest" the others (DeGRPO's control token)
        "turn":  "last" is a sequence's last trained turn, "earlier" the others (DTPO's tool turn)
        "label": the segment labels that the engine recorded (control, think, tool, answer)
    """

    by: Literal["first", "turn", "label"] = "label"
    weights: dict[str, float] = {}


Aggregation = TokenMean | SeqMeanTokenMean | SeqMeanTokenSum | ConstNorm | TokenSum | Segments | Custom

# --- S7: regularisers -------------------------------------------------------------------------------------------


class Kl(Kind, frozen=True, kw_only=True, tag="kl"):
    """coef x an estimate of KL(policy, `against`): k1, k2, k3, or "k3_k2" (k3 in value, k2 in gradient)."""

    coef: float = 0.001
    form: Literal["k1", "k2", "k3", "k3_k2"] = "k3"
    against: Literal["reference", "old", "sampler"] = "reference"


class KlHinge(Kind, frozen=True, kw_only=True, tag="kl_hinge"):
    """coef x sg([KL - bound]+) x KL of the step's mean k3 against the proximal policy. DRPO (2510.04474)."""

    coef: float = 1e3
    bound: float = 1e-4
    against: Literal["reference", "old", "sampler"] = "old"


class Entropy(Kind, frozen=True, kw_only=True, tag="entropy"):
    """-coef x entropy: a bonus."""

    coef: float = 0.001


class EntropyBand(Kind, frozen=True, kw_only=True, tag="entropy_band"):
    """coef x ([low - H]+ + [H - high]+) per token. G2RPO (2604.08539); the bounds are a reconstruction."""

    coef: float = 0.01
    low: float = 0.3
    high: float = 1.0


class Perception(Kind, frozen=True, kw_only=True, tag="perception"):
    """-coef x KL(pi(.|x), pi(.|masked x)) of sampled tokens, plus `clean` x H(pi) + `masked` x H(masked), H taken as
    -log-prob. Observation tokens are masked with probability `share`. PAPO (2507.06448).

    form  "code": exp(d) - d - 1 with d = masked - clean, as released; "paper": r - log r - 1 with r = pi / pi_masked
    """

    coef: float = 0.01
    form: Literal["code", "paper"] = "code"
    clean: float = 0.0
    masked: float = 0.0
    share: float = 0.6


class Distillation(Kind, frozen=True, kw_only=True, tag="distillation"):
    """coef x 1[reward >= threshold] x D(teacher, policy) on the policy's own tokens, over the whole vocabulary: the
    generalised Jensen-Shannon divergence with `beta`, or KL(teacher, policy) with beta = 0. KEPO (2602.00400)."""

    coef: float = 1.0
    threshold: float = 1.0
    beta: float = 0.5


class Sft(Kind, frozen=True, kw_only=True, tag="sft"):
    """coef x negative log-likelihood of sequences with reward >= threshold."""

    coef: float = 0.1
    threshold: float = 1.0


class CustomPenalty(Custom, frozen=True, kw_only=True, tag="custom"):
    """coef x your own penalty per token."""

    coef: float = 1.0


Regulariser = Kl | KlHinge | Entropy | EntropyBand | Perception | Distillation | Sft | CustomPenalty

# --- advantages that read the current log-probs -----------------------------------------------------------------


class Discriminative(Kind, frozen=True, kw_only=True, tag="discriminative"):
    """DRPO (2510.04474) by its gradient: a group is split at reward > `threshold`; positives weigh
    softmax((1 - length / max_length) / length_temperature), negatives -softmax(mean log-prob / tau), detached.
    Groups that are all right or all wrong weigh nothing. Replaces the advantages."""

    threshold: float = 0.5
    tau: float = 10.0
    length_temperature: float = 0.1
    max_length: int = 1024


Contrast = Discriminative | Custom

# --- S8: controllers --------------------------------------------------------------------------------------------


class Schedule(Kind, frozen=True, kw_only=True, tag="schedule"):
    """The number at `of` goes from `start` to `end` over `steps` optimiser steps, "linear" or "geometric"; then stays.
    "inverse": start / (1 + (step / steps) (start / end - 1))."""

    of: str
    start: float
    end: float
    steps: int
    form: Literal["linear", "geometric", "inverse"] = "linear"


class AdaptiveCoef(Kind, frozen=True, kw_only=True, tag="adaptive"):
    """number *= 1 + clip(watched / target - 1, -0.2, 0.2) / horizon once per optimiser step: PPO's adaptive KL.
    `watch` names a figure of the step."""

    of: str
    watch: str
    target: float
    horizon: float = 100.0


class Dual(Kind, frozen=True, kw_only=True, tag="dual"):
    """lambda <- clip(lambda + lr (watched - target), 0, max): a Lagrange multiplier."""

    of: str
    watch: str
    target: float
    lr: float = 0.1
    max: float = 5.0


Controller = Schedule | AdaptiveCoef | Dual

# --- the declaration --------------------------------------------------------------------------------------------


class Objective(Struct, frozen=True, kw_only=True):
    """A choice on every axis. `proximal` says what the ratio is taken against: the log-probs the sampler recorded
    ("sampler"), or the learner's own at the start of the update ("learner", one more forward pass).
    """

    source: Source = Final()
    proximal: Literal["sampler", "learner"] = "sampler"
    ratio: Ratio = Token()
    gate: Gate = Clip()
    behaviour: tuple[Behaviour, ...] = ()
    aggregation: Aggregation = TokenMean()
    regularisers: tuple[Regulariser, ...] = ()
    contrast: Contrast | None = None
    controllers: tuple[Controller, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference policy takes part."""
        kls = (r for r in self.regularisers if isinstance(r, Kl | KlHinge))
        read = any(r.against == "reference" and (r.coef or self.controllers) for r in kls)
        return read or any(custom.reference for custom in self.customs)

    @property
    def reads_sampler(self) -> bool:
        """Whether a ratio or a KL is taken against the sampler, so that every trained token must have its log-prob."""
        compared = [r.against for r in self.regularisers if isinstance(r, Kl | KlHinge)]
        read = not isinstance(self.ratio, NoRatio) or "old" in compared
        return (self.proximal == "sampler" and read) or "sampler" in compared

    @property
    def needs_sampler(self) -> bool:
        """Whether the sampler's log-probs are used at all. A correction takes a token that has none as it is."""
        return self.reads_sampler or bool(self.behaviour) or bool(self.customs)

    @property
    def needs_reward(self) -> bool:
        """Whether the composed reward of a trajectory is read in the loss itself."""
        return isinstance(self.contrast, Discriminative) or any(
            isinstance(r, Sft | Distillation) for r in self.regularisers
        )

    @property
    def bypass(self) -> bool:
        """Whether nothing stands between policy and sampler, neither a ratio nor a proximal policy: corrections then
        compare the policy itself with the sampler, w = sg(pi) / pi_sampler."""
        return isinstance(self.ratio, NoRatio) and self.proximal == "sampler"

    @property
    def coupled(self) -> bool:
        """Whether a token's loss depends on other sequences of the step: micro-batches must be seen together."""
        levels = self.ratio.levels if isinstance(self.ratio, Levels) else ()
        return (
            self.contrast is not None
            or any(level in ("domain", "prompt") for level in levels)
            or (isinstance(self.ratio, Mix) and self.ratio.by == "entropy")
            or (isinstance(self.gate, Clip) and self.gate.adaptive is not None)
            or any(isinstance(b, Normalise) for b in self.behaviour)
            or any(isinstance(r, KlHinge) for r in self.regularisers)
            or any(custom.coupled for custom in self.customs)
        )

    @property
    def grouped(self) -> bool:
        """Whether members of a group are read together, so that an optimiser step must have all of them or none."""
        return self.contrast is not None or (isinstance(self.ratio, Levels) and "prompt" in self.ratio.levels)

    @property
    def customs(self) -> list[Custom]:
        """The functions of the user's own."""
        axes = (self.ratio, self.gate, *self.behaviour, self.aggregation, *self.regularisers, self.contrast)
        return [choice for choice in axes if isinstance(choice, Custom)]

    def find(self, kind: type[Any]) -> Any:
        """The regulariser of this class, or None."""
        return next((r for r in self.regularisers if isinstance(r, kind)), None)


IMITATION = Objective(ratio=NoRatio(), gate=NoGate())
"""Supervised learning is REINFORCE with advantage one: the gradient is that of the mean log-likelihood."""
