"""The gated hierarchical reward: correctness, then quality, then efficiency (our reconstruction of an HRM).

    R = -1             a rule is broken (G0): ungrounded item, unconfirmed purchase, too many errors
    R = 0              nothing was recommended
    R = 0.30 c^2       a hard wish is missed (c: weighted share of wishes met)
    R = 0.50 + 0.35 q + 0.15 e [q >= 0.5]
                       all hold; q = 0.6 utility + 0.4 evidence, e = efficiency

An episode cut off from outside has no quantities: it counts as one without a recommendation.
The levels are disjoint ranges, so nothing of a higher level can be bought with a lower one. The environment emits the
quantities; `HRM` is the default declaration that composes them, `hrm` the same in plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import msgspec
import numpy as np

from agentgym.types import RewardTerm
from agentgym_envs.shopping.catalogue import Catalogue, Constraint
from agentgym_envs.shopping.desk import Close, Desk, Outcome
from agentgym_envs.shopping.requests import Reason

HRM: dict[str, Any] = {
    "op": "gate", "when": {"op": "term", "name": "valid", "default": 1.0}, "at_least": 1.0, "otherwise": -1.0,
    "then": {
        "op": "gate", "when": {"op": "term", "name": "finished", "default": 0.0}, "at_least": 1.0, "otherwise": 0.0,
        "then": {
            "op": "gate", "when": "hard", "at_least": 1.0,
            "otherwise": {"op": "power", "of": "share", "exponent": 2, "scale": 0.3},
            "then": {
                "op": "weighted_sum", "of": {"quality": 0.35}, "bias": 0.5,
                "plus": [{
                    "op": "gate", "when": "quality", "at_least": 0.5, "otherwise": 0.0,
                    "then": {"op": "weighted_sum", "of": {"efficiency": 0.15}},
                }],
            },
        },
    },
}  # fmt: skip


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The quantities at the end of an episode, each in [0, 1]; the three flags are 0 or 1."""

    valid: float
    finished: float
    hard: float = 0.0
    share: float = 0.0
    quality_utility: float = 0.0
    quality_evidence: float = 0.0
    quality: float = 0.0
    efficiency: float = 0.0


def hrm(v: Verdict) -> float:
    """R of a verdict."""
    if v.valid < 1.0:
        return -1.0
    if v.finished < 1.0:
        return 0.0
    if v.hard < 1.0:
        return 0.30 * v.share**2
    return 0.50 + 0.35 * v.quality + (0.15 * v.efficiency if v.quality >= 0.5 else 0.0)


def terms(outcome: Outcome, verdict: Verdict | None) -> tuple[RewardTerm, ...]:
    """The ledger of one turn: the potential, and at the end the whole vector."""
    lines = [RewardTerm(name="phi.before", value=outcome.before), RewardTerm(name="phi.after", value=outcome.after)]
    if outcome.drift:
        lines.append(RewardTerm(name="phi.drift", value=outcome.drift, cause="world"))
    if verdict is not None:
        vector = msgspec.structs.asdict(verdict)
        lines += [RewardTerm(name=name, value=value, level="episode") for name, value in vector.items()]
    return tuple(lines)


def judge(desk: Desk) -> Verdict:
    """Judge a closed desk."""
    close = desk.close
    if close is None or not close.valid or not close.finished or not close.rows:
        return Verdict(valid=float(close is None or close.valid), finished=float(close is not None and close.finished))
    pairing = _pair(desk, close.rows)
    cs = [_share(desk, need, row) for need, row in pairing]
    hard = float(all(row in desk.feasible[need] for need, row in pairing) and _purse_holds(desk, close.rows))
    utility = float(np.mean([_utility(desk, need, row) for need, row in pairing]))
    evidence = _evidence(desk, close, pairing)
    return Verdict(
        valid=1.0,
        finished=1.0,
        hard=hard,
        share=float(np.mean(cs)),
        quality_utility=utility,
        quality_evidence=evidence,
        quality=0.6 * utility + 0.4 * evidence,
        efficiency=_efficiency(desk),
    )


