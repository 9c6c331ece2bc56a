"""Figures of an estimate: how far the expected step is from the gradient of the return, and how far steps scatter."""

from __future__ import annotations

import msgspec
import numpy as np

from agentgym import seeding
from agentgym_trainers.exact.estimate import Estimate, Lab
from agentgym_trainers.exact.mdp import MDP, Real
from agentgym_trainers.exact.worlds import STALE

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


def policies(mdp: MDP) -> list[Real]:
    """Logits [S, A] at which things are measured: the uniform policy and two others."""
    noise = seeding.rng("exact", mdp.name)
    others = [np.asarray([[noise.gauss(0.0, 0.8) for _ in row] for row in mdp.legal]) for _ in range(2)]
    return [np.zeros(mdp.legal.shape), *others]


def sampler_of(mdp: MDP, theta: Real) -> Real:
    """Who plays: the learner, but for "stale"."""
    return theta + np.asarray(DRIFT) if mdp is STALE else theta


def estimates(lab: Lab) -> list[Estimate]:
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


def worst(lab: Lab) -> Bias:
    return max((bias(lab.mdp.name, found) for found in estimates(lab)), key=lambda b: b.relative)


def scatter(lab: Lab) -> Spread:
    found = lab.estimate(policies(lab.mdp)[0])
    return Spread(world=lab.mdp.name, trace=found.trace, signal=found.signal)
