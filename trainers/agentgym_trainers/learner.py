"""From trajectories and their advantages to moved weights.

    learner = Learner(trainable, objective, Optim(lr=5e-4), total_steps=120)
    figures = learner.update(trajectories, advantages)

An update takes the trajectories of one rollout through `epochs` x `minibatches` optimiser steps; a step goes through
micro-batches of packed sequences and divides by the counts of all of them, on all ranks, so how they are cut changes
nothing. Where a token's loss depends on other sequences (`Objective.coupled`) the step is taken in two passes: one
without gradient finds the loss of the whole step and its derivative by every log-prob, one takes these to the weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentgym.errors import ConfigError, ModelError, RecordError
from agentgym.seeding import rng
from agentgym.types import Batch, Trajectory, Turns, WeightsVersion
from agentgym_trainers import ranks
from agentgym_trainers.controllers import begun, controlled, numbers, with_numbers
from agentgym_trainers.forward import IDLE, LEAVES, Blank, Forward, Micro, joined, trained
from agentgym_trainers.history import HISTORY, History
from agentgym_trainers.objective.aggregations import count_parts
from agentgym_trainers.objective.compute import loss, summarise
from agentgym_trainers.objective.declare import IMITATION, Objective, Struct
from agentgym_trainers.objective.tokens import Tokens, Totals
from agentgym_trainers.sharding import parted, shard, sharded, whole

Advantages = Sequence[NDArray[np.float64]]
Sums = list[dict[str, float]]


class Optim(Struct, frozen=True, kw_only=True):
    """AdamW and how an update is cut.

    clip          bound of the gradient's norm; 0 = none
    warmup        optimiser steps in which the rate rises linearly to `lr`
    decay         share of the steps, at the end, in which it falls linearly to `floor` x lr
    epochs, minibatches    optimiser steps per update = epochs x minibatches
    micro_tokens  tokens in one forward pass: memory, never the result
    sharded       FSDP2: weights, gradients and optimiser states in shards over the ranks of the run; that of [optim]
                  holds for all its phases
    only          a regular expression: parameters whose names it finds move, the others stay ("" = all move)
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
    sharded: bool = False
    only: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or min(self.epochs, self.minibatches, self.micro_tokens) < 1:
            raise ConfigError(f"lr is positive, and epochs, minibatches and micro_tokens are at least 1; got {self}")
        if not (0 <= self.decay <= 1 and 0 <= self.floor <= 1 and self.warmup >= 0 and self.clip >= 0):
            raise ConfigError(f"decay and floor are shares in [0, 1], warmup and clip at least 0; got {self}")
        if not (all(0 <= b < 1 for b in self.betas) and 0 <= self.weight_decay < math.inf):
            raise ConfigError(f"betas are in [0, 1), weight_decay is at least 0; got {self}")
        try:
            re.compile(self.only)
        except re.error as error:
            raise ConfigError(f"optim.only = {self.only!r} is no regular expression: {error}") from error

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
        self,
        trajectories: Sequence[Trajectory],
        advantages: Advantages,
        *,
        max_tokens: int,
        behaviour: bool = True,
        rewards: Sequence[float] | None = None,
    ) -> list[Batch]:
        """Packed micro-batches, as `agentgym.collate.collate` makes them."""
        ...

    async def publish(self, version: WeightsVersion) -> None:
        """From now on act with the weights as they are."""
        ...


MASTER = "master"
"""Names float32 masters among the tensors of a learner's state."""


