"""The known traps, each as one measurement on the world that shows it: a method walks into it, or it does not.

A finding holds the status, the number that was measured, and a sentence about it. Nothing here reads a declaration:
what a composition does is asked of its steps, so a function of your own is judged as a declared method is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from agentgym_trainers.exact.composition import Composition
from agentgym_trainers.exact.estimate import RETRIES, Lab, gradient
from agentgym_trainers.exact.mdp import MDP, Real, log_policy
from agentgym_trainers.exact.measures import bias, estimates, policies, sampler_of, shares
from agentgym_trainers.exact.worlds import FAULTY, SCALES, STALE, STOPPING
from agentgym_trainers.objective.declare import NoGate, NoRatio, Objective, TokenSum

Status = Literal["clean", "caught", "not certified"]
TOLERANCE = 0.01
"""An effect of less than a hundredth is called none."""
Finding = tuple[Status, float, str]


def credit_of(c: Composition) -> Composition:
    """The composition with plain sums in place of its means over tokens: what its advantages alone do."""
    if "loss" in c.hooks:
        plain = Objective(ratio=NoRatio(), gate=NoGate(), aggregation=TokenSum())
        return dataclasses.replace(c, objective=plain, hooks={n: f for n, f in c.hooks.items() if n != "loss"})
    summed = msgspec.structs.replace(Objective())
    for axis in Objective.__struct_fields__:
        msgspec.structs.force_setattr(summed, axis, getattr(c.objective, axis))
    msgspec.structs.force_setattr(summed, "aggregation", TokenSum())
    return dataclasses.replace(c, objective=summed)


def _turn_weights(c: Composition) -> list[Real]:
    """What each turn counts in "stopping", in pairs with returns 0 or 1: a scale that depends on the group is then the
    same for every pair that differs, so that what is left comes from the turns."""
    return [shares(found, 0) for found in estimates(Lab(c, STOPPING, members=2, fair=True))]


def _even(weights: Sequence[Real]) -> tuple[float, Real]:
    """The least weight over the largest, where that is least, and those weights."""
    ratios = [(float(w.min() / w.max()) if w.max() > 0 else -1.0, w) for w in weights]
    return min(ratios, key=lambda found: found[0])


def _silent(weights: Sequence[Real]) -> bool:
    return not all(np.isfinite(w).all() for w in weights) or all(np.allclose(w, 0.0) for w in weights)


def _per_turn(c: Composition) -> Finding:
    weights = _turn_weights(credit_of(c))
    if _silent(weights):
        return "not certified", float("nan"), "It learns nothing from a pair of episodes that stop at different turns."
    evenness, found = _even(weights)
    told = ", ".join(f"{w / found[0]:.3f}" if found[0] else f"{w:.3f}" for w in found)
    if evenness < 1 - TOLERANCE:
        return "caught", evenness, f"Where the policy decides when to stop, its credit weighs turns 1, 2, 3 by {told}."
    return "clean", evenness, "Its credit weighs early and late turns alike where the policy decides when to stop."


def _length(c: Composition) -> Finding:
    whole, credit = _turn_weights(c), _turn_weights(credit_of(c))
    if _silent(whole) or _silent(credit):
        return "not certified", float("nan"), "It learns nothing from a pair of episodes of different length."
    evenness, found = _even([w / np.where(v == 0, np.nan, v) for w, v in zip(whole, credit, strict=True)])
    told = ", ".join(f"{w / found[0]:.3f}" for w in found)
    if not evenness >= 1 - TOLERANCE:
        return "caught", evenness, f"Its mean over tokens weighs turns 1, 2, 3 by {told}, on top of its credit."
    return "clean", evenness, "How it sums over tokens leaves turns of long and short episodes their weight."


def _scaling(c: Composition) -> Finding:
    found = [shares(e, 1) for e in estimates(Lab(credit_of(c), SCALES, members=2, fair=True))]
    if _silent(found):
        return "not certified", float("nan"), "It learns nothing from prompts of one turn."
    ratios = [float(w[0] / w[1]) if w[1] else float("inf") for w in found]
    worst = max(ratios, key=lambda r: abs(np.log(r)) if r > 0 else np.inf)
    told = f"A prompt whose rewards are a tenth of another's counts {worst:.3g} x per unit of reward"
    if not abs(worst - 1) <= TOLERANCE:
        return "caught", worst, f"{told}: the step is not that of the mean return."
    return "clean", worst, f"{told}."


def _zeros(c: Composition) -> Finding:
    """With failed members against without them, where the fault persists."""
    lab, logs = Lab(c, FAULTY, members=3, retries=0, fair=True), log_policy(policies(FAULTY)[0], FAULTY.legal)
    good = [tuple(tuple(~p if FAULTY.paths[p].failed else p for p in group) for group in step) for step in lab.steps]
    with_, without = (
        gradient(np.einsum("g,gqksa->sa", lab.probabilities(logs), lab.coefficients(logs, logs, steps)), logs)
        for steps in (lab.steps, good)
    )
    true = lab.true(logs).sum((0, 1))
    change = _change(with_, without)
    along = float((with_ * true).sum() / max((without * true).sum(), 1e-300))
    if change > TOLERANCE:
        told = f"Failed episodes change the expected step by {change:.3g} of its size; it keeps {along:.2f} of its way"
        return "caught", change, f"{told} to the best action" + (", and leads away." if along < 0 else ".")
    return "clean", change, "An episode that failed is in no baseline and trains nothing: the step is as without it."


def _retrying(c: Composition) -> Finding:
    changes = [_retried(c, mdp) for mdp in (FAULTY, STOPPING)]
    change = max(changes)
    if change > TOLERANCE:
        told = f"Playing again with fresh noise changes the expected step by {change:.3g} of its size"
        return "caught", change, f"{told}: what is learnt from is no longer what the policy does."
    left = _left_out(c)
    return (
        "clean",
        change,
        "Faults are retried with the same task, seed and noise, so the policy's choices stay as they were; what still "
        f"fails after {RETRIES} retries is left out, which bends the step by {left:.3g} where half of the tries break.",
    )


def _retried(c: Composition, mdp: MDP) -> float:
    theta = policies(mdp)[0]
    fair, own = (Lab(c, mdp, members=2, fair=fair).estimate(theta).expected.sum((0, 1)) for fair in (True, False))
    return _change(own, fair)


def _change(now: Real, before: Real) -> float:
    """|now - before| / |before|; 0 where both are nothing."""
    return float(np.linalg.norm(now - before)) / max(float(np.linalg.norm(before)), 1e-300)


def _left_out(c: Composition) -> float:
    """The change of the expected step's direction by failures that persist."""
    theta = policies(FAULTY)[0]
    some, none = (Lab(c, FAULTY, members=3, retries=r, fair=True).estimate(theta) for r in (RETRIES, 60))
    return bias("", dataclasses.replace(some, true=none.expected)).relative if none.expected.any() else 0.0


