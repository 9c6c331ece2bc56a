"""What an objective reads of the models, at the trained tokens of a micro-batch.

A forward pass runs the trunk over all N tokens and the unembedding, in chunks, over the M trained ones. What stays
fixed during an update (proximal policy, reference, which observations are masked) is computed once, in `prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.errors import ConfigError, RecordError
from agentgym.modeling.logprobs import chunked_divergence, chunked_logprobs, head_of, packed_hidden
from agentgym.seeding import key, uniforms
from agentgym.types import Batch
from agentgym_trainers import ranks
from agentgym_trainers.history import History
from agentgym_trainers.objective.declare import (
    Distillation,
    Entropy,
    EntropyBand,
    Layer,
    Objective,
    Perception,
)
from agentgym_trainers.objective.tokens import Tokens
from agentgym_trainers.sharding import sharded, within

LEAVES = ("logp", "entropy", "masked", "divergence")
"""The columns of `Tokens` that carry gradient."""


def _idle() -> Batch:
    nothing = np.zeros(2, np.float32)
    return Batch(
        ids=np.zeros(2, np.int32),
        positions=np.arange(2, dtype=np.int32),
        bounds=np.asarray([0, 2]),
        mask=np.asarray([0, 1], np.float32),
        advantages=nothing,
        logprobs=nothing,
        versions=np.full(2, -1, np.int32),
        turns=np.zeros(2, np.int32),
        owners=np.zeros(1, np.int32),
        segments=np.zeros(2, np.int16),
    )


IDLE = _idle()
"""What a rank without a micro-batch of its own passes through a model in shards: all ranks gather them together."""


class Blank(NamedTuple):
    """What takes the place of a masked observation token, and the ids that are never masked (a template's marks)."""

    token: int = 0
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Micro:
    """A micro-batch of an update that began with optimiser step `step`: `fixed` are its tokens before any forward pass,
    with `logp` = `old`; `layer` is the layer that log-probs come from (None: the last), `blanked` the ids [N] with
    observations masked, or None."""

    batch: Batch
    fixed: Tokens
    step: int
    layer: int | None = None
    blanked: NDArray[np.int32] | None = None

    @property
    def idle(self) -> bool:
        return self.batch is IDLE


class Forward:
    """The models of an update and how they are read.

    `temperature` is the sampler's, so that both speak of the same distribution. `reference` and `teacher` are frozen
    modules. With a `history` the log-probs of the versions that sampled are worked out too. Raises `ConfigError` where
    the objective needs a module that is missing.
    """

    def __init__(
        self,
        objective: Objective,
        module: Any,
        *,
        reference: Any = None,
        teacher: Any = None,
        temperature: float = 1.0,
        seed: int = 0,
        blank: Blank | None = None,
        history: History | None = None,
    ) -> None:
        if objective.needs_reference and reference is None:
            raise ConfigError("a KL regulariser needs a reference; pass the frozen module")
        self.distillation: Distillation | None = objective.find(Distillation)
        if self.distillation and teacher is None:
            raise ConfigError("distillation needs a teacher; pass the frozen module (model.teacher = its folder)")
        self.source, self.proximal = objective.source, objective.proximal
        self.perception: Perception | None = objective.find(Perception)
        moving = bool(objective.customs) or any(isinstance(r, Entropy | EntropyBand) for r in objective.regularisers)
        self.entropy: bool | Literal["detached"] = moving or "detached"
        self.reads_sampler, self.needs_sampler = objective.reads_sampler, objective.needs_sampler
        self.module, self.teacher, self.history = module, teacher, history
        self.reference = reference if objective.needs_reference else None
        self.temperature, self.seed, self.blank = temperature, seed, blank or Blank()

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int, version: int | None = None) -> Micro:
        """What stays fixed during the update that begins with optimiser step `step` (from 0) at this version of the
        weights (None: the one that sampled). `ModelError` for a layer that the model does not have, `RecordError` where
        a log-prob of the sampler is compared with and missing, and for a token of a later version or a forgotten one.

        While log-probs come from a layer inside, the sampler's are of another distribution, so the proximal policy is
        the learner's own.
        """
        layer = self.source.layer if isinstance(self.source, Layer) and step < self.source.steps else None
        own = self.proximal == "learner" or layer is not None
        fixed = columns(batch, next(self.module.parameters()))
        if self.reads_sampler and not fixed.sampled.isfinite().all():
            raise RecordError(
                "a trained token has no finite log-prob of the sampler, and the objective compares with it; nothing "
                "was moved. Have the engine record them, or set objective.proximal = 'learner'"
            )
        old = self.logprobs(self.module, batch, layer) if own else fixed.sampled
        reference = None if self.reference is None else self.logprobs(self.reference, batch, layer)
        share = self.perception.share if self.perception else 0.0
        blanked = blanked_ids(batch, share, self.blank, key(self.seed, "blank", step)) if self.perception else None
        age = self._age(batch, fixed.sampled, version) if layer is None else None
        fixed = replace(fixed, logp=old, old=old, reference=reference, age=age, own=old if own and not layer else None)
        return Micro(batch, replace(fixed, behaviour=self._behaviour(batch, fixed)), step, layer, blanked)

    def _age(self, batch: Batch, like: Tensor, version: int | None) -> Tensor | None:
        """Updates since each trained token was sampled [M], or NaN; None where nothing is known of any sampler."""
        if version is None:
            return torch.zeros_like(like) if self.needs_sampler else None
        sampled = batch.versions[trained(batch)]
        if (sampled > version).any():
            raise RecordError(f"a token of version {sampled.max()} of the weights, and the learner is at {version}")
        return torch.from_numpy(np.where(sampled < 0, np.nan, version - sampled)).to(like)

    def _behaviour(self, batch: Batch, fixed: Tokens) -> Tensor | None:
        """Log-probs of the versions that sampled [M], one forward pass for each of them."""
        if self.history is None or fixed.age is None:
            return None
        found, mine = torch.full_like(fixed.sampled, torch.nan), self.history.holding(batch.versions[trained(batch)])
        for held in sorted(set().union(*ranks.gather(set(mine))) if sharded(self.module) else mine):
            with self.history.under(held):
                logp = self.logprobs(self.module, batch)
            if held in mine:
                at = torch.from_numpy(mine[held]).to(found.device)
                found[at] = logp[at]
        return found

    def tokens(self, micro: Micro) -> Tokens:
        """The trained tokens, with gradient unless the caller turned it off."""
        logp, entropy, masked, divergence = within(self.module, lambda: self._leaves(micro))
        return replace(micro.fixed, logp=logp, entropy=entropy, masked=masked, divergence=divergence)

    def _leaves(self, micro: Micro) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        hidden = self._hidden(self.module, micro.batch, micro.layer)
        logp, entropy = self._read(self.module, hidden, micro.batch, self.entropy)
        return logp, entropy, self._masked(micro), self._diverged(micro, hidden)

    def logprobs(self, module: Any, batch: Batch, layer: int | None = None) -> Tensor:
        """Log-probs of the trained tokens under a module [M]."""
        return within(module, lambda: self._read(module, self._hidden(module, batch, layer), batch, False)[0])

    def _masked(self, micro: Micro) -> Tensor | None:
        """Log-probs of the same tokens behind masked observations."""
        if micro.blanked is None:
            return None
        hidden = self._hidden(self.module, micro.batch, micro.layer, micro.blanked)
        return self._read(self.module, hidden, micro.batch, False)[0]

    def _diverged(self, micro: Micro, hidden: Tensor) -> Tensor | None:
        if self.distillation is None:
            return None
        with torch.no_grad():
            taught = self._hidden(self.teacher, micro.batch)
        heads = head_of(self.module), head_of(self.teacher)
        beta, temperature = self.distillation.beta, self.temperature
        return chunked_divergence(hidden, heads[0], taught, heads[1], beta=beta, temperature=temperature)

    @staticmethod
    def _hidden(module: Any, batch: Batch, layer: int | None = None, ids: NDArray[np.int32] | None = None) -> Tensor:
        """The hidden states that predict the trained tokens [M, hidden]."""
        ids = batch.ids if ids is None else ids
        hidden = packed_hidden(module, ids, batch.positions, batch.bounds, layer=layer)
        return hidden[torch.from_numpy(trained(batch) - 1).to(hidden.device)]

    def _read(
        self, module: Any, hidden: Tensor, batch: Batch, entropy: bool | Literal["detached"]
    ) -> tuple[Tensor, Tensor]:
        targets = torch.from_numpy(batch.ids[trained(batch)].astype(np.int64)).to(hidden.device)
        return chunked_logprobs(hidden, targets, head_of(module), temperature=self.temperature, entropy=entropy)


