"""A fast part of the fault battery (`bench/faults_results.py`): what breaks around a run becomes no reward, and costs
nothing that was finished."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from agentgym import registry
from agentgym.store import load_run
from agentgym.types import Message, Observation, Trajectory
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.rollouts import readable

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import faulty
from making import trajectory


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(faulty.Faulty, "steps", count())
    faulty.register()
    yield
    registry.unregister(faulty.Faulty.id)


def config(ledger: Path, **env: Any) -> Config:
    return from_table(
        {
            "env": {"id": faulty.Faulty.id, "ledger": str(ledger), **env},
            "run": {"steps": 5, "threads": 1, "checkpoint_every": 2},
            "model": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1},
            "rollout": {
                "tasks_per_step": 3,
                "group_size": 4,
                "slots": 16,
                "max_length": 64,
                "retries": 0,
                "max_staleness": 2,
                "limits": {"turn_seconds": 2.0},
            },
            "sampling": {"max_tokens": 3},
            "optim": {"lr": 1e-2},
            "eval": {"episodes": 0},
        }
    )


def test_broken_environments_cost_their_episodes_and_nothing_else(tmp_path: Path) -> None:
    """Raising, hanging and answering nonsense while rollouts and learner overlap: every episode that began ended in one
    way, no failed one has a reward, and the folder can be read."""
    ledger, out = tmp_path / "ledger", tmp_path / "run"
    summary = PolicyGradient.train(config(ledger, raises=0.1, hangs=0.05, garbage=0.15), out)
    told, run = faulty.struck(ledger), load_run(out)
    statuses = Counter(t.status for t in run.trajectories())
    assert told["b"] == len(run) == 5 * 3 * 4
    assert statuses["failed"] == told["r"] + told["h"] + told["g"] == summary.counts["failed"] > 10
    assert min(told.values()) > 0, "every fault struck"
    assert statuses["terminated"] == told["e"] == summary.counts["consumed"]
    assert all((entry.value is None) == (entry.status == "failed") for entry in run.index)
    kinds = Counter(t.failure.kind for t in run.trajectories() if t.failure)
    assert kinds["timeout"] == told["h"]


@pytest.mark.parametrize("garbage", ["a number for a last message", "a word for a metric"])
def test_nonsense_that_no_folder_can_hold_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbage: str
) -> None:
    monkeypatch.setattr(faulty, "GARBAGE", {garbage: faulty.GARBAGE[garbage]})
    PolicyGradient.train(config(tmp_path / "ledger", garbage=0.3), tmp_path / "run")
    told, run = faulty.struck(tmp_path / "ledger"), load_run(tmp_path / "run")
    assert Counter(t.status for t in run.trajectories()) == {"failed": told["g"], "terminated": told["e"]}
    assert told["g"] > 5


def test_what_no_folder_could_give_back_is_a_failed_trajectory_without_contents() -> None:
    sound = trajectory([{"r": 1.0}])
    assert readable(sound) is sound
    odd: Trajectory = sound.replace(final={"agent": Observation(messages=(Message(role="user", content=7),))})  # type: ignore[arg-type]
    found = readable(odd)
    assert (found.status, len(found.turns), found.final) == ("failed", 0, {})
    assert found.failure is not None
    assert "Expected `str | array`, got `int`" in found.failure.message
    assert found.episode == odd.episode
