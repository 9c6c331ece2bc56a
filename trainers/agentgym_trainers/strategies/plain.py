"""Strategies that only choose: plain groups, groups with contrast, a greedy baseline, the strongest contrast kept."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.errors import ConfigError
from agentgym.types import Guidance
from agentgym_trainers.strategies import declare
from agentgym_trainers.strategies.base import Group, Sample, Strategy, Table, with_metric


class Plain(Strategy[declare.Plain]):
    """See `declare.Plain`."""

    async def play(self, table: Table) -> list[Group]:
        return await table.play([deal.episodes(self.size) for deal in table.deal()])


class DynamicFilter(Strategy[declare.DynamicFilter]):
    """See `declare.DynamicFilter`. A failed member has no reward and makes no contrast."""

    def check(self) -> None:
        if self.declared.rounds < 1:
            raise ConfigError(f"strategy.rounds is at least 1; got {self.declared.rounds}")
        if self.size < 2:
            raise ConfigError(
                "strategy 'dynamic_filter' keeps groups whose rewards differ: set rollout.group_size >= 2"
            )

    async def play(self, table: Table) -> list[Group]:
        kept: list[Group] = []
        for _ in range(self.declared.rounds):
            missing = table.deal(table.deals - len(kept))
            groups = await table.play([deal.episodes(self.size) for deal in missing])
            kept += [group for group in groups if mixed(group)]
        return kept


def mixed(group: Sequence[Sample]) -> bool:
    """Whether its rewards differ."""
    return len({s.value for s in group if s.value is not None}) > 1


class Greedy(Strategy[declare.Greedy]):
    """See `declare.Greedy`. A group whose greedy episode failed has no baseline and is left out."""

    async def play(self, table: Table) -> list[Group]:
        greedy = Guidance(sampling=self.sampling.replace(temperature=0.0, top_p=1.0, top_k=0))
        hands = [[*d.episodes(self.size), *d.episodes(1, greedy, mode="greedy")] for d in table.deal()]
        groups = await table.play(hands)
        return [with_metric(g[:-1], "greedy", g[-1].value) for g in groups if g[-1].value is not None]


class Contrastive(Strategy[declare.Contrastive]):
    """See `declare.Contrastive`. Length is sampled tokens; failed members are in no order and stay to be counted."""

    def check(self) -> None:
        if not (2 <= self.declared.keep <= self.declared.sample and self.declared.keep % 2 == 0):
            raise ConfigError(
                "strategy.keep is an even number up to strategy.sample, half of it from either end; got keep = "
                f"{self.declared.keep}, sample = {self.declared.sample}"
            )

    async def play(self, table: Table) -> list[Group]:
        groups = await table.play([deal.episodes(self.declared.sample) for deal in table.deal()])
        return [self._chosen(group) for group in groups]

    def _chosen(self, group: Group) -> Group:
        good, failed = [s for s in group if s.value is not None], [s for s in group if s.value is None]
        lengths = [sum(len(span.ids) for _, span in s.trajectory.spans) for s in good]
        kept = set(contrast([s.value or 0.0 for s in good], lengths, self.declared.keep))
        if self.declared.statistics == "kept":
            return [s for i, s in enumerate(good) if i in kept] + failed
        return [s._replace(train=i in kept) for i, s in enumerate(good)] + failed


def contrast(values: Sequence[float], lengths: Sequence[int], keep: int) -> list[int]:
    """Indices in the order of reward (high first), then length (short first): the first and last `keep` / 2 of them."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], lengths[i]))
    return order if keep >= len(order) else order[: keep // 2] + order[len(order) - keep // 2 :]