def trained(batch: Batch) -> NDArray[np.intp]:
    """Where the trained tokens lie [M]."""
    return np.flatnonzero(batch.mask)


def columns(batch: Batch, like: Tensor) -> Tokens:
    """What a batch says of its trained tokens, on the device of `like` and in its precision (at least float32).

    Raises `RecordError` for an advantage that is not finite, and for a trained token without anything before it.
    """
    at = trained(batch)
    owner = np.repeat(np.arange(len(batch.owners)), np.diff(batch.bounds))[at]
    if not np.isfinite(batch.advantages[at]).all():
        bad = batch.owners[owner[~np.isfinite(batch.advantages[at])][0]]
        raise RecordError(f"an advantage of trajectory {bad} of this batch is not finite; nothing was moved")
    if (batch.positions[at] == 0).any():
        raise RecordError("the first token of a sequence is marked as trained; it has no prediction (mask 0 there)")
    real = torch.float64 if like.dtype == torch.float64 else torch.float32

    def numbers(x: NDArray[Any]) -> Tensor:
        return torch.from_numpy(x).to(like.device, real if x.dtype.kind == "f" else torch.int64)

    def facts(x: NDArray[Any] | None) -> Tensor | None:
        return None if x is None or np.isnan(x).all() else numbers(x)

    sampled = numbers(batch.logprobs[at])
    return Tokens(
        logp=sampled,
        old=sampled,
        sampled=sampled,
        advantages=numbers(batch.advantages[at]),
        sequence=numbers(owner),
        sequences=len(batch.owners),
        turn=numbers(batch.turns[at]),
        segment=numbers(batch.segments[at]),
        labels=batch.labels,
        group=facts(batch.groups),
        domain=facts(batch.domains),
        reward=facts(batch.rewards),
    )


