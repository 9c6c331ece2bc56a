"""The weights of the last versions, so that what a version would have said can be worked out after it is gone.

    history = History(parameters, length=4)
    history.remember(7)                       # the weights as they are, at the start of every update
    with history.under(5):
        logprobs = ...                        # of version 5; afterwards the weights are those of 7 again, bit by bit

A trajectory may hold tokens of several versions. The sampler's log-probs of them carry its numerics, the learner's own
carry everything learnt since; those of the version that sampled, in the learner's numerics, lie between the two and
tell mismatch from staleness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.errors import RecordError
from agentgym_trainers.sharding import assembled, local, parted

HISTORY = "history"
"""Begins the names of remembered weights among the tensors of a learner's state."""


class History:
    """The moving weights of the version remembered last and of at most `length` versions before it, on the CPU.

    A version at which no update began has the weights of the next one that is remembered: only updates move them.
    """

    def __init__(self, parameters: Sequence[Tensor], length: int) -> None:
        self.parameters, self.length = parameters, length
        self.held: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def remember(self, version: int) -> None:
        """The weights as they are are those of `version`; what lies more than `length` versions back is forgotten."""
        self.held[version] = [local(p.detach()).to("cpu", copy=True) for p in self.parameters]
        self.held = {v: kept for v, kept in self.held.items() if v >= version - self.length}

    def holding(self, versions: NDArray[np.int32]) -> dict[int, NDArray[np.bool_]]:
        """Of tokens sampled by `versions` [M] (negative: nobody knows which): the remembered versions that have their
        weights, and which of the tokens each one sampled [M]. `RecordError` for one that is forgotten."""
        known = np.asarray(sorted(self.held), np.int64)
        sampled = versions[versions >= 0]
        if len(sampled) and (not len(known) or sampled.min() < known[-1] - self.length or sampled.max() > known[-1]):
            raise RecordError(
                f"a token of version {sampled.min()} of the weights; remembered are {known.tolist()}. Raise "
                "rollout.max_staleness, or set rollout.behaviour = 'recorded'"
            )
        place = np.searchsorted(known, versions)
        return {int(known[i]): (place == i) & (versions >= 0) for i in np.unique(place[versions >= 0])}

    @contextmanager
    def under(self, version: int) -> Iterator[None]:
        """The weights of a remembered version, for as long as this lasts; nothing else may read the model meanwhile."""
        now = max(self.held)
        if version == now:
            yield
            return
        self._put(version)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, version: int) -> None:
        for p, kept in zip(self.parameters, self.held[version], strict=True):
            local(p).copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Whole tensors by name."""
        return {
            f"{HISTORY}.{version}.{i}": assembled(kept, p)
            for version, held in self.held.items()
            for i, (kept, p) in enumerate(zip(held, self.parameters, strict=True))
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; other tensors are left alone."""
        names = [name.split(".") for name in tensors if name.startswith(f"{HISTORY}.")]
        self.held = {
            version: [
                local(parted(tensors[f"{HISTORY}.{version}.{i}"], p)).to("cpu", copy=True)
                for i, p in enumerate(self.parameters)
            ]
            for version in sorted({int(version) for _, version, _ in names})
        }
