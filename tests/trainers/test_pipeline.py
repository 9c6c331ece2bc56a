"""The pipeline on a simulated rollout side, by a virtual clock: the bound, conservation, progress, kills anywhere."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentgym.errors import ConfigError, Fault
from agentgym.policy import Load
from agentgym.testing.fakes import CountingEnv
from agentgym_trainers.journal import Journal, Standing
from agentgym_trainers.pipeline import Pipeline
from agentgym_trainers.rollouts import Played, TaskCursor, Unit
from agentgym_trainers.schedule import Schedule
from agentgym_trainers.simulated import SimulatedPlayer

LATENCIES = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 5.0, 40.0]), min_size=3, max_size=9)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only where everything waits for it; a run in which nothing is left to wait for is stuck."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            assert self._scheduled, "stuck: nothing runs, and nothing ever will"  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def by_virtual_clock(main: Callable[[], Awaitable[None]]) -> None:
    async def checked() -> None:
        await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was leaked"

    with closing(VirtualLoop()) as loop:
        told = list[dict[str, Any]]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        loop.run_until_complete(checked())
        assert told == [], "an error that nobody looked at"


class Rollouts(SimulatedPlayer):
    """Samples each unit with the newest weights that there are once it has waited `late` seconds; full at `room`."""

    def __init__(self, latencies: list[float], late: float, room: int, **told: set[int]) -> None:
        super().__init__(lambda uniform: latencies[int(uniform * len(latencies))], group=2, turns=1, **told)
        self.late, self.room, self.version, self.most = late, room, 0, 0
        self.asked: list[Unit] = []

    async def play(self, unit: Unit) -> Played:
        self.asked.append(unit)
        await asyncio.sleep(self.late)
        self.most = max(self.most, self.running + 1)
        return await super().play(msgspec.structs.replace(unit, version=self.version))

    def load(self) -> Load:
        return Load(running=self.running, waiting=self.running, slots=self.room)


class Run:
    """What a run keeps on disk (checkpoint and journal), and a life of it: the loop of training around a pipeline."""

    def __init__(self, folder: Path, rollouts: Rollouts, *, batch: int, max_staleness: int, updates: int) -> None:
        self.folder, self.rollouts, self.updates = folder, rollouts, updates
        self.batch, self.max_staleness = batch, max_staleness
        self.position, self.stood = 0, Standing()
        self.learnt: list[list[int]] = []
        """Units by update, in the weights that the learner holds."""
        self.whole = 0
        """Bytes of the journal's newest file that no kill can tear: it came into being with them."""

    @contextmanager
    def line(self, places: int) -> Iterator[Pipeline]:
        schedule = Schedule(
            batch=self.batch, max_staleness=self.max_staleness, updates=self.updates, version=self.position
        )
        schedule.next, self.rollouts.version = self.stood.begun, self.position
        del self.learnt[self.position :]
        with closing(Journal(self.folder, self.position)) as journal:
            cursor = TaskCursor(CountingEnv(), 0, self.stood.drawn)
            yield Pipeline(self.rollouts, cursor, schedule, journal, deals=1, most=places)

    async def live(self, line: Pipeline, step: float, every: int) -> None:
        """To the end, with a checkpoint every so many updates, which is written while play goes on."""
        while line.schedule.version < self.updates:
            played = await line.take()
            stale = [line.schedule.version - unit.oldest(-1) for unit in played]
            assert all(0 <= found <= self.max_staleness for found in stale), stale
            assert len(played) == self.batch
            await asyncio.sleep(step)
            self.learnt.append([unit.number for unit in played])
            self.rollouts.version += 1
            line.advance()
            if len(self.learnt) % every == 0:
                stood = line.standing
                line.journal.begin(len(self.learnt), line.open())
                self.whole = self.newest.stat().st_size
                await asyncio.sleep(step)
                self.position, self.stood = len(self.learnt), stood
                line.journal.prune(self.position)

    @property
    def newest(self) -> Path:
        return max((self.folder / "journal").glob("*.frames"))

    def tear(self, share: float) -> None:
        """The kill came in the middle of a write: of what was added to the newest file, only this share is there."""
        size = self.newest.stat().st_size
        os.truncate(self.newest, self.whole + int(share * (size - self.whole)))

    def check(self) -> None:
        """Every unit was learnt from, once, and each was dealt the same tasks whenever it was played."""
        assert [len(found) for found in self.learnt] == [self.batch] * self.updates
        assert sorted(n for found in self.learnt for n in found) == list(range(self.updates * self.batch))
        dealt = TaskCursor(CountingEnv(), 0).take(self.updates * self.batch)
        assert all(unit.tasks == (dealt[unit.number],) for unit in self.rollouts.asked)


