"""Bias, variance and hackability of a method, exactly, on worlds that can be listed; and the traps it walks into.

    certificate = run("grpo")             # or a .toml file, or a .py file (see composition.py)
    print(report(certificate))

What is certified is one optimiser step at the policy that played (in "stale": at one a little newer). What comes after
it in an update, when ratios have moved, is not. Numbers are those of the smallest groups that show an effect; most
shrink with the size of group and batch, and none of the traps goes away.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from agentgym import seeding
from agentgym_trainers.exact.composition import Composition, load
from agentgym_trainers.exact.estimate import RETRIES, Estimate, Lab, gradient
from agentgym_trainers.exact.flow import Flow, flows
from agentgym_trainers.exact.mdp import FAULTY, MDP, SCALES, STALE, STOPPING, WORLDS, Real, log_policy
from agentgym_trainers.objective.declare import NoGate, NoRatio, Objective, TokenSum

Status = Literal["clean", "caught", "not certified"]
TOLERANCE = 0.01
"""An effect of less than a hundredth is called none."""
MEMBERS = {"stopping": 4, "scales": 2, "tool": 4, "faulty": 3, "stale": 3}
"""Episodes a prompt, in the figures of bias and variance."""
DRIFT = (0.08, 0.0, -0.08)
"""What the sampler's logits in "stale" have over the learner's: the ratios stay well inside every usual bound."""


class Bias(msgspec.Struct, frozen=True, kw_only=True):
    """The expected step against the gradient of the expected return, at the worst of the policies tried.

    relative   |c E[step] - gradient| / |gradient| with the best c > 0; 1 where every c makes it worse
    angle      between the two, degrees;  scale  E[step] along the gradient, over it
    turns, prompts    the same scale of each turn's and prompt's part, the first turn's (largest prompt's) taken as 1
    """

    world: str
    relative: float
    angle: float
    scale: float
    turns: tuple[float, ...]
    prompts: tuple[float, ...]


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """At the uniform policy: trace of the covariance of a step, and (expected step along the gradient)^2 / (trace x
    episodes), which does not depend on the learning rate."""

    world: str
    trace: float
    signal: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the method walks into one trap; `number` is what the sentence speaks of."""

    trap: str
    status: Status
    number: float
    sentence: str


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured. `refused`: why a run refuses the declaration (it was measured all the same); `outside`:
    why nothing could be measured; `gaps`: what of the method was not; `asides`: what was left out as another goal."""

    name: str
    refused: str = ""
    outside: str = ""
    gaps: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    bias: tuple[Bias, ...] = ()
    spread: tuple[Spread, ...] = ()
    flows: tuple[Flow, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    seconds: float = 0.0

    @property
    def caught(self) -> tuple[Verdict, ...]:
        """The traps that it walks into."""
        return tuple(v for v in self.verdicts if v.status == "caught")

    @property
    def hackable(self) -> bool:
        """Whether following its expected step raised the declared return and lowered the true one."""
        return any(flow.hacked for flow in self.flows)


def run(name: str | Path) -> Certificate:
    """Certify a method by its name, or a .toml or .py file."""
    return certify(load(name))


def certify(source: Composition | Mapping[str, Any]) -> Certificate:
    """Push every group of every world through the composition, and judge."""
    began = time.perf_counter()
    c = source if isinstance(source, Composition) else load(source)
    try:
        found = _outside(c, c.outside) if c.outside else _measured(c)
    except Exception as error:
        if not c.refused:
            raise
        found = _outside(c, f"past the rule that refuses it nothing can be computed ({error})")
    return msgspec.structs.replace(found, seconds=round(time.perf_counter() - began, 3))


def _outside(c: Composition, why: str) -> Certificate:
    nothing = tuple(_verdict(trap, ("not certified", float("nan"), f"Not measured: {why}.")) for trap in TRAPS)
    return Certificate(name=c.name, refused=c.refused, outside=why, verdicts=nothing)


def _measured(c: Composition) -> Certificate:
    labs = {mdp.name: Lab(c, mdp, members=MEMBERS[mdp.name]) for mdp in WORLDS.values()}
    gaps = (*c.gaps, *(lab.pipeline.note for lab in labs.values() if lab.pipeline.note))
    paying = [lab for lab in labs.values() if lab.pipeline.varied]
    if not paying:
        return _outside(c, "its reward is the same for every episode, so it imitates and estimates no gradient")
    return Certificate(
        name=c.name,
        refused=c.refused,
        gaps=gaps,
        asides=c.asides,
        bias=tuple(_worst(lab) for lab in paying),
        spread=tuple(_spread(lab) for lab in paying),
        flows=flows(c),
        verdicts=tuple(_verdict(trap, _hedged(judge(c), gaps)) for trap, judge in TRAPS.items()),
    )


# --- figures ----------------------------------------------------------------------------------------------------


def policies(mdp: MDP) -> list[Real]:
    """Logits [S, A] at which things are measured: the uniform policy and two others."""
    noise = seeding.rng("exact", mdp.name)
    others = [np.asarray([[noise.gauss(0.0, 0.8) for _ in row] for row in mdp.legal]) for _ in range(2)]
    return [np.zeros(mdp.legal.shape), *others]


def sampler_of(mdp: MDP, theta: Real) -> Real:
    """Who plays: the learner, but for "stale"."""
    return theta + np.asarray(DRIFT) if mdp is STALE else theta


def _estimates(lab: Lab) -> list[Estimate]:
    return [lab.estimate(theta, sampler_of(lab.mdp, theta)) for theta in policies(lab.mdp)]


def bias(world: str, found: Estimate) -> Bias:
    """An estimate as figures."""
    step, true = found.expected.sum((0, 1)), found.true.sum((0, 1))
    along, size, length = float((step * true).sum()), float((step**2).sum()), float((true**2).sum())
    best = max(along / size, 0.0) if size > 0 else 0.0
    relative = float(np.sqrt(((best * step - true) ** 2).sum() / length))
    angle = np.degrees(np.arctan2(relative, along / np.sqrt(size * length))) if best else 90.0 + 90.0 * (along < 0)
    return Bias(
        world=world,
        relative=relative,
        angle=float(angle),
        scale=along / length,
        turns=_unit(shares(found, 0), 0),
        prompts=_unit(shares(found, 1), -1),
    )


def shares(found: Estimate, over: int) -> Real:
    """Each turn's part of the expected step along its part of the gradient, over it (`over` 0: prompts are summed), or
    each prompt's (1)."""
    step, true = found.expected.sum(over), found.true.sum(over)
    length = (true**2).sum((1, 2))
    return np.asarray((step * true).sum((1, 2)) / np.where(length > 1e-18, length, np.nan))


