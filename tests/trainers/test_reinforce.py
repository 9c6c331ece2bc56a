"""The reinforcement phase: critic, derived rewards, multipliers, pairs, teacher; and a resumed run of each."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from toys import BanditEnv, register, table

from agentgym.errors import ConfigError, Fault
from agentgym.modeling import flops
from agentgym.store import load_run
from agentgym_trainers.config import Config, from_table, resolve
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.reinforce import Reinforcement
from agentgym_trainers.state import MODEL

QUIET = {"warmup": {"steps": 0}, "eval": {"episodes": 0}, "run": {"steps": 4, "threads": 1, "checkpoint_every": 2}}
GAE = [{"key": "none", "centre": "none", "scale": "tokens", "credit": "gae", "lam": 0.9}]
CLOCKED = ("seconds", "sampled_per", "timeline", "engine", "units", "learn_tokens", "mfu")
"""Figures that hang on the clock."""
KL_PAID = {"op": "weighted_sum", "of": {"hit": 1.0, "policy.kl": -0.1, "policy.tokens": -0.01}}
PRICED = {
    "op": "lagrangian",
    "of": "hit",
    "constraints": {"length": {"cost": "policy.tokens", "multiplier": 0.1, "target": 3.0, "lr": 0.05}},
}
RUNS: dict[str, dict[str, Any]] = {
    "critic": {"advantage": GAE, "critic": {"epochs": 6}},
    "KL in the reward": {"reward": KL_PAID},
    "multiplier": {"reward": PRICED},
    "pairs": {"run": {**QUIET["run"], "algorithm": "preference"}},
    "tracked quantiles": {
        "advantage": [
            {"key": "bundle", "bundle": 2, "centre": "none", "scale": "none", "credit": "share",
             "transform": {"kind": "risk", "track": True}}
        ]
    },
    "controllers": {
        "objective": {
            "regularisers": [{"kind": "kl", "coef": 0.05}, {"kind": "perception"}],
            "controllers": [
                {"kind": "adaptive", "of": "regularisers.0.coef", "watch": "kl_reference", "target": 0.001},
                {"kind": "schedule", "of": "gate.high", "start": 0.4, "end": 0.2, "steps": 3},
            ],
            "gate": {"kind": "clip"},
        }
    },
    "strategy with a memory": {"strategy": {"kind": "forced_mode", "begin": "blue", "reference": 2}},
}  # fmt: skip


def config(**sections: Any) -> Config:
    register()
    lists = {name: found for name, found in sections.items() if not isinstance(found, dict)}
    tables = {name: found for name, found in sections.items() if isinstance(found, dict)}
    return from_table({**table(**{**QUIET, **tables}), **lists})


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in load_run(run).metrics if line.get("phase") == "rl"]


def weights(run: Path) -> dict[str, Any]:
    return load_file(Path(load_run(run).checkpoints[-1].path) / MODEL / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_phase_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    declared = config(**RUNS[name])
    exact = from_table({**declared.table(), "run": {**declared.table()["run"], "deterministic": True}})
    PolicyGradient.train(exact, tmp_path / "whole")

    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if (phase, done) == ("rl", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(exact, tmp_path / "run", progress=stop)
    PolicyGradient.train(None, tmp_path / "run", resume=True)
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(bool((left[key] == right[key]).all()) for key in left)

    def told(run: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines(run)]

    assert told(tmp_path / "whole") == told(tmp_path / "run")
    assert len(told(tmp_path / "run")) == 4


def test_ppo_with_a_critic_finds_the_arm_that_pays(tmp_path: Path) -> None:
    declared = config(
        **RUNS["critic"], run={**QUIET["run"], "steps": 14}, eval={"episodes": 60}, optim={"lr": 1e-2, "epochs": 2}
    )
    summary = PolicyGradient.train(declared, tmp_path / "run")
    assert summary.after["success"] > 0.7
    found = lines(tmp_path / "run")
    assert found[0]["value_loss"] > 0.0
    assert found[-1]["value_explained"] > 0.0


def test_pairs_find_the_arm_that_pays(tmp_path: Path) -> None:
    declared = config(**RUNS["pairs"], eval={"episodes": 60}, preference={"loss": {"kind": "dpo", "beta": 0.5}})
    longer = from_table({**declared.table(), "run": {**declared.table()["run"], "steps": 14}})
    summary = PolicyGradient.train(longer, tmp_path / "run")
    assert summary.after["success"] > summary.before["success"] + 0.3
    assert {"margin", "accuracy", "pairs"} <= set(lines(tmp_path / "run")[0])


def test_a_reward_reads_what_the_trainer_knows(tmp_path: Path) -> None:
    """policy.kl is zero while the policy is still the reference, and is paid for once it has moved."""
    declared = config(**RUNS["KL in the reward"], optim={"lr": 3e-2})
    summary = PolicyGradient.train(declared, tmp_path / "run")
    assert (tmp_path / "run" / "reference").is_dir()
    first, *_, last = lines(tmp_path / "run")
    tokens = first["sampled_tokens"] / first["episodes"]
    hits = [sum(t.value for t in run.rewards) for run in load_run(tmp_path / "run").trajectories()][:32]
    assert first["return"] == pytest.approx(sum(hits) / 32 - 0.01 * tokens, abs=1e-5)
    hits = [sum(t.value for t in run.rewards) for run in load_run(tmp_path / "run").trajectories()][-32:]
    tokens = last["sampled_tokens"] / last["episodes"]
    assert last["return"] < sum(hits) / 32 - 0.01 * tokens - 1e-3
    assert summary.steps == 4


def test_a_multiplier_rises_while_its_constraint_is_broken(tmp_path: Path) -> None:
    PolicyGradient.train(config(**RUNS["multiplier"]), tmp_path / "run")
    found = lines(tmp_path / "run")
    expected = 0.1
    for line in found:
        cost = line["sampled_tokens"] / line["episodes"]
        expected = max(expected + 0.05 * (cost - 3.0), 0.0)
        assert line["multiplier.length"] == pytest.approx(expected, abs=1e-9)
    assert found[-1]["multiplier.length"] > 0.0


def test_a_multiplier_also_learns_from_groups_that_are_left_out(tmp_path: Path) -> None:
    """Every group is equal and none is learnt from: the constraint that all of them break is priced all the same."""
    priced = {
        "op": "lagrangian",
        "of": {"op": "weighted_sum", "of": {"hit": 0.0}},
        "constraints": {"length": {"cost": "policy.tokens", "multiplier": 0.0, "target": 1.0, "lr": 0.05}},
    }
    declared = config(reward=priced, rollout={"drop_equal": True}, run={**QUIET["run"], "steps": 1})
    summary = PolicyGradient.train(declared, tmp_path / "run")
    assert summary.counts["equal"] == 32
    assert lines(tmp_path / "run")[0]["multiplier.length"] > 0.0


def test_an_update_of_failures_says_so_whatever_the_reward_reads(tmp_path: Path) -> None:
    broken = config(reward=KL_PAID, env={"broken": True}, sft={"steps": 0})
    with pytest.raises(Fault, match="the lever is stuck"):
        PolicyGradient.train(broken, tmp_path / "run")


def test_a_teacher_is_loaded_from_its_folder(tmp_path: Path) -> None:
    """Distilled from a policy that has learnt the arm: the pupil follows it although its own reward says nothing."""
    objective = {"regularisers": [{"kind": "distillation", "coef": 1.0, "beta": 0.0, "threshold": 0.0}]}
    with pytest.raises(ConfigError, match=r"model\.teacher"):
        config(objective=objective)
    PolicyGradient.train(config(run={**QUIET["run"], "steps": 12}, eval={"episodes": 40}), tmp_path / "teacher")
    folder = tmp_path / "kept"
    shutil.copytree(Path(load_run(tmp_path / "teacher").checkpoints[-1].path) / MODEL, folder)
    model = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "teacher": str(folder)}
    declared = config(
        objective=objective,
        model=model,
        reward={"op": "weighted_sum", "of": {"hit": 0.0}},
        run={**QUIET["run"], "steps": 10},
        eval={"episodes": 60},
    )
    summary = PolicyGradient.train(declared, tmp_path / "run")
    found = lines(tmp_path / "run")
    assert found[-1]["divergence"] < 0.3 * found[0]["divergence"]
    assert summary.after["success"] > summary.before["success"] + 0.3


def test_imitation_inside_a_trust_region(tmp_path: Path) -> None:
    """TPSFT: several epochs on each batch, held by a ratio against the policy as it was, on chosen parameters only."""
    held = {"gate": {"kind": "clip", "low": 0.05, "high": 0.05}, "proximal": "learner"}
    optim = {"lr": 3e-3, "epochs": 4, "only": "mlp", "warmup": 0}
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, objective in (("held", held), ("free", {"gate": {"kind": "none"}, "proximal": "learner"})):
        sft = {"steps": 6, "objective": objective, "optim": optim}
        PolicyGradient.train(config(sft=sft, run={**QUIET["run"], "steps": 0}), tmp_path / name)
        seen[name] = [line for line in load_run(tmp_path / name).metrics if line.get("phase") == "sft"]
    assert seen["held"][0]["clipped"] > 0.0
    assert seen["held"][-1]["nll"] < seen["held"][0]["nll"]
    assert sum(line["ratio_variance"] for line in seen["held"]) < sum(line["ratio_variance"] for line in seen["free"])


def test_a_run_names_its_method(tmp_path: Path) -> None:
    """From a method's file to weights; the resolved config holds what was laid."""
    register()
    mine = tmp_path / "mine.toml"
    sections = {"objective": {"ratio": {"kind": "sequence"}, "gate": {"kind": "clip", "low": 3e-4, "high": 4e-4}}}
    mine.write_text(tomli_w.dumps(sections), encoding="utf-8")
    declared = resolve({**table(**QUIET), "method": str(mine)}, ["sft.steps=3", "run.steps=2"])
    PolicyGradient.train(declared, tmp_path / "run")
    held = load_run(tmp_path / "run").config
    assert held["objective"]["ratio"] == {"kind": "sequence"}
    assert held["method"] == str(mine)
    assert BanditEnv.id == held["env"]["id"]


def test_threads_are_the_learners_own_and_the_machine_is_measured_before_anybody_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's threads are no others' business, and what a machine can do is not measured beside one at work."""
    measured, learnt, learn = [], [], Reinforcement.learn

    def measure(*_: Any) -> float:
        measured.append(threading.current_thread())
        return 1e9

    def spied(phase: Reinforcement, *given: Any) -> Any:
        learnt.append(torch.get_num_threads())
        return learn(phase, *given)

    monkeypatch.setattr(flops, "measured", measure)
    monkeypatch.setattr(Reinforcement, "learn", spied)
    flops.peak.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quiet = config(run={"steps": 1, "threads": 0}, rollout={"threads": 1, "max_staleness": 1}, sft={"steps": 0})
        PolicyGradient.train(quiet, tmp_path / "run")
    finally:
        torch.set_num_threads(before)
        flops.peak.cache_clear()
    assert measured == [threading.main_thread()]
    assert learnt == [2]
