"""The journal: whatever a kill leaves of it is a beginning of what was written, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentgym.types import Task
from agentgym_trainers.journal import Event, Journal, Taken, read
from agentgym_trainers.rollouts import Played, Unit


def unit(number: int) -> Unit:
    return Unit(number=number, version=0, tasks=(Task(env="x", seed=number),), step=number)


EVENTS: list[Event] = [unit(0), unit(1), Played(number=1, groups=[]), Taken(step=1, units=[1]), unit(2)]


def told(folder: Path, position: int) -> list[Event]:
    return list(read(folder / "journal" / f"{position:06d}.frames"))


def test_cut_anywhere_it_holds_the_events_before_the_cut_and_takes_further_ones(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        for event in EVENTS:
            journal.write(event)
    path = tmp_path / "journal" / "000000.frames"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        before = told(tmp_path, 0)
        assert before == EVENTS[: len(before)]
        assert len(before) < len(EVENTS)
        with closing(Journal(tmp_path, 0)) as journal:
            journal.write(unit(9))
        assert told(tmp_path, 0) == [*before, unit(9)]


def test_bytes_that_changed_end_it(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        for event in EVENTS:
            journal.write(event)
    path = tmp_path / "journal" / "000000.frames"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with closing(Journal(tmp_path, 0)) as journal:
        assert sorted(journal.history().begun) == [0, 1]


def test_a_checkpoint_takes_the_place_of_what_lay_there_all_or_nothing(tmp_path: Path) -> None:
    """Killed while it tells what is open, it has what an earlier life wrote there: a unit that was finished then must
    not be played again."""

    def interrupted() -> Iterator[Event]:
        yield unit(0)
        raise KeyboardInterrupt

    with closing(Journal(tmp_path, 0)) as journal:
        journal.write(unit(0))
        journal.begin(2, [unit(0)])
        journal.write(Played(number=0, groups=[]))
        journal.begin(4, [unit(0), Played(number=0, groups=[])])
    with closing(Journal(tmp_path, 0)) as journal:
        with pytest.raises(KeyboardInterrupt):
            journal.begin(2, interrupted())
        assert told(tmp_path, 2) == [unit(0), Played(number=0, groups=[])]
        journal.begin(2, [unit(0), unit(1)])
        journal.write(unit(2))
    assert told(tmp_path, 2) == [unit(0), unit(1), unit(2)]
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["000000.frames", "000002.frames"]
    with closing(Journal(tmp_path, 2)) as journal:
        assert sorted(journal.history().begun) == [0, 1, 2]
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["000002.frames"]


def test_without_the_file_of_a_checkpoint_there_is_no_history(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        journal.begin(4, EVENTS)
    with closing(Journal(tmp_path, 2)) as journal:
        assert not journal.history().begun
        assert not journal.history().taken
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["000002.frames"]
