"""A training run whose rollouts vLLM samples while the learner moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SMALL = {
    "run.steps": 4,
    "env.size": 200,
    "warmup.steps": 2,
    "sft.steps": 5,
    "sft.demonstrations": 20,
    "eval.episodes": 4,
    "rollout.tasks_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_staleness": 2,
    "rollout.behaviour": "recomputed",
    "rollout.engine": "vllm",
    "rollout.engine_options.enforce_eager": "true",
}


def test_an_asynchronous_run_learns_from_what_vllm_sampled(tmp_path: Path) -> None:
    """The learner's log-probs of what the named versions sampled are vLLM's, to float32: no correction has work."""
    agentgym, run = Path(sys.executable).with_name("agentgym"), tmp_path / "run"
    command = [str(agentgym), "train", "shopping/smoke", "--out", str(run)]
    for name, value in SMALL.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line.get("phase") == "rl"]
    assert len(updates) == 4
    assert 1 <= max(line["staleness_max"] for line in updates) <= 2
    assert max(line["mismatch"] for line in updates) < 1e-4