class Learner:
    """Owns the optimiser; shares the parameters with whoever gave the `Trainable`.

    Parameters of half precision get float32 masters: a step of 1e-6 would vanish in the rounding of bfloat16.

    `total_steps` is the length of the learning-rate schedule in optimiser steps. `temperature` is the sampler's, so
    that both speak of the same distribution. `reference` and `teacher` are frozen modules, for the regularisers that
    need them; `blank` is what masked observations are replaced with. With `remember`, the weights of so many versions
    before the current one are kept, and the log-probs of those that sampled are worked out (`History`). `objective` is
    the one of the next step: controllers move its numbers.
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
        teacher: nn.Module | None = None,
        blank: Blank | None = None,
        remember: int | None = None,
    ) -> None:
        self.trainable, self.objective, self.optim = trainable, begun(objective), optim
        self.total_steps, self.seed = total_steps, seed
        if optim.sharded:
            shard(trainable.module())
        self.parameters = _moving(trainable.module(), optim.only)
        self.history = None if remember is None else History(self.parameters, remember)
        self.forward = Forward(
            objective,
            trainable.module(),
            reference=reference,
            teacher=teacher,
            temperature=temperature,
            seed=seed,
            blank=blank,
            history=self.history,
        )
        self.steps = 0
        self.updates = 0
        self.masters = [_master(p) for p in self.parameters]
        self.optimiser = torch.optim.AdamW(
            self.masters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )

    # --- one update, one step ---

    def update(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Advantages,
        rewards: Sequence[float] | None = None,
        *,
        version: int | None = None,
    ) -> dict[str, float]:
        """Every optimiser step that one rollout pays for; the mean of their figures.

        `rewards` are the composed ones, for objectives that read them; `version` is the number of the weights as they
        are, None where they sampled all of it themselves. Every rank is given the same, and takes its share. Raises
        `RecordError` for an advantage that is not finite and for a token of a version that cannot be, before any weight
        moves.
        """
        _refuse_strange(trajectories, advantages)
        if self.history is not None and version is not None:
            self.history.remember(version)
        cut = self._cut(trajectories)
        minibatches = [self._prepare(part, advantages, trajectories, rewards, version) for part in cut]
        steps = [self._step(parts) for _ in range(self.optim.epochs) for parts in minibatches]
        self.updates += 1
        return mean_figures([figures for figures in steps if figures]) | stale_cache(trajectories)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step over these micro-batches; the result does not depend on how they are cut. Nothing moves,
        and there are no figures, where no token is trained on."""
        mine = [batches[i] for i in ranks.share([len(batch.ids) for batch in batches])]
        return self._step([self.forward.prepare(batch, self.steps) for batch in even(self.trainable, mine)])

    def _cut(self, trajectories: Sequence[Trajectory]) -> Iterator[list[int]]:
        """Which trajectories go together: a keyed random order, in `minibatches` parts; whole groups where the
        objective reads members together."""
        held: dict[Any, list[int]] = {}
        for i, t in enumerate(trajectories):
            held.setdefault(t.prompt if self.objective.grouped else i, []).append(i)
        order = list(held.values())
        rng(self.seed, "minibatches", self.updates).shuffle(order)
        parts = np.array_split(np.arange(len(order)), self.optim.minibatches)
        return ([i for place in part for i in order[place]] for part in parts)

    def _prepare(
        self,
        part: Sequence[int],
        advantages: Advantages,
        trajectories: Sequence[Trajectory],
        rewards: Sequence[float] | None,
        version: int | None,
    ) -> list[Micro]:
        part = [part[i] for i in ranks.share([tokens_of(trajectories[i]) for i in part])]
        batches = self.trainable.collate(
            [trajectories[i] for i in part],
            [advantages[i] for i in part],
            max_tokens=self.optim.micro_tokens,
            behaviour=self.objective.needs_sampler,
            rewards=None if rewards is None else [rewards[i] for i in part],
        )
        return [self.forward.prepare(batch, self.steps, version) for batch in even(self.trainable, batches)]

    def _step(self, parts: Sequence[Micro]) -> dict[str, float]:
        total = self._totals(parts)
        if not total.tokens:
            return {}
        self.clear()
        together = self.objective.coupled and (ranks.count() > 1 or len(parts) > 1)
        value, sums = (self._together if together else self._apart)(parts, total)
        figures = {"loss": value, "grad_norm": 0.0, "tokens": float(total.tokens), **summarise(sums, total)}
        figures |= numbers(self.objective)
        self._require_finite("loss", value)
        figures["grad_norm"] = self.move()
        self.clear()
        self.objective = controlled(self.objective, self.steps, figures)
        return figures

    def _totals(self, parts: Sequence[Micro]) -> Totals:
        found: Counter[str] = Counter()
        parts = [part for part in parts if not part.idle]
        for t in (part.fixed for part in parts):
            found.update(count_parts(self.objective.aggregation, t.turn, t.segment, t.sequence, t.labels))
        held = ranks.gather((sum(len(p.fixed.logp) for p in parts), sum(p.fixed.sequences for p in parts), found))
        tokens, count, counted = zip(*held, strict=True)
        return Totals(sum(tokens), sum(count), dict(sum(counted, Counter())))

    def _apart(self, parts: Sequence[Micro], total: Totals) -> tuple[float, Sums]:
        """Micro-batch by micro-batch: loss and sums of all ranks; the gradients are this rank's."""
        value, sums = 0.0, []
        for part in parts:
            tokens = self._tokens(part)
            if part.idle:
                self._backward(tokens)
                continue
            found, part_sums = loss(self.objective, tokens, total)
            torch.autograd.backward(found, inputs=self._inputs)
            value += float(found.detach())
            sums.append(part_sums)
        everyone = ranks.gather((value, sums))
        return sum(v for v, _ in everyone), [s for _, held in everyone for s in held]

    def _together(self, parts: Sequence[Micro], total: Totals) -> tuple[float, Sums]:
        """The same for a loss of the whole step: its derivatives by the leaves first, then those of the leaves."""
        found, sums, derivatives = self._derivatives(parts, total)
        for part in parts:
            tokens = self._tokens(part)
            if part.idle:
                self._backward(tokens)
                continue
            size = len(tokens.logp)
            leaves = [getattr(tokens, name) for name in derivatives]
            torch.autograd.backward(leaves, [d[:size] for d in derivatives.values()], inputs=self._inputs)
            derivatives = {name: d[size:] for name, d in derivatives.items()}
        return found, sums

    def _tokens(self, part: Micro) -> Tokens:
        """The trained tokens; in the first step of an update the policy is still the one that it began with."""
        tokens = self.forward.tokens(part)
        first = tokens.own is None and part.layer is None and part.step == self.steps
        return replace(tokens, own=tokens.logp.detach()) if first else tokens

    def _derivatives(self, parts: Sequence[Micro], total: Totals) -> tuple[float, Sums, dict[str, Tensor]]:
        """The loss of the step over all ranks, its sums, and its derivative by each leaf of this rank's tokens."""
        with torch.no_grad():
            mine = [(self._tokens(part), part.idle) for part in parts]
            seen = ranks.gather([_to(tokens, "cpu") for tokens, idle in mine if not idle])
        device = self.parameters[0].device
        whole = _to(joined([tokens for held in seen for tokens in held]), device)
        leaves = {name: x.requires_grad_() for name in LEAVES if (x := getattr(whole, name)) is not None}
        found, sums = loss(self.objective, whole, total)
        slopes = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        start = sum(len(tokens.logp) for held in seen[: ranks.rank()] for tokens in held)
        share = {name: d[start:] for name, d in zip(leaves, slopes, strict=True) if d is not None}
        return float(found.detach()), [sums], share

    @property
    def _inputs(self) -> list[nn.Parameter] | None:
        """Whose gradients a backward pass leaves; None = everybody's: shards are no leaves of its graph."""
        return None if self.optim.sharded else self.parameters

    def _backward(self, tokens: Tokens) -> None:
        """The backward pass of an idle micro-batch: nothing, through everything."""
        leaves = [x for name in LEAVES if (x := getattr(tokens, name)) is not None and x.requires_grad]
        torch.autograd.backward(leaves, [torch.zeros_like(x) for x in leaves], inputs=self._inputs)

    @torch.no_grad()
    def log_ratios(self, trajectories: Sequence[Trajectory], other: nn.Module) -> list[NDArray[np.float64]]:
        """log policy - log other, summed over the tokens that each turn of each trajectory sampled: [turns] each."""
        nothing = [np.zeros(len(t.turns)) for t in trajectories]
        starts = np.cumsum([0, *map(len, nothing)]).tolist()
        found = np.zeros(starts[-1])
        mine = np.asarray(ranks.share(list(map(tokens_of, trajectories))), int)
        parts = [trajectories[i] for i in mine], [nothing[i] for i in mine]
        batches = self.trainable.collate(*parts, max_tokens=self.optim.micro_tokens, behaviour=False)
        for batch in even(self.trainable, batches):
            gap = self.forward.logprobs(self.trainable.module(), batch) - self.forward.logprobs(other, batch)
            if batch is not IDLE:
                at = trained(batch)
                owners = mine[np.repeat(batch.owners, np.diff(batch.bounds))[at]]
                np.add.at(found, np.asarray(starts)[owners] + batch.turns[at], gap.double().cpu().numpy())
        found = np.sum(ranks.gather(found), 0)
        return [found[a:b] for a, b in pairwise(starts)]

    def clear(self) -> None:
        """Forget the accumulated gradient."""
        for p in (*self.trainable.module().parameters(), *self.masters):
            p.grad = None

    def move(self) -> float:
        """Sum the accumulated gradient over the ranks, clip, check and apply it; its norm before clipping."""
        if not self.optim.sharded:
            ranks.sum_gradients(self.parameters)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip or math.inf)))
        self._require_finite("gradient", norm)
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

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise ModelError(
                f"the {what} of optimiser step {self.steps} is {value}; the weights are as before it. Lower optim.lr "
                f"(now {self.optim.lr:g}), and look for extreme advantages and log-probs in the last rollout"
            )

    # --- state ---

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that an interrupted run needs besides the weights. Whole ones: with shards all
        ranks call it, and a run may be resumed by another number of them."""
        tensors = {
            f"{index}.{name}": whole(value)
            for index, held in self.optimiser.state_dict()["state"].items()
            for name, value in held.items()
        }
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = {f"{i}.{MASTER}": whole(m.detach()) for i, (p, m) in enumerate(pairs) if p is not m}
        before = {} if self.history is None else self.history.state()
        plain = {"steps": self.steps, "updates": self.updates, "numbers": numbers(self.objective)}
        return tensors | masters | before, plain

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The inverse of `state`, on a learner made in the same way."""
        held: dict[int, dict[str, Tensor]] = {}
        if self.history is not None:
            self.history.restore(tensors)
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if index == HISTORY:
                continue
            if name == MASTER:
                self.masters[int(index)].data.copy_(parted(value, self.masters[int(index)]))
            else:
                held.setdefault(int(index), {})[name] = parted(value, self.masters[int(index)])
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": held, "param_groups": state["param_groups"]})
        self.steps, self.updates = int(plain["steps"]), int(plain["updates"])
        self.objective = with_numbers(self.objective, plain["numbers"])


