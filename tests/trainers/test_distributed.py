"""Two processes take the steps that one with all the trajectories takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranked
import torch

from agentgym.errors import ConfigError

RANKED = Path(ranked.__file__)
pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(400)]


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
        assert [process.wait(360) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ranked.CASES)
def test_two_ranks_are_one_process(both: list[dict[str, Any]], name: str) -> None:
    """12.12, 12.13: weights, figures and controllers, and the same on both ranks bit by bit."""
    agree(both, ranked.learn(name), name)


@pytest.mark.parametrize("name", ranked.FAMILIES)
def test_pairs_and_candidates_too(both: list[dict[str, Any]], name: str) -> None:
    agree(both, ranked.family(name), name)


def agree(both: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    one, other = (found[name] for found in both)
    assert torch.equal(one["weights"], other["weights"])
    assert one["figures"] == other["figures"]
    assert one["numbers"] == other["numbers"]
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-9)
    assert one["numbers"] == pytest.approx(alone["numbers"], abs=1e-9)
    for found, expected in zip(one["figures"], alone["figures"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_two_ranks_have_one_critic(both: list[dict[str, Any]]) -> None:
    alone = ranked.valued()
    one, other = (found["critic"] for found in both)
    assert torch.equal(one["weights"], other["weights"])
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-6)
    assert one["figures"] == other["figures"] == pytest.approx(alone["figures"], rel=1e-5)
    for found in (one, other):
        for mine, expected in zip(found["values"], alone["values"], strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-6)


def test_two_ranks_compare_with_another_model_as_one(both: list[dict[str, Any]]) -> None:
    for found in both:
        for mine, expected in zip(found["ratios"], ranked.compared(), strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-9)


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ranked.SHARDED)
def test_shards_are_one_process(both: list[dict[str, Any]], name: str) -> None:
    """FSDP2, also where the ranks have unequal numbers of micro-batches, or one has none."""
    agree([found["shards"] for found in both], ranked.learn(name), name)


def test_each_rank_holds_its_half(both: list[dict[str, Any]]) -> None:
    """Of the weights and of what the optimiser remembers; whole on rank 0 where they are put together."""
    held = [found["shards"] for found in both]
    for name in ("held", "moments"):
        assert sum(shards[name] for shards in held) == pytest.approx(1.0)
        assert all(0.4 < shards[name] < 0.6 for shards in held)
    names = sorted(ranked.make("plain").trainable.module().state_dict())
    assert [shards["names"] for shards in held] == [names, []]
    module = ranked.make("plain").trainable.module()
    whole = [p.shape for p in module.parameters()]
    assert [held[0]["state"][f"{i}.exp_avg"] for i in range(len(whole))] == whole
    assert [held[0]["state"][f"history.1.{i}"] for i in range(len(whole))] == whole


def test_an_interrupted_learner_in_shards_ends_with_the_same_bits(both: list[dict[str, Any]]) -> None:
    for found in both:
        one, resumed = found["shards"]["resumed"]
        assert torch.equal(one, resumed)
        assert found["shards"]["figures"][0] == found["shards"]["figures"][1]


def test_masters_in_shards(both: list[dict[str, Any]]) -> None:
    """bfloat16 weights move by float32 masters, and as in one process but for rounding, which Adam blows up where a
    gradient is next to nothing."""
    start = ranked.weights(ranked.make("plain", dtype=torch.bfloat16)).float()
    alone = ranked.learn("plain", dtype=torch.bfloat16)["weights"].float() - start
    for found in both:
        mine = found["shards"]["half"]["weights"]
        assert mine.dtype == torch.bfloat16
        assert float(torch.nn.functional.cosine_similarity(mine.float() - start, alone, dim=0)) > 0.95


# --- failures ---------------------------------------------------------------------------------------------------


def test_what_one_rank_raises_ends_all(both: list[dict[str, Any]]) -> None:
    """Nobody waits for a rank that is gone."""
    assert both[1]["failed"] == "RecordError: a span does not add up"
    assert both[0]["failed"] == "RankError: rank 1 of 2 stopped: RecordError: a span does not add up"


def test_one_process_has_no_shards() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        ranked.make("plain", ranked.IN_SHARDS)