def _unit(weights: Real, of: int) -> tuple[float, ...]:
    return tuple(float(w / weights[of]) if weights[of] else float("nan") for w in weights)


def _worst(lab: Lab) -> Bias:
    return max((bias(lab.mdp.name, found) for found in _estimates(lab)), key=lambda b: b.relative)


def _spread(lab: Lab) -> Spread:
    found = lab.estimate(policies(lab.mdp)[0])
    return Spread(world=lab.mdp.name, trace=found.trace, signal=found.signal)


# --- traps ------------------------------------------------------------------------------------------------------

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
    return [shares(found, 0) for found in _estimates(Lab(c, STOPPING, members=2, fair=True))]


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
    found = [shares(e, 1) for e in _estimates(Lab(credit_of(c), SCALES, members=2, fair=True))]
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


def _verdict(trap: str, found: Finding) -> Verdict:
    status, number, sentence = found
    return Verdict(trap=trap, status=status, number=number, sentence=sentence)


def _hedged(found: Finding, gaps: Sequence[str]) -> Finding:
    """What was measured in part cannot be called clean."""
    status, number, sentence = found
    if gaps and status == "clean":
        return "not certified", number, f"In the part that was measured: {sentence}"
    return found


# --- as text ----------------------------------------------------------------------------------------------------


def report(c: Certificate) -> str:
    """The certificate as text, for a terminal."""
    lines = [f"{c.name}: {_summary(c)} ({c.seconds:.1f} s)"]
    lines += [f"  refused when loaded: {c.refused}"] if c.refused else []
    lines += [f"  not measured: {gap}" for gap in ((c.outside,) if c.outside else c.gaps)]
    lines += [f"  note: {aside}" for aside in c.asides]
    lines += ["", "traps"] + [f"  {v.status:<14}{v.trap:<24}{v.sentence}" for v in c.verdicts]
    if c.bias:
        lines += ["", "world      bias     angle   turns                  prompts          variance   signal"]
        lines += [_row(b, s) for b, s in zip(c.bias, c.spread, strict=True)]
        lines += ["", "followed to the end (truth, declared return: before -> after)"] + [_led(f) for f in c.flows]
    return "\n".join(lines)


def _summary(c: Certificate) -> str:
    if c.outside:
        return "not certifiable"
    caught = ", ".join(v.trap for v in c.caught) or "no trap"
    return f"caught in {caught}" if c.caught else "clean" if not c.gaps else f"{caught} in what could be measured"


def _row(b: Bias, s: Spread) -> str:
    turns, prompts = (" ".join(f"{x:.2f}" for x in found) for found in (b.turns, b.prompts))
    return f"{b.world:<10} {b.relative:<8.2g} {b.angle:<7.3g} {turns:<22} {prompts:<16} {s.trace:<10.3g} {s.signal:.3g}"


def _led(f: Flow) -> str:
    told = f"truth {f.truth[0]:.3f} -> {f.truth[1]:.3f}, declared {f.goal[0]:.3f} -> {f.goal[1]:.3f}"
    return f"  from {f.start:<16}{told}, regret {f.regret:.3f}{', HACKED' if f.hacked else ''}"
