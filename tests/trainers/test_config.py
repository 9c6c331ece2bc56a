"""A config is checked key by key, and says where it is wrong and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from toys import BanditEnv, register, table

from agentgym import registry
from agentgym.errors import ConfigError
from agentgym_trainers.config import from_table, resolve
from agentgym_trainers.critic import CriticConfig
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.objective.declare import Clip, Objective, Soft
from agentgym_trainers.strategies.declare import Plain

BARE = {"ratio": {"kind": "none"}, "gate": {"kind": "none"}}
BATCH = {"key": "batch"}
GAE = {"key": "none", "centre": "none", "scale": "none", "credit": "gae"}
DISCRIMINATIVE = {
    **BARE,
    "aggregation": {"kind": "seq_mean_token_mean"},
    "contrast": {"kind": "discriminative"},
}
SHAPED = {"op": "potential", "name": "phi", "gamma": 0.9}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"group_siez": 4}}, r"rollout\.group_siez.*did you mean 'group_size'"),
        ({"rolout": {}}, r"rolout.*did you mean 'rollout'"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr"),
        ({"sampling": {"temprature": 1.0}}, r"sampling\.temprature.*'temperature'"),
        ({"sft": {"optim": {"l": 1}}}, r"sft\.optim\.l"),
        ({"advantage": [{"centr": "mean"}]}, r"advantage\[0\]\.centr.*'centre'"),
        ({"advantage": [{"centre": "middle"}]}, "middle"),
        ({"rollout": {"limits": {"max_turn": 3}}}, r"rollout\.limits\.max_turn"),
        ({"rollout": {"group_size": 1}}, "no baseline"),
        ({"rollout": {"max_staleness": -1}}, "at least 0; got -1"),
        ({"env": {"id": 3}}, r"env\.id"),
        (
            {"reward": {"op": "potential", "name": "phi", "gamma": 0.9}, "advantage": [{"credit": "return_to_go"}]},
            "0.9",
        ),
        ({"reward": {"op": "summ"}}, "'sum'"),
        ({"objective": {"gate": {"kind": "clipp"}}}, r"objective\.gate\.kind: no kind 'clipp'; did you mean 'clip'"),
        ({"objective": {"gate": {"kind": "clip", "hihg": 1}}}, r"objective\.gate\.hihg.*'high'"),
        ({"objective": {"gate": {"high": 0.1}}}, r"objective\.gate: say which kind it is; there are branch_clip, clip"),
        ({"objective": {"gate": {"kind": "clip", "adaptive": {"stp": 1}}}}, r"objective\.gate\.adaptive\.stp.*'step'"),
        ({"objective": {"regularisers": [{"kind": "kl"}, {"kind": "kl", "coeff": 1}]}}, r"regularisers\[1\]\.coeff"),
        ({"objective": {"controllers": [{"kind": "duel"}]}}, r"controllers\[0\]\.kind.*'dual'"),
        ({"objective": {"contrast": {"kind": "discriminate"}}}, r"contrast\.kind.*'discriminative'"),
        ({"objective": {"source": {"kind": "layer"}}}, "layer"),
        ({"strategy": {"kind": "prefixes"}}, r"strategy\.kind.*'prefix'"),
        ({"advantage": [{"transform": {"kind": "rank"}}]}, r"advantage\[0\]\.transform\.kind"),
        ({"preference": {"loss": {"kind": "dpoo"}}}, r"preference\.loss\.kind.*'dpo'"),
        ({"critic": {"lr": 0.0}}, r"critic\.lr is positive"),
        ({"objective": {"regularisers": [{"kind": "distillation"}]}}, r"model\.teacher"),
        ({"sft": {"objective": {"gate": {"kind": "clip"}}}}, r"sft\.objective\.proximal"),
        ({"sft": {"objective": {"proximal": "learner", "regularisers": [{"kind": "kl"}]}}}, "no reference"),
        ({"sft": {"objective": {**BARE, "regularisers": [{"kind": "sft"}]}}}, "bring no rewards"),
        ({"sft": {"batch": 0}}, r"sft\.batch is at least 1; got 0"),
        ({"run": {"steps": -1}}, r"run\.steps is at least 0; got -1"),
        ({"warmup": {"length": [3, 2]}}, r"warmup\.length"),
        ({"sampling": {"temperature": 0.0}}, r"temperature = 0 draws nothing"),
        ({"sampling": {"temperature": float("nan")}}, r"sampling\.temperature"),
        ({"sampling": {"top_p": 0.0}}, "top_p in"),
        ({"rollout": {"group_size": 1}, "run": {"algorithm": "preference"}}, "no pair"),
        ({"rollout": {"group_size": 1, "drop_equal": True}, "advantage": [BATCH]}, "leave out everything"),
        ({"rollout": {"drop_equal": True}, "advantage": [BATCH]}, "none of them compares within a prompt"),
        ({"strategy": {"kind": "dynamic_filter"}, "advantage": [BATCH]}, "dynamic_filter leaves out groups"),
        ({"preference": {"loss": {"kind": "dpo", "beta": 0.5}}}, r"\[preference\] is read where run\.algorithm"),
        ({"candidates": {"cap": 5.0}}, r"\[candidates\] is read where run\.algorithm"),
        ({"critic": {"lr": 0.1}}, r"\[critic\] is at work where"),
        ({"objective": DISCRIMINATIVE, "advantage": [BATCH]}, r"\[\[advantage\]\] is not read"),
        ({"advantage": [GAE, {**GAE, "gamma": 0.9}]}, "one critic"),
        ({"strategy": {"kind": "forced_mode"}, "objective": BARE}, "begins replies for the policy"),
        ({"strategy": {"kind": "forced_mode"}, "objective": {"proximal": "learner"}}, "or a behaviour correction"),
        (
            {"strategy": {"kind": "hint_levels", "context": "original"}, "objective": BARE},
            "without their hint.*context = 'sampled'",
        ),
        ({"objective": {"source": {"kind": "layer", "layer": 9}}}, "layer 9 of a model of 3 layers"),
        ({"objective": {"gate": {"kind": "custom", "target": "no.such:gate"}}}, "no function at target"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], said: str) -> None:
    whole: dict[str, Any] = {"env": {"id": "bandit-v0"}} | sections
    with pytest.raises((ConfigError, LookupError), match=said):
        from_table(whole)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"group_size": 1}, "advantage": [{"centre": "given"}]},
        {"rollout": {"group_size": 1}, "strategy": {"kind": "contrastive"}},
        {"rollout": {"group_size": 1}, "run": {"algorithm": "best_of_n"}},
        {"sampling": {"temperature": 0.0}, "run": {"steps": 0}},
        {"preference": {"loss": {"kind": "rpo"}}, "run": {"algorithm": "expert_iteration"}},
        {"strategy": {"kind": "forced_mode"}, "run": {"algorithm": "best_of_n"}, "objective": BARE},
        {"strategy": {"kind": "forced_mode"}, "objective": {**BARE, "behaviour": [{"kind": "truncate"}]}},
        {"strategy": {"kind": "hint_levels", "context": "sampled"}, "objective": BARE},
        {"rollout": {"drop_equal": True}, "advantage": [BATCH, {}]},
    ],
)
def test_what_can_be_meant_is_not_refused(sections: dict[str, Any]) -> None:
    from_table({"env": {"id": "bandit-v0"}, **sections})


def test_a_method_without_a_critic_takes_the_preset_s_away() -> None:
    base = {**table(critic={"lr": 0.1}), "advantage": [GAE]}
    assert resolve(base).critic.lr == 0.1
    assert resolve(base, ["method=grpo"]).critic == CriticConfig()
    assert resolve({**base, "method": "ppo"}).critic.lr == 0.1


def test_overrides_are_toml_values_and_the_table_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(table()), encoding="utf-8")
    config = resolve(file, ["run.seed=7", "advantage=[{scale='none'}, {credit='turn', weight=0.5}]", "env.broken=true"])
    assert (config.run.seed, config.env["broken"], len(config.advantage)) == (7, True, 2)
    assert from_table(config.table()) == config
    assert resolve(str(file)).run.seed == 0


def method(tmp_path: Path, name: str, **table: Any) -> str:
    """A method file of one's own."""
    file = tmp_path / f"{name}.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(file)


