"""A config is checked key by key, and says where it is wrong and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from toys import register, table

from agentgym import registry
from agentgym.errors import ConfigError
from agentgym_trainers.config import from_table, resolve
from agentgym_trainers.loop import PolicyGradient

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
        ({"rollout": {"max_staleness": 1}}, "synchronous"),
        ({"env": {"id": 3}}, r"env\.id"),
        (
            {"reward": {"op": "potential", "name": "phi", "gamma": 0.9}, "advantage": [{"credit": "return_to_go"}]},
            "0.9",
        ),
        ({"reward": {"op": "summ"}}, "'sum'"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], said: str) -> None:
    whole: dict[str, Any] = {"env": {"id": "bandit-v0"}} | sections
    with pytest.raises((ConfigError, LookupError), match=said):
        from_table(whole)


def test_overrides_are_toml_values_and_the_table_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(table()), encoding="utf-8")
    config = resolve(file, ["run.seed=7", "advantage=[{scale='none'}, {credit='turn', weight=0.5}]", "env.broken=true"])
    assert (config.run.seed, config.env["broken"], len(config.advantage)) == (7, True, 2)
    assert from_table(config.table()) == config
    assert resolve(str(file)).run.seed == 0


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
