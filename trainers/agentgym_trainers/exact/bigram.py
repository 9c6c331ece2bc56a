"""A language model that is a table: the logits of the next token are a row chosen by the last one.

It has the shape of a transformers model (`base_model`, `get_output_embeddings`, `config`), so that log-probs, learner
and layers walk the same code with it as with a real one. The residual stream is the logits themselves: each of L
layers adds its own row to it, the final norm changes nothing, and the unembedding is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentgym.collate import collate
from agentgym.types import Batch, Trajectory, WeightsVersion
from agentgym_trainers.exact.mdp import MDP, Real, Tabular
from agentgym_trainers.learner import Advantages

NEVER = -1e9
"""Logit of a token that is not offered; infinity would make an entropy of it undefined."""


class BigramConfig:
    """What log-prob code asks of a config."""

    def __init__(self, vocabulary: int, layers: int) -> None:
        self.vocab_size = self.hidden_size = vocabulary
        self.num_hidden_layers = layers
        self._attn_implementation = "eager"

    def get_text_config(self) -> BigramConfig:
        return self


class Layer(nn.Module):
    """Adds its row for the token to the stream."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, stream: Tensor, ids: Tensor) -> Tensor:
        return stream + self.table[ids]


class Base(nn.Module):
    """ids [1, N] -> hidden states [1, N, V]. Nothing attends, so packed sequences need no layout."""

    def __init__(self, legal: Tensor, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(len(legal)) for _ in range(layers))
        self.norm = nn.Identity()
        self.offered: Tensor
        self.register_buffer("offered", torch.where(legal, 0.0, NEVER))

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **unused: Any) -> tuple[Any, ...]:
        states = [self.offered[input_ids]]
        for layer in self.layers:
            states.append(layer(states[-1], input_ids))
        final = self.norm(states[-1])
        return (final, (*states[:-1], final)) if output_hidden_states else (final,)


class Bigram(nn.Module):
    """V tokens; `legal` [V, V] says which may follow which."""

    _supports_sdpa = True

    def __init__(self, legal: Tensor, layers: int = 1) -> None:
        super().__init__()
        self.config = BigramConfig(len(legal), layers)
        self.base_model = Base(legal, layers)
        self.head = nn.Linear(len(legal), len(legal), bias=False)
        self.head.weight = nn.Parameter(torch.eye(len(legal)), requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def _can_set_attn_implementation(self) -> bool:
        return True

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


class Model:
    """A `Trainable`: a bigram that plays an MDP, and the tabular policy that samples from the same numbers."""

    def __init__(self, mdp: MDP, theta: Real | None = None, layers: int = 1) -> None:
        self.mdp = mdp
        legal = torch.ones(len(mdp.vocabulary), len(mdp.vocabulary), dtype=torch.bool)
        legal[: len(mdp.states)] = False
        legal[: len(mdp.states), len(mdp.states) :] = torch.from_numpy(mdp.legal)
        self.bigram = Bigram(legal, layers)
        if theta is not None:
            with torch.no_grad():
                self._block(self.bigram.base_model.layers[-1]).copy_(torch.from_numpy(theta))
        self.policy = Tabular(mdp, self.theta())

    def _block(self, layer: nn.Module) -> Tensor:
        """The entries state -> action of a layer: [S, A]."""
        return layer.table[: len(self.mdp.states), len(self.mdp.states) :]  # type: ignore[index]

    def theta(self) -> Real:
        """The logits as they are: [S, A]."""
        total = sum(self._block(layer).detach() for layer in self.bigram.base_model.layers)
        found: Real = torch.as_tensor(total).double().numpy()
        return found

    def gradient(self) -> NDArray[np.float64]:
        """The gradient that lies in the last layer's table: [S, A]."""
        grads = self.bigram.base_model.layers[-1].table.grad
        found: Real = torch.as_tensor(grads)[: len(self.mdp.states), len(self.mdp.states) :].double().numpy()
        return found

    # --- Trainable ---

    def module(self) -> nn.Module:
        return self.bigram

    def collate(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Advantages,
        *,
        max_tokens: int,
        behaviour: bool = True,
        rewards: Sequence[float] | None = None,
    ) -> list[Batch]:
        return collate(trajectories, advantages, max_tokens=max_tokens, behaviour=behaviour, rewards=rewards)

    async def publish(self, version: WeightsVersion) -> None:
        self.policy.theta, self.policy.version = self.theta(), version.number
