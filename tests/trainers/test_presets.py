"""The presets' whole paths, with what a test can afford in place of their sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from agentgym import make
from agentgym.env import task_list
from agentgym.modeling import build
from agentgym.modeling.tokenizer import train_bpe
from agentgym.store import load_run
from agentgym_trainers.config import from_table
from agentgym_trainers.loop import PolicyGradient

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["run.steps=1", "eval.episodes=4", "eval.ladder=false", "rollout.tasks_per_step=2", "rollout.group_size=2"]


def test_smoke_walks_from_the_tasks_to_moved_weights(tmp_path: Path) -> None:
    short = ["warmup.steps=2", "sft.steps=4", "sft.demonstrations=16", "rollout.drop_equal=false", *SHORT]
    summary = PolicyGradient.train(PolicyGradient.resolve("shopping/smoke", short), tmp_path / "run")
    assert summary.before["episodes"] == summary.after["episodes"] == 4
    run = load_run(tmp_path / "run")
    assert [line["phase"] for line in run.metrics] == ["warmup"] * 2 + ["sft"] * 4 + ["evaluation", "rl", "evaluation"]
    assert len(run) == 4
    assert run.metrics[-2]["tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu", "gpu-lora"])
def test_gpu_presets_run_a_hub_model_on_the_full_surface(tmp_path: Path, name: str) -> None:
    """A random model of the same class, saved in hub format, in its bfloat16: asynchronous, checkpointed, sampled from
    weights of its own; with adapters and without."""
    if name == "gpu-lora":
        pytest.importorskip("peft", reason="needs the extra [lora]")
    env = make("shopping-v0", size=300)
    texts = [str(task.payload) for task in task_list(env, "train", 0, 20)]
    tokenizer = train_bpe(texts, 400)
    model = build.tiny(len(tokenizer), hidden=16, layers=1, heads=2, kv_heads=1, max_length=8192)
    build.save(model, tokenizer, tmp_path / "hub")
    settings = [
        f"model.path={tmp_path / 'hub'}", "model.device=cpu", "env.size=300", "sampling.max_tokens=4",
        "rollout.slots=4", "rollout.limits.max_turns=2", "rollout.drop_equal=false", "eval.every=0", *SHORT,
    ]  # fmt: skip
    config = PolicyGradient.resolve(f"shopping/{name}", settings)
    assert config.model.checkpointing
    assert config.rollout.max_staleness == 2
    summary = PolicyGradient.train(config, tmp_path / "run")
    assert summary.last["tokens"] > 0
    assert summary.last["kl_reference"] == pytest.approx(0.0, abs=1e-2)
    assert summary.after["episodes"] == 4
    folder = Path(load_run(tmp_path / "run").checkpoints[-1].path) / "model"
    assert {x.dtype for _, x in build.load(folder).named_parameters()} == {torch.bfloat16}
    assert (folder / build.ADAPTER).is_dir() == (name == "gpu-lora")


SHAPE = {
    **{"vocab_size": 151_936, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "tie_word_embeddings": True},
}
"""Of a model of 4.0 B parameters."""


@pytest.mark.parametrize(("name", "gigabytes"), [("gpu", 141), ("gpu-lora", 80)])
def test_gpu_presets_fit_the_device_that_they_name(tmp_path: Path, name: str, gigabytes: int) -> None:
    Qwen3Config(architectures=["Qwen3ForCausalLM"], **SHAPE).save_pretrained(tmp_path)
    plan = PolicyGradient.plan(PolicyGradient.resolve(f"shopping/{name}", [f"model.path={tmp_path}"]))
    assert 4.0e9 < plan.parameters < 4.1e9
    assert plan.memory_total < 0.95 * gigabytes * 1e9


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The script that fills docs/results/shopping.md."""
    spec = importlib.util.spec_from_file_location("shopping_results", ROOT / "bench" / "shopping_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_differ_from_the_preset_in_what_they_learn_from_alone(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "weights", lambda run: run)
    preset = PolicyGradient.resolve("shopping/laptop")
    arms = {m: from_table(results.table_of(Path("out"), m, 0, [])) for m in results.METHODS}
    assert (arms["hrm"].reward, arms["hrm"].advantage) == (preset.reward, preset.advantage)
    assert arms["outcome"].reward == {"op": "term", "name": "hard", "default": 0.0}
    assert arms["outcome"].advantage == preset.advantage[:1]
    assert arms["turn"].advantage == preset.advantage
    assert [arms[m].run.algorithm for m in ("imitation", "expert")] == ["best_of_n", "expert_iteration"]
    assert arms["imitation"].reward == {}
    for arm in arms.values():
        assert (arm.env, arm.rollout, arm.optim, arm.sampling) == (
            preset.env, preset.rollout, preset.optim, preset.sampling,
        )  # fmt: skip
        assert arm.warmup.steps == arm.sft.steps == 0


def test_intervals_are_students(results: ModuleType) -> None:
    """Of 10, 20, 30 points: 20 +- 4.303 * 10 / sqrt(3)."""
    assert results.interval([0.1, 0.2, 0.3]) == "+20.0 [-4.8, +44.8]"
    found: dict[str, Any] = results.T
    assert found[5] == 2.776