@given(
    batch=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    updates=st.integers(1, 9),
    places=st.integers(1, 12),
    room=st.integers(1, 6),
    latencies=LATENCIES,
    late=st.sampled_from([0.0, 0.5, 3.0]),
    step=st.sampled_from([0.0, 0.7, 6.0]),
    failed=st.sets(st.integers(0, 30)),
)
def test_bound_conservation_progress(
    batch: int,
    max_staleness: int,
    updates: int,
    places: int,
    room: int,
    latencies: list[float],
    late: float,
    step: float,
    failed: set[int],
) -> None:
    """A unit whose episodes all failed is handed over like any other: what failed is for the learner to count."""
    rollouts = Rollouts(latencies, late, room, failed=failed)

    async def main(folder: Path) -> None:
        run = Run(folder, rollouts, batch=batch, max_staleness=max_staleness, updates=updates)
        with run.line(places) as line:
            await run.live(line, step, every=3)
            assert not line.units
            assert not line.played
            await line.close()
        run.check()
        assert line.counts == {"begun": updates * batch, "taken": updates * batch, "cancelled": 0}
        assert len(rollouts.asked) == updates * batch
        assert rollouts.most <= places

    with tempfile.TemporaryDirectory() as folder:
        by_virtual_clock(lambda: main(Path(folder)))


@given(
    batch=st.integers(1, 3),
    max_staleness=st.integers(0, 3),
    updates=st.integers(2, 9),
    every=st.integers(1, 4),
    latencies=LATENCIES,
    step=st.sampled_from([0.0, 0.7, 6.0]),
    kills=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 4), st.floats(0, 1)), max_size=4),
    failed=st.sets(st.integers(0, 30)),
)
@example(  # its second life has a checkpoint in the middle of what it goes through again
    batch=1,
    max_staleness=0,
    updates=3,
    every=1,
    latencies=[0.0],
    step=6.0,
    kills=[(13.0, 2, 0.0), (13.0, 1, 0.0)],
    failed=set(),
)
def test_killed_anywhere_it_loses_unfinished_units_alone(
    batch: int,
    max_staleness: int,
    updates: int,
    every: int,
    latencies: list[float],
    step: float,
    kills: list[tuple[float, int, float]],
    failed: set[int],
) -> None:
    """Each life has checkpoints every so many updates of its own, and may end in the middle of a write."""
    rollouts = Rollouts(latencies, 0.0, 99, failed=failed)

    async def main(folder: Path) -> None:
        run = Run(folder, rollouts, batch=batch, max_staleness=max_staleness, updates=updates)
        for at, every_, share in kills:
            await killed(run, at, every_)
            run.tear(share)
        with run.line(places=5) as line:
            await run.live(line, step, every)
            await line.close()
        run.check()

    async def killed(run: Run, at: float, every: int) -> None:
        """A life that ends after `at` seconds. What it had taken, it must take again; what it had played, it has."""
        asked = len(rollouts.asked)
        with run.line(places=5) as line:
            known = set(line.played)
            task = asyncio.ensure_future(run.live(line, step, every))
            await asyncio.wait([task], timeout=at)
            dead = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for one in dead:
                one.cancel()
            await asyncio.gather(*dead, return_exceptions=True)
            if task.done() and not task.cancelled():
                task.result()
        assert not known & {unit.number for unit in rollouts.asked[asked:]}, "played again though it had been played"

    with tempfile.TemporaryDirectory() as folder:
        by_virtual_clock(lambda: main(Path(folder)))


def test_a_resumed_run_takes_the_same_units_again(tmp_path: Path) -> None:
    """Updates that no checkpoint holds are learnt once more: from those units, in that order."""
    rollouts = Rollouts([5.0, 0.1, 40.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=2, max_staleness=2, updates=8)
        with run.line(places=4) as line:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.live(line, 1.0, every=99), 60)
            await line.close()
        before = [list(found) for found in run.learnt]
        assert 2 < len(before) < 8
        with run.line(places=4) as line:
            await run.live(line, 1.0, every=99)
            await line.close()
        assert run.learnt[: len(before)] == before
        run.check()

    by_virtual_clock(main)


@given(raising=st.sets(st.integers(0, 11), min_size=1), latencies=LATENCIES)
def test_a_unit_that_raises_stops_the_run_with_its_error(raising: set[int], latencies: list[float]) -> None:
    """The first of them, where several do; all others are accounted for."""
    rollouts = Rollouts(latencies, 0.0, 99, raises=raising)

    async def main(folder: Path) -> None:
        run = Run(folder, rollouts, batch=2, max_staleness=1, updates=6)
        with run.line(places=4) as line:
            with pytest.raises(Fault, match=r"^unit \d+ was told to raise$"):
                await run.live(line, 0.5, every=2)
            ready, now = len(line.played), asyncio.get_running_loop().time()
            await line.close()
            assert asyncio.get_running_loop().time() == now, "closing waits for nobody"
        ended = line.counts["taken"] + ready + line.counts["cancelled"]
        assert ended + 1 <= line.counts["begun"] == len(rollouts.asked) <= ended + len(raising)

    with tempfile.TemporaryDirectory() as folder:
        by_virtual_clock(lambda: main(Path(folder)))


