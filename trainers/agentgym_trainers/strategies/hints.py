"""Strategies with hints from the environment: levels that rise and fall, and hinted members drawn by rejection.

A task for which the environment has no words (an empty hint) is played plainly: to draw it anew until it succeeds would
be selection and no help.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.env import require
from agentgym.errors import ConfigError
from agentgym.types import Episode, Guidance
from agentgym_trainers.strategies import declare
from agentgym_trainers.strategies.base import Deal, Group, Sample, Strategy, Table, rate


class HintLevels(Strategy[declare.HintLevels]):
    """See `declare.HintLevels`. `memory` holds the levels above 0 of "light". The label "hint" is the level."""

    def check(self) -> None:
        require(self.env, "hints", "the strategy 'hint_levels'")
        if self.declared.levels < 1 or not 0 <= self.declared.low <= self.declared.high <= 1:
            raise ConfigError(
                "strategy.levels is at least 1 and 0 <= low <= high <= 1; got "
                f"{self.declared.levels}, {self.declared.low} and {self.declared.high}"
            )

    async def play(self, table: Table) -> list[Group]:
        return await (self._lightly(table) if self.declared.variant == "light" else self._rising(table))

    async def _lightly(self, table: Table) -> list[Group]:
        """Each task at its own level, which its success moves."""
        deals = table.deal()
        groups = await table.play([self._hinted(deal, self.memory.get(deal.task.id, 0)) for deal in deals])
        for deal, group in zip(deals, groups, strict=True):
            level = next_level(self.memory.pop(deal.task.id, 0), rate(group), self.declared)
            self.memory |= {deal.task.id: level} if level else {}
        return groups

    async def _rising(self, table: Table) -> list[Group]:
        """Groups without success again, level by level; where no level helps the unhinted group stays (our choice)."""
        deals = table.deal()
        groups = await table.play([self._hinted(deal, 0) for deal in deals])
        for level in range(1, self.declared.levels + 1):
            stuck = [i for i, g in enumerate(groups) if rate(g) == 0.0 and self.env.hint(deals[i].task, level)]
            again = await table.play([self._hinted(deals[i], level) for i in stuck])
            for i, group in zip(stuck, again, strict=True):
                groups[i] = group if rate(group) else groups[i]
        return groups

    def _hinted(self, deal: Deal, level: int) -> list[Episode]:
        hint = self.env.hint(deal.task, level) if level else ""
        guidance = Guidance(hint=hint, context=self.declared.context) if hint else None
        return deal.episodes(self.size, guidance, hint=str(level))


def next_level(level: int, success: float | None, declared: declare.HintLevels) -> int:
    """One up for a success rate of at most `low`, one down above `high`; unmoved where every member failed."""
    if success is None:
        return level
    step = (success <= declared.low) - (success > declared.high)
    return min(max(level + step, 0), declared.levels)


class HintedRejection(Strategy[declare.HintedRejection]):
    """See `declare.HintedRejection`. An attempt that failed is spent, and is no reward of zero. The label "hint" is the
    level, "0" for plain members."""

    def check(self) -> None:
        require(self.env, "hints", "the strategy 'hinted_rejection'")
        d = self.declared
        if not (1 <= d.count <= self.size and d.attempts >= 1 and d.level >= 1):
            raise ConfigError(
                f"strategy.count is 1 to rollout.group_size = {self.size}, attempts and level are at least 1; got "
                f"{d.count}, {d.attempts} and {d.level}"
            )

    async def play(self, table: Table) -> list[Group]:
        deals, plain = table.deal(), self.size - self.declared.count
        groups = await table.play([deal.episodes(plain, hint="0") for deal in deals])
        for _ in range(self.declared.attempts):
            drawn = await table.play([self._hinted(d, self._missing(g)) for d, g in zip(deals, groups, strict=True)])
            for group, found in zip(groups, drawn, strict=True):
                group += accepted(found)
        hands = [d.episodes(self._missing(g), hint="0") for d, g in zip(deals, groups, strict=True)]
        instead = await table.play(hands)
        return [group + found for group, found in zip(groups, instead, strict=True)]

    def _missing(self, group: Group) -> int:
        return self.size - len(group)

    def _hinted(self, deal: Deal, count: int) -> list[Episode]:
        level = self.declared.level
        guidance = Guidance(hint=self.env.hint(deal.task, level), context=self.declared.context)
        return deal.episodes(count, guidance, hint=str(level)) if guidance.hint else []


def accepted(found: Sequence[Sample]) -> Group:
    """Those with a positive reward."""
    return [s for s in found if s.value is not None and s.value > 0]
