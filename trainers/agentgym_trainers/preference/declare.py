"""What learning from preferences is declared with: a loss and who builds the pairs. No torch here.

    [preference]
    loss = {kind = "dpo", beta = 0.1}
    pairs = {kind = "best_worst", margin = 0.0, length_ratio = 1.5}

Symbols: y+ the chosen and y- the rejected trajectory, log-probs summed over sampled tokens; ref the frozen reference,
pi_t the policy as it was when the update began; D(pi, ref) = log pi/ref (y+) - log pi/ref (y-).
"""

from __future__ import annotations

import math
from typing import Literal

from agentgym.errors import ConfigError
from agentgym_trainers.objective.declare import Kind, Struct

# --- losses -----------------------------------------------------------------------------------------------------


class DPO(Kind, frozen=True, kw_only=True, tag="dpo"):
    """-log sigmoid(beta D). DPO (2305.18290); equal to trl's "sigmoid".

    against  "reference", or "previous": pi_t in its place (iterated DPO, the practical form of DNO)
    """

    beta: float = 0.1
    against: Literal["reference", "previous"] = "reference"


class RPO(Kind, frozen=True, kw_only=True, tag="rpo"):
    """DPO + eta x negative log-likelihood of y+. RPO (2405.16436).

    form  "code": per chosen token of the step, as trl and the released code; "paper": beta eta x the sequence's sum,
          recalled from the paper and not checked
    """

    beta: float = 0.01
    eta: float = 0.005
    form: Literal["code", "paper"] = "code"


class INPO(Kind, frozen=True, kw_only=True, tag="inpo"):
    """(h - 1 / (2 eta))^2 with h = D(pi, anchor), log anchor = (tau / eta) log ref + (1 - tau / eta) log pi_t. INPO
    (2407.00617); recalled, and its numbers are ours: the paper's ratio tau / eta is not verified."""

    eta: float = 0.0075
    tau: float = 0.0025


class DNO(Kind, frozen=True, kw_only=True, tag="dno"):
    """Cross-entropy of sigmoid(r(y+) - r(y-)) and sigmoid(eta D(pi, pi_t)), r the win-rate against pi_t. DNO
    (2404.03715); recalled. Here r is the win-rate against the other members of the group, which pi_t sampled."""

    eta: float = 0.1


class SRPO(Kind, frozen=True, kw_only=True, tag="srpo"):
    """(1 - mix) x improvement + mix x robustness. SRPO (2406.01660).

    improvement  (beta (log pi/ref (y | y') - log pi/ref (y' | y')) - (p - 1/2))^2, p = 1 where y is the better one;
                 both orders, averaged; recalled
    robustness   (beta / 2 (D(pi, ref) + log pi/ref (y+ | y-) - log pi/ref (y- | y+)) - 1/2)^2: a reconstruction, from
                 the condition that the min-max problem's optimum fulfils; `mix` is ours

    (y | y') is y sampled behind the tokens of y'; four further sequences a pair, each twice as long.
    """

    beta: float = 0.1
    mix: float = 0.5


class CODPO(Kind, frozen=True, kw_only=True, tag="codpo"):
    """DPO on judged pairs + sft x negative log-likelihood of y+ per token of y+. CGPO (2409.20370); the second term is
    recalled, and off unless set."""

    beta: float = 0.1
    sft: float = 0.0


Loss = DPO | RPO | INPO | DNO | SRPO | CODPO

# --- pairs ------------------------------------------------------------------------------------------------------


class BestWorst(Kind, frozen=True, kw_only=True, tag="best_worst"):
    """One pair a group: of its pairs whose rewards differ by more than `margin`, the one that differs most.

    length_ratio  the longer one has at most so many times the sampled tokens of the shorter (0 = whatever)
    """

    margin: float = 0.0
    length_ratio: float = 0.0


class AllPairs(Kind, frozen=True, kw_only=True, tag="all"):
    """Every pair of a group whose rewards differ by more than `margin`; `length_ratio` as in "best_worst"."""

    margin: float = 0.0
    length_ratio: float = 0.0


class Judged(Kind, frozen=True, kw_only=True, tag="judged"):
    """One pair a group: y+ is the best feasible member, y- the worst infeasible one, or the worst of all where none is
    infeasible; a group without a feasible member is skipped. CGPO (2409.20370).

    constraints  reward terms of the judges; a member is feasible where each of them totals `at_least`
    """

    constraints: tuple[str, ...]
    at_least: float = 1.0
    length_ratio: float = 0.0


Builder = BestWorst | AllPairs | Judged


class Preference(Struct, frozen=True, kw_only=True):
    """Learning from preferences: a loss over pairs, and how pairs are made of a group of samples."""

    loss: Loss = DPO()
    pairs: Builder = BestWorst()

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference policy takes part."""
        return not isinstance(self.loss, DNO) and not (isinstance(self.loss, DPO) and self.loss.against == "previous")

    @property
    def needs_previous(self) -> bool:
        """Whether the policy as it was when the update began does."""
        return isinstance(self.loss, INPO | DNO) or not self.needs_reference

    @property
    def conditional(self) -> bool:
        """Whether trajectories are also read behind one another."""
        return isinstance(self.loss, SRPO)


def check(p: Preference) -> None:
    """Refuse what cannot be meant, with the reason."""
    for kind in (p.loss, p.pairs):
        for name in kind.__struct_fields__:
            value = getattr(kind, name)
            least = -math.inf if name == "at_least" else 0.0
            if isinstance(value, float | int) and not (math.isfinite(value) and value >= least):
                raise ConfigError(f"{name} of {kind.kind!r} is a finite number{' from 0' * (least == 0)}; got {value}")
    scale = p.loss.eta if isinstance(p.loss, INPO | DNO) else p.loss.beta
    if not scale:
        raise ConfigError(f"{'eta' if isinstance(p.loss, INPO | DNO) else 'beta'} of {p.loss.kind!r} is above 0; got 0")
    if isinstance(p.loss, INPO) and p.loss.tau > p.loss.eta:
        raise ConfigError(f"tau of 'inpo' is at most eta: tau / eta is a share; got {p.loss.tau} and {p.loss.eta}")
    if isinstance(p.loss, SRPO) and p.loss.mix > 1:
        raise ConfigError(f"mix of 'srpo' is a share in [0, 1]; got {p.loss.mix}")
    _check_pairs(p)


def _check_pairs(p: Preference) -> None:
    if 0 < p.pairs.length_ratio < 1:
        raise ConfigError(
            f"length_ratio is the longer over the shorter, so at least 1 (0 = any); got {p.pairs.length_ratio}"
        )
    if isinstance(p.pairs, Judged) and not p.pairs.constraints:
        raise ConfigError("pairs 'judged' need constraints: the names of the judges' reward terms")
    if isinstance(p.loss, CODPO) and not isinstance(p.pairs, Judged):
        raise ConfigError(
            f"'codpo' is DPO on judged pairs, not {p.pairs.kind!r}; set pairs.kind = 'judged', or loss.kind = 'dpo'"
        )
