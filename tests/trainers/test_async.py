"""One loop for every staleness: parity with a plain synchronous loop, the bound, and kills that lose nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toys import BanditEnv, register, table

from agentgym import registry
from agentgym.errors import ConfigError, EnvironmentFault, Fault
from agentgym.store import load_run
from agentgym.types import Action, Observation, StepResult, Task, WeightsVersion
from agentgym_trainers import language
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.reinforce import Reinforcement, player
from agentgym_trainers.rollouts import TaskCursor, Unit, oldest
from agentgym_trainers.state import MODEL

HERE = Path(__file__).parent
BARE: dict[str, Any] = {"warmup": {"steps": 0}, "sft": {"steps": 0}, "eval": {"episodes": 0}}
EXACT: dict[str, Any] = {**BARE, "run": {"deterministic": True, "steps": 5, "checkpoint_every": 2, "threads": 1}}


class SlowBandit(BanditEnv):
    """Answers after a few milliseconds, other ones for every task."""

    id = "slow-bandit-v0"

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        await asyncio.sleep(0.002 * (self.turn + 1) * random.Random(id(self)).random())
        return await super().act(action)


class FlakyBandit(SlowBandit):
    """Every third task cannot be begun at all, and of the other episodes every seventh breaks down."""

    id = "flaky-bandit-v0"
    asked = count(1)

    async def begin(self, task: Task) -> Observation:
        if task.seed % 3 == 0:
            raise EnvironmentFault("this lever is stuck")
        if next(self.asked) % 7 == 0:
            raise EnvironmentFault("this lever broke off")
        return await super().begin(task)


def config(**sections: Any) -> Config:
    register()
    for env in (SlowBandit, FlakyBandit):
        if env.id not in registry.catalogue():
            registry.register(env.id, env, summary="a bandit with latency")
    return from_table(table(**sections))


def weights(run: Path) -> dict[str, Any]:
    return load_file(Path(load_run(run).checkpoints[-1].path) / MODEL / "model.safetensors")


# --- parity -----------------------------------------------------------------------------------------------------


async def plainly(declared: Config) -> tuple[dict[str, Any], list[Any]]:
    """Synchronous training with nothing around it: play, learn, publish, in turn."""
    env = registry.make(**declared.env)
    model = language.make(declared, env)
    await model.publish(WeightsVersion(number=0))
    phase, seen = Reinforcement(declared, env, model), []
    rollouts, cursor = player(declared, env, model.engine, model.renderer, None), TaskCursor(env, declared.run.seed)
    for step in range(declared.run.steps):
        tasks = tuple(cursor.take(declared.rollout.tasks_per_step))
        played = await rollouts.play(Unit(number=step, version=step, tasks=tasks, step=step))
        seen += [s.trajectory.content() for s in played.handed]
        phase.learn([played], step)
        await model.publish(WeightsVersion(number=step + 1))
    model.close()
    return {name: p.detach().clone() for name, p in model.module().named_parameters()}, seen


@pytest.mark.parametrize("unit", ["update", "group"])
def test_at_staleness_zero_the_pipeline_is_the_plain_loop(tmp_path: Path, unit: str) -> None:
    """The same trajectories and the same weights, bit for bit."""
    declared = config(**EXACT, rollout={"unit": unit})
    PolicyGradient.train(declared, tmp_path / "run")
    expected, seen = asyncio.run(plainly(declared))
    found = weights(tmp_path / "run")
    assert all(bool((found[name] == value).all()) for name, value in expected.items() if name in found)
    assert len(found) >= len(expected) - 1, "all but the tied unembedding"
    assert [t.content() for t in load_run(tmp_path / "run").trajectories()] == seen


# --- the bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["group", "update"])
def test_overlapped_training_learns_within_the_bound_and_accounts_for_everything(tmp_path: Path, unit: str) -> None:
    declared = config(
        env={"id": SlowBandit.id},
        rollout={"max_staleness": 2, "unit": unit},
        run={"steps": 24, "threads": 1, "checkpoint_every": 7},
        optim={"lr": 4e-3},
        eval={"episodes": 60, "ladder": False},
    )
    summary = PolicyGradient.train(declared, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert len(run) == 24 * 4 * 8
    assert Counter(e.step for e in run.index) == {28 + n: 32 for n in range(1, 25)}
    assert len({e.episode for e in run.index}) == len(run), "nothing is learnt from twice"
    assert summary.counts["consumed"] == len(run)
    assert summary.counts.get("stale", 0) == 0, "the schedule leaves nothing for the buffer to drop"
    ages = [entry.step - 1 - oldest(t, 0) for entry, t in zip(run.index, run.trajectories(), strict=True)]
    assert max(ages) in (1, 2)
    lines = [line for line in run.metrics if line["phase"] == "rl"]
    assert max(line["staleness_max"] for line in lines) == max(ages)
    assert {what for line in lines for what, *_ in line["timeline"]["learner"]} == {
        "waiting", "learning", "publishing", "saving",
    }  # fmt: skip
    assert summary.after["success"] > summary.before["success"] + 0.5


def test_failures_that_end_first_do_not_end_an_overlapped_run(tmp_path: Path) -> None:
    """They are taken together, in updates from which nothing is learnt, and are nobody's zero."""
    declared = config(
        **BARE,
        env={"id": FlakyBandit.id},
        rollout={"max_staleness": 2, "retries": 0},
        run={"steps": 3, "threads": 1},
    )
    PolicyGradient.train(declared, tmp_path / "run")
    first, *rest = (line for line in load_run(tmp_path / "run").metrics if line["phase"] == "rl")
    assert first["failed"] == 32
    assert "return" not in first
    assert "nll" not in first
    assert all("return" in line for line in rest)
    with pytest.raises(Fault, match="all 32 episodes"):
        PolicyGradient.train(config(**BARE, env={"broken": True}, rollout={"max_staleness": 2}), tmp_path / "broken")
    assert len(load_run(tmp_path / "broken")) == 2 * 32


