"""`agentgym replay` and `agentgym report`: what a run's folder holds."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from agentgym.cli.environments import make
from agentgym.cli.output import emit, out
from agentgym.errors import DataError, unknown
from agentgym.html import trajectory_page
from agentgym.mixture import part_of
from agentgym.replay import replay
from agentgym.report import declared_reward, find, write_report
from agentgym.shards import Entry
from agentgym.store import Run, load_run, write_atomic


def run_replay(options: Namespace) -> int:
    """Exit code 1 when the environment answers otherwise than it did."""
    run, entry = recorded(options.trajectory)
    trajectory = find(run, entry)
    if options.html:
        page = trajectory_page(trajectory, declared_reward(run.config, trajectory))
        write_atomic(Path(options.html), page.encode())
    env = part_of(run.config, trajectory).get("env", {})
    same_env = isinstance(env, dict) and env.get("id", trajectory.env) == trajectory.env
    report = replay(trajectory, make(trajectory.env, env if same_env else {}))
    if options.json:
        figures = {"same": report.same, "turns": report.turns, "difference": report.difference}
        emit({"env": report.env, "episode": entry.episode, **figures})
    else:
        out().print(f"{entry.episode}: {report}", markup=False)
    return 0 if report.same else 1


def recorded(place: str) -> tuple[Run, Entry]:
    """`FOLDER`, `FOLDER:N` or `FOLDER:EPISODE`: the run and the entry meant; without one, the first."""
    folder, separator, which = place.rpartition(":")
    if not separator or Path(place).exists():
        folder, which = place, "0"
    run = load_run(folder)
    if not run.index:
        raise DataError(f"the run {folder} holds no trajectory yet")
    return run, _entry(run, which)


def _entry(run: Run, which: str) -> Entry:
    if which.removeprefix("-").isdecimal():
        number = int(which)
        if not -len(run) <= number < len(run):
            raise DataError(f"{run.path} holds {len(run)} trajectories; there is no number {number}")
        return run.index[number]
    by_id = {entry.episode: entry for entry in run.index}
    if which not in by_id:
        raise unknown(f"episode in {run.path}", which, by_id)
    return by_id[which]


def run_report(options: Namespace) -> None:
    """The page's path, on standard output."""
    out().print(str(write_report(options.run_folder, options.out)), markup=False)