def blanked_ids(batch: Batch, share: float, blank: Blank, seed: int) -> NDArray[np.int32]:
    """The ids with observation tokens blanked, each with probability `share`: tokens nobody sampled, after the first.

    Drawn by the content of the sequence, so the cut into micro-batches and ranks changes nothing.
    """
    texts = (batch.ids[a:b].tobytes() for a, b in pairwise(batch.bounds))
    keys = np.asarray([key(seed, text) for text in texts], np.uint64)
    drawn = uniforms(np.repeat(keys, np.diff(batch.bounds)), batch.positions) < share
    seen = (batch.turns < 0) & (batch.mask == 0) & (batch.positions > 0) & ~np.isin(batch.ids, blank.kept)
    return np.where(drawn & seen, np.int32(blank.token), batch.ids)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several micro-batches as those of one: sequences renumbered, labels by name."""
    starts = np.cumsum([0, *(p.sequences for p in parts)])
    labels = tuple(dict.fromkeys(label for p in parts for label in p.labels))
    moved = [
        replace(p, sequence=p.sequence + int(start), segment=_relabelled(p, labels))
        for p, start in zip(parts, starts[:-1], strict=True)
    ]
    names = [name for name in Tokens.__dataclass_fields__ if name not in ("sequences", "labels")]
    held = {name: [getattr(p, name) for p in moved] for name in names}
    whole: dict[str, Any] = {n: None if any(x is None for x in xs) else torch.cat(xs) for n, xs in held.items()}
    return Tokens(**whole, sequences=int(starts[-1]), labels=labels)


def _relabelled(p: Tokens, labels: tuple[str, ...]) -> Tensor | None:
    if p.segment is None:
        return None
    return torch.tensor([labels.index(label) for label in p.labels], device=p.segment.device)[p.segment]
