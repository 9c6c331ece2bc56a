"""The presets' whole paths, with what a test can afford in place of their sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentgym import make
from agentgym.env import task_list
from agentgym.modeling import build
from agentgym.modeling.tokenizer import train_bpe
from agentgym.store import load_run
from agentgym_trainers.loop import PolicyGradient

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
def test_gpu_runs_a_hub_model_on_the_full_surface(tmp_path: Path) -> None:
    """A random model of the same class, saved in hub format, in its bfloat16."""
    env = make("shopping-v0", size=300)
    texts = [str(task.payload) for task in task_list(env, "train", 0, 20)]
    tokenizer = train_bpe(texts, 400)
    model = build.tiny(len(tokenizer), hidden=16, layers=1, heads=2, kv_heads=1, max_length=8192)
    build.save(model, tokenizer, tmp_path / "hub")
    settings = [
        f"model.path={tmp_path / 'hub'}", "model.device=cpu", "env.size=300", "sampling.max_tokens=4",
        "rollout.slots=4", "rollout.limits.max_turns=2", "rollout.drop_equal=false", "eval.every=0", *SHORT,
    ]  # fmt: skip
    summary = PolicyGradient.train(PolicyGradient.resolve("shopping/gpu", settings), tmp_path / "run")
    assert summary.last["tokens"] > 0
    assert summary.last["kl_reference"] == pytest.approx(0.0, abs=1e-2)
    assert summary.after["episodes"] == 4
    assert (Path(load_run(tmp_path / "run").checkpoints[-1].path) / "model" / "model.safetensors").is_file()
