"""Hackability: where a method's expected step leads, followed to the end, when a reward stands for the truth."""

from __future__ import annotations

import msgspec
import numpy as np

from agentgym_trainers.exact.composition import Composition
from agentgym_trainers.exact.estimate import Lab, gradient
from agentgym_trainers.exact.mdp import MDP, Real, log_policy
from agentgym_trainers.exact.worlds import TOOL

LENGTH = 80
"""Steps of the flow; they are of length `STRIDE` first and shrink to nothing, so the path is about 24 long."""
STRIDE = 0.6
MEMBERS = 3
LEAN = 1.5
"""Logit of what a start leans to."""
MOVED = 1e-3
"""A change of a return that counts as one."""


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """The expected step, followed from one policy on. `goal` is the declared return, `truth` the true one, before and
    after; `regret` what is missing to the best policy; `hacked`: the goal rose and the truth fell."""

    start: str
    goal: tuple[float, float]
    truth: tuple[float, float]
    regret: float
    hacked: bool


def flows(composition: Composition) -> tuple[Flow, ...]:
    """From the uniform policy, from ones that lean to each action, and from one that is nearly right, in "tool". In
    pairs where what a step teaches depends on the policy, so that each has to be pushed through the pipeline anew."""
    lab = Lab(composition, TOOL, members=MEMBERS)
    steady = _steady(lab)
    lab = lab if steady is not None else Lab(composition, TOOL, members=2)
    return tuple(_flow(lab, name, theta, steady) for name, theta in _starts(lab.mdp).items())


def _starts(mdp: MDP) -> dict[str, Real]:
    one_hot = np.eye(len(mdp.actions))
    leaning = {
        f"mostly {word}": LEAN * np.ones((len(mdp.states), 1)) * one_hot[a] for a, word in enumerate(mdp.actions)
    }
    return {"uniform": np.zeros(mdp.legal.shape), **leaning, "nearly right": 2 * LEAN * one_hot[mdp.optimal()]}


def _steady(lab: Lab) -> Real | None:
    """The coefficients of every step [G, Q, K, S, A], where they do not depend on the policy."""
    logs = [log_policy(x, lab.mdp.legal) for x in (np.zeros(lab.mdp.legal.shape), lab.mdp.legal * [[0.7, -0.4]])]
    first, second = (lab.coefficients(x, x) for x in logs)
    return first if np.allclose(first, second, rtol=1e-9, atol=1e-12) else None


def _flow(lab: Lab, name: str, start: Real, steady: Real | None) -> Flow:
    theta = start
    for step in range(LENGTH):
        logs = log_policy(theta, lab.mdp.legal)
        found = lab.coefficients(logs, logs) if steady is None else steady
        ahead = gradient(np.einsum("g,gqksa->sa", lab.probabilities(logs), found), logs)
        size = float(np.linalg.norm(ahead))
        if size < 1e-10:
            break
        theta = theta + STRIDE * (1 - step / LENGTH) * ahead / size
    return _told(lab, name, log_policy(start, lab.mdp.legal), log_policy(theta, lab.mdp.legal))


def _told(lab: Lab, name: str, before: Real, after: Real) -> Flow:
    goal = lab.value(before), lab.value(after)
    truth = lab.mdp.mean(lab.mdp.value(before)), lab.mdp.mean(lab.mdp.value(after))
    return Flow(
        start=name,
        goal=goal,
        truth=truth,
        regret=lab.mdp.mean(lab.mdp.best()) - truth[1],
        hacked=goal[1] - goal[0] > MOVED and truth[0] - truth[1] > MOVED,
    )
