"""POPE: hard tasks begin behind a prefix of the oracle's actions."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.env import require
from agentgym.errors import ConfigError, unknown
from agentgym.types import Action, Episode, Guidance, iterate
from agentgym_trainers.strategies import declare
from agentgym_trainers.strategies.base import Deal, Group, Sample, Strategy, Table, rate

Start = tuple[Action, ...]


class Prefix(Strategy[declare.Prefix]):
    """See `declare.Prefix`. The label "guided" is "yes" or "no": an advantage with the key ["prompt", "label:guided"]
    gives each condition its own baseline. `memory` holds the index of a task's checkpoint once a probe succeeded.

    Probes choose the checkpoint and are not learnt from: they were played until one succeeded.
    """

    def check(self) -> None:
        d = self.declared
        require(self.env, "ladder", "the strategy 'prefix'")
        rungs = self.env.ladder()
        if d.oracle not in rungs:
            raise unknown(f"rung of the ladder of {self.env.id}", d.oracle, rungs)
        if (
            not d.checkpoints
            or any(not 0 < c < 1 for c in d.checkpoints)
            or list(d.checkpoints) != sorted(d.checkpoints)
        ):
            raise ConfigError(f"strategy.checkpoints are rising shares between 0 and 1; got {list(d.checkpoints)}")
        self.oracle, self.guided = rungs[d.oracle], int(d.guided * self.size) if 0 < d.guided <= 1 else 0
        if not 1 <= self.guided <= self.size or d.probes < 1:
            raise ConfigError(
                f"strategy.guided = {d.guided} of rollout.group_size = {self.size} guides {self.guided} members, and "
                f"probes is {d.probes}; at least one each, and no more than all"
            )

    async def play(self, table: Table) -> list[Group]:
        deals = table.deal()
        groups = await table.play([deal.episodes(self.size, guided="no") for deal in deals])
        hard = [i for i, group in enumerate(groups) if rate(group) == 0.0]
        starts = await self._starts(table, [deals[i] for i in hard])
        hands = [self._behind(deals[i], start) for i, start in zip(hard, starts, strict=True)]
        for i, found in zip(hard, await table.play(hands), strict=True):
            groups[i] = groups[i][: self.size - len(found)] + found
        return groups

    def _behind(self, deal: Deal, start: Start) -> list[Episode]:
        return deal.episodes(self.guided, Guidance(start=start), guided="yes") if start else []

    async def _starts(self, table: Table, hard: Sequence[Deal]) -> list[Start]:
        """Where each of these tasks begins; () where the oracle itself does not succeed."""
        shown = await table.play([deal.episodes(1) for deal in hard], self.oracle)
        known = [
            (deal, prefixes(sample, self.declared.checkpoints)) for deal, (sample,) in zip(hard, shown, strict=True)
        ]
        for place in range(len(self.declared.checkpoints)):
            open_ = [(deal, cuts[place]) for deal, cuts in known if cuts and deal.task.id not in self.memory]
            hands = [d.episodes(self.declared.probes, Guidance(start=cut), guided="probe") for d, cut in open_]
            for (deal, _), found in zip(open_, await table.play(hands), strict=True):
                self.memory |= {deal.task.id: place} if rate(found) else {}
        return [cuts[self.memory.get(deal.task.id, 0)] if cuts else () for deal, cuts in known]


def prefixes(sample: Sample, checkpoints: Sequence[float]) -> list[Start]:
    """The first actions of a successful episode, one tuple for each share: at least one action, never the last."""
    actions = [turn.action for turn in iterate(sample.trajectory.turns)]
    if not sample.success or len(actions) < 2:
        return []
    return [tuple(actions[: min(max(1, round(share * len(actions))), len(actions) - 1)]) for share in checkpoints]