def _pair(desk: Desk, rows: Sequence[int]) -> list[tuple[int, int]]:
    """(need, row): the first recommended item for a single need, else the assignment that meets most."""
    needs = range(len(desk.brief.needs))
    if len(needs) == 1:
        return [(0, rows[0])]
    padded = [*rows[:6], *[-1] * max(len(needs) - len(rows), 0)]
    options = [list(zip(needs, p, strict=True)) for p in permutations(padded, len(needs))]
    return max(options, key=lambda option: sum(_share(desk, need, row) for need, row in option))


def _share(desk: Desk, need: int, row: int) -> float:
    """c: weighted share of the hard wishes that hold on the structured fields; being the best is one of them."""
    if row < 0:
        return 0.0
    wishes, catalogue = desk.mind.wishes[need], desk.catalogue
    met = sum(w.weight for w in wishes if catalogue.satisfies(row, w))
    total = sum(w.weight for w in wishes)
    if desk.brief.needs[need].best:
        met, total = met + float(row in desk.feasible[need]), total + 1.0
    return met / total if total else 1.0


def _purse_holds(desk: Desk, rows: Sequence[int]) -> bool:
    """A bundle: one of each need and no more, within the budget after the voucher, from one seller if asked."""
    purse = desk.brief.purse
    if purse is None:
        return True
    exact = len(rows) == len(desk.brief.needs) and all(quantity == 1 for quantity in desk.cart.values())
    total = float(desk.catalogue.numbers["price"].values[list(rows)].sum())
    sellers = {desk.catalogue.columns["seller"].read(row) for row in rows} if purse.one_seller else {""}
    return exact and bool(np.isfinite(total)) and purse.covers(total) and len(sellers) == 1


def utilities(catalogue: Catalogue, soft: Sequence[Constraint], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """u of each row: the weighted sum of its merits in the soft slots, each min-max over the rows; [len(rows)]."""
    total = np.zeros(len(rows))
    for wish in soft:
        merit = catalogue.numbers[wish.slot].merit(rows)
        merit = np.where(np.isfinite(merit), merit, merit[np.isfinite(merit)].min(initial=0.0))
        total += wish.weight * (merit - merit.min()) / max(float(np.ptp(merit)), 1e-12)
    return total


def _utility(desk: Desk, need: int, row: int) -> float:
    """q_u: where the item stands between the worst and the best of F; 1 where all are equal, 0 outside F."""
    rows = desk.feasible[need]
    if row not in rows:
        return 0.0
    u = utilities(desk.catalogue, desk.brief.needs[need].soft, rows)
    spread = float(np.ptp(u))
    return 1.0 if spread < 1e-12 else float((u[rows == row][0] - u.min()) / spread)


def _evidence(desk: Desk, close: Close, pairing: Sequence[tuple[int, int]]) -> float:
    """q_e: F1 of the reasons. Precision: claims true of the item's fields; recall: told wishes addressed."""
    reasons = dict.fromkeys(close.reasons)
    if not reasons:
        return 0.0
    true = [r for r in reasons if _claim_holds(desk.catalogue, r)]
    told = {(need, w.slot) for need, _ in pairing for w in desk.mind.known(need)}
    need_of = {desk.catalogue.ids[row]: need for need, row in pairing if row >= 0}
    addressed = {(need_of[r.item], r.claim.slot) for r in true if r.item in need_of} & told
    precision, recall = len(true) / len(reasons), len(addressed) / len(told) if told else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _claim_holds(catalogue: Catalogue, reason: Reason) -> bool:
    row = catalogue.row_of.get(reason.item)
    return row is not None and reason.claim.slot in catalogue.columns and catalogue.satisfies(row, reason.claim)


def cost(desk: Desk) -> int:
    """Calls that were not free, duplicate questions, and answers "no preference" after the first."""
    charged = max(desk.counts.calls - desk.counts.free, 0)
    return charged + desk.mind.duplicates + max(desk.mind.indifferent - 1, 0)


def _efficiency(desk: Desk) -> float:
    """e = 1 - clip((cost - least) / (budget - least), 0, 1); the least is search and recommend, or a filled cart."""
    needs = len(desk.brief.needs)
    least = 2 if needs == 1 else 2 * needs + 2
    spread = max(desk.brief.budget - least, 1)
    return 1.0 - min(max((cost(desk) - least) / spread, 0.0), 1.0)
