"""What reward models learn from, and the loss of each kind: pairs, reactions, ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from agentgym.errors import ConfigError


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l), the mean over pairs: [n, outputs] each -> scalar."""
    return -logsigmoid(chosen - rejected).mean()


class Examples(Protocol):
    """A data set of texts. `relative`: its loss leaves the scores' zero and scale open."""

    relative: ClassVar[bool]

    @property
    def texts(self) -> list[str]:
        """Every text, in the order that `places` counts in."""
        ...

    def __len__(self) -> int: ...

    def places(self, rows: Sequence[int]) -> list[int]:
        """The texts that these examples are made of."""
        ...

    def loss(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """scores [places, outputs] -> scalar."""
        ...


@dataclass(frozen=True)
class Pairs:
    """chosen[i] was preferred to rejected[i]: Bradley-Terry. A model against a reference reads `joined` texts."""

    chosen: Sequence[str]
    rejected: Sequence[str]
    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _alike("rejected texts", self.chosen, self.rejected)

    @property
    def texts(self) -> list[str]:
        return [*self.chosen, *self.rejected]

    def __len__(self) -> int:
        return len(self.chosen)

    def places(self, rows: Sequence[int]) -> list[int]:
        return [*rows, *(len(self) + i for i in rows)]

    def loss(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        return bradley_terry(*scores.chunk(2))


@dataclass(frozen=True)
class _Shown:
    """Base of examples that speak of one text each: `shown[i]`."""

    shown: Sequence[str]
    relative: ClassVar[bool] = False

    @property
    def texts(self) -> list[str]:
        return list(self.shown)

    def __len__(self) -> int:
        return len(self.shown)

    def places(self, rows: Sequence[int]) -> list[int]:
        return list(rows)


@dataclass(frozen=True)
class Reactions(_Shown):
    """Whether a user loved each text: binary cross-entropy on the logit."""

    loved: Sequence[bool]

    def __post_init__(self) -> None:
        _alike("reactions", self.shown, self.loved)

    def loss(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        if scores.shape[1] != 1:
            raise ConfigError(f"a reaction says one thing of a text, and the model has {scores.shape[1]} heads")
        wanted = torch.tensor([[float(self.loved[i])] for i in rows], device=scores.device)
        return binary_cross_entropy_with_logits(scores, wanted)


@dataclass(frozen=True)
class Ratings(_Shown):
    """Several labels of each text [n][outputs], None where a text was not rated: squared error over what is known."""

    labels: Sequence[Sequence[float | None]]

    def __post_init__(self) -> None:
        _alike("rows of labels", self.shown, self.labels)
        if len({len(row) for row in self.labels}) > 1:
            raise ConfigError("every text has as many labels as the others; write None for one that was not rated")
        if not all(x is None or math.isfinite(x) for row in self.labels for x in row):
            raise ConfigError("a label is a finite number, or None where a text was not rated")

    def loss(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        given = [[float("nan") if x is None else float(x) for x in self.labels[i]] for i in rows]
        wanted = torch.tensor(given, device=scores.device)
        if wanted.shape != scores.shape:
            raise ConfigError(f"labels of shape {tuple(wanted.shape)} for scores of shape {tuple(scores.shape)}")
        known = ~wanted.isnan()
        error = torch.where(known, scores - wanted.nan_to_num(), torch.zeros_like(scores))
        return error.square().sum() / known.sum().clamp(min=1)


def _alike(what: str, one: Sequence[object], other: Sequence[object]) -> None:
    if not len(one) or len(one) != len(other):
        raise ConfigError(f"{len(one)} texts and {len(other)} {what}; there is one for each, and at least one")
