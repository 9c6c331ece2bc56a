"""The learner's benchmark: both contestants take the same step, and the figures have the promised shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from agentgym import registry
from agentgym.collate import collate
from agentgym.errors import UnknownName
from agentgym.modeling import flops
from agentgym_trainers import bench_learner as bench

TINY = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "words": 64}
TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)


@pytest.mark.skipif(not TRL, reason="needs the extra [compare]")
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_is_at_work_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SIZES, "tiny", {**TINY, "hidden": 96, "layers": 12})
    played = bench.episodes("tiny", "equal", 8, seed=0)
    for contestant in (bench.Ours, bench.Theirs):
        held = []
        for checkpointing in (False, True):
            made = contestant(bench.Setting("tiny", "equal", checkpointing, "cpu"), played, 4096)
            made.step()
            held.append(bench.peak(made.step))
        assert held[1] < 0.8 * held[0], contestant.__name__


@pytest.mark.skipif(not TRL, reason="needs the extra [compare]")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_end_at_the_same_weights(checkpointing: bool) -> None:
    setting = bench.Setting("tiny", "drawn", checkpointing, "cpu")
    played = bench.episodes("tiny", "drawn", 8, seed=0)
    ours, theirs = bench.Ours(setting, played, 1024), bench.Theirs(setting, played, 1024)
    assert theirs.parts > 1
    before = [p.detach().clone() for p in ours.model.parameters()]
    for _ in range(3):
        ours.step()
        theirs.step()
    for mine, other, first in zip(ours.model.parameters(), theirs.model.parameters(), before, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=0)
        assert (mine - first).abs().max() > 1e-4


def test_padded_tensors_hold_what_is_packed() -> None:
    played = bench.episodes("tiny", "drawn", 5, seed=3)
    batch = bench.padded(played, "cpu")
    (packed,) = collate(played.trajectories, [np.ones(len(t.turns)) for t in played.trajectories], max_tokens=10**6)
    assert batch["prompt_mask"].sum() + batch["completion_mask"].sum() == played.tokens == len(packed.ids)
    assert (batch["completion_mask"] * batch["tool_mask"]).sum() == played.sampled == packed.mask.sum()
    row = int(packed.owners[0])
    ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])
    real = torch.cat([batch["prompt_mask"][row], batch["completion_mask"][row]]).bool()
    assert ids[real].tolist() == packed.ids[: packed.bounds[1]].tolist()
    scored = batch["tool_mask"][row].bool()
    mine = packed.logprobs[: packed.bounds[1]][packed.mask[: packed.bounds[1]] > 0]
    assert batch["old_per_token_logps"][row][scored].tolist() == mine.tolist()


def test_lengths_are_drawn_once_and_equal_where_asked() -> None:
    lengths = {kind: flops.lengths_of(bench.episodes("tiny", kind, 6, 1).trajectories)[0] for kind in bench.TURNS}
    assert len(set(lengths["equal"])) == 1
    assert max(lengths["drawn"]) - min(lengths["drawn"]) > max(lengths["near"]) - min(lengths["near"]) > 0
    assert lengths["drawn"] == flops.lengths_of(bench.episodes("tiny", "drawn", 6, 1).trajectories)[0]


@pytest.mark.filterwarnings("ignore")
def test_the_table_has_a_row_for_each_setting(tmp_path: Path) -> None:
    out, threads = tmp_path / "learner.md", torch.get_num_threads()
    given = {"sizes": "tiny", "lengths": "drawn", "sequences": 4, "rounds": 1}
    figures = registry.load("learner", "benches")(**given, trl=TRL, out=str(out))
    torch.set_num_threads(threads)
    rows = figures["learner"]
    assert [row["checkpointing"] for row in rows] == ["off", "on"]
    assert rows[1]["ours, peak MB"] <= rows[0]["ours, peak MB"]
    assert "| tiny |" in out.read_text(encoding="utf-8")
    with pytest.raises(UnknownName, match="tinny"):
        bench.learner(sizes="tinny")