@pytest.mark.parametrize(("staleness", "strategy"), [(0, "plain"), (2, "plain"), (2, "dynamic_filter")])
def test_every_episode_ends_in_exactly_one_count(tmp_path: Path, staleness: int, strategy: str) -> None:
    """Whole units fail, single members fail, groups are left out: what is stored is what was counted."""
    declared = config(
        eval={"episodes": 0},
        env={"id": FlakyBandit.id},
        strategy={"kind": strategy},
        rollout={"max_staleness": staleness, "drop_equal": True, "retries": 0},
        run={"steps": 8, "threads": 1, "checkpoint_every": 3},
    )
    summary, run = PolicyGradient.train(declared, tmp_path / "run"), load_run(tmp_path / "run")
    assert summary.counts["consumed"] > 0
    assert sum(summary.counts.values()) == len(run) == len({e.episode for e in run.index})
    failed = [entry for entry in run.index if entry.status == "failed"]
    assert {entry.value for entry in failed} == {None}
    lines = [line for line in run.metrics if line["phase"] == "rl"]
    assert summary.counts["failed"] == sum(line["failed"] for line in lines) > 0
    assert len(failed) == summary.counts["failed"] or strategy == "dynamic_filter", "it sets whole groups aside"
    assert summary.counts.get("stale", 0) == 0


def test_what_overlapping_cannot_mean_is_refused() -> None:
    with pytest.raises(ConfigError, match="which weights sample a reply is a matter of timing"):
        config(run={"deterministic": True}, rollout={"max_staleness": 1})
    with pytest.raises(ConfigError, match="warm start all along"):
        config(run={"algorithm": "best_of_n"}, rollout={"max_staleness": 1})
    with pytest.raises(ConfigError, match="stale_caches"):
        config(rollout={"stale_caches": True})
    with pytest.raises(ConfigError, match="max_staleness is at least 0; got -1"):
        config(rollout={"max_staleness": -1})


# --- kills ------------------------------------------------------------------------------------------------------

ASYNC: dict[str, Any] = {
    **BARE,
    "env": {"id": SlowBandit.id},
    "run": {"steps": 14, "checkpoint_every": 4, "threads": 1},
    "rollout": {"max_staleness": 2},
}
CHILD = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from test_async import ASYNC, config
from agentgym_trainers.loop import PolicyGradient
fresh, declared = sys.argv[2] == "fresh", config(**ASYNC)
PolicyGradient.train(declared if fresh else None, sys.argv[1], resume=not fresh,
    progress=lambda phase, done, total, figures: print(phase, done, flush=True))
