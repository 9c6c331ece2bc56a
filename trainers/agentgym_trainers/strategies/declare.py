"""S1: how the episodes of an update are chosen and played, as declarations. No torch here.

[strategy]
kind = "hint_levels"
variant = "light"
"""

from __future__ import annotations

from typing import Literal

from agentgym_trainers.objective.declare import Kind

Context = Literal["sampled", "original"]


class Plain(Kind, frozen=True, kw_only=True, tag="plain"):
    """`group_size` episodes of every task."""


class DynamicFilter(Kind, frozen=True, kw_only=True, tag="dynamic_filter"):
    """Groups whose rewards are all equal are dropped and replaced by groups of further tasks, in at most `rounds`
    rounds of play an update. DAPO (2503.14476)."""

    rounds: int = 3


class Greedy(Kind, frozen=True, kw_only=True, tag="greedy"):
    """One more episode a task at temperature 0, not trained on; its reward is the metric "greedy" of the others: the
    baseline of ReMax (2310.10505)."""


class Contrastive(Kind, frozen=True, kw_only=True, tag="contrastive"):
    """Plays `sample` members and keeps `keep` of them: ordered by reward (high first), then length (short first), the
    first half of `keep` and the last half. DCPO (2603.06065); the selection score is a reconstruction.

    statistics  whether advantages are formed over the full group or over the kept members
    """

    sample: int = 16
    keep: int = 8
    statistics: Literal["full", "kept"] = "full"


class HintLevels(Kind, frozen=True, kw_only=True, tag="hint_levels"):
    """Hints of level 1..`levels` (0: none), from the environment. SAGE (2602.03143).

    variant  "sage": a group without success is played again at levels 1, 2, .. until one succeeds, and replaced;
             "light": every task has a level that persists: success rate <= `low` raises it, > `high` lowers it
    """

    variant: Literal["sage", "light"] = "sage"
    levels: int = 3
    low: float = 0.0
    high: float = 0.35
    context: Context = "sampled"


class Prefix(Kind, frozen=True, kw_only=True, tag="prefix"):
    """Tasks without success begin behind a prefix of the oracle's actions: the shortest of `checkpoints` (shares of the
    oracle's episode) from which one of `probes` episodes succeeds, else the first of them. A share `guided` of each
    group is guided, the rest begins at the start. The prefix is context and not trained on. POPE (2601.18779)."""

    checkpoints: tuple[float, ...] = (0.25, 0.5, 0.75)
    guided: float = 0.5
    probes: int = 4
    oracle: str = "oracle"


class HintedRejection(Kind, frozen=True, kw_only=True, tag="hinted_rejection"):
    """`count` members of each group see a hint of `level` and are drawn anew, at most `attempts` times, until their
    reward is positive; when none is, a plain episode takes the place (our choice). They are trained under the `context`
    prompt. KEPO (2602.00400)."""

    count: int = 2
    attempts: int = 5
    level: int = 1
    context: Context = "original"


class ForcedMode(Kind, frozen=True, kw_only=True, tag="forced_mode"):
    """A share of each group begins its first reply with `begin`; label "mode" is "forced" or "free". The metric
    "reference" of every episode is the success rate of `reference` free episodes of the initial policy on the same
    task (0: none are played). AdaptThink (2505.13417)."""

    begin: str = "</think>"
    share: float = 0.5
    reference: int = 0


Strategy = Plain | DynamicFilter | Greedy | Contrastive | HintLevels | Prefix | HintedRejection | ForcedMode
