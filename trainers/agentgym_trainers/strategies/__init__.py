"""S1: rollout strategies, that is how the episodes of an update are chosen and played. No torch here.

    strategy = make(HintLevels(variant="light"), env, group_size=8)
    groups = await strategy.play(table)           # see base.Table
    strategy.restore(strategy.state())            # what it remembers of tasks, for checkpoints

`declare` holds the declarations, one module for each family what they do: plain, hints, prefix, modes.
"""

from __future__ import annotations

from typing import Any

from agentgym.env import Environment
from agentgym.types import Sampling
from agentgym_trainers.strategies import declare, hints, modes, plain, prefix
from agentgym_trainers.strategies.base import Group, Sample, Strategy, Table, rate

__all__ = ["Group", "Sample", "Strategy", "Table", "make", "needs_reference", "rate"]

KINDS: dict[type[declare.Strategy], type[Strategy[Any]]] = {
    declare.Plain: plain.Plain,
    declare.DynamicFilter: plain.DynamicFilter,
    declare.Greedy: plain.Greedy,
    declare.Contrastive: plain.Contrastive,
    declare.HintLevels: hints.HintLevels,
    declare.HintedRejection: hints.HintedRejection,
    declare.Prefix: prefix.Prefix,
    declare.ForcedMode: modes.ForcedMode,
}


def make(
    declared: declare.Strategy, env: Environment, *, group_size: int, sampling: Sampling | None = None
) -> Strategy[Any]:
    """The declared strategy at work, or a `ConfigError` that says why it cannot be in this environment."""
    return KINDS[type(declared)](declared, env, group_size, sampling or Sampling())


def needs_reference(declared: declare.Strategy) -> bool:
    """Whether it has the initial policy play (`Table.reference`)."""
    return isinstance(declared, declare.ForcedMode) and declared.reference > 0
