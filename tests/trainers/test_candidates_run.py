"""Whole runs that learn from candidates, which the environment's answers weigh; and go on where they were cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import toys

from agentgym import registry
from agentgym.errors import ConfigError
from agentgym.store import load_run
from agentgym.types import Task
from agentgym_trainers.config import Config, resolve
from agentgym_trainers.loop import PolicyGradient


class Told(toys.BanditEnv):
    """A bandit that can say which arm pays."""

    id = "told-v0"
    capabilities = frozenset({"ladder", "answer"})

    def answer(self, task: Task) -> str:
        return "pick blue"


@pytest.fixture(autouse=True)
def _bandits() -> None:
    toys.register()
    if Told.id not in registry.catalogue():
        registry.register(Told.id, Told, summary="pick the blue arm, twice, and know it")


def declared(env: str = Told.id, settings: tuple[str, ...] = (), **run: Any) -> Config:
    table = toys.table(env={"id": env}, run={"steps": 8, "checkpoint_every": 2, **run}, eval={"episodes": 60})
    return resolve(table, ["method=intro", *settings])


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in load_run(run).metrics if line.get("phase") == "rl"]


def test_a_run_learns_from_candidates(tmp_path: Path) -> None:
    config = declared(settings=("optim.lr=3e-3",), steps=10)
    assert config.run.algorithm == "candidates"
    found = PolicyGradient.train(config, tmp_path / "run")
    figures = lines(tmp_path / "run")
    for name in ("objective", "nll", "weight", "weight_max", "capped"):
        assert all(math.isfinite(line[name]) for line in figures), name
    assert figures[-1]["nll"] < 0.85 * figures[0]["nll"]
    assert found.after["return_mean"] > found.before["return_mean"] + 0.4


def test_what_falls_short_of_the_threshold_is_not_learnt_from(tmp_path: Path) -> None:
    PolicyGradient.train(declared(settings=("candidates.threshold=2.0",), steps=2), tmp_path / "both")
    wins = [t for t in load_run(tmp_path / "both").trajectories() if sum(x.value for x in t.rewards) >= 2.0]
    assert wins
    assert sum(line.get("rollouts", 0) for line in lines(tmp_path / "both")) == len(wins)
    PolicyGradient.train(declared(settings=("candidates.threshold=3.0",), steps=2), tmp_path / "none")
    assert not any("nll" in line for line in lines(tmp_path / "none"))


def test_a_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    config = declared(settings=("eval.episodes=0",), steps=4, deterministic=True)
    PolicyGradient.train(config, tmp_path / "whole")

    def stop(phase: str, done: int, *_: Any) -> None:
        if (phase, done) == ("rl", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(config, tmp_path / "cut", progress=stop)
    PolicyGradient.train(None, tmp_path / "cut", resume=True)
    weights = [(tmp_path / name / "checkpoints").rglob("model.safetensors") for name in ("whole", "cut")]
    one, other = (max(found, key=lambda path: path.parent.name).read_bytes() for found in weights)
    assert one == other


def test_an_environment_that_knows_no_answers_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'candidates' needs the capability 'answer'; bandit-v0 claims ladder"):
        PolicyGradient.train(declared("bandit-v0"), tmp_path / "run", progress=_never)


def _never(*_: Any) -> None:
    raise AssertionError("a step was taken")
