"""`agentgym bench async`: how close asynchronous training comes to the least time that its own rule allows.

The real pipeline, schedule and journal run simulated units (a group of episodes with heavy-tailed latencies, played
without a model) beside a simulated learner, from an empty buffer to the last update. Four figures stand beside the
seconds that it takes:

- bound: a discrete-event simulation of the same latencies under the same admission rule, in which everything that is
  not a latency or a learner's step costs nothing;
- bare: the same rule and latencies on a bare asyncio loop, without records, pipeline and journal: what the machine and
  its timers allow at that moment;
- floor: max(all rollout work over all places, all learner time), which no rule can go below;
- the same run with max_staleness = 0, the synchronous loop.

    agentgym bench async [--json] [--set latency=pareto] [--set scale=2] [--set out=FILE.md]
"""

from __future__ import annotations

import asyncio
import heapq
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agentgym.bench.measure import cost, machine, markdown, spread
from agentgym.errors import unknown
from agentgym.testing.fakes import LATENCIES, CountingEnv
from agentgym_trainers.journal import Journal
from agentgym_trainers.pipeline import Pipeline
from agentgym_trainers.rollouts import Played, TaskCursor
from agentgym_trainers.schedule import Schedule
from agentgym_trainers.simulated import SimulatedLearner, SimulatedPlayer

CHECKPOINT = 20
"""Updates between two files of the journal."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A run: `batch` units an update, at most `places` units at once."""

    updates: int
    batch: int
    places: int
    max_staleness: int

    def schedule(self) -> Schedule:
        return Schedule(batch=self.batch, max_staleness=self.max_staleness, updates=self.updates)


Seconds = Callable[[int], float]
"""How long a unit, or the learner's step, of this number lasts."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took, the greatest staleness that its learner met, and what became of the units."""

    seconds: float
    staleness: int
    counts: dict[str, int]


def overlap(
    updates: int = 200,
    batch: int = 16,
    group: int = 8,
    places: int = 24,
    latency: str = "lognormal",
    scale: float = 1.0,
    staleness: Sequence[int] = (0, 1, 2, 4),
    busy: bool = False,
    repeats: int = 3,
    seed: int = 0,
    out: str = "",
) -> dict[str, Any]:
    """Rows by max_staleness, which take turns within a repeat. Episodes last 10 ms in the mean and a learner's step
    16 ms, times `scale`; `busy` has the learner hold a core meanwhile. `out` also writes the figures as Markdown."""
    if latency not in LATENCIES:
        raise unknown("latency", latency, LATENCIES)
    player = SimulatedPlayer(LATENCIES[latency](0.01 * scale), group=group, seed=seed)
    learner = SimulatedLearner(0.016 * scale, busy=busy, seed=seed)
    cases = [Case(updates=updates, batch=batch, places=places, max_staleness=n) for n in sorted({0, *staleness})]
    runs = [[_pair(case, player, learner) for case in cases] for _ in range(repeats)]
    figures = {
        "machine": machine(("msgspec", "numpy")),
        "reading": "median (lowest - highest) of the repeats; all rows take turns within a repeat; a load above the "
        "number of cores slows every run, the bare ones too",
        "settings": {
            "updates": updates,
            "units an update": batch,
            "episodes a unit": group,
            "units at once": places,
            "latency": f"{latency}, mean {10 * scale:g} ms",
            "learner's step": f"{16 * scale:g} ms, {'busy' if busy else 'idle'}",
            "seed": seed,
        },
        "floor s": round(floor(cases[0], player.seconds, learner.seconds), 2),
        "by max_staleness": [
            row(case, bound(case, player.seconds, learner.seconds), [r[i] for r in runs], [r[0] for r in runs])
            for i, case in enumerate(cases)
        ],
    }
    if out:
        Path(out).write_text(markdown("How close asynchronous training comes to its bound", figures), encoding="utf-8")
    return figures


