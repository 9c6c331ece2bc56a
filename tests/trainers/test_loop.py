"""The loop: reinforcement improves a toy, a killed run ends with the same bits, failures are never rewards."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toys import register, table

from agentgym.errors import ConfigError, Fault, StoreError
from agentgym.rewards import Composed
from agentgym.store import load_run
from agentgym.types import Action, Episode, Observation, Task, TokenSpan, Trajectory, Turn, Turns, VersionRun
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.rollouts import Buffer, Sample, TaskCursor, best_of
from agentgym_trainers.state import MODEL

HERE = Path(__file__).parent


def config(**sections: Any) -> Config:
    register()
    return from_table(table(**sections))


def weights(run: Path) -> dict[str, Any]:
    return load_file(Path(load_run(run).checkpoints[-1].path) / MODEL / "model.safetensors")


def test_reinforcement_finds_the_arm_that_pays(tmp_path: Path) -> None:
    """From a teacher at chance (both arms right in 1 of 16 episodes); the folder holds all that the report needs."""
    heard: list[str] = []
    summary = PolicyGradient.train(
        config(eval={"episodes": 60, "ladder": True, "every": 6}),
        tmp_path / "run",
        progress=lambda phase, done, total, figures: heard.append(f"{phase} {done}/{total}"),
    )
    assert summary.before["success"] < 0.3
    assert summary.after["success"] > 0.7
    assert summary.after["success"] >= summary.after["metrics"]["valid"] * summary.after["success_valid"] - 1e-9
    assert summary.ladder["oracle"]["success"] == 1.0
    run = load_run(tmp_path / "run")
    assert len(run) == 12 * 4 * 8
    lines = [line for line in run.metrics if line.get("phase") == "rl"]
    assert len(lines) == 12
    assert {"return", "success", "valid", "entropy", "kl", "ratio", "clipped", "grad_norm", "tokens"} <= set(lines[0])
    assert {"seconds_waiting", "seconds_learning", "sampled_per_second", "failed", "staleness", "timeline"} <= set(
        lines[0]
    )
    assert lines[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert lines[0]["mismatch"] == pytest.approx(0.0, abs=1e-4)
    assert [line["evaluation"]["policy"] for line in run.metrics if "evaluation" in line] == [
        "before", "step 6", "step 12", "after", "ladder/random", "ladder/oracle",
    ]  # fmt: skip
    assert (tmp_path / "run" / "report.html").is_file()
    assert [c.step for c in run.checkpoints] == [36, 40]
    assert heard[0] == "warmup 1/3"
    assert "rl 12/12" in heard
    assert PolicyGradient.train(None, tmp_path / "run", resume=True).after["success"] == summary.after["success"]
    with pytest.raises(StoreError, match="resume it"):
        PolicyGradient.train(config(), tmp_path / "run")


@pytest.mark.parametrize(("algorithm", "versions"), [("best_of_n", 1), ("expert_iteration", 8)])
def test_imitating_the_best_of_each_group_improves_too(tmp_path: Path, algorithm: str, versions: int) -> None:
    """Best-of-n samples from the warm start all along, expert iteration from the policy of the moment.

    They learn from a handful of tokens a step, hence the gentle rate.
    """
    gentle = {"sft": {"steps": 50}, "optim": {"lr": 5e-3}, "warmup": {"steps": 0}, "eval": {"episodes": 60}}
    declared = config(run={"algorithm": algorithm, "steps": 8}, **gentle)
    summary = PolicyGradient.train(declared, tmp_path / "run")
    assert summary.after["success"] > summary.before["success"] + 0.2
    played = load_run(tmp_path / "run").trajectories()
    assert len({run.version for t in played for _, span in t.spans for run in span.versions}) == versions


EXACT: dict[str, Any] = {
    "run": {"deterministic": True, "steps": 6, "checkpoint_every": 2, "threads": 1},
    "eval": {"episodes": 4},
}
CHILD = f"""
import sys
from toys import register, table
from agentgym_trainers.config import from_table
from agentgym_trainers.loop import PolicyGradient
register()
def progress(phase, done, total, figures):
    print(phase, done, flush=True)
PolicyGradient.train(from_table(table(**{EXACT!r})), sys.argv[1], progress=progress)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("exact") / "whole"
    PolicyGradient.train(config(**EXACT), path)
    return path


