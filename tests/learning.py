"""A learner without an engine: random trajectories, a tiny model, declarations of every shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agentgym.collate import collate
from agentgym.modeling import build
from agentgym.types import (
    Action,
    Batch,
    Episode,
    Floats,
    Ids,
    Observation,
    Segment,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    WeightsVersion,
)
from agentgym_trainers.sharding import whole

VOCABULARY = 20


class Bare:
    """A `Trainable` of two layers."""

    def __init__(self, seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> None:
        self.model = build.tiny(VOCABULARY, hidden=16, layers=layers, heads=2, kv_heads=1, seed=seed, init=0.2)
        self.model.to(dtype)
        self.published: list[int] = []

    def module(self) -> nn.Module:
        module: nn.Module = self.model
        return module

    def collate(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[NDArray[np.float64]],
        *,
        max_tokens: int,
        behaviour: bool = True,
        rewards: Sequence[float] | None = None,
    ) -> list[Batch]:
        return collate(trajectories, advantages, max_tokens=max_tokens, behaviour=behaviour, rewards=rewards)

    async def publish(self, version: WeightsVersion) -> None:
        self.published.append(version.number)


def episode(number: int, *, members: int = 3) -> Trajectory:
    """One to three turns of random tokens, the first sampled one of a turn labelled "control"."""
    g = np.random.default_rng(number)
    turns = []
    for step in range(1 + number % 3):
        prompt, ids = g.integers(0, VOCABULARY, 3), g.integers(0, VOCABULARY, 2 + number % 4)
        labels = (Segment(label="control", start=0, stop=1), Segment(label="answer", start=1, stop=len(ids)))
        floats = Floats(g.normal(-3.0, 0.1, len(ids)))
        span = TokenSpan(prompt=Ids(prompt), ids=Ids(ids), logprobs=floats, segments=labels)
        turns.append(Turn(step=step, observation=Observation(), action=Action(span=span)))
    task = Task(env="x", seed=number // members)
    labels = {"domain": "even" if number // members % 2 == 0 else "odd"}
    key = Episode(task=task, seed=number // members, member=number % members)
    return Trajectory(env="x", episode=key, turns=Turns(items=tuple(turns)), status="terminated", labels=labels)


EPISODES = [episode(n) for n in range(9)]
CREDIT = [np.linspace(-1, 1, len(t.turns)) + 0.1 * n for n, t in enumerate(EPISODES)]
REWARDS = [float(n % 2) for n in range(len(EPISODES))]


def weights(learner: Any) -> torch.Tensor:
    """All moving parameters, flat; put together where they lie in shards."""
    return torch.cat([whole(p.detach()).flatten() for p in learner.parameters])
