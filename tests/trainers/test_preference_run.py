"""Whole runs that learn from pairs: play, compare, learn, publish; and go on where they were interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toys

from agentgym_trainers.config import resolve
from agentgym_trainers.loop import PolicyGradient

JUDGED = {"loss": {"kind": "codpo"}, "pairs": {"kind": "judged", "constraints": ["hit"]}}


@pytest.fixture(autouse=True)
def _bandit() -> None:
    toys.register()


@pytest.mark.parametrize("section", [{}, {"loss": {"kind": "dno"}, "pairs": {"kind": "all"}}, JUDGED])
def test_a_run_learns_from_pairs(tmp_path: Path, section: dict[str, Any]) -> None:
    table = {**toys.table(run={"steps": 15, "algorithm": "preference"}), "preference": section}
    found = PolicyGradient.train(resolve(table), tmp_path / "run")
    assert found.after["return_mean"] > found.before["return_mean"] + 0.8
    assert found.counts["tied"] + found.counts.get("infeasible", 0) > 0


def test_a_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    table = toys.table(
        run={"steps": 6, "checkpoint_every": 2, "algorithm": "preference", "deterministic": True}, eval={"episodes": 0}
    )
    config = resolve({**table, "preference": {"loss": {"kind": "inpo"}, "pairs": {"kind": "all"}}})
    whole = PolicyGradient.train(config, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if phase == "rl" and done == 3:
            raise Stop

    with pytest.raises(Stop):
        PolicyGradient.train(config, tmp_path / "cut", progress=stop)
    again = PolicyGradient.train(None, tmp_path / "cut", resume=True)
    weights = [(tmp_path / name / "checkpoints").rglob("model.safetensors") for name in ("whole", "cut")]
    last = [max(found, key=lambda path: path.parent.name).read_bytes() for found in weights]
    assert last[0] == last[1]
    assert again.counts == whole.counts
