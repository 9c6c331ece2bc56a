"""A run over several environments: built from a config, scaled, moved by what was seen, told by domain, refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import trajectory
from toys import BanditEnv, register, table

from agentgym.advantages import Term, advantages
from agentgym.collate import collate
from agentgym.errors import ConfigError
from agentgym.mixture import DOMAIN, Mixture
from agentgym.rewards import check_reconciles, composer
from agentgym.seeding import share
from agentgym.types import Task
from agentgym_trainers import figures, mixtures
from agentgym_trainers.config import Component, Config, Curriculum, from_table
from agentgym_trainers.mixtures import Domains, Spread, make_env, reward_of, shares
from agentgym_trainers.strategies import Sample

HIT = composer(BanditEnv.reward)
OTHER = {"op": "weighted_sum", "bias": -0.5, "of": {"hit": 3.0}}
PRICED = {"op": "lagrangian", "of": "hit", "constraints": {"length": {"cost": "policy.tokens", "multiplier": 0.1}}}


def bandit(name: str, weight: float = 1.0, **rest: Any) -> dict[str, Any]:
    return {"env": {"id": "bandit-v0"}, "name": name, "weight": weight, **rest}


def mixed(*parts: dict[str, Any], **sections: Any) -> Config:
    register()
    return from_table({**table(), "env": {"id": "mixture"}, "mixture": [*parts], **sections})


def sample(domain: str, value: float | None, success: float | None = None) -> Sample:
    """An episode of two turns that was paid this; None: it failed."""
    amounts = [{"hit": 0.0 if value is None else 0.25 * value}, {"hit": 0.0 if value is None else 0.75 * value}]
    played = trajectory(
        amounts,
        labels={DOMAIN: domain},
        status="failed" if value is None else "terminated",
        metrics={} if success is None else {"success": success},
    )
    return Sample(played, None if value is None else HIT.trajectory(played))


# --- from a config ----------------------------------------------------------------------------------------------


def test_a_config_makes_its_mixture_or_its_one_environment():
    env = make_env(mixed(bandit("a", 1.0), bandit("b", 3.0), {"env": {"id": "bandit-v0", "broken": True}}))
    assert isinstance(env, Mixture)
    assert env.shares == {"a": 0.2, "b": 0.6, "bandit-v0": 0.2}
    assert getattr(env.members["bandit-v0"], "broken")  # noqa: B009
    assert isinstance(make_env(from_table(table())), BanditEnv)


def test_rewards_are_the_components_else_the_runs_else_the_environments():
    played = sample("a", 1.0).trajectory
    declared = {
        "environment": mixed(bandit("a"), bandit("b")),
        "run": mixed(bandit("a"), bandit("b"), reward=OTHER),
        "component": mixed(bandit("a", reward=OTHER), bandit("b")),
        "other component": mixed(bandit("a"), bandit("b", reward=OTHER)),
        "one for all": mixed(bandit("a", reward=OTHER), bandit("b", reward=OTHER)),
    }
    found = {name: reward_of(c, make_env(c)) for name, c in declared.items()}
    values = {name: composers.of(played).trajectory(played).value for name, composers in found.items()}
    assert values == {"environment": 1, "run": 2.5, "component": 2.5, "other component": 1, "one for all": 2.5}
    assert [name for name, composers in found.items() if composers.own] == ["component", "other component"]
    assert reward_of(declared["run"], BanditEnv()).multipliers.declaration == OTHER


def test_the_word_environment_stands_for_each_components_own():
    doubled = {"op": "weighted_sum", "plus": ["environment", "environment"]}
    config = mixed(bandit("a"), bandit("b"), reward=doubled)
    assert config.reward["plus"] == [BanditEnv.reward, BanditEnv.reward]
    config = mixed(bandit("a", reward=OTHER), bandit("b"), reward=doubled)
    assert config.reward == {}
    assert [c.reward for c in config.mixture] == [OTHER, {**doubled, "plus": [BanditEnv.reward, BanditEnv.reward]}]
    assert from_table(config.table()) == config


def test_multipliers_belong_to_one_declared_reward():
    config = mixed(bandit("a"), bandit("b"), reward=PRICED)
    found = reward_of(config, make_env(config))
    found.multipliers.restore({"length": 0.5})
    assert found.derived == ("policy.tokens",)
    assert found.of(sample("a", 1.0).trajectory).declaration["constraints"]["length"]["multiplier"] == 0.5
    config = mixed(bandit("a", reward=PRICED), bandit("b"))
    with pytest.raises(ConfigError, match=r"reward of a has a constraint.*run with one declared reward"):
        reward_of(config, make_env(config))


# --- scale ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), min_size=1, max_size=6))
def test_a_running_spread_is_that_of_all_values(batches):
    spread = Spread()
    for batch in batches:
        spread = spread.joined(batch)
    values = np.concatenate(batches)
    assert (spread.size, spread.mean) == (len(values), pytest.approx(values.mean(), abs=1e-9))
    if values.std() > 1e-6:
        assert spread.scale == pytest.approx(1 / values.std(), rel=1e-6)


@pytest.mark.parametrize("values", [[3.0], [0.1] * 7, [0.0, 0.0], [-1e6] * 3])
def test_one_value_and_equal_values_are_left_as_they_are(values):
    assert Spread().joined(values).scale == 1.0
    assert Spread().joined(values).joined(values[:1]).scale == 1.0
    assert Spread().scale == 1.0


def test_rewards_are_scaled_by_domain_and_still_reconcile():
    config = mixed(bandit("a", scale="std"), bandit("b", scale=0.5), bandit("c"))
    domains = Domains(config, make_env(config))
    given_ = [sample("a", 10.0), sample("b", 8.0), sample("a", -10.0), sample("c", 3.0), sample("a", None)]
    scaled = domains.scaled(given_)
    assert [s.value for s in scaled] == [1.0, 4.0, -1.0, 3.0, None]
    assert [s.trajectory for s in scaled] == [s.trajectory for s in given_]
    for before, after in zip(given_, scaled, strict=True):
        if before.reward and after.reward:
            check_reconciles(after.reward)
            assert after.reward.extra == before.reward.extra
    assert domains.spreads["a"].size == 2
    assert domains.scaled([sample("a", 0.0)])[0].value == 0.0
    assert domains.scale("a") == pytest.approx(1 / np.std([10.0, -10.0, 0.0]))


def test_a_base_is_scaled_too():
    based = sample("a", 2.0)._replace(reward=composer(OTHER).trajectory(sample("a", 2.0).trajectory))
    config = mixed(bandit("a", scale=2.0), bandit("b"))
    (scaled,) = Domains(config, make_env(config)).scaled([based])
    assert scaled.reward is not None
    assert (scaled.reward.value, scaled.reward.base) == (11.0, -1.0)
    check_reconciles(scaled.reward)


def test_a_run_without_a_mixture_is_left_alone():
    domains = Domains(from_table(table()), BanditEnv())
    samples = [sample("", 1.0), sample("elsewhere", 2.0)]
    assert domains.scaled(samples) == samples
    assert domains.update(samples) == {}
    domains.restore(json.loads(json.dumps(domains.state())))


# --- curriculum -------------------------------------------------------------------------------------------------

NAMES = "abcd"
rates = st.lists(st.none() | st.floats(0.0, 1.0), min_size=4, max_size=4)


@given(
    kind=st.sampled_from(["fixed", "learnable", "weakest"]),
    floor=st.floats(0.0, 1.0),
    weights=st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4),
    found=rates,
)
def test_shares_add_up_and_keep_their_floor(kind, floor, weights, found):
    declared = {name: w / sum(weights) for name, w in zip(NAMES, weights, strict=True)}
    success = {name: rate for name, rate in zip(NAMES, found, strict=True) if rate is not None}
    moved = shares(Curriculum(kind=kind, floor=floor), declared, success)
    assert sum(moved.values()) == pytest.approx(1.0)
    assert all(moved[name] >= floor * declared[name] * (1 - 1e-12) for name in NAMES)


def test_shares_go_where_most_is_to_be_learnt_or_success_is_least():
    even = {"never": 0.25, "sometimes": 0.25, "always": 0.25, "unseen": 0.25}
    success = {"never": 0.0, "sometimes": 0.5, "always": 1.0}
    learnable = shares(Curriculum(kind="learnable", floor=0.2), even, success)
    assert learnable == pytest.approx({"never": 0.05, "sometimes": 0.45, "always": 0.05, "unseen": 0.45})
    weakest = shares(Curriculum(kind="weakest", floor=0.0), even, success)
    assert weakest == pytest.approx({"never": 0.5, "sometimes": 0.25, "always": 0.0, "unseen": 0.25})
    assert shares(Curriculum(kind="learnable"), even, dict.fromkeys(even, 1.0)) == even
    assert shares(Curriculum(kind="fixed"), even, success) == even


def test_success_runs_on_and_a_failed_episode_says_nothing():
    config = mixed(bandit("a"), bandit("b"), curriculum={"kind": "weakest", "floor": 0.0, "decay": 0.5})
    env = make_env(config)
    domains = Domains(config, env)
    assert isinstance(env, Mixture)
    told = domains.update([sample("a", 1.0, success=1.0), sample("a", None), sample("b", None)])
    assert domains.success == {"a": 1.0}
    assert (
        told
        == {"domain/a/weight": 0.0, "domain/b/weight": 1.0}
        == {f"domain/{n}/weight": w for n, w in env.weights.items()}
    )
    domains.update([sample("a", 0.0, success=0.0), *[sample("b", 1.0, success=1 / 3)] * 4])
    assert domains.success == pytest.approx({"a": 1 / 3, "b": 1 / 3})
    domains.update([sample("b", 1.0, success=1.0)] * 2)
    assert domains.success == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert env.weights == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert env.shares == {"a": 0.5, "b": 0.5}


# --- resume -----------------------------------------------------------------------------------------------------


class Life:
    """A run as far as tasks, shares and scales go: what a task brings hangs on the task and the step alone."""

    def __init__(self, config: Config) -> None:
        env = make_env(config)
        assert isinstance(env, Mixture)
        self.env, self.domains, self.drawn = env, Domains(config, env), Counter[str]()
        self.stream = env.course(7)
        self.values: list[float | None] = []

    def update(self, step: int, tasks: int = 5) -> list[Task]:
        found = list(islice(self.stream, tasks))
        self.drawn.update(task.labels[DOMAIN] for task in found)
        luck = [share("luck", step, task.id) for task in found]
        played = [
            sample(t.labels[DOMAIN], None if x > 0.9 else x, success=float(x > 0.5))
            for t, x in zip(found, luck, strict=True)
        ]
        self.values += [s.value for s in self.domains.scaled(played)]
        self.domains.update(played)
        return found

    def resumed(self, config: Config) -> Life:
        """Another process: what a checkpoint holds, through JSON, and nothing else."""
        state, drawn = json.loads(json.dumps([self.domains.state(), self.drawn]))
        other = Life(config)
        other.domains.restore(state)
        other.drawn, other.values = Counter(drawn), list(self.values)
        other.stream = other.env.course(7, drawn)
        return other


@given(steps=st.integers(1, 12), cuts=st.sets(st.integers(0, 11)), kind=st.sampled_from(["learnable", "weakest"]))
def test_a_run_cut_anywhere_draws_scales_and_shares_as_an_uninterrupted_one(steps, cuts, kind):
    config = mixed(bandit("a", scale="std"), bandit("b", 2.0, scale="std"), bandit("c", 0.5), curriculum={"kind": kind})
    whole, cut = Life(config), Life(config)
    for step in range(steps):
        if step in cuts:
            cut = cut.resumed(config)
        assert cut.update(step) == whole.update(step)
    assert cut.values == whole.values
    assert cut.env.weights == whole.env.weights
    assert whole.env.weights != whole.env.shares


# --- what readers of domains get --------------------------------------------------------------------------------


def test_figures_are_told_by_domain_and_failures_are_in_no_mean():
    found = figures.outcomes([sample("a", 1.0, 1.0), sample("a", 0.0, 0.0), sample("a", None), sample("b/c", 4.0)])
    told = {name: value for name, value in found.items() if name.startswith("domain/")}
    assert told == {
        "domain/a/return": 0.5,
        "domain/a/success": 0.5,
        "domain/a/episodes": 2.0,
        "domain/a/share": 0.75,
        "domain/b/c/return": 4.0,
        "domain/b/c/episodes": 1.0,
        "domain/b/c/share": 0.25,
    }
    assert not any(name.startswith("domain/") for name in figures.outcomes([sample("", 1.0)]))


def test_advantages_compare_within_a_domain_and_batches_carry_it():
    samples = [sample("a", 1.0), sample("a", 3.0), sample("b", 10.0), sample("b", 20.0)]
    held = [(s.trajectory, s.reward) for s in samples]
    credit = advantages(held, (Term(key="domain", centre="mean", scale="none"),))
    assert [float(a[0]) for a in credit] == [-1.0, 1.0, -5.0, 5.0]
    (batch,) = collate([s.trajectory for s in samples], credit, max_tokens=1000)
    assert batch.domains is not None
    first, second, third, fourth = batch.domains[np.argsort(batch.owners)]
    assert first == second != third == fourth


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "sections", "reason"),
    [
        ([], {}, "plays the components of .*there is none"),
        ([bandit("a")], {"env": {"id": "bandit-v0"}}, "env.id = 'mixture', and it is 'bandit-v0'"),
        ([bandit("a")], {"env": {"id": "mixture", "broken": True}}, "env.broken: a mixture has no settings of its own"),
        ([bandit("a"), bandit("a")], {}, "2 components of the mixture are called 'a'"),
        ([bandit(""), bandit("")], {}, "2 components of the mixture are called 'bandit-v0'"),
        ([bandit("a", 0.0)], {}, "weight of a is above 0 and finite; got 0.0"),
        ([bandit("a", math.inf)], {}, "weight of a is above 0 and finite; got inf"),
        ([bandit("a", scale=-1.0)], {}, r"mixture\[0\].scale is above 0 and finite, or 'std'; got -1.0"),
        ([{"env": {"id": "mixture"}}], {}, r"mixture\[0\].env.id names an environment of the catalogue"),
        ([{"env": {}}], {}, r"mixture\[0\].env.id names an environment of the catalogue; got None"),
        ([bandit("a")], {"curriculum": {"floor": 1.5}}, r"floor is in \[0, 1\]"),
        ([bandit("a")], {"curriculum": {"decay": 1.0}}, r"decay in \[0, 1\)"),
        ([bandit("a", reward={"op": "potential", "name": "phi", "gamma": 0.9})],
         {"advantage": [{"credit": "return_to_go", "gamma": 1.0}]}, "gamma = 0.9"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(parts, sections, reason):
    with pytest.raises(ConfigError, match=reason):
        mixtures.refuse(mixed(*parts, **sections))


def test_a_curriculum_needs_a_mixture():
    register()
    with pytest.raises(ConfigError, match="moves the shares of a mixture"):
        mixtures.refuse(from_table({**table(), "curriculum": {"kind": "weakest"}}))


@pytest.mark.parametrize("mixture", [3, "a", [3], [{"name": "a"}], [{"env": {}, "wieght": 1}]])
def test_what_is_no_component_is_named(mixture):
    with pytest.raises(ConfigError, match="mixture"):
        from_table({**table(), "env": {"id": "mixture"}, "mixture": mixture})


def test_a_component_is_declared_as_it_is_read():
    assert mixed(bandit("a")).mixture == (Component(env={"id": "bandit-v0"}, name="a"),)