def test_a_method_replaces_its_axes_and_its_user_changes_single_keys(tmp_path: Path) -> None:
    """Whoever names a method, the preset or --set: earlier layers' axes go, its own keys stay on top."""
    mine = method(
        tmp_path,
        "mine",
        objective={"gate": {"kind": "soft", "positive": 2.0}},
        advantage=[{"scale": "none"}],
        optim={"epochs": 3},
    )
    held = {"gate": {"kind": "clip", "dual": 3.0}, "proximal": "learner"}
    base = {**table(objective=held, strategy={"kind": "greedy"}), "whiten": "turns"}
    found = resolve(base, [f"method={mine}", "objective.gate.negative=1.5", "rollout.group_size=4"])
    assert found.objective == Objective(gate=Soft(positive=2.0, negative=1.5))
    assert (found.whiten, found.strategy, found.method) == ("none", Plain(), mine)
    assert [term.scale for term in found.advantage] == ["none"]
    assert (found.optim.epochs, found.optim.lr, found.rollout.group_size) == (3, 1e-2, 4)
    assert from_table(found.table()) == found
    below = resolve({**base, "method": mine})
    assert (below.whiten, below.strategy.kind) == ("turns", "greedy")
    assert below.objective == Objective(gate=Clip(dual=3.0), proximal="learner")
    assert below.optim.epochs == 3