"""


def live(out: Path, mode: str, until: float | None) -> int:
    """Train in a process of its own, and SIGKILL it so many seconds after its first update."""
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    with child.stdout:
        if until is not None and child.stdout.readline():
            time.sleep(until)
            child.send_signal(signal.SIGKILL)
        child.stdout.read()
    return child.wait(60)


@pytest.mark.slow
def test_a_killed_overlapped_run_loses_unfinished_episodes_alone(tmp_path: Path) -> None:
    """Killed at a moment of chance: every unit is learnt from once, and what the journal held was not played again."""
    out, chance = tmp_path / "run", random.Random(time.time())
    assert live(out, "fresh", chance.uniform(0.0, 0.25)) == -signal.SIGKILL
    finished = _finished(out)
    assert live(out, "resume", None) == 0
    run = load_run(out)
    assert len({e.episode for e in run.index}) == len(run) == 14 * 32
    assert Counter(e.step for e in run.index) == dict.fromkeys(range(1, 15), 32)
    ages = [entry.step - 1 - oldest(t, 0) for entry, t in zip(run.index, run.trajectories(), strict=True)]
    assert min(ages) >= 0
    assert max(ages) <= 2
    kept = {t.episode.id: t.content() for t in run.trajectories()}
    assert all(kept[id] == content for id, content in finished.items())


def test_what_was_played_right_after_the_warm_start_is_kept(tmp_path: Path) -> None:
    """Its checkpoints are older than any play: the journal begins with the last of them."""

    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if (phase, done) == ("rl", 2):
            raise KeyboardInterrupt

    declared = config(
        env={"id": SlowBandit.id},
        eval={"episodes": 0},
        run={"steps": 3, "threads": 1, "checkpoint_every": 9},
        rollout={"max_staleness": 1},
    )
    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(declared, tmp_path / "run", progress=stop)
    finished = _finished(tmp_path / "run")
    assert len(finished) >= 2 * 32
    PolicyGradient.train(None, tmp_path / "run", resume=True)
    kept = {t.episode.id: t.content() for t in load_run(tmp_path / "run").trajectories()}
    assert all(kept[id] == content for id, content in finished.items())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_a_resumed_run_that_is_refused_leaves_nothing_open(tmp_path: Path) -> None:
    """Units that began under a bound of 2 are not dropped silently because somebody lowered it meanwhile."""

    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        raise KeyboardInterrupt

    out, opened = tmp_path / "run", len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(config(**ASYNC), out, progress=stop)
    written = out / "config.toml"
    edited = written.read_text().replace("max_staleness = 2", "max_staleness = 0")
    written.write_text(edited.replace("processes = 1", "processes = 2"))
    with pytest.raises(ConfigError, match="set them back in its config"):
        PolicyGradient.train(None, out, resume=True)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == opened


def _finished(out: Path) -> dict[str, Any]:
    """Episodes that were whole when the run was killed: stored, or only in the journal."""
    from agentgym_trainers.journal import History, read

    files = sorted((out / "journal").glob("*.frames"))
    history = History(event for path in files for event in read(path))
    return {s.trajectory.episode.id: s.trajectory.content() for p in history.played.values() for s in p.handed}


def test_mismatch_and_staleness_are_told_apart(tmp_path: Path) -> None:
    """With the weights of the last versions remembered: what the sampler's numerics do, and what learning did since."""
    declared = config(
        **BARE,
        env={"id": SlowBandit.id},
        run={"steps": 6, "threads": 1},
        rollout={"max_staleness": 2, "behaviour": "recomputed"},
    )
    PolicyGradient.train(declared, tmp_path / "run")
    lines = [line for line in load_run(tmp_path / "run").metrics if line["phase"] == "rl"]
    assert max(line["mismatch"] for line in lines) < 1e-4
    old = [line for line in lines if line["age"] > 0.5]
    assert old
    assert old[-1]["staleness_kl"] > 1e-5, "and yet no mismatch"
