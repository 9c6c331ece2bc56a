"""The schedule under random latencies, failures and restarts: the bound, conservation, progress."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ConfigError
from agentgym_trainers.schedule import Schedule


def admitted(schedule: Schedule) -> list[int]:
    found = []
    while schedule.open:
        found.append(schedule.begin())
    return found


def test_admission_is_areals() -> None:
    """B = 4, version 0: staleness 0 admits 4 units, staleness 1 admits 8 (objectives reference, section 4)."""
    assert admitted(Schedule(batch=4, max_staleness=0, updates=9)) == [0, 1, 2, 3]
    assert admitted(Schedule(batch=4, max_staleness=1, updates=9)) == list(range(8))


def test_staleness_zero_takes_turns() -> None:
    schedule = Schedule(batch=2, max_staleness=0, updates=3)
    for update in range(3):
        first, second = admitted(schedule)
        schedule.finish(second)
        assert schedule.take() is None
        schedule.finish(first)
        assert schedule.take() == [first, second] == [2 * update, 2 * update + 1]
        assert not schedule.open, "nothing begins while the learner moves the weights"
        schedule.advance()
    assert not schedule.open, "the run is over"


def test_a_straggler_is_waited_for_only_when_it_would_be_late() -> None:
    """Staleness 1, one unit an update: unit 1 overtakes unit 0 once; then unit 0 must come."""
    schedule = Schedule(batch=1, max_staleness=1, updates=9)
    assert admitted(schedule) == [0, 1]
    schedule.finish(1)
    assert schedule.take() == [1]
    schedule.advance()
    assert admitted(schedule) == [2]
    schedule.finish(2)
    assert schedule.take() is None, "taking unit 2 would make unit 0 two versions old"
    schedule.finish(0)
    assert schedule.take() == [0]


def test_what_began_late_has_more_time() -> None:
    """Unit 0 waited for a slot and sampled its first token under version 1."""
    schedule = Schedule(batch=1, max_staleness=1, updates=9)
    admitted(schedule)
    schedule.finish(1)
    schedule.take()
    schedule.advance()
    schedule.finish(admitted(schedule)[0])
    schedule.finish(0, oldest=1)
    assert schedule.take() == [0], "equals go by number"
    assert schedule.begun == {2: 1}


def test_bad_numbers() -> None:
    with pytest.raises(ConfigError, match="batch is at least 1"):
        Schedule(batch=0, max_staleness=0, updates=1)


@given(
    batch=st.integers(1, 4),
    staleness=st.integers(0, 4),
    updates=st.integers(0, 12),
    slots=st.integers(1, 20),
    data=st.data(),
)
def test_bound_conservation_progress(batch: int, staleness: int, updates: int, slots: int, data: st.DataObject) -> None:
    """Units last at random, fail at random and are replaced, the rollout side has only so many slots, and the run is
    killed at random: it ends after exactly `updates` updates, nothing taken is too old, and every unit begun is taken
    or dropped, once."""
    latency = data.draw(st.lists(st.integers(0, 30), min_size=5, max_size=5), label="latencies")
    fails = data.draw(st.sets(st.integers(0, 60), max_size=10), label="failing units")
    dies = data.draw(st.sets(st.integers(0, updates), max_size=2), label="killed before update")
    schedule = Schedule(batch=batch, max_staleness=staleness, updates=updates)
    clock, events, began, taken, dropped = 0, list[tuple[int, int]](), dict[int, int](), list[int](), list[int]()

    def play(number: int) -> None:
        began[number] = schedule.version
        heapq.heappush(events, (clock + latency[number % 5], number))

    while schedule.version < updates:
        while schedule.open and len(events) < slots:
            play(schedule.begin())
        while (found := schedule.take()) is None:
            assert events, "nothing runs, and nothing can be taken: the run would hang"
            clock, number = heapq.heappop(events)
            if number in fails:
                schedule.drop(number)
                dropped.append(number)
            else:
                schedule.finish(number)
            while schedule.open and len(events) < slots:
                play(schedule.begin())
        assert len(found) == batch
        assert all(schedule.version - began[n] <= staleness for n in found)
        taken += found
        schedule.advance()
        if schedule.version in dies:
            dies.discard(schedule.version)
            schedule, events = _restarted(schedule, began, events), []
            for number in [n for n in schedule.begun if n not in schedule.ready]:
                play(number)
    assert len(taken) == updates * batch == len(set(taken))
    assert sorted(taken + dropped) == list(range(schedule.next))
    assert not schedule.begun
    assert not schedule.open


def _restarted(old: Schedule, began: dict[int, int], events: list[tuple[int, int]]) -> Schedule:
    """What a resumed run makes of the ready units and of those that were under way."""
    new = Schedule(batch=old.batch, max_staleness=old.max_staleness, updates=old.updates, version=old.version)
    new.next = old.next
    for number in old.ready:
        new.adopt(number, began[number])
        new.finish(number)
    for _, number in events:
        new.adopt(number, old.version)
    return new
