"""Which units of play may begin, and which the learner takes: the arithmetic of asynchronous training.

A unit is what is played and handed over at once: one group, or all groups of an update. `batch` of them make an
update. A unit that begins under version v may be learnt from at versions v to v + max_staleness; `take` never returns
an older one, and never goes on where an unfinished one would be too old afterwards. So nothing has to be thrown away,
and a learner waits for a straggler only when the bound says so. With max_staleness = 0 that is synchronous training.

    schedule = Schedule(batch=16, max_staleness=2, updates=200)
    while schedule.open:
        number = schedule.begin()                # somebody plays it, then calls schedule.finish(number)
    taken = schedule.take()                      # None: too early; else the numbers of one update, oldest first
    schedule.advance()                           # the learner has published new weights

It knows no clock and no tasks, so a simulation and a property test drive the very rule that training runs by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentgym.errors import ConfigError


class Schedule:
    """See the module. `updates` bounds the run; `version` counts updates from where the schedule begins.

    The admission rule is AReaL's (2505.24298): begun - dropped < (version + max_staleness + 1) * batch.
    """

    def __init__(self, *, batch: int, max_staleness: int, updates: int, version: int = 0) -> None:
        if batch < 1 or max_staleness < 0 or updates < version:
            raise ConfigError(
                f"batch is at least 1, max_staleness at least 0, updates at least version; got {batch}, "
                f"{max_staleness} and {updates}, {version}"
            )
        self.batch, self.max_staleness, self.updates, self.version = batch, max_staleness, updates, version
        self.begun: dict[int, int] = {}
        """Units begun and not taken, each with the version it began under."""
        self.ready: set[int] = set()
        self.learning = 0
        """Units taken for the update under way: they make room only with the new weights."""
        self.next = 0

    @property
    def running(self) -> int:
        """Units that are being played."""
        return len(self.begun) - len(self.ready)

    @property
    def open(self) -> bool:
        """Whether another unit may begin: some coming update still needs one, and it will not be too old for it."""
        horizon = min(self.max_staleness + 1, self.updates - self.version)
        return len(self.begun) + self.learning < horizon * self.batch

    def begin(self) -> int:
        """The number of a new unit, under the weights of now."""
        number, self.next = self.next, self.next + 1
        self.begun[number] = self.version
        return number

    def adopt(self, number: int, version: int) -> None:
        """A unit of an earlier life of the run, as if it began under this version."""
        self.begun[number] = version
        self.next = max(self.next, number + 1)

    def retake(self, numbers: Sequence[int]) -> None:
        """What an update of that life took, it takes again."""
        for number in numbers:
            self.drop(number)
        self.learning = len(numbers)

    def finish(self, number: int, oldest: int = 0) -> None:
        """It was played. `oldest`: the oldest version that sampled anything of it, where that is later than its
        beginning (it had to wait for a slot)."""
        self.begun[number] = max(self.begun[number], oldest)
        self.ready.add(number)

    def drop(self, number: int) -> None:
        """It will not be learnt from; another may begin in its place."""
        del self.begun[number]
        self.ready.discard(number)

    def take(self) -> list[int] | None:
        """The units of the next update, oldest first; None while too few are ready, or another would be late then."""
        taken = sorted(self.ready, key=lambda n: (self.begun[n], n))[: self.batch]
        if len(taken) < self.batch or self.late(self.begun.keys() - set(taken), self.version + 1):
            return None
        for number in taken:
            self.drop(number)
        self.learning = len(taken)
        return taken

    def late(self, units: Iterable[int], version: int) -> list[int]:
        """Those of the units that the updates from `version` on cannot learn from in time: all that began under one
        version or before must fit into the updates that it still has."""
        found = list[int]()
        for place, number in enumerate(sorted(units, key=self.begun.__getitem__)):
            updates = self.begun[number] + self.max_staleness + 1 - version
            if place - len(found) >= updates * self.batch:
                found.append(number)
        return found

    def advance(self) -> None:
        """The update is over: new weights are at work."""
        self.version, self.learning = self.version + 1, 0
