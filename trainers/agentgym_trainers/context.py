"""Trajectories read behind further tokens: what a policy would say to the same episode had it known more.

Whoever compares the two (an answer that is shown, a trajectory to improve on) collates the longer form, and takes the
context off the packed batch again: tokens stay aligned, however they were packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError
from agentgym.types import Action, Batch, Columns, Ids, TokenSpan, Trajectory, Turn, Turns


def with_context(trajectory: Trajectory, ids: Sequence[int] | NDArray[np.int32]) -> Trajectory:
    """The trajectory as if `ids` had stood in front of every one of its token sequences. Raises `ConfigError` for
    columns, which have no tokens."""
    if isinstance(trajectory.turns, Columns):
        raise ConfigError(f"{trajectory.episode.id} holds arrays; only token sequences have a context")
    front = _Front(np.asarray(ids, np.int32))
    shown: Trajectory = trajectory.replace(turns=Turns(items=tuple(front.turn(t) for t in trajectory.turns.items)))
    return shown


class _Front:
    """Puts tokens in front of each root branch, and moves the forks of the others along."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self.ids = ids
        self.begun: set[tuple[str, int]] = set()

    def turn(self, turn: Turn) -> Turn:
        drafts = tuple(d.replace(action=self._action(d.by or turn.agent, d.action)) for d in turn.drafts)
        changed: Turn = turn.replace(drafts=drafts, action=self._action(turn.agent, turn.action))
        return changed

    def _action(self, agent: str, action: Action) -> Action:
        if action.span is None or (agent, action.span.branch) in self.begun:
            return action
        self.begun.add((agent, action.span.branch))
        changed: Action = action.replace(span=self._span(action.span))
        return changed

    def _span(self, span: TokenSpan) -> TokenSpan:
        if span.parent is not None:
            branch, length = span.parent
            forked: TokenSpan = span.replace(parent=(branch, length + len(self.ids)))
            return forked
        begun: TokenSpan = span.replace(
            prompt=self._behind(span.prompt),
            unhinted=self._behind(span.unhinted) if span.context == "hinted" else Ids(),
        )
        return begun

    def _behind(self, prompt: Ids) -> Ids:
        return Ids(np.concatenate([self.ids, prompt.numpy()]))


def without_context(batch: Batch, lengths: Sequence[int] | NDArray[np.int64]) -> Batch:
    """The batch without the first `lengths`[owner] tokens of every sequence."""
    cut = np.asarray(lengths, np.int32)[batch.owners]
    cuts = np.repeat(cut, np.diff(batch.bounds))
    kept = batch.positions >= cuts
    columns = {name: getattr(batch, name)[kept] for name in _COLUMNS}
    return msgspec.structs.replace(
        batch,
        **columns,
        positions=(batch.positions - cuts)[kept],
        bounds=batch.bounds - np.concatenate(([0], np.cumsum(cut, dtype=np.int64))),
    )


_COLUMNS = ("ids", "mask", "advantages", "logprobs", "versions", "turns", "segments")
