"""The timeline of a run's report: what is drawn, what is added up, what a run without one has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agentgym.report import run_html
from agentgym.store import RunFolder, load_run
from agentgym.timeline import PAUSE, read, shares, timeline
from agentgym.types import Action, Episode, Observation, Task, Timing, Trajectory, Turn, Turns

CONFIG = {"env": {"id": "counting-v0"}}


def line(step: int, start: float, oldest: int = 0, units: int = 2) -> dict[str, Any]:
    """An update of 10 s: 4 waiting, 6 learning; its units began 5 s before it and ended with the waiting."""
    laps = [["waiting", start, start + 4], ["learning", start + 4, start + 10]]
    played = [[number, oldest, start - 5, start + 4] for number in range(units)]
    return {"phase": "rl", "step": step, "return": 1.0, "timeline": {"learner": laps, "units": played}}


def folder(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RunFolder.create(path, CONFIG) as run:
        for held in lines:
            run.log(held)
            run.append(_episode(held["step"]), step=held["step"], value=1.0)
    return path


def _episode(step: int) -> Trajectory:
    turn = Turn(step=0, observation=Observation(), action=Action(text="go"), timing=Timing(policy=2.0, environment=0.5))
    episode = Episode(task=Task(env="counting-v0"), seed=step)
    return Trajectory(
        env="counting-v0", episode=episode, turns=Turns(items=(turn, turn)), status="terminated", seconds=7.0
    )


def test_shares_of_the_wall_time(tmp_path: Path) -> None:
    run = load_run(folder(tmp_path / "run", [line(1, 100.0), line(2, 110.0)]))
    learner, episodes = shares(read(run.metrics), run)
    assert learner == {"waiting": 8.0, "learning": 12.0}
    assert episodes == {"generation": 8.0, "environment": 2.0, "reward and rest": 4.0}
    page = timeline(run)
    assert all(f">{share} %<" in page for share in ("40.0", "60.0", "57.1", "14.3", "28.6"))
    assert "0.7 at once on average" in page


def test_units_are_coloured_by_their_staleness(tmp_path: Path) -> None:
    """Learnt from in the update to version `step`, by weights of number step - 1."""
    run = load_run(folder(tmp_path / "run", [line(5, 100.0, oldest=4), line(6, 110.0, oldest=3), line(9, 120.0)]))
    assert [{bar.staleness for bar in update.bars} for update in read(run.metrics)] == [{0}, {2}, {8}]
    drawn = re.findall(r'class="(s\d)" x=', timeline(run))
    assert sorted(drawn) == ["s0", "s0", "s2", "s2", "s3", "s3"]


def test_the_pause_before_a_resume_takes_no_room(tmp_path: Path) -> None:
    run = load_run(folder(tmp_path / "run", [line(1, 100.0), line(2, 110.0 + 10 * PAUSE), line(3, 121.0 + 10 * PAUSE)]))
    starts = [update.laps[0].start for update in read(run.metrics)]
    assert starts == [100.0, 110.0, 121.0]


def test_a_run_without_the_entry_has_no_section(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        run.log({"phase": "rl", "step": 1, "return": 0.5})
        run.log({"phase": "evaluation", "evaluation": {"policy": "after"}})
    page = run_html(load_run(tmp_path / "run"))
    assert timeline(load_run(tmp_path / "run")) == ""
    assert "Timeline" not in page


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    lines = [line(step, 10.0 * step, oldest=step - 2, units=30) for step in range(1, 801)]
    found = timeline(load_run(folder(tmp_path / "run", lines)))
    assert 10_000 < len(found) < 200_000
    assert all(float(x) >= 0 for x in re.findall(r' (?:x|width)="([^"]+)"', found))
    assert "http" not in found
