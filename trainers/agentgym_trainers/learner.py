"""From trajectories and their advantages to moved weights.

    learner = Learner(trainable, objective, Optim(lr=5e-4), total_steps=120)
    figures = learner.update(trajectories, advantages)

An update takes the trajectories of one rollout through `epochs` x `minibatches` optimiser steps; a step goes through
micro-batches of packed sequences and divides by the counts of all of them, so how they are cut changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentgym.collate import sequences, trained_tokens
from agentgym.errors import ConfigError, ModelError
from agentgym.modeling.logprobs import token_logprobs
from agentgym.seeding import rng
from agentgym.types import Batch, Trajectory, WeightsVersion
from agentgym_trainers.objective.compute import loss, summarise
from agentgym_trainers.objective.declare import Objective, Struct
from agentgym_trainers.objective.tokens import Tokens, Totals

Advantages = Sequence[NDArray[np.float64]]


class Optim(Struct, frozen=True, kw_only=True):
    """AdamW and how an update is cut.

    clip          bound of the gradient's norm; 0 = none
    warmup        optimiser steps in which the rate rises linearly to `lr`
    decay         share of the steps, at the end, in which it falls linearly to `floor` x lr
    epochs, minibatches    optimiser steps per update = epochs x minibatches
    micro_tokens  tokens in one forward pass: memory, never the result
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 3
    decay: float = 0.3
    floor: float = 0.1
    epochs: int = 1
    minibatches: int = 1
    micro_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.lr <= 0 or min(self.epochs, self.minibatches, self.micro_tokens) < 1:
            raise ConfigError(f"lr is positive, and epochs, minibatches and micro_tokens are at least 1; got {self}")
        if not (0 <= self.decay <= 1 and 0 <= self.floor <= 1 and self.warmup >= 0 and self.clip >= 0):
            raise ConfigError(f"decay and floor are shares in [0, 1], warmup and clip at least 0; got {self}")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of optimiser step `step` (from 0) of `total`."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        tail = self.decay * total
        falling = 1.0 if tail < 1 else min(1.0, max(self.floor, (total - step) / tail))
        return self.lr * rising * falling


class Trainable(Protocol):
    """What a learner needs of a model; whoever also acts with it moves the weights over in `publish`."""

    def module(self) -> nn.Module:
        """The model whose parameters move, shared, not copied."""
        ...

    def collate(
        self, trajectories: Sequence[Trajectory], advantages: Advantages, *, max_tokens: int, behaviour: bool = True
    ) -> list[Batch]:
        """Packed micro-batches, as `agentgym.collate.collate` makes them."""
        ...

    async def publish(self, version: WeightsVersion) -> None:
        """From now on act with the weights as they are."""
        ...


MASTER = "master"
"""Names float32 masters among the tensors of a learner's state."""


@dataclass(frozen=True)
class _Micro:
    """A micro-batch with the log-probs that stay fixed during an update, [N] each, or None where not needed."""

    batch: Batch
    old: Tensor | None = None
    reference: Tensor | None = None