class Family:
    """Base of learners whose loss is of another family: optimiser, masters, ranks and state are those of `learner`.
    `ConfigError` for shards."""

    def __init__(self, trainable: Trainable, optim: Optim, *, total_steps: int, seed: int, temperature: float) -> None:
        if optim.sharded:
            raise ConfigError("optim.sharded = true is for objectives; pairs and candidates learn with whole weights")
        self.learner = Learner(trainable, IMITATION, optim, total_steps=total_steps, seed=seed, temperature=temperature)

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self.learner.steps

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `Learner.state`."""
        return self.learner.state()

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """As `Learner.restore`."""
        self.learner.restore(tensors, plain)


def _moving(module: nn.Module, only: str) -> list[nn.Parameter]:
    """The parameters to move; `ConfigError` where `only` finds none."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = [p for name, p in named if re.search(only, name)]
    if not found:
        shown = ", ".join(name for name, _ in named[:6])
        raise ConfigError(f"optim.only = {only!r} finds no parameter; the first of {len(named)} are {shown}")
    return found


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimiser moves: the parameter, or a float32 copy of one in half precision."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().clone().requires_grad_()


def even(trainable: Trainable, batches: Sequence[Batch]) -> list[Batch]:
    """Those with something to train on; where the model lies in shards, as many on each rank."""
    found = [batch for batch in batches if batch.mask.any()]
    if not sharded(trainable.module()):
        return found
    return found + [IDLE] * (max(ranks.gather(len(found))) - len(found))


