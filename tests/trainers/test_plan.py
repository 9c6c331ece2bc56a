"""The plan of a run: what each setting does to memory and time, and how near it is to what torch allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from agentgym.modeling import build, lora
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym_trainers import bench_learner as bench
from agentgym_trainers.config import from_table
from agentgym_trainers.plan import _memory, _model, plan

MODEL = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "tokenizer": "bpe", "vocabulary": 2048}


@pytest.fixture(autouse=True)
def bandit() -> None:
    toys.register()


def memory(model: dict[str, Any] | None = None, **sections: Any) -> dict[str, float]:
    config = from_table(toys.table(model={**MODEL, **(model or {})}, **sections))
    return _memory(config, _model(config))


def test_parameters_are_those_of_the_model_that_is_made() -> None:
    config = from_table(toys.table(model={**MODEL, "lora": {"rank": 8, "targets": ["q_proj", "down_proj"]}}))
    made = build.tiny(2048, hidden=256, layers=4, heads=4, kv_heads=2)
    bare = build.parameters(made)
    adapters = 4 * 8 * ((256 + 256) + (768 + 256))
    assert plan(config).parameters == bare + adapters
    pytest.importorskip("peft", reason="needs the extra [lora]")
    lora.add(made, config.model.lora)
    assert build.parameters(made) == bare + adapters


def test_full_weights_have_gradients_and_two_moments() -> None:
    found = memory()
    assert found["gradients"] == found["weights"]
    assert found["optimiser"] == 2 * found["weights"]
    assert not {"engine", "reference", "versions"} & found.keys()
    cached = 2 * 4 * 2 * 64
    assert found["cache"] == 4 * 32 * 64 * cached


def test_adapters_save_gradients_moments_and_the_second_base() -> None:
    kl = {"regularisers": [{"kind": "kl", "form": "k3", "coef": 0.01}]}
    full, low = memory(objective=kl), memory({"lora": {"rank": 8}}, objective=kl)
    assert low["gradients"] < full["gradients"] / 10
    assert low["optimiser"] == 2 * low["gradients"]
    assert low["reference"] == low["gradients"]
    assert full["reference"] == full["weights"]
    assert low["weights"] == full["weights"] + low["gradients"]


def test_what_asynchronous_runs_hold_besides() -> None:
    stale = {"max_staleness": 2, "slots": 32, "max_length": 64, "behaviour": "recomputed"}
    found = memory(rollout=stale)
    assert found["engine"] == found["weights"]
    assert found["versions"] == 3 * found["weights"]
    low = memory({"lora": {"rank": 8}}, rollout=stale)
    assert low["engine"] == low["gradients"], "the engine's twin shares the base"


def test_a_second_process_has_its_own_weights_and_caches() -> None:
    found = memory(run={"processes": 2})
    assert found["worker"] == found["process"] + found["weights"] + found["cache"]
    assert "engine" not in found


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer_whole() -> None:
    plain, again = memory()["activations"], memory({"checkpointing": True})["activations"]
    assert plain / 4 < again < plain / 2


def test_shards_are_divided_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole, parts = memory(), memory(optim={"lr": 1e-2, "sharded": True})
    for name in ("weights", "gradients", "optimiser"):
        assert parts[name] == whole[name] / 4
    assert parts["activations"] == whole["activations"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_near_what_a_step_allocates(checkpointing: bool) -> None:
    """Gradients, activations and logits of a step of 512 packed tokens, by torch's own account."""
    setting = bench.Setting("3M", "equal", checkpointing, "cpu")
    ours = bench.Ours(setting, bench.episodes("3M", "equal", 3, 0), 512)
    ours.step()
    measured = bench.peak(ours.step)
    optim = {"lr": 1e-2, "micro_tokens": 512}
    sft = {"optim": {"lr": 1e-2, "micro_tokens": 512}}
    found = memory({"checkpointing": checkpointing}, optim=optim, sft=sft)
    planned = sum(found[name] for name in ("gradients", "activations", "logits"))
    assert 0.7 * measured < planned < 1.8 * measured


def test_a_folder_is_read_for_its_shape_alone(tmp_path: Path) -> None:
    tokens = closed_vocabulary(["a", "b"])
    model = build.tiny(len(tokens), hidden=32, layers=2)
    build.save(model, tokens, tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()
    found = plan(from_table(toys.table(model={"path": str(tmp_path / "hub")})))
    assert found.parameters == build.parameters(model)
    assert found.fits
    assert torch.get_num_threads() >= 1


def test_frozen_bases_cost_less_time_and_recomputing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentgym_trainers.plan.measured", lambda *_, **__: 1e9)
    full, low, again = (
        plan(from_table(toys.table(model={**MODEL, **more}))).seconds["learn"]
        for more in ({}, {"lora": {"rank": 8}}, {"checkpointing": True})
    )
    assert low == pytest.approx(full * 4 / 6)
    assert again == pytest.approx(full * 8 / 6)