def test_a_method_may_bring_a_reward_and_pairs(tmp_path: Path) -> None:
    priced = method(tmp_path, "priced", reward={"op": "weighted_sum", "plus": ["environment", 1.0]})
    pairs = method(tmp_path, "pairs", preference={"loss": {"kind": "ipo"}})
    register()
    found = resolve(table(reward={"op": "min", "of": ["hit"]}), [f"method={priced}"])
    assert found.reward["plus"][0] == BanditEnv.reward
    assert found.objective == Objective()
    with pytest.raises(ConfigError, match=r"preference\.loss\.kind"):
        resolve(table(), [f"method={pairs}"])
    assert resolve(table(), ["method=dpo"]).run.algorithm == "preference"
    assert resolve({**table(), "method": "dpo"}, ["method=gspo"]).run.algorithm == "policy_gradient"
    with pytest.raises(LookupError, match="did you mean 'gspo'"):
        resolve(table(), ["method=gspoo"])


def test_a_table_of_another_kind_replaces_and_of_the_same_kind_is_merged() -> None:
    register()
    base = table(objective={"gate": {"kind": "clip", "dual": 3.0}})
    soft = resolve(base, ["objective.gate={kind='soft', positive=2.0}"]).objective.gate
    assert soft == Soft(positive=2.0)
    assert resolve(base, ["objective.gate.high=0.3"]).objective.gate == Clip(dual=3.0, high=0.3)
    swapped = resolve(table(reward={"op": "min", "of": ["hit"]}), ["reward={op='sum'}"]).reward
    assert swapped == {"op": "sum"}


def test_every_preset_resolves_and_plans() -> None:
    found = [name for name in registry.catalogue("presets") if name.startswith("shopping/")]
    assert {"shopping/laptop", "shopping/smoke", "shopping/gpu"} <= set(found)
    for name in ("shopping/laptop", "shopping/smoke"):
        plan = PolicyGradient.plan(resolve(name))
        assert 5e5 <= plan.parameters <= 1e6
        assert plan.memory_total < 6e9
        assert plan.fits


def test_a_plan_says_what_a_machine_lacks() -> None:
    register()
    small, big = (from_table(table(model=model)) for model in ({}, {"hidden": 16384, "layers": 80, "heads": 128}))
    assert PolicyGradient.plan(small).fits
    found = PolicyGradient.plan(big)
    assert not found.fits
    assert "cannot" in found.verdict