class Learner:
    """Owns the optimiser; shares the parameters with whoever gave the `Trainable`.

    Parameters of half precision get float32 masters: a step of 1e-6 would vanish in the rounding of bfloat16.

    `total_steps` is the length of the learning-rate schedule in optimiser steps. `temperature` is the sampler's, so
    that both speak of the same distribution. `reference` is a frozen module, needed for a KL regulariser.
    """

    def __init__(
        self,
        trainable: Trainable,
        objective: Objective,
        optim: Optim,
        *,
        total_steps: int,
        seed: int = 0,
        temperature: float = 1.0,
        reference: nn.Module | None = None,
    ) -> None:
        if objective.needs_reference and reference is None:
            raise ConfigError("a KL regulariser needs a reference; pass the frozen module")
        self.trainable, self.objective, self.optim = trainable, objective, optim
        self.total_steps, self.seed, self.temperature = total_steps, seed, temperature
        self.reference = reference if objective.needs_reference else None
        self.steps = 0
        self.updates = 0
        self.parameters = [p for p in trainable.module().parameters() if p.requires_grad]
        self.masters = [_master(p) for p in self.parameters]
        self.optimiser = torch.optim.AdamW(
            self.masters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )

    # --- one update, one step ---

    def update(self, trajectories: Sequence[Trajectory], advantages: Advantages) -> dict[str, float]:
        """Every optimiser step that one rollout pays for; the mean of their figures."""
        parts = [self._prepare(t, a) for t, a in self._cut(trajectories, advantages)]
        parts = [part for part in parts if part]
        figures = [self._step(part) for _ in range(self.optim.epochs) for part in parts]
        self.updates += 1
        return _mean(figures)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step over these micro-batches; the result does not depend on how they are cut."""
        return self._step([self._micro(batch) for batch in batches])

    def _cut(
        self, trajectories: Sequence[Trajectory], advantages: Advantages
    ) -> Iterator[tuple[list[Trajectory], list[NDArray[np.float64]]]]:
        """The trajectories in a keyed random order, in `minibatches` parts."""
        order = list(range(len(trajectories)))
        rng(self.seed, "minibatches", self.updates).shuffle(order)
        for part in np.array_split(order, self.optim.minibatches):
            yield [trajectories[i] for i in part], [advantages[i] for i in part]

    def _prepare(self, trajectories: Sequence[Trajectory], advantages: Advantages) -> list[_Micro]:
        batches = self.trainable.collate(
            trajectories,
            advantages,
            max_tokens=self.optim.micro_tokens,
            behaviour=self.objective.needs_sampler,
        )
        return [self._micro(batch) for batch in batches]

    @torch.no_grad()
    def _micro(self, batch: Batch) -> _Micro:
        old = self.logprobs(batch)[0] if self.objective.proximal == "learner" else None
        reference = None if self.reference is None else self.logprobs(batch, self.reference)[0]
        return _Micro(batch, old, reference)

    def logprobs(self, batch: Batch, module: nn.Module | None = None, entropy: bool = False) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            self.trainable.module() if module is None else module,
            batch,
            temperature=self.temperature,
            entropy=entropy,
            masked_only=True,
        )

    def _step(self, parts: Sequence[_Micro]) -> dict[str, float]:
        total = Totals(trained_tokens(p.batch for p in parts), sequences(p.batch for p in parts))
        self.optimiser.zero_grad(set_to_none=True)
        sums, value = [], 0.0
        for part in parts:
            found, part_sums = loss(self.objective, self.tokens(part), total)
            found.backward()
            value += float(found.detach())
            sums.append(part_sums)
        norm = self.move()
        return {"loss": value, "grad_norm": norm, "tokens": float(total.tokens), **summarise(sums, total)}

    def tokens(self, part: _Micro) -> Tokens:
        """The trained tokens of a micro-batch, with gradient."""
        batch = part.batch
        logp, entropy = self.logprobs(batch, entropy=True)
        at = torch.from_numpy(np.flatnonzero(batch.mask)).to(logp.device)
        owner = np.repeat(np.arange(len(batch.owners)), np.diff(batch.bounds))
        sampled = torch.from_numpy(batch.logprobs).to(logp.device)
        return Tokens(
            logp=logp[at],
            old=(sampled if part.old is None else part.old)[at],
            sampled=sampled[at],
            advantages=torch.from_numpy(batch.advantages).to(logp.device)[at],
            sequence=torch.from_numpy(owner).to(logp.device)[at],
            sequences=len(batch.owners),
            reference=None if part.reference is None else part.reference[at],
            entropy=entropy[at],
        )

    def move(self) -> float:
        """Clip, check and apply the accumulated gradient; its norm before clipping."""
        bound = self.optim.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, bound))
        if not math.isfinite(norm):
            raise ModelError(
                f"the gradient of optimiser step {self.steps} is {norm}; the weights are as before it. Lower optim.lr "
                f"(now {self.optim.lr:g}), and look for non-finite rewards in the last rollout"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.optim.rate(self.steps, self.total_steps)
        pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for p, m in pairs:
            m.grad = None if p.grad is None else p.grad.float()
        self.optimiser.step()
        with torch.no_grad():
            for p, m in pairs:
                p.copy_(m)
        self.steps += 1
        return norm

    # --- state ---

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that an interrupted run needs besides the weights."""
        tensors = {
            f"{index}.{name}": value
            for index, held in self.optimiser.state_dict()["state"].items()
            for name, value in held.items()
        }
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = {f"{i}.{MASTER}": m.detach() for i, (p, m) in enumerate(pairs) if p is not m}
        return tensors | masters, {"steps": self.steps, "updates": self.updates}

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The inverse of `state`, on a learner made in the same way."""
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if name == MASTER:
                self.masters[int(index)].data.copy_(value)
            else:
                held.setdefault(int(index), {})[name] = value
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": held, "param_groups": state["param_groups"]})
        self.steps, self.updates = int(plain["steps"]), int(plain["updates"])


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimiser moves: the parameter, or a float32 copy of one in half precision."""
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().clone().requires_grad_()


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Figure by figure; tokens are summed, maxima stay maxima."""
    if not figures:
        return {}
    return {name: _FOLDS.get(name, _average)([f[name] for f in figures]) for name in figures[0]}


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_FOLDS: dict[str, Callable[[Sequence[float]], float]] = {"tokens": sum, "ratio_max": max}