def _double(c: Composition) -> Finding:
    """The power of w = pi / sampler in the step: d log(coefficient) / d log w over the tokens of a step."""
    lab, theta = Lab(c, STALE, members=3, fair=True), policies(STALE)[0]
    logs, played = log_policy(theta, STALE.legal), log_policy(sampler_of(STALE, theta), STALE.legal)
    on, off = (x.sum((1, 2, 3)) for x in (lab.coefficients(logs, logs), lab.coefficients(logs, played)))
    live = on * off > 1e-30
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(live, np.log(off / on), 0.0)
    x = np.where(live, (logs - played)[0], 0.0)
    count = np.maximum(live.sum(1, keepdims=True), 1)
    x, y = (np.where(live, z - z.sum(1, keepdims=True) / count, 0.0) for z in (x, y))
    if not (x**2).sum() > 0:
        return "not certified", float("nan"), "It trains on no token that the sampler drew from an older policy."
    power = float((x * y).sum() / (x**2).sum())
    told = f"The mismatch of sampler and learner enters the step to the power {power:.2f}"
    if c.refused and c.objective.behaviour:
        return "caught", power, f"Refused when loaded: {c.refused}. Past the rule: {told[0].lower()}{told[1:]}."
    if power > 1.5:
        return "caught", power, f"{told}: it is corrected twice, in the ratio and in the weights."
    return "clean", power, told + (": it is not corrected." if abs(power) < 0.5 else ".")


TRAPS = {
    "per-turn normalisation": _per_turn,
    "length normalisation": _length,
    "std scaling": _scaling,
    "silent zeros": _zeros,
    "retry until success": _retrying,
    "double correction": _double,
}