def kill(out: Path, when: str) -> None:
    """Train in a process of its own; SIGKILL it once it has said `when`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.strip() == when:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait(60) == -signal.SIGKILL


def agree(a: Path, b: Path) -> None:
    """The same weights and episodes, bit by bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(bool((left[name] == right[name]).all()) for name in left)
    runs = [load_run(path) for path in (a, b)]
    one, other = ([t.content() for t in run.trajectories()] for run in runs)
    assert one == other
    assert len(one) == 6 * 32
    assert [line["step"] for line in runs[1].metrics if line["phase"] == "rl"] == list(range(29, 35))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints: what was collected since the last one is cut off and collected again."""
    kill(tmp_path / "killed", "rl 3")
    left = load_run(tmp_path / "killed")
    assert left.checkpoints[-1].step == 3 + 25 + 2
    assert len(left) >= 3 * 32
    PolicyGradient.train(None, tmp_path / "killed", resume=True)
    agree(whole, tmp_path / "killed")


@pytest.mark.parametrize("moment", [("warmup", 2), ("sft", 9), ("before", 1), ("rl", 2), ("rl", 6)])
def test_an_interrupted_run_ends_with_the_same_bits(whole: Path, tmp_path: Path, moment: tuple[str, int]) -> None:
    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if (phase, done) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(config(**EXACT), tmp_path / "run", progress=stop)
    assert PolicyGradient.train(None, tmp_path / "run", resume=True).steps == 6
    agree(whole, tmp_path / "run")


async def test_training_works_inside_a_running_loop(tmp_path: Path) -> None:
    declared = config(run={"steps": 1}, warmup={"steps": 0}, sft={"steps": 0}, eval={"episodes": 0})
    assert asyncio.get_running_loop().is_running()
    assert PolicyGradient.train(declared, tmp_path / "run").before == {}


def test_when_everything_fails_the_run_says_why(tmp_path: Path) -> None:
    declared = config(env={"broken": True}, warmup={"steps": 0}, sft={"steps": 0}, eval={"episodes": 0})
    with pytest.raises(Fault, match=r"all 32 episodes.*lever is stuck.*resume"):
        PolicyGradient.train(declared, tmp_path / "run")


def test_seconds_of_evaluations_are_told_once(tmp_path: Path) -> None:
    """Evaluations between updates are not seconds of reinforcement too."""
    declared = config(
        run={"steps": 2}, warmup={"steps": 0}, sft={"steps": 0}, eval={"episodes": 200, "every": 1, "ladder": False}
    )
    seconds = PolicyGradient.train(declared, tmp_path / "run").seconds
    lines = [line for line in load_run(tmp_path / "run").metrics if line["phase"] == "rl"]
    laps = {what: sum(line[f"seconds_{what}"] for line in lines) for what in ("waiting", "learning", "evaluating")}
    assert seconds["evaluation"] > laps["evaluating"] > 0.1
    assert seconds["rl"] < laps["waiting"] + laps["learning"] + laps["evaluating"] / 2


def test_a_reference_is_kept_for_a_resumed_run(tmp_path: Path) -> None:
    objective = {"regularisers": [{"kind": "kl", "coef": 0.01}]}
    declared = config(run={"steps": 2}, warmup={"steps": 0}, eval={"episodes": 0}, objective=objective)
    summary = PolicyGradient.train(declared, tmp_path / "run")
    assert summary.last["kl_reference"] > 0.0
    assert (tmp_path / "run" / "reference" / "model.safetensors").is_file()


def sample(value: float | None, group: str = "g", version: int = 0) -> Sample:
    span = TokenSpan(versions=(VersionRun(start=0, version=version),))
    turns = Turns(items=(Turn(step=0, observation=Observation(), action=Action(span=span)),))
    status: Any = "failed" if value is None else "terminated"
    episode = Episode(task=Task(env="x"), group=group)
    reward = None if value is None else Composed(value, 0.0, ())
    return Sample(Trajectory(env="x", episode=episode, turns=turns, status=status), reward)


def test_the_buffer_admits_what_may_be_learnt_from_and_counts_the_rest() -> None:
    buffer = Buffer(max_staleness=1, drop_equal=True)
    mixed = [sample(1.0, version=5), sample(0.0, version=4), sample(0.5, version=3), sample(None)]
    assert [s.value for s in buffer.take([mixed, [sample(1.0, "h", 5), sample(1.0, "h", 5)]], 5)] == [1.0, 0.0]
    assert buffer.counts == {"consumed": 2, "failed": 1, "stale": 1, "equal": 2}
    keeps = Buffer(max_staleness=0, drop_equal=False)
    assert len(keeps.take([[sample(1.0), sample(1.0)]], 0)) == 2


def test_best_of_takes_the_first_best_of_each_group() -> None:
    samples = [sample(0.1, "a"), sample(0.9, "a", 1), sample(0.9, "a", 2), sample(0.3, "b", 3)]
    assert best_of(samples) == [samples[1].trajectory, samples[3].trajectory]
    assert best_of([sample(None, "a"), sample(-0.5, "a", 1), sample(None, "b", 2)]) == []


def test_a_cursor_goes_on_where_it_was_and_begins_again() -> None:
    class Finite:
        id = "finite"

        def tasks(self, split: str, seed: int) -> Any:
            return (Task(env="finite", seed=n) for n in range(5))

    first: Any = TaskCursor(Finite(), seed=0)  # type: ignore[arg-type]
    whole = [t.seed for t in first.take(12)]
    assert whole == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    later: Any = TaskCursor(Finite(), seed=0, drawn={"": 6})  # type: ignore[arg-type]
    later.skip([Task(env="finite", seed=1)])
    assert [t.seed for t in later.take(5)] == whole[7:]
    assert first.drawn == later.drawn == {"": 12}

    class Empty(Finite):
        def tasks(self, split: str, seed: int) -> Any:
            return iter(())

    with pytest.raises(ConfigError, match="no task"):
        TaskCursor(Empty(), seed=0).take(1)  # type: ignore[arg-type]
