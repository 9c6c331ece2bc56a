"""A step of any method on a few small records: composer -> advantages -> collate -> loss, in float64.

played = world()                          # three prompts, four members each, turns of a few tokens
step = Step("gspo", played, move=0.1)     # the policy has moved by up to 0.1 in log-prob
step.gradient()                           # {episode id: d loss / d log-prob of its sampled tokens}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import torch
from making import trajectory
from numpy.typing import NDArray
from torch import Tensor

from agentgym.advantages import advantages
from agentgym.collate import collate
from agentgym.rewards import Composed, composer, derived
from agentgym.seeding import rng
from agentgym.types import Batch, Trajectory, Turns
from agentgym_trainers.forward import columns
from agentgym_trainers.methods import Declaration, declared, load, names
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import NoGate, NoRatio, Objective
from agentgym_trainers.objective.tokens import Tokens

PROMPTS, MEMBERS = 3, 4
EVERY = tuple(n for n in names() if not (load(n).table.get("preference") or load(n).table.get("candidates")))
"""Methods whose loss is composed of the axes; the others have families of their own."""


def member(prompt: int, number: int, rewards: Sequence[Mapping[str, float]], tokens: Sequence[int] | int) -> Trajectory:
    """One trajectory with all that any method reads: labels, metrics, anchors."""
    t = trajectory(
        rewards,
        tokens=tokens,
        group=f"p{prompt}",
        anchors=[f"s{k % 2}" for k in range(len(rewards))],
        labels={"experience": ("with", "without")[number % 2], "guided": ("yes", "no")[number % 2], "domain": "house"},
        metrics={"greedy": 0.4, "reference": 0.6},
    )
    found: Trajectory = t.replace(episode=t.episode.replace(member=number))
    return found


def world(seed: int = 0, prompts: int = PROMPTS, members: int = MEMBERS) -> list[Trajectory]:
    """Trajectories of one to three turns with random terms, different in every member."""
    g = np.random.default_rng(seed)
    found = []
    for p in range(prompts):
        for m in range(members):
            turns = 1 + (p + m) % 3
            rewards = [{"tool": g.normal(), "action": g.normal()} for _ in range(turns)]
            rewards[-1]["outcome"] = g.normal()
            found.append(member(p, m, rewards, g.integers(1, 5, turns).tolist()))
    return found


def changed(t: Trajectory, amount: Callable[[str, float], float]) -> Trajectory:
    """The trajectory with every amount of its ledger replaced by `amount(name, value)`."""
    assert isinstance(t.turns, Turns)
    turns = [
        turn.replace(rewards=tuple(r.replace(value=amount(r.name, r.value)) for r in turn.rewards))
        for turn in t.turns.items
    ]
    found: Trajectory = t.replace(turns=Turns(items=tuple(turns)))
    return found


def filled(declaration: Any) -> Any:
    """A reward with the sum of the ledger for the environment's own; the sum itself where a method says nothing."""
    if declaration == "environment":
        return {"op": "sum"}
    if isinstance(declaration, Mapping):
        return {name: filled(part) for name, part in declaration.items()} or {"op": "sum"}
    return [filled(part) for part in declaration] if isinstance(declaration, list | tuple) else declaration


class Step:
    """One optimiser step of a method over these trajectories.

    move, mismatch, apart   how far policy and proximal policy, proximal policy and sampler, and the policy and all that
                            regularisers compare it with lie apart, at most, in log-prob; drawn by episode
    drift                   how far every token has moved besides
    bare                    without regularisers
    """

    def __init__(
        self,
        method: str | Declaration,
        played: Sequence[Trajectory],
        *,
        move: float = 0.0,
        drift: float = 0.0,
        mismatch: float = 0.0,
        apart: float = 0.0,
        bare: bool = True,
        objective: Objective | None = None,
        state: Any = None,
    ) -> None:
        self.method = declared(load(method)) if isinstance(method, str) else method
        self.played, self.state = played, state
        self.move, self.drift, self.mismatch, self.apart = move, drift, mismatch, apart
        self.objective = self.method.objective if objective is None else objective
        if bare:
            self.objective = msgspec.structs.replace(self.objective, regularisers=(), controllers=())

    @cached_property
    def composed(self) -> list[Composed]:
        compose = composer(filled(self.method.reward or "environment"))
        return [compose.trajectory(t, derived(t, self._noise("kl", t, len(t.turns), 0.0))) for t in self.played]

    @cached_property
    def credit(self) -> list[NDArray[np.float64]]:
        samples = list(zip(self.played, self.composed, strict=True))
        values = [np.asarray(self._noise("values", t, len(t.turns), 0.5)) for t in self.played]
        terms, whiten = self.method.advantage, self.method.whiten
        return advantages(samples, terms, whiten=whiten, state=self.state, values=values)

    @cached_property
    def batch(self) -> Batch:
        values = [c.value for c in self.composed]
        (found,) = collate(self.played, self.credit, max_tokens=10**6, rewards=values)
        return found

    @cached_property
    def tokens(self) -> Tokens:
        """Every column that any objective reads, the ones with gradient as leaves."""
        t = columns(self.batch, torch.zeros((), dtype=torch.float64))
        old = t.sampled + (self.noise("old", self.mismatch) if self.objective.proximal == "learner" else 0.0)
        logp = old + self.drift + self.noise("logp", self.move)
        return replace(
            t,
            old=old,
            logp=logp.clone().requires_grad_(),
            reference=logp + self.noise("reference", self.apart),
            entropy=(1.0 + self.noise("entropy", 0.9)).requires_grad_(),
            masked=(logp + self.noise("masked", self.apart)).requires_grad_(),
            divergence=self.noise("divergence", 1.0).abs().requires_grad_(),
        )

    def noise(self, name: str, size: float) -> Tensor:
        """[M] numbers within +-size that belong to the episode, whichever way the step is laid out."""
        counts = np.bincount(self.owners, minlength=len(self.batch.owners))
        parts = [self._noise(name, self.played[o], n, size) for o, n in zip(self.batch.owners, counts, strict=True)]
        return torch.tensor(np.concatenate([np.zeros(0), *parts]))

    @staticmethod
    def _noise(name: str, t: Trajectory, count: int, size: float) -> list[float]:
        draw = rng(0, name, t.episode.id)
        return [size * draw.uniform(-1.0, 1.0) for _ in range(count)]

    @property
    def owners(self) -> NDArray[np.intp]:
        """The sequence of each trained token [M]."""
        return np.repeat(np.arange(len(self.batch.owners)), np.diff(self.batch.bounds))[self.batch.mask > 0]

    def loss(self) -> Tensor:
        found, _ = loss(self.objective, self.tokens, totals(self.objective.aggregation, self.tokens))
        return found

    def slopes(self, name: str = "logp") -> Tensor:
        """d loss / d a column [M]; zeros where the loss does not read it."""
        leaf = getattr(self.tokens, name)
        (found,) = torch.autograd.grad(self.loss(), leaf, allow_unused=True, materialize_grads=True)
        return found

    def gradient(self) -> dict[str, NDArray[np.float64]]:
        """d loss / d log-prob of every episode's sampled tokens."""
        slopes, owners = self.slopes().numpy(), self.owners
        return {self.played[o].episode.id: slopes[owners == s] for s, o in enumerate(self.batch.owners)}


def plain(objective: Objective) -> Objective:
    """REINFORCE with the objective's own aggregation: what every gate is on-policy."""
    return Objective(ratio=NoRatio(), gate=NoGate(), aggregation=objective.aggregation)
