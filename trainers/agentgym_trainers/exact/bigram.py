"""A language model that is a table: the logits of the next token are a row chosen by the last one.

It has the shape of a transformers model (`base_model`, `get_output_embeddings`, `config`), so that log-probs, learner
and critic walk the same code with it as with a real one. The hidden state of a token is its row of the table beside
the token itself, one-hot; each of L layers adds its own row. The unembedding takes the row as it is and, by the
one-hot part, away what may not follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from agentgym.collate import collate
from agentgym.types import WeightsVersion
from agentgym_trainers.exact.mdp import MDP, Real, Tabular
from agentgym_trainers.forward import Blank

NEVER = -1e9
"""Logit of a token that is not offered; infinity would make an entropy of it undefined."""


class BigramConfig:
    """What log-prob code asks of a config."""

    def __init__(self, vocabulary: int, layers: int) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocabulary, 2 * vocabulary, layers
        self._attn_implementation = "eager"

    def get_text_config(self) -> BigramConfig:
        return self


class Layer(nn.Module):
    """Adds its row for the token: [1, N, 2V] and ids [1, N] -> [1, N, 2V]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, stream: Tensor, ids: Tensor) -> Tensor:
        return stream + pad(self.table[ids], (0, len(self.table)))


class Base(nn.Module):
    """ids [1, N] -> hidden states [1, N, 2V]. Nothing attends, so packed sequences need no layout."""

    def __init__(self, vocabulary: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(vocabulary) for _ in range(layers))
        self.norm = nn.Identity()

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **unused: Any) -> tuple[Any, ...]:
        table = self.layers[0].table
        token = one_hot(input_ids, len(table)).to(table.dtype)  # type: ignore[arg-type]
        states = [pad(token, (len(table), 0))]  # type: ignore[arg-type]
        for layer in self.layers:
            states.append(layer(states[-1], input_ids))
        final = self.norm(states[-1])
        return (final, (*states[:-1], final)) if output_hidden_states else (final,)


class Bigram(nn.Module):
    """V tokens; `legal` [V, V] says which may follow which."""

    _supports_sdpa = True

    def __init__(self, legal: Tensor, layers: int = 1) -> None:
        super().__init__()
        size = len(legal)
        self.config = BigramConfig(size, layers)
        self.base_model = Base(size, layers)
        self.head = nn.Linear(2 * size, size, bias=False)
        never = torch.where(legal, 0.0, NEVER)
        self.head.weight = nn.Parameter(torch.cat((torch.eye(size), never.T), 1), requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def _can_set_attn_implementation(self) -> bool:
        return True

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


class Model:
    """A `Trainable`: a bigram that plays an MDP, and as its engine the tabular policy of the same numbers.

    The last token of the vocabulary is the blank that stands for a masked observation.
    """

    def __init__(self, mdp: MDP, theta: Real | None = None, layers: int = 1) -> None:
        self.mdp = mdp
        self.bigram = Bigram(_offered(mdp), layers)
        if theta is not None:
            with torch.no_grad():
                self._block(self.bigram.base_model.layers[-1]).copy_(torch.from_numpy(theta))
        self.engine = Tabular(mdp, self.theta())

    @property
    def blank(self) -> Blank:
        return Blank(len(self.mdp.vocabulary), ())

    def _block(self, layer: nn.Module) -> Tensor:
        """The entries state -> action of a layer: [S, A]."""
        return self._cut(layer.table)  # type: ignore[arg-type]

    def _cut(self, table: Tensor) -> Tensor:
        states = len(self.mdp.states)
        return table[:states, states : states + len(self.mdp.actions)]

    def theta(self) -> Real:
        """The logits as they are: [S, A]."""
        total = sum(self._block(layer).detach() for layer in self.bigram.base_model.layers)
        found: Real = torch.as_tensor(total).double().numpy()
        return found

    def gradient(self) -> NDArray[np.float64]:
        """The gradient that lies in the last layer's table: [S, A]."""
        grad = self.bigram.base_model.layers[-1].table.grad
        found: Real = self._cut(torch.as_tensor(grad)).double().numpy()
        return found

    # --- Trainable ---

    def module(self) -> nn.Module:
        return self.bigram

    collate = staticmethod(collate)

    async def publish(self, version: WeightsVersion) -> None:
        self.engine.theta, self.engine.version = self.theta(), version.number


def _offered(mdp: MDP) -> Tensor:
    """[V, V]: after a state its legal actions, after a blank any action, after an action anything but a blank."""
    states, actions, size = len(mdp.states), len(mdp.actions), len(mdp.vocabulary) + 1
    found = torch.zeros(size, size, dtype=torch.bool)
    found[:states, states : states + actions] = torch.from_numpy(mdp.legal)
    found[states : states + actions, :-1] = True
    found[-1, states : states + actions] = True
    return found
