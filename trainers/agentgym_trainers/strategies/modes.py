"""AdaptThink: a share of each group has its first reply begun for it."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.errors import ConfigError
from agentgym.types import Episode, Guidance
from agentgym_trainers.strategies import declare
from agentgym_trainers.strategies.base import Deal, Group, Strategy, Table, rate, with_metric


class ForcedMode(Strategy[declare.ForcedMode]):
    """See `declare.ForcedMode`. The forced members are the first; their share in the group is the one recorded.

    `memory` holds the reference success of each task, played once. A group whose reference episodes all failed has no
    reference and is left out.
    """

    def check(self) -> None:
        d = self.declared
        self.forced = int(d.share * self.size) if 0 < d.share <= 1 else 0
        if not (0 < self.forced <= self.size and d.begin and d.reference >= 0):
            raise ConfigError(
                f"strategy.share = {d.share} of rollout.group_size = {self.size} forces {self.forced} members to begin "
                f"with {d.begin!r}; at least one, no more than all, with a text, and reference is at least 0"
            )

    async def play(self, table: Table) -> list[Group]:
        deals = table.deal()
        await self._refer(table, deals)
        groups = await table.play([[*self._forced(deal), *self._free(deal)] for deal in deals])
        if not self.declared.reference:
            return groups
        known = [(self.memory.get(deal.task.id), group) for deal, group in zip(deals, groups, strict=True)]
        return [with_metric(group, "reference", value) for value, group in known if value is not None]

    def _forced(self, deal: Deal) -> list[Episode]:
        guidance = Guidance(begin=self.declared.begin, share=self.forced / self.size)
        return deal.episodes(self.forced, guidance, mode="forced")

    def _free(self, deal: Deal) -> list[Episode]:
        return deal.episodes(self.size - self.forced, mode="free")

    async def _refer(self, table: Table, deals: Sequence[Deal]) -> None:
        """Have the initial policy play the tasks that it has not played yet."""
        if not self.declared.reference:
            return
        new = {deal.task.id: deal for deal in deals if deal.task.id not in self.memory}
        hands = [deal.episodes(self.declared.reference, mode="reference") for deal in new.values()]
        for id, found in zip(new, await table.play(hands, table.reference), strict=True):
            success = rate(found)
            self.memory |= {} if success is None else {id: success}