def row(case: Case, least: float, pairs: Sequence[Pair], beside: Sequence[Pair]) -> dict[str, Any]:
    """The repeats of one case, beside its bound and the synchronous runs of the same repeats."""
    return {
        "max_staleness": case.max_staleness,
        "seconds": spread([o.seconds for o, _ in pairs], 2),
        "bound s": round(least, 2),
        "% of bound": spread([100 * least / o.seconds for o, _ in pairs]),
        "bare % of bound": spread([100 * least / bare for _, bare in pairs]),
        "speed-up": spread([b.seconds / o.seconds for (o, _), (b, _) in zip(pairs, beside, strict=True)], 2),
        "staleness met": max(o.staleness for o, _ in pairs),
        "dropped": sum(o.counts["dropped"] for o, _ in pairs),
    }


Pair = tuple[Outcome, float]
"""A run, and the seconds of the bare one after it."""


def _pair(case: Case, player: SimulatedPlayer, learner: SimulatedLearner) -> Pair:
    return run(case, player, learner), cost(lambda: bare(case, player.seconds, learner.seconds)).wall


# --- the run ----------------------------------------------------------------------------------------------------


def run(case: Case, player: SimulatedPlayer, learner: SimulatedLearner) -> Outcome:
    """The real machinery, on an event loop and in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_trained(case, player, learner, Journal(Path(folder), 0)))


async def _trained(case: Case, player: SimulatedPlayer, learner: SimulatedLearner, journal: Journal) -> Outcome:
    cursor, schedule = TaskCursor(CountingEnv(), 0), case.schedule()
    line = Pipeline(player, cursor, schedule, journal, deals=1, most=case.places)
    began, learnt = time.perf_counter(), list[list[Played]]()
    for update in range(case.updates):
        learnt.append(await line.take())
        await learner.learn(update)
        line.advance()
        if (update + 1) % CHECKPOINT == 0:
            journal.begin(update + 1, line.open())
            journal.prune(update + 1)
    seconds = time.perf_counter() - began
    await line.close()
    journal.close()
    counts, worst = Counter(line.counts), max(n - unit.oldest(n) for n, units in enumerate(learnt) for unit in units)
    counts["dropped"] += counts["begun"] - counts["taken"] - counts["cancelled"]
    return Outcome(seconds=seconds, staleness=worst, counts=counts)


async def bare(case: Case, unit: Seconds, step: Seconds) -> None:
    """The schedule on an event loop where units and steps only sleep."""
    schedule, ended = case.schedule(), asyncio.Event()

    async def play(number: int) -> None:
        await asyncio.sleep(unit(number))
        schedule.finish(number)
        fill()
        ended.set()

    def fill() -> None:
        while schedule.open and schedule.running < case.places:
            group.create_task(play(schedule.begin()))

    async with asyncio.TaskGroup() as group:
        while schedule.version < case.updates:
            fill()
            while not schedule.take():
                await ended.wait()
                ended.clear()
            await asyncio.sleep(step(schedule.version))
            schedule.advance()


# --- what it could take at least --------------------------------------------------------------------------------


def bound(case: Case, unit: Seconds, step: Seconds) -> float:
    """Seconds of the same run where only latencies and steps take time: the schedule, driven by a clock of events."""
    schedule, clock, learning = case.schedule(), 0.0, False
    events: list[tuple[float, int]] = []
    while schedule.version < case.updates:
        while schedule.open and schedule.running < case.places:
            number = schedule.begin()
            heapq.heappush(events, (clock + unit(number), number))
        if not learning and schedule.take():
            learning = True
            heapq.heappush(events, (clock + step(schedule.version), LEARNT))
        clock, number = heapq.heappop(events)
        if number == LEARNT:
            learning = False
            schedule.advance()
        else:
            schedule.finish(number)
    return clock


LEARNT = -1
"""The event of an update that is over."""


def floor(case: Case, unit: Seconds, step: Seconds) -> float:
    """All work on all places, or all of the learner's: no order of them takes less than either."""
    rollout = sum(map(unit, range(case.updates * case.batch))) / case.places
    return max(rollout, sum(map(step, range(case.updates))))
