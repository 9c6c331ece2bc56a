"""Every step of play, with its probability: what an update is in expectation, and how far it scatters.

    lab = Lab(load("grpo"), STOPPING, members=3)
    found = lab.estimate(theta)           # expected and true gradient by prompt and turn, and the spread

A step plays `members` episodes of every prompt. All steps are listed, up to the order of members unless the method
reads it; each goes through the pipeline, and its gradient follows from d loss / d log-prob of each token, because
d log pi(a|s) / d theta is known.

G steps, Q prompts, K turns, S states, A actions, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import factorial, prod

import numpy as np

from agentgym.errors import ConfigError, RecordError
from agentgym_trainers.exact.composition import Composition
from agentgym_trainers.exact.mdp import MDP, Path, Real, log_policy
from agentgym_trainers.exact.pipeline import Facts, Group, Pipeline, Step, least
from agentgym_trainers.strategies.declare import DynamicFilter

STEPS = 4000
"""More of them are refused: the worlds are meant to be small."""
RETRIES = 2
"""Of the runner where an episode fails, with the same task, seed and sampling noise."""


@dataclass(frozen=True)
class Estimate:
    """Gradients with respect to theta, split by the prompt and turn they come from: [Q, K, S, A].

    expected  E[-gradient of the loss];  true  the gradient of the expected return;  second  E[|gradient|^2]
    """

    expected: Real
    true: Real
    second: float
    episodes: int

    @property
    def trace(self) -> float:
        """Trace of the covariance of a step's gradient."""
        return max(self.second - float((self.expected.sum((0, 1)) ** 2).sum()), 0.0)

    @property
    def signal(self) -> float:
        """(expected gradient along the true one)^2 / (trace of the covariance x episodes of a step)."""
        true = self.true.sum((0, 1))
        along = float((self.expected.sum((0, 1)) * true).sum()) / max(float(np.linalg.norm(true)), 1e-300)
        return along**2 / max(self.trace * self.episodes, 1e-300)


