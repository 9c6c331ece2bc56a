"""Whole runs over a mixture: curves and evaluations by domain, methods that read domains, a resumed curriculum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toys import BanditEnv, register, table

from agentgym import registry
from agentgym.errors import ConfigError
from agentgym.mixture import domain_of
from agentgym.report import declared_reward, run_html
from agentgym.store import Run, load_run
from agentgym.types import Action, Observation, StepResult, Task, say
from agentgym_trainers.config import Config, resolve
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.state import MODEL

DEAR = {"op": "weighted_sum", "of": {"hit": 10.0}}
PARTS = [
    {"env": {"id": "bandit-v0"}, "name": "blue", "weight": 2.0},
    {"env": {"id": "grey-v0"}, "weight": 1.0, "reward": DEAR, "scale": "std"},
]


class GreyEnv(BanditEnv):
    """Asks in other words, and grey is the arm that pays."""

    id = "grey-v0"

    async def begin(self, task: Task) -> Observation:
        await super().begin(task)
        return say("choose one")

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        swapped = {"grey": "blue", "blue": "grey"}.get(action.text, action.text)
        seen, result = await super().act(Action(text=swapped))
        return seen and say("choose another"), result

    def vocabulary(self) -> list[str]:
        return ["choose", *super().vocabulary()]


RUN = {"threads": 1, "checkpoint_every": 2, "deterministic": True}


def mixed(steps: int, **sections: Any) -> Config:
    register()
    if "grey-v0" not in registry.catalogue():
        registry.register("grey-v0", GreyEnv)
    small = {"warmup": {"steps": 0}, "sft": {"steps": 10, "demonstrations": 32, "batch": 8}, "eval": {"episodes": 0}}
    tables = {name: found for name, found in sections.items() if isinstance(found, dict)}
    return resolve(
        {
            **table(**{**small, **tables, "run": {**RUN, "steps": steps}}),
            "env": {"id": "mixture"},
            "mixture": PARTS,
            "curriculum": {"kind": "weakest", "decay": 0.5},
            "method": sections.get("method", ""),
        }
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in load_run(run).metrics if line.get("phase") == "rl"]


def tasks(run: Path) -> list[tuple[str, str]]:
    return [(domain_of(t), t.episode.id) for t in load_run(run).trajectories()]


def mean_hits(run: Run, domain: str, step: float) -> float:
    found = [t for t in run.trajectories(step=int(step)) if domain_of(t) == domain]
    return sum(term.value for t in found for term in t.rewards) / len(found)


def stop_at(step: int) -> Callable[..., None]:
    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if (phase, done) == ("rl", step):
            raise KeyboardInterrupt

    return stop


def test_a_run_tells_each_domain_apart(tmp_path: Path) -> None:
    summary = PolicyGradient.train(mixed(8, eval={"episodes": 30}), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert Counter(map(domain_of, run.trajectories())).keys() == {"blue", "grey-v0"}
    assert {(domain_of(t), t.env) for t in run.trajectories()} == {("blue", "bandit-v0"), ("grey-v0", "grey-v0")}
    for line in lines(tmp_path / "run"):
        assert line["domain/blue/share"] + line.get("domain/grey-v0/share", 0.0) == pytest.approx(1.0)
        assert line["domain/blue/weight"] + line["domain/grey-v0/weight"] == pytest.approx(1.0)
    last = lines(tmp_path / "run")[-1]
    assert last["domain/grey-v0/return"] == pytest.approx(10 * mean_hits(run, "grey-v0", last["step"]))
    assert last["domain/grey-v0/scale"] < 1.0
    parts = summary.after["by_label"]["domain"]
    assert parts["blue"]["episodes"] + parts["grey-v0"]["episodes"] == 30
    assert abs(parts["blue"]["episodes"] - 20) <= 2
    page = run_html(run)
    assert "success by domain" in page
    rewards = {domain_of(t): declared_reward(run.config, t) for t in run.trajectories()}
    assert rewards == {"blue": BanditEnv.reward, "grey-v0": DEAR}


@pytest.mark.parametrize("name", ["fiberpo-domain", "g2rpo", "cgpo-crpg"])
def test_methods_that_read_domains_learn_from_a_mixture(tmp_path: Path, name: str) -> None:
    PolicyGradient.train(mixed(2, method=name), tmp_path / "run")
    found = lines(tmp_path / "run")
    assert len(found) == 2
    assert all(line["grad_norm"] > 0.0 for line in found)


def test_a_resumed_curriculum_ends_with_the_same_tasks_and_bits(tmp_path: Path) -> None:
    config = mixed(6)
    PolicyGradient.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(config, tmp_path / "run", progress=stop_at(3))
    PolicyGradient.train(None, tmp_path / "run", resume=True)
    assert tasks(tmp_path / "whole") == tasks(tmp_path / "run")
    told = [{n: x for n, x in line.items() if n.startswith("domain/")} for line in lines(tmp_path / "run")]
    assert told == [{n: x for n, x in line.items() if n.startswith("domain/")} for line in lines(tmp_path / "whole")]
    assert len({line["domain/blue/weight"] for line in told}) > 3
    left, right = (
        load_file(Path(load_run(tmp_path / run).checkpoints[-1].path) / MODEL / "model.safetensors")
        for run in ("whole", "run")
    )
    assert all(bool((left[key] == right[key]).all()) for key in left)


def test_the_preset_walks_from_its_three_kinds_of_customer_to_moved_shares(tmp_path: Path) -> None:
    short = {"warmup": 1, "sft": 2, "run": 1}
    settings = [f"{section}.steps={steps}" for section, steps in short.items()]
    settings += ["sft.demonstrations=12", "rollout.tasks_per_step=5", "rollout.group_size=2", "eval.episodes=5"]
    summary = PolicyGradient.train(resolve("shopping/mixture", settings), tmp_path / "run")
    parts = summary.after["by_label"]["domain"]
    assert {name: part["episodes"] for name, part in parts.items()} == {"open": 2, "reserved": 2, "vague": 1}
    (line,) = lines(tmp_path / "run")
    assert sum(line[f"domain/{name}/weight"] for name in parts) == pytest.approx(1.0)


def test_a_mixture_without_components_is_refused_before_anything_runs() -> None:
    register()
    with pytest.raises(ConfigError, match="there is none"):
        resolve({**table(), "env": {"id": "mixture"}})
