"""Two processes take the steps that one with all the trajectories takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch

RANKED = Path(ranked.__file__)
pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks came to, in processes of their own that speak over loopback."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(RANKED.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    started = [
        subprocess.Popen([sys.executable, str(RANKED), str(rank), "2", str(folder)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(90) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ranked.CASES)
def test_two_ranks_are_one_process(both: list[dict[str, Any]], name: str) -> None:
    """12.12, 12.13: weights, figures and controllers, and the same on both ranks bit by bit."""
    alone = ranked.learn(name, 0, 1)
    one, other = (found[name] for found in both)
    assert torch.equal(one["weights"], other["weights"])
    assert one["figures"] == other["figures"]
    assert one["numbers"] == other["numbers"]
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-9)
    assert one["numbers"] == pytest.approx(alone["numbers"], abs=1e-9)
    for found, expected in zip(one["figures"], alone["figures"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_two_ranks_have_one_critic(both: list[dict[str, Any]]) -> None:
    alone = ranked.valued(0, 1)
    one, other = (found["critic"] for found in both)
    assert torch.equal(one["weights"], other["weights"])
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-6)
    assert one["figures"] == other["figures"] == pytest.approx(alone["figures"], rel=1e-5)


def test_what_one_rank_refuses_all_refuse(both: list[dict[str, Any]]) -> None:
    """Nobody waits for a rank that is gone."""
    said = [found["refused"] for found in both]
    assert said[0] == said[1]
    assert "not finite" in said[0]
