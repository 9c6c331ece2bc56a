"""Runs whose trajectories are judged before their reward is composed: ledgers, faults, feasibility, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toys

from agentgym.errors import ConfigError, Fault, ToolFault, UnknownName
from agentgym.rewards import composer
from agentgym.rewards.judges import Judge, last, rule
from agentgym.store import load_run
from agentgym.types import Trajectory
from agentgym_trainers import methods
from agentgym_trainers.config import Config, resolve
from agentgym_trainers.loop import PolicyGradient

GREEN = {"kind": "matches", "name": "green", "pattern": "green"}
SAFE = {"kind": "matches", "name": "safe", "pattern": "red|blue", "where": "all"}
BOLD = {"kind": "matches", "name": "bold", "pattern": "blue", "where": "any"}
QUICK: dict[str, Any] = {"run": {"steps": 2, "threads": 1}, "eval": {"episodes": 0}}


@pytest.fixture(autouse=True)
def _bandit() -> None:
    toys.register()


def declared(*judges: dict[str, Any], reward: Any = None, **sections: Any) -> Config:
    return resolve({**toys.table(**{**QUICK, **sections}), "judge": list(judges), "reward": reward or {}})


def paid_by(*names: str) -> dict[str, Any]:
    return {"op": "weighted_sum", "of": dict.fromkeys(names, 1.0)}


def played(run: Path) -> list[Trajectory]:
    return list(load_run(run).trajectories())


def total(trajectory: Trajectory, name: str) -> float:
    return sum(term.value for term in trajectory.rewards if term.name == name)


def grader(name: str, patience: int) -> Judge:
    """Breaks for members from `patience` on."""

    def grade(trajectory: Trajectory) -> float:
        if trajectory.episode.member >= patience:
            raise ToolFault("the grader sleeps")
        return float("blue" in last(trajectory))

    return rule(name, grade)


GRADER = {"kind": "custom", "name": "grade", "target": f"{__name__}:grader"}


# --- runs -------------------------------------------------------------------------------------------------------


def test_what_a_judge_says_is_recorded_and_learnt_from(tmp_path: Path) -> None:
    """The environment pays for blue, the run's judge for green."""
    config = declared(GREEN, reward=paid_by("green"), run={"steps": 12, "threads": 1})
    PolicyGradient.train(config, tmp_path / "run")
    lines = [line for line in load_run(tmp_path / "run").metrics if line.get("phase") == "rl"]
    found = played(tmp_path / "run")
    assert {term.name for t in found for term in t.rewards} == {"hit", "green"}
    assert all(total(t, "green") == float("green" in last(t)) for t in found)
    assert lines[0]["return"] == pytest.approx(sum(total(t, "green") for t in found[:32]) / 32, abs=1e-6)
    assert lines[-1]["return"] > lines[0]["return"] + 0.4


def test_feasible_is_what_every_judge_accepts(tmp_path: Path) -> None:
    """CGPO: the reward where all are satisfied, else its floor."""
    reward = {"op": "all_of", "when": ["safe", "bold"], "then": paid_by("hit"), "otherwise": -1.0}
    PolicyGradient.train(declared(SAFE, BOLD, reward=reward), tmp_path / "run")
    values = set()
    for t in played(tmp_path / "run"):
        feasible = total(t, "safe") == total(t, "bold") == 1.0
        values.add(composer(reward).trajectory(t).value)
        assert composer(reward).trajectory(t).value == (total(t, "hit") if feasible else -1.0)
    assert -1.0 in values
    assert values & {1.0, 2.0}


def test_a_judge_that_stays_broken_makes_a_failed_trajectory(tmp_path: Path) -> None:
    summary = PolicyGradient.train(declared({**GRADER, "patience": 5}, reward=paid_by("grade")), tmp_path / "run")
    found = played(tmp_path / "run")
    assert [t.status == "failed" for t in found] == [t.episode.member >= 5 for t in found]
    assert {t.failure.message for t in found if t.failure} == {"judge: the grader sleeps"}
    assert summary.counts["failed"] == len(found) * 3 // 8
    with pytest.raises(Fault, match="all 32 episodes of this update failed, 32 of them with 'tool: judge: the grader"):
        PolicyGradient.train(declared({**GRADER, "patience": 0}, reward=paid_by("grade")), tmp_path / "none")


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    run = {"steps": 4, "threads": 1, "checkpoint_every": 2, "deterministic": True}
    config = declared(GREEN, reward=paid_by("green"), run=run)
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


# --- declarations -----------------------------------------------------------------------------------------------


def test_a_method_brings_its_judges(tmp_path: Path) -> None:
    """They replace those that lay there; who names the method may say others; a method without any keeps them."""
    mine = tmp_path / "mine.toml"
    mine.write_text(tomli_w.dumps({"judge": [SAFE], "reward": paid_by("safe")}), encoding="utf-8")
    below = {**toys.table(**QUICK), "judge": [GREEN]}
    assert resolve(below, [f"method={mine}"]).judge == (SAFE,)
    assert resolve({**below, "method": str(mine)}).judge == (GREEN,)
    assert resolve(below, ["method=grpo"]).judge == (GREEN,)
    mine.write_text(tomli_w.dumps({"judge": [{**SAFE, "kind": "match"}]}), encoding="utf-8")
    with pytest.raises(UnknownName, match="no kind of judge 'match'; did you mean 'matches'"):
        methods.declared(methods.load(str(mine)))


def test_the_config_is_read_back_as_it_was() -> None:
    config = declared(GREEN, {**BOLD, "where": "any"})
    assert resolve(config.table()) == config


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"kind": "matchez", "name": "green", "pattern": "g"}, "kind of judge 'matchez'; did you mean 'matches'"),
        ({"name": "green"}, "kind of judge"),
        ({"kind": "matches", "name": "green"}, "judge of kind 'matches': missing a required argument: 'pattern'"),
        ({**GREEN, "pattrn": "g"}, "unexpected keyword argument 'pattrn'"),
        ({**GREEN, "pattern": "("}, "is no regular expression"),
        ({**GREEN, "pattern": 5}, "judge of kind 'matches'"),
        ({"kind": "custom", "target": "nowhere:judge"}, "custom judge's target"),
        ({"kind": "computed", "name": "x", "declaration": {"op": "sums"}}, "did you mean 'sum'"),
    ],
)
def test_what_is_no_judge_is_refused_when_loaded(judge: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=said):
        declared(judge)


def test_two_judges_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two judges are called 'green'"):
        declared(GREEN, {**SAFE, "name": "green"})
