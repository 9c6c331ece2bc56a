"""Every registered environment is parametrised in by itself, an installed outsider's too, and so are its references."""

from __future__ import annotations

import pytest

from agentgym import make
from agentgym.registry import catalogue
from agentgym.testing import check_env, check_policy

IDS = [*catalogue("envs"), "gym:CartPole-v1"]


@pytest.mark.parametrize("id", IDS)
def test_environment_conforms(id):
    report = check_env(id, episodes=4)
    report.raise_for_failures()
    assert report["same_seed"].status == report["two_processes"].status == "passed"


@pytest.mark.parametrize("id", IDS)
def test_reference_policies_conform(id):
    env = make(id)
    assert bool(env.ladder()) == ("ladder" in env.capabilities)
    for name, policy in env.ladder().items():
        report = check_policy(policy, env, episodes=2)
        assert report.ok, f"rung {name!r}: {report}"
