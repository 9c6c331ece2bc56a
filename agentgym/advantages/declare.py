"""What an advantage is declared with: terms that are summed, each a place on a few axes.

    GRPO              Term()
    Dr.GRPO           Term(scale="none")
    RLOO              Term(centre="leave_one_out", scale="none")
    REINFORCE++       Term(key="none", centre="none", scale="tokens", credit="return_to_go")
    OPO               Term(centre="length_weighted", scale="none")
    GPG               Term(scale="active")
    GiGPO             Term(scale="none"), Term(key=("prompt", "anchor"), scale="none", credit="return_to_go", gamma=.95)
    GDPO              Term(key=("prompt", "component")), with whiten="trajectories"
    Complementary RL  Term(key=("prompt", "label:experience"))
    DTPO              Term(component="outcome"), Term(component="tool", credit="turn", weight=0.3)
    HRPO              Term(), Term(key="none", centre="none", scale="none", credit="turn", component="action")
    RiskPO            Term(key="bundle", centre="none", scale="none", credit="share", transform=Risk(track=True))
    G2RPO             Term(centre="none", scale="none", transform=RankNormal())
    PPO               Term(key="none", centre="none", scale="tokens", credit="gae")
    turn baseline     Term(key=("prompt", "turn"), centre="others", scale="none", credit="return_to_go")

What cannot be meant is refused when it is declared, with the reason. Why each of them is or is not unbiased:
docs/credit.md.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import msgspec

from agentgym.errors import ConfigError, unknown

TURN_KEYS = ("anchor", "turn")
"""Parts of a key that differ between the turns of one trajectory and agent."""
KEYS = ("prompt", "batch", "none", "component", "domain", "bundle", "agent", *TURN_KEYS)


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the declarations."""