def tokens_of(trajectory: Trajectory) -> int:
    """How many tokens its turns added: what a rank's share is measured by."""
    return sum(len(span.prompt) + len(span.ids) + len(span.suffix) for _, span in trajectory.spans)


def _refuse_strange(trajectories: Sequence[Trajectory], advantages: Advantages) -> None:
    """`RecordError` where an advantage is not finite."""
    strange = [t.episode.id for t, a in zip(trajectories, advantages, strict=True) if not np.isfinite(a).all()]
    if strange:
        raise RecordError(
            f"the advantages of episode {strange[0]} are not finite; nothing was learnt from this update. Look for "
            "non-finite rewards in its ledger"
        )


def _to(tokens: Tokens, device: str | torch.device) -> Tokens:
    held = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    moved: dict[str, Any] = {name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)}
    return replace(tokens, **moved)


def stale_cache(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The share of the trained tokens in spans that attended to caches of older weights, where there are any."""
    spans = [turn.action.span for t in trajectories if isinstance(t.turns, Turns) for turn in t.turns.items]
    sizes = [(len(span.ids), span.stale) for span in spans if span is not None]
    stale = sum(size for size, kept in sizes if kept)
    return {"stale_cache": stale / sum(size for size, _ in sizes)} if stale else {}


def mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Figure by figure; tokens are summed, maxima stay maxima."""
    names = dict.fromkeys(name for f in figures for name in f)
    return {name: _fold(name)([f[name] for f in figures if name in f]) for name in names}


def _fold(name: str) -> Callable[[Sequence[float]], float]:
    return sum if name == "tokens" else max if name.endswith("_max") else _average


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
