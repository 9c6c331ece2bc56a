"""Rollouts and learner, side by side: units are begun as the schedule admits them, and taken as the learner is ready.

    line = Pipeline(rollouts, cursor, schedule, journal, deals=1, most=32)
    played = await line.take()         # the units of the next update; play goes on meanwhile
    ...                                # learn, publish
    line.advance()
    await line.close()                 # cancels what is under way

With max_staleness = 0 nothing is played while the learner moves: the same machinery is then synchronous training.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from agentgym.policy import Load
from agentgym_trainers.journal import Event, Journal, Standing, Taken
from agentgym_trainers.rollouts import Played, TaskCursor, Unit
from agentgym_trainers.schedule import Schedule

LOOK = 0.02
"""Seconds until the next look at an engine that was full."""


class Player(Protocol):
    """The rollout side, in this process or in another."""

    async def play(self, unit: Unit) -> Played:
        """Play a unit to its end. Several are under way at once."""
        ...

    def load(self) -> Load:
        """How busy its engine is."""
        ...


class Pipeline:
    """See the module. `deals` tasks make a unit, and at most `most` units are played at once; versions are numbers of
    weights, as the schedule has them.

    What the journal holds of an earlier life of the run is gone through first: its updates take the same units again,
    so that no trajectory is learnt from twice and none never; then units that were ready are ready, and those that were
    under way are played anew.
    """

    def __init__(
        self, player: Player, cursor: TaskCursor, schedule: Schedule, journal: Journal, *, deals: int, most: int
    ) -> None:
        self.player, self.cursor, self.schedule, self.journal = player, cursor, schedule, journal
        self.deals, self.most = deals, most
        self.units: dict[int, Unit] = {}
        self.played: dict[int, Played] = {}
        self.counts: Counter[str] = Counter()
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._error: BaseException | None = None
        self._looking = False
        self._again = dict(journal.history.taken)
        self._left: list[Unit] = []
        self.memory = journal.history.memory
        """What the strategy knew after the unit that ended last."""
        self._adopt()

    async def take(self) -> list[Played]:
        """The units of the next update, oldest first. Raises what stopped a unit that could not be played."""
        step = self.schedule.version + 1
        numbers = self._again.pop(step, None)
        if numbers is not None:
            self.schedule.retake(numbers)
        while numbers is None:
            self._fill()
            if self._error is not None:
                raise self._error
            numbers = self.schedule.take()
            if numbers is None:
                await self._wake.wait()
                self._wake.clear()
            else:
                self.journal.write(Taken(step=step, units=numbers))
        self.counts["taken"] += len(numbers)
        for number in numbers:
            del self.units[number]
        return [self.played.pop(n) for n in numbers]

    def advance(self) -> None:
        """The learner has published new weights."""
        self.schedule.advance()
        self._fill()

    def open(self) -> Iterator[Event]:
        """What a checkpoint must know besides the weights: units begun and not taken, and what they came to."""
        yield from self.units.values()
        yield from self.played.values()

    @property
    def standing(self) -> Standing:
        """For a checkpoint; what is open goes into the journal that it begins."""
        return Standing(begun=self.schedule.next, drawn=dict(self.cursor.drawn), memory=self.memory)

    @property
    def running(self) -> int:
        """Units under way."""
        return len(self._running)

    async def close(self) -> None:
        """Cancel what is under way and wait until it has cleaned up."""
        self.counts["cancelled"] += sum(task.cancel() for task in self._running)
        await asyncio.gather(*self._running, return_exceptions=True)

    # --- play ---

    def _fill(self) -> None:
        """Begin what the schedule admits, the places allow and the engine has room for."""
        while not self._again and self._error is None and len(self._running) < self.most:
            if not (self._left or self.schedule.open):
                return
            if self._running and self.player.load().full:
                self._look_later()
                return
            self._start(self._anew(self._left.pop(0)) if self._left else self._deal())

    def _look_later(self) -> None:
        def look() -> None:
            self._looking = False
            self._fill()

        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK, look)

    def _deal(self) -> Unit:
        """A new unit, with the next tasks of the run."""
        number, stride = self.schedule.begin(), self.schedule.batch
        unit = Unit(
            number=number,
            version=self.schedule.version,
            tasks=tuple(self.cursor.take(self.deals)),
            step=number // stride,
            index=number % stride,
            stride=stride,
        )
        self.units[number] = unit
        self._guarded(lambda: self.journal.write(unit))
        return unit

    def _start(self, unit: Unit) -> None:
        self.counts["begun"] += 1
        task = asyncio.ensure_future(self._play(unit))
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def _play(self, unit: Unit) -> None:
        played = await self.player.play(unit)
        self.journal.write(played)
        self.played[unit.number], self.memory = played, played.memory
        self.schedule.finish(unit.number, played.oldest(unit.version))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            error = task.exception()
            self._error = self._error or error
            self._guarded(self._fill)
        self._wake.set()

    def _guarded(self, work: Any) -> None:
        """Whatever fails outside of `take` is raised by it."""
        try:
            work()
        except Exception as error:
            self._error = self._error or error
            self._wake.set()

    # --- an earlier life ---

    def _adopt(self) -> None:
        history = self.journal.history
        for unit in history.begun.values():
            self.cursor.skip(unit.tasks if unit.number >= self.schedule.next else ())
        self.units, self.played = dict(history.begun), dict(history.played)
        for number, unit in self.units.items():
            played = self.played.get(number)
            self.schedule.adopt(number, played.oldest(unit.version) if played else unit.version, ready=bool(played))
        self._left = [unit for number, unit in self.units.items() if number not in self.played]

    def _anew(self, unit: Unit) -> Unit:
        """A unit that was under way: the same tasks, under the weights of now."""
        self.schedule.begun[unit.number] = self.schedule.version
        self.units[unit.number] = msgspec.structs.replace(unit, version=self.schedule.version)
        return self.units[unit.number]
