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
from collections.abc import Callable, Iterator
from typing import Protocol

from agentgym.errors import ConfigError, Fault
from agentgym.policy import Load
from agentgym_trainers.journal import Event, History, Journal, Standing, Taken
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
        history = journal.history()
        self._again = history.taken
        self._left: list[Unit] = []
        self.memory = history.memory
        """What the strategy knew after the unit that ended last."""
        self._adopt(history)

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
        """What a checkpoint must know besides the weights: units begun and not taken, what they came to, and which of
        them an earlier life has taken already. The strategy's memory is that of now, whichever is told last."""
        yield from self.units.values()
        yield from (played.replace(memory=self.memory) for played in self.played.values())
        yield from (Taken(step=step, units=numbers) for step, numbers in self._again.items())

    @property
    def standing(self) -> Standing:
        """For a checkpoint; what is open goes into the journal that it begins."""
        return Standing(begun=self.schedule.next, drawn=dict(self.cursor.drawn), memory=self.memory)

    @property
    def running(self) -> int:
        """Units under way."""
        return len(self._running)

    async def close(self) -> None:
        """Cancel what is under way and wait until it has cleaned up; nothing begins any more."""
        self.most = 0
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
            self._guarded(self._fill)

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
        return self._recorded(unit)

    def _anew(self, unit: Unit) -> Unit:
        """A unit that was under way: the same tasks, under the weights of now."""
        self.schedule.adopt(unit.number, self.schedule.version)
        return self._recorded(unit.replace(version=self.schedule.version))

    def _recorded(self, unit: Unit) -> Unit:
        self.journal.write(unit)
        self.units[unit.number] = unit
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
        error = Fault("what played a unit cancelled it") if task.cancelled() else task.exception()
        self._error = self._error or error
        self._guarded(self._fill)
        self._wake.set()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever fails outside of `take` is raised by it."""
        try:
            work()
        except Exception as error:
            self._error = self._error or error
            self._wake.set()

    # --- an earlier life ---

    def _adopt(self, history: History) -> None:
        """Raises `ConfigError` for open units that this run's settings could not have begun."""
        schedule = self.schedule
        for unit in history.begun.values():
            self.cursor.skip(unit.tasks if unit.number >= schedule.next else ())
        self.units, self.played = history.begun, history.played
        self._left = [unit for number, unit in self.units.items() if number not in self.played]
        resumes = max(self._again, default=schedule.version)
        for number, unit in self.units.items():
            schedule.adopt(number, unit.version if number in self.played else resumes)
            if number in self.played:
                schedule.finish(number, self.played[number].oldest(unit.version))
        taken = {number for numbers in self._again.values() for number in numbers}
        others = {(unit.stride, len(unit.tasks)) for unit in self.units.values()} - {(schedule.batch, self.deals)}
        if others or schedule.late(self.units.keys() - taken, resumes):
            raise ConfigError(
                "the run was begun with another rollout.tasks_per_step or unit, or a greater max_staleness, and what "
                "was played since its last checkpoint cannot be learnt from so; set them back in its config.toml"
            )