class Lab:
    """A composition in one world. `retries` are the runner's; `fair` leaves out the composition's own `retry`."""

    def __init__(
        self, composition: Composition, mdp: MDP, *, members: int, retries: int = RETRIES, fair: bool = False
    ) -> None:
        self.composition, self.mdp, self.retries, self.fair = composition, mdp, retries, fair
        self.members = least(composition, members)
        self.pipeline = Pipeline(composition, mdp)
        self.filtered = isinstance(composition.strategy, DynamicFilter)

    # --- every step and its probability ---

    @cached_property
    def slots(self) -> list[list[Group]]:
        """The groups that each slot of a step may hold: one slot a prompt. A dynamic filter refills groups without
        signal, from any prompt."""
        found = self._choices(self.shape)
        if prod(map(len, found)) > STEPS:
            raise ConfigError(f"{prod(map(len, found))} steps to list in {self.mdp.name!r}; the limit is {STEPS}")
        return found

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the sets of members within which their order changes nothing."""
        kinds = len(self.pipeline.classes)
        coarse = tuple(len(range(k, self.members, kinds)) for k in range(kinds))
        return coarse if self._symmetric(coarse) else (1,) * self.members

    def _choices(self, shape: Sequence[int]) -> list[list[Group]]:
        paths = [[p for p, path in enumerate(self.mdp.paths) if path.prompt == q] for q in range(len(self.mdp.prompts))]
        found = [[_dealt(sets) for sets in product(*(_sets(own, n) for n in shape))] for own in paths]
        if not self.filtered:
            return found
        return [[group for groups in found for group in groups if self._differ(group)]] * len(found)

    def _differ(self, group: Group) -> bool:
        return len({self.pipeline.returns[p] for p in group if not self.mdp.paths[p].failed}) > 1

    def _symmetric(self, shape: Sequence[int]) -> bool:
        """Whether turning one group's members around within their sets changes no gradient: probed on some steps."""
        slots, kinds = self._choices(shape), len(shape)
        mixed = [group for group in slots[0] if _turned(group, kinds) != group]
        probes = list(product(mixed, *slots[1:]))
        logs = log_policy(np.zeros(self.mdp.legal.shape), self.mdp.legal)
        facts = self.facts(logs)
        return all(
            np.allclose(
                self.pipeline.of_step(step, logs, logs, facts),
                self.pipeline.of_step((_turned(step[0], kinds), *step[1:]), logs, logs, facts),
            )
            for step in probes[:: max(len(probes) // 12, 1)]
        )

    @cached_property
    def steps(self) -> list[Step]:
        return list(product(*self.slots))

    def probabilities(self, sampler: Real) -> Real:
        """[G]: of the steps when a policy with these log-probs plays."""
        chances = self.chances(sampler)
        found = [np.asarray([self._orders(g) * chances[list(g)].prod() for g in groups]) for groups in self.slots]
        if self.filtered:
            found = [slot / slot.sum() for slot in found]
        return np.asarray([prod(ps) for ps in product(*found)])

    def _orders(self, group: Group) -> int:
        """How many orders of its members a listed group stands for."""
        kinds = len(self.shape)
        return prod(_arrangements(group[k::kinds]) for k in range(kinds))

    def chances(self, sampler: Real) -> Real:
        """[P]: of the paths as they reach the learner, after retries; 1 for each prompt in all."""
        retry = None if self.fair else self.composition.hooks.get("retry")
        if retry is None:
            return self.mdp.chances(sampler) * [_persisting(path, self.retries + 1) for path in self.mdp.paths]
        found, attempts = self.mdp.chances(sampler), self.composition.attempts
        again = np.asarray([bool(retry(self.mdp.record(path))) for path in self.mdp.paths])
        prompts = np.asarray([path.prompt for path in self.mdp.paths])
        share = np.bincount(prompts, found * again)[prompts]
        found *= np.where(again, share ** (attempts - 1), sum(share**j for j in range(attempts)))
        return found

    # --- the estimate ---

    def estimate(self, theta: Real, sampler: Real | None = None) -> Estimate:
        """At the learner's logits `theta` [S, A], played by those of the `sampler` (default: the same)."""
        logs = log_policy(theta, self.mdp.legal)
        played = logs if sampler is None else log_policy(sampler, self.mdp.legal)
        found = gradient(self.coefficients(logs, played), logs)
        chances = self.probabilities(played)
        return Estimate(
            expected=np.einsum("g,gqksa->qksa", chances, found),
            true=self.true(logs),
            second=float(chances @ (found.sum((1, 2)) ** 2).sum((1, 2))),
            episodes=self.members * len(self.slots),
        )

    def coefficients(self, logs: Real, played: Real, steps: Sequence[Step] | None = None) -> Real:
        """d(-loss) / d log pi(a|s), summed over a step's tokens: [G, Q, K, S, A]."""
        facts = self.facts(logs)
        found = np.stack([self.pipeline.of_step(step, logs, played, facts) for step in steps or self.steps])
        if not np.isfinite(found).all():
            raise RecordError(f"its step is not finite in the world {self.mdp.name!r}: there is nothing to certify")
        return found

    def true(self, logs: Real) -> Real:
        """The gradient of the expected return, mean over prompts, if nothing ever broke: [Q, K, S, A]."""
        weights = self.mdp.intended(logs) * self.pipeline.returns / len(self.mdp.prompts)
        found = np.zeros((len(self.mdp.prompts), *self.mdp.visits.shape[1:]))
        np.add.at(found, [path.prompt for path in self.mdp.paths], weights[:, None, None, None] * self.mdp.visits)
        return gradient(found, logs)

    def value(self, logs: Real) -> float:
        """The expected return, mean over prompts, if nothing ever broke."""
        return float(self.mdp.intended(logs) @ self.pipeline.returns) / len(self.mdp.prompts)

    def facts(self, logs: Real) -> Facts:
        """What the policy with these log-probs is known by."""
        prompts = np.asarray([path.prompt for path in self.mdp.paths])
        only = np.full(logs.shape, -1e9)
        only[np.arange(len(logs)), logs.argmax(-1)] = 0.0
        surely, likely = self.mdp.intended(only), self.mdp.intended(logs)
        greedy = np.asarray([np.argmax(surely * (prompts == q)) for q in range(len(self.mdp.prompts))])
        values = self.pipeline.values(likely) if self.pipeline.informed else np.zeros(0)
        expected = np.bincount(prompts, likely * self.pipeline.returns).astype(np.float64)
        return Facts(greedy, expected, values)


def gradient(coefficients: Real, logs: Real) -> Real:
    """Sum of c d log pi(a|s) / d theta: c(s, a) - pi(a|s) sum_a c(s, a); [..., S, A]."""
    return coefficients - np.exp(logs) * coefficients.sum(-1, keepdims=True)


def _sets(paths: Sequence[int], n: int) -> list[Group]:
    return list(combinations_with_replacement(paths, n))


def _dealt(sets: Sequence[Group]) -> Group:
    """Members of sets of equal labels, in the order in which they play: the sets take turns."""
    return tuple(sets[m % len(sets)][m // len(sets)] for m in range(sum(map(len, sets))))


def _turned(group: Group, kinds: int) -> Group:
    return _dealt([group[k::kinds][::-1] for k in range(kinds)])


def _arrangements(members: Group) -> int:
    return factorial(len(members)) // prod(factorial(members.count(p)) for p in set(members))


def _persisting(path: Path, tries: int) -> float:
    """How much likelier a path is when decisions that broke are tried again, `tries` times in all."""
    if path.failed:
        return path.chance ** (tries - 1)
    return (1.0 - (1.0 - path.chance) ** tries) / path.chance
