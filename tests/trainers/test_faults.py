"""A fast part of the fault battery (`bench/faults_results.py`): what breaks around a run becomes no reward, and costs
nothing that was finished."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym import registry
from agentgym.errors import Fault, ModelError, StoreError
from agentgym.store import load_run
from agentgym.types import Message, Observation, Trajectory
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.journal import History, read
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.rollouts import readable
from agentgym_trainers.updates import fitting

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import faulty
from making import trajectory


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(faulty.Faulty, "steps", count())
    faulty.register()
    yield
    registry.unregister(faulty.Faulty.id)


def config(ledger: Path, *, steps: int = 5, every: int = 2, **env: Any) -> Config:
    return from_table(
        {
            "env": {"id": faulty.Faulty.id, "ledger": str(ledger), **env},
            "run": {"steps": steps, "threads": 1, "checkpoint_every": every},
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


def test_what_stopped_a_run_can_be_repaired_and_the_run_resumed(tmp_path: Path) -> None:
    """The failed episodes of the earlier life stand in the journal, and are no reason to stop again."""
    out = tmp_path / "run"
    with pytest.raises(Fault, match=r"all 12 episodes of this update failed.*Repair that and resume"):
        PolicyGradient.train(config(tmp_path / "ledger", steps=9, every=100, raises=1.0), out)
    declared = out / "config.toml"
    declared.write_text(declared.read_text().replace("raises = 1.0", "raises = 0.0"))
    summary = PolicyGradient.train(None, out, resume=True)
    assert summary.counts["failed"] == faulty.struck(tmp_path / "ledger")["r"] >= 3 * 12
    assert summary.counts["consumed"] == faulty.struck(tmp_path / "ledger")["e"] >= 3 * 12
    assert len(load_run(out)) == 9 * 12


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: what a full disk says, without one."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE stands in for a full disk")
def test_a_full_disk_under_the_journal_stops_the_run_and_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with files_up_to(20_000), pytest.raises(StoreError, match=r"cannot write .*frames: File too large.*then resume"):
        PolicyGradient.train(config(tmp_path / "ledger", every=100), out)
    assert not (out / "run.lock").exists()
    history = History(event for path in (out / "journal").glob("*.frames") for event in read(path))
    finished = {s.trajectory.episode.id: s.trajectory.content() for p in history.played.values() for s in p.handed}
    assert len(finished) >= 8
    PolicyGradient.train(None, out, resume=True)
    content = {t.episode.id: t.content() for t in load_run(out).trajectories()}
    assert len(content) == len(load_run(out)) == 5 * 3 * 4
    assert finished.items() <= content.items()


def test_a_step_without_memory_is_one_error_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"no memory for update 7: .*allocate.* lower optim.micro_tokens"), fitting(7):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(ModelError, match="no memory for update 7"), fitting(7):
        raise MemoryError("no more")
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), fitting(7):
        raise RuntimeError("size mismatch")
