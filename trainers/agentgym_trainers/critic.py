"""The critic of PPO: what a turn's state is worth, read off the policy's own trunk.

    critic = Critic(trainable, CriticConfig(), micro_tokens=8192)
    states = critic.read(trajectories)
    values = states.per_turn                    # what credit "gae" reads
    figures = critic.update(states, returns)

The state of a turn is all that stands before its first sampled token, so its value is a linear function of the hidden
state there. The trunk is read without gradient: the policy's loss alone moves it, and an update of the critic is a
regression over numbers that are read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentgym.errors import ConfigError
from agentgym.modeling.logprobs import head_of, packed_hidden
from agentgym.types import Batch, Trajectory
from agentgym_trainers import ranks
from agentgym_trainers.forward import IDLE
from agentgym_trainers.learner import Trainable, even, tokens_of
from agentgym_trainers.objective.declare import Struct
from agentgym_trainers.sharding import within


class CriticConfig(Struct, frozen=True, kw_only=True):
    """lr      of the value head's own AdamW; about how far one step moves a value, whatever the model's width
    clip    how far a value may move in one update before it counts no more (0 = as far as it likes)
    epochs  passes over the turns of an update
    """

    lr: float = 0.2
    clip: float = 0.5
    epochs: int = 8

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and self.clip >= 0 and self.epochs >= 1):
            raise ConfigError(f"critic.lr is positive, clip from 0 and epochs at least 1; got {self}")


class States(NamedTuple):
    """The K turns with sampled tokens of some trajectories: hidden states [K, H], values as they were when read [K],
    whose they are [K] and which turn [K]; `per_turn` has a value for every turn of each trajectory, 0 for the others.
    """

    hidden: Tensor
    values: Tensor
    owners: NDArray[np.intp]
    turns: NDArray[np.intp]
    per_turn: list[NDArray[np.float64]]


class Critic:
    """V = w x + b with x = h / (|h| sqrt(H)), zero before the first update. What comes after an episode is worth 0,
    also where it was cut off."""

    def __init__(self, trainable: Trainable, config: CriticConfig, *, micro_tokens: int) -> None:
        self.trainable, self.config, self.micro_tokens = trainable, config, micro_tokens
        weight = head_of(trainable.module()).weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.parameters = list(self.head.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)

    @torch.no_grad()
    def read(self, trajectories: Sequence[Trajectory]) -> States:
        """The states of these trajectories' turns, and what they are worth now. Every rank is given the same, and reads
        its share; `per_turn` has everybody's."""
        nothing = [np.zeros(len(t.turns)) for t in trajectories]
        mine = np.asarray(ranks.share(list(map(tokens_of, trajectories))), int)
        parts = [trajectories[i] for i in mine], [nothing[i] for i in mine]
        batches = even(self.trainable, self.trainable.collate(*parts, max_tokens=self.micro_tokens, behaviour=False))
        found = [states for batch in batches if (states := self._states(batch, mine)) is not None]
        hidden = torch.cat([h for h, _, _ in found]) if found else self.head.weight.new_zeros(0, self.head.in_features)
        owners, turns = (np.concatenate([[], *(f[i] for f in found)]).astype(np.intp) for i in (1, 2))
        values = self._value(hidden)
        for owner, turn, value in zip(owners, turns, values.tolist(), strict=True):
            nothing[owner][turn] = value
        per_turn = [sum(held) for held in zip(*ranks.gather(nothing), strict=True)]
        return States(hidden, values, owners, turns, per_turn)

    def _states(self, batch: Batch, mine: NDArray[np.intp]) -> tuple[Tensor, NDArray[np.intp], NDArray[np.intp]] | None:
        """Hidden states, owners and turns of a batch of trajectories `mine`, one for each turn with trained tokens."""
        module = self.trainable.module()
        hidden = within(module, lambda: packed_hidden(module, batch.ids, batch.positions, batch.bounds))
        if batch is IDLE:
            return None
        at = np.flatnonzero(batch.mask)
        sequence = np.repeat(np.arange(len(batch.owners)), np.diff(batch.bounds))[at]
        first = np.ones(len(at), bool)
        first[1:] = (np.diff(batch.turns[at]) != 0) | (np.diff(sequence) != 0)
        before = torch.from_numpy(at[first] - 1).to(hidden.device)
        return (
            hidden[before].float(),
            mine[batch.owners[sequence[first]]],
            batch.turns[at[first]].astype(np.intp),
        )

    def _value(self, hidden: Tensor) -> Tensor:
        return self.head(nn.functional.normalize(hidden) * hidden.shape[1] ** -0.5)[:, 0]

    def update(self, states: States, returns: Sequence[NDArray[np.float64]]) -> dict[str, float]:
        """`epochs` steps towards the returns, per turn of each trajectory as `States.per_turn`; their last figures:
        value_loss, and value_explained, the share of the returns' variance that the values had explained before."""
        held = [returns[owner][turn] for owner, turn in zip(states.owners, states.turns, strict=True)]
        targets = states.values.new_tensor(held)
        total = sum(ranks.gather(len(targets)))
        if not total:
            return {}
        loss = 0.0
        for _ in range(self.config.epochs):
            self.optimiser.zero_grad()
            found = value_loss(self._value(states.hidden), states.values, targets, self.config.clip).sum() / total
            found.backward()
            ranks.sum_gradients(self.parameters)
            self.optimiser.step()
            loss = sum(ranks.gather(float(found.detach())))
        return {"value_loss": loss, "value_explained": _explained(states.values.tolist(), held)}

    # --- state ---

    def state(self) -> dict[str, Tensor]:
        """Tensors by name: the head and its optimiser."""
        moments = self.optimiser.state_dict()["state"]
        held = {f"{index}.{name}": value for index, inner in moments.items() for name, value in inner.items()}
        return {**held, **{name: p.detach() for name, p in self.head.named_parameters()}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on a critic made in the same way."""
        self.head.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
        moments: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if name:
                moments.setdefault(int(index), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 max((V - R)^2, (V_clipped - R)^2) with V within `clip` of the old value; [K] each. PPO2, verl."""
    missed = (values - returns) ** 2
    if not clip:
        return 0.5 * missed
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(missed, (near - returns) ** 2)


def _explained(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - Var(R - V) / Var(R) over all ranks; 0 where all returns are equal."""
    v, r = (np.concatenate(ranks.gather(np.asarray(x, np.float64))) for x in (values, returns))
    return float(1.0 - np.var(r - v) / np.var(r)) if len(r) and np.var(r) > 0 else 0.0