def test_going_back_to_a_checkpoint_whose_journal_is_gone_plays_on_from_there(tmp_path: Path) -> None:
    rollouts = Rollouts([1.0, 7.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=2, max_staleness=1, updates=9)
        with run.line(places=4) as line:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.live(line, 1.0, every=2), 22)
            await line.close()
        assert run.position > 2
        run.position, run.stood = 0, Standing()
        with run.line(places=4) as line:
            await run.live(line, 1.0, every=2)
            await line.close()
        run.check()

    by_virtual_clock(main)


def test_what_a_changed_config_cannot_learn_from_is_refused(tmp_path: Path) -> None:
    """Rather than waited for without end."""
    rollouts = Rollouts([1.0, 1.0, 40.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=2, max_staleness=3, updates=9)
        with run.line(places=8) as line:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.live(line, 2.0, every=99), 30)
            await line.close()
        for name, value in {"batch": 1, "max_staleness": 0}.items():
            edited = Run(tmp_path, rollouts, **{"batch": 2, "max_staleness": 3, "updates": 9} | {name: value})
            with pytest.raises(ConfigError, match="set them back"), edited.line(places=8):
                pass
        run.updates, run.max_staleness = 12, 4
        with run.line(places=8) as line:
            await run.live(line, 2.0, every=99)
            await line.close()
        run.check()

    by_virtual_clock(main)


# --- what goes wrong in between ---------------------------------------------------------------------------------


def test_a_unit_that_was_cancelled_by_its_player_stops_the_run(tmp_path: Path) -> None:
    class Cancelled(Rollouts):
        async def play(self, unit: Unit) -> Played:
            if unit.number == 1:
                raise asyncio.CancelledError
            return await super().play(unit)

    async def main() -> None:
        run = Run(tmp_path, Cancelled([1.0], 0.0, 99), batch=2, max_staleness=1, updates=3)
        with run.line(places=4) as line:
            with pytest.raises(Fault, match="cancelled"):
                await run.live(line, 0.5, every=2)
            await line.close()

    by_virtual_clock(main)


def test_nothing_begins_once_a_line_is_closed(tmp_path: Path) -> None:
    """Unit 0 is over, and its end is not looked at yet: the place that it leaves stays empty."""

    class Immediate(Rollouts):
        async def play(self, unit: Unit) -> Played:
            self.asked.append(unit)
            await asyncio.sleep(3.0 * unit.number)
            return Played(number=unit.number, groups=[])

    rollouts = Immediate([1.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=1, max_staleness=3, updates=5)
        with run.line(places=2) as line:
            waiting = asyncio.ensure_future(line.take())
            while not line.played:  # noqa: ASYNC110 - the very pass of the loop matters
                await asyncio.sleep(0)
            await line.close()
            await asyncio.sleep(1)
            waiting.cancel()
        assert [unit.number for unit in rollouts.asked] == [0, 1]
        assert line.running == 0

    by_virtual_clock(main)


def test_an_engine_that_cannot_be_looked_at_stops_the_run(tmp_path: Path) -> None:
    """The look happens by itself, in a callback of the loop."""

    class Broken(Rollouts):
        def load(self) -> Load:
            if asyncio.get_running_loop().time() > 0.0:
                raise Fault("the engine is gone")
            return Load(waiting=9, slots=1)

    async def main() -> None:
        run = Run(tmp_path, Broken([5.0], 0.0, 99), batch=2, max_staleness=1, updates=3)
        with run.line(places=4) as line:
            with pytest.raises(Fault, match="the engine is gone"):
                await run.live(line, 0.5, every=2)
            assert asyncio.get_running_loop().time() < 1.0
            await line.close()

    by_virtual_clock(main)


def test_a_checkpoint_tells_the_strategys_memory_of_now(tmp_path: Path) -> None:
    """In whatever order it tells what is open: a unit that ended long ago must not bring back what was known then."""

    class Remembers(Rollouts):
        async def play(self, unit: Unit) -> Played:
            return msgspec.structs.replace(await super().play(unit), memory={"unit": unit.number})

    rollouts = Remembers([1.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=1, max_staleness=3, updates=6)
        with run.line(places=2) as line:
            (first,) = await line.take()
            await asyncio.sleep(30)
            assert sorted(line.played) == [1, 2, 3]
            line.played = dict(reversed(line.played.items()))
            line.journal.begin(1, line.open())
            await line.close()
        assert first.number == 0
        with closing(Journal(tmp_path, 1)) as journal:
            assert journal.history().memory == line.memory == {"unit": 3}

    by_virtual_clock(main)


def test_what_an_earlier_life_played_is_not_kept_once_it_is_taken(tmp_path: Path) -> None:
    rollouts = Rollouts([1.0], 0.0, 99)

    async def main() -> None:
        run = Run(tmp_path, rollouts, batch=1, max_staleness=1, updates=9)
        with run.line(places=2) as line:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.live(line, 1.0, every=99), 5.5)
            await line.close()
        with run.line(places=2) as line:
            assert len(line.played) > 3
            (first,) = await line.take()
            alone = Played(number=0, groups=[])
            assert sys.getrefcount(first) == sys.getrefcount(alone)
            await line.close()

    by_virtual_clock(main)