class Transform(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Scores of a group become centred values in another way than by subtraction; needs centre = "none"."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class RankNormal(Transform, frozen=True, kw_only=True, tag="rank_normal"):
    """The normal quantile of a score's rank k of n (G2RPO, 2604.08539); ties get the average of their quantiles.

    The paper's map from rank to probability was not seen: "half" is (k - 1/2) / n, "plus_one" is k / (n + 1).
    """

    convention: Literal["half", "plus_one"] = "half"

    def __post_init__(self) -> None:
        _one_of("convention", self.convention, ("half", "plus_one"))


class Risk(Transform, frozen=True, kw_only=True, tag="risk"):
    """Mixed value at risk (RiskPO, 2510.00911), with q_d, q_u the `lower` and `upper` quantiles of the scores S:

        rvar = ([S - q_d]+ - [S - q_u]+) / (upper - lower + 1e-6)       with `natural`: + (q_d - q_u) in the numerator
        cvar = -[q_d - S]+ / (lower + 1e-6)                             with `seeking`: [S - q_u]+ / (1 - upper + 1e-6)
        A = (weight cvar + rvar) / (weight + 1)

    track  the quantiles are those of all steps so far: the first step's, then moved by lr (alpha - share of S below q)
           after each step. They live in the `state` that is passed to `advantages`. Else each group has its own.
    """

    lower: float = 0.2
    upper: float = 0.8
    weight: float = 1.5
    natural: bool = False
    seeking: bool = False
    track: bool = False
    lr: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper <= 1:
            raise ConfigError(f"a risk reads quantiles 0 <= lower < upper <= 1; got {self.lower}, {self.upper}")
        if not (0 <= self.weight < math.inf and 0 < self.lr < math.inf):
            raise ConfigError(f"weight is at least 0 and lr above 0; got weight {self.weight}, lr {self.lr}")


class PassAtK(Transform, frozen=True, kw_only=True, tag="pass_at_k"):
    """The best of a group gets what it is ahead of the second best, the others 0 (2503.19595)."""


class Best(Transform, frozen=True, kw_only=True, tag="best"):
    """The best of a group keeps its own score, the others get 0; equals share it (CGPO's CRRAFT, best of n)."""


AnyTransform = RankNormal | Risk | PassAtK | Best

_CHOICES: dict[str, tuple[str, ...]] = {
    "centre": ("mean", "leave_one_out", "others", "length_weighted", "given", "none"),
    "scale": ("none", "std", "batch", "tokens", "active"),
    "count": ("trajectories", "turns"),
    "credit": ("trajectory", "turn", "return_to_go", "gae", "share"),
    "whose": ("all", "agent", "team"),
    "singleton": ("zero", "keep"),
}


class Term(Struct, frozen=True, kw_only=True):
    """One summand of an advantage.

    Its units are trajectories (credit "trajectory" and "share"; with "agent" in the key each agent's part of one) or
    turns (the other credits). Units of one group share a baseline.

    key        what makes a group, one or several of: "prompt"; "batch"; "none"; "domain" (label "domain", else the
               environment); "label:NAME"; "agent"; "anchor" (the state without its history); "turn" (index);
               "component" (every reward name apart, a term of its own); "bundle" (alone: `bundle` consecutive prompts
               of the step; the k-th unit of a group is the sum over its prompts of their k-th members)
    centre     subtract the group's mean; "leave_one_out": the mean of its other units; "others": the mean of the units
               of other trajectories, and where there are none the baseline of this trajectory's latest turn that had
               some; "length_weighted": the mean by sampled tokens (OPO); "given": `metrics[given]`; or nothing
    transform  in place of centring: RankNormal, Risk, PassAtK, Best
    scale      "std": divide by the standard deviation of the group's scores + eps (by 1 where all are equal);
               "batch" / "tokens": whiten over all units, counted once / by sampled tokens (verl's masked whitening);
               "active": times units / units with a score other than 0 (GPG); or nothing
    count      with "turns" a trajectory enters its group's mean and std once a turn (the default of GiGPO's code)
    credit     "trajectory": one value for all turns; "turn": each turn its own reward; "return_to_go": what came from
               a turn on, discounted by `gamma` a step; "gae": with recorded or given values, `gamma` and `lam`;
               "share": of a bundle's value by how far the reward is above its prompt's mean (RiskPO; in equal parts
               where these cancel). A bundle with credit "trajectory" gives every member the whole value
    component  read this reward name's raw terms, and not the composed reward; with credit "turn" only the turns that
               carry such a term take part, the others get 0 (DTPO's tool turns, HRPO's action rewards)
    whose      which lines of the ledger count: all; the acting agent's own (levels token, segment, turn, agent); or
               the team's (levels team, episode), which every agent of the step shares
    singleton  where nothing is left to compare with: advantage zero, or the score itself (verl's GRPO)
    """

    key: str | tuple[str, ...] = "prompt"
    bundle: int = 5
    centre: Literal["mean", "leave_one_out", "others", "length_weighted", "given", "none"] = "mean"
    given: str = "baseline"
    transform: AnyTransform | None = None
    scale: Literal["none", "std", "batch", "tokens", "active"] = "std"
    ddof: int = 1
    eps: float = 1e-6
    count: Literal["trajectories", "turns"] = "trajectories"
    credit: Literal["trajectory", "turn", "return_to_go", "gae", "share"] = "trajectory"
    gamma: float = 1.0
    lam: float = 0.95
    component: str = ""
    whose: Literal["all", "agent", "team"] = "all"
    weight: float = 1.0
    singleton: Literal["zero", "keep"] = "zero"

    def __post_init__(self) -> None:
        for axis, choices in _CHOICES.items():
            _one_of(axis, getattr(self, axis), choices)
        for part in self.parts:
            if part not in KEYS and not (part.startswith("label:") and part != "label:"):
                raise unknown("group key", part, (*KEYS, "label:NAME"))
        if self.ddof not in (0, 1) or not 0 <= self.eps < math.inf or not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ConfigError(
                f"ddof is 0 or 1, eps >= 0, gamma and lam in [0, 1]; "
                f"got {self.ddof}, {self.eps}, {self.gamma}, {self.lam}"
            )
        if not math.isfinite(self.weight):
            raise ConfigError(f"the weight of a term is a finite number, not {self.weight}")
        _check_key(self)
        _check_bundle(self)
        _check_statistics(self)
        if "turn" in self.parts and (self.scale == "std" or self.centre not in ("others", "given", "none")):
            warnings.warn(
                "statistics per turn index are biased: late turns exist only in long trajectories; "
                "use centre 'others' and no std (docs/credit.md)",
                stacklevel=2,
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The key as a tuple."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)

    @property
    def whole(self) -> bool:
        """Whether its units are trajectories and not turns."""
        return self.credit in ("trajectory", "share")

    def replace(self, **changes: Any) -> Term:
        """A copy with these fields changed."""
        changed: Term = msgspec.structs.replace(self, **changes)
        return changed


def _one_of(axis: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(axis, value, choices)


def _check_key(term: Term) -> None:
    own = [part for part in term.parts if part in TURN_KEYS]
    if not term.parts:
        raise ConfigError("an empty key: write 'none' for no groups, or 'batch' for one")
    if term.whole and own:
        raise ConfigError(f"the key {own[0]!r} is of turns; set credit to 'turn' or 'return_to_go'")
    if "none" in term.parts and (term.centre not in ("none", "given") or term.scale == "std" or term.transform):
        raise ConfigError(
            "the key 'none' makes no groups; use centre 'none' or 'given', scale other than 'std', no transform"
        )
    if "component" in term.parts and term.component:
        raise ConfigError(f"the key 'component' splits by every reward name; drop component={term.component!r}")


def _check_bundle(term: Term) -> None:
    if term.credit == "share" and "bundle" not in term.parts:
        raise ConfigError("the credit 'share' divides a bundle's value; set key = 'bundle'")
    if "bundle" not in term.parts:
        return
    if len(term.parts) > 1 or not term.whole:
        raise ConfigError("the key 'bundle' stands alone, with credit 'share' or 'trajectory'")
    if term.centre == "given":
        raise ConfigError("a bundle has no figure of its own: the centre 'given' is of single trajectories")
    if term.bundle < 1:
        raise ConfigError(f"a bundle holds at least one prompt, not {term.bundle}")


def _check_statistics(term: Term) -> None:
    if term.transform and term.centre != "none":
        raise ConfigError(f"the transform {term.transform.kind!r} takes the place of centring; set centre = 'none'")
    if isinstance(term.transform, RankNormal) and term.scale == "std":
        raise ConfigError("ranks know no scale of the scores: with 'rank_normal' set scale = 'none'")
    if term.count == "turns" and (term.credit != "trajectory" or term.centre != "mean" or "bundle" in term.parts):
        raise ConfigError(
            "count = 'turns' says how often a trajectory enters its group's mean; "
            "it needs credit 'trajectory', centre 'mean' and no bundle"
        )
