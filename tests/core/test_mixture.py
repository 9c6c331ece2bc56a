"""Mixtures: shares, streams that go on where they stopped, members that play their own tasks, and what all can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import BanditEnv

from agentgym import make
from agentgym.env import Environment, task_list
from agentgym.errors import ConfigError, UnknownName
from agentgym.evaluation import evaluate
from agentgym.mixture import DOMAIN, ByDomain, Composers, Mixture, composers
from agentgym.policy import Scripted
from agentgym.replay import replaying
from agentgym.rollout import Runner, episodes
from agentgym.testing import check_env
from agentgym.types import Action, Task

SHOP: dict[str, Any] = {"surface": "compact", "size": 200, "intents": ["single"], "soft": 0}


class ShortEnv(BanditEnv):
    """A bandit with ten tasks a split, and its own reward."""

    id = "short-v0"
    version = "7"
    reward = {"op": "weighted_sum", "bias": 1.0, "of": {"hit": 10.0}}  # noqa: RUF012 - declared once, never changed

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, split=split, seed=seed + number) for number in range(10))


def shops(**weights: float) -> Mixture:
    members = {"one": make("shopping-v0", hidden=[1, 1], **SHOP), "two": make("shopping-v0", hidden=[2, 2], **SHOP)}
    return Mixture(members, weights or None)


def bandits(**weights: float) -> Mixture:
    return Mixture({name: BanditEnv() for name in weights}, weights)


def names(tasks: Iterator[Task], count: int) -> list[str]:
    return [task.labels[DOMAIN] for task in islice(tasks, count)]


# --- streams ----------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 400),
)
def test_every_member_has_its_share_of_any_number_of_tasks(weights, seed, count):
    env = bandits(**{f"m{i}": w for i, w in enumerate(weights)})
    drawn = Counter(names(env.tasks("train", seed), count))
    for name, share in env.shares.items():
        assert abs(drawn[name] - share * count) < 4.0


def test_a_stream_is_its_members_streams_in_their_order_and_repeats():
    env = shops(one=1.0, two=3.0)
    tasks = task_list(env, "train", 5, 40)
    assert tasks == task_list(env, "train", 5, 40) != task_list(env, "train", 6, 40)
    for name, member in env.members.items():
        own = [task for task in tasks if task.labels[DOMAIN] == name]
        assert [t.replace(labels={"intent": "single"}) for t in own] == task_list(member, "train", 5, len(own))


def test_a_short_member_begins_again_in_training_and_ends_an_evaluation():
    env = Mixture({"short": ShortEnv(), "long": BanditEnv()}, {"short": 1.0, "long": 4.0})
    training = [t.seed for t in task_list(env, "train", 0, 200) if t.labels[DOMAIN] == "short"]
    assert len(training) >= 38
    assert len(set(training)) == len(training)
    held_out = Counter(names(env.tasks("test", 0), 10_000))
    assert held_out["short"] == 10
    assert abs(held_out["long"] - 40) < 5


def test_a_member_without_tasks_is_named():
    class Empty(BanditEnv):
        def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
            return iter(())

    with pytest.raises(ConfigError, match=r"none .bandit-v0. has no task in the split 'train'"):
        task_list(Mixture({"none": Empty()}), "train", 0, 1)


@given(
    moves=st.lists(st.tuples(st.integers(1, 30), st.floats(0.0, 1.0), st.floats(0.01, 1.0)), min_size=1, max_size=6),
    stop=st.integers(0, 60),
)
def test_a_course_goes_on_exactly_where_it_stopped_while_its_weights_move(moves, stop):
    """Cut anywhere, in the middle of a stretch of weights too, the rest is what an uninterrupted course gives."""
    whole, cut = (Mixture({"short": ShortEnv(), "long": BanditEnv()}) for _ in range(2))
    stream, again, found, resumed = whole.course(3), cut.course(3), [], []
    for count, short, long in moves:
        whole.weights = cut.weights = {"short": short, "long": long}
        for _ in range(count):
            found.append(next(stream))
            if len(resumed) == stop:
                again = cut.course(3, Counter(task.labels[DOMAIN] for task in resumed))
            resumed.append(next(again))
    assert resumed == found


def test_a_course_by_the_declared_shares_is_the_training_stream_and_a_weight_of_zero_is_never_drawn():
    env = bandits(a=1.0, b=2.0)
    assert list(islice(env.course(9), 50)) == task_list(env, "train", 9, 50)
    env.weights = {"a": 1.0, "b": 0.0}
    assert set(names(env.course(9), 200)) == {"a"}
    assert set(names(env.tasks("train", 9), 20)) == {"a", "b"}


# --- episodes ---------------------------------------------------------------------------------------------------


def test_shopping_configurations_conform_in_another_process_too():
    report = check_env(shops(one=1.0, two=2.0), episodes=4)
    report.raise_for_failures()
    assert {c.status for c in report.checks} == {"passed"}


def test_toys_conform_as_far_as_their_members_do():
    """The bandit is no full environment: the same tasks in every split, and a step after the end goes on."""
    own, mixed = (
        check_env(env, episodes=4, processes=False)
        for env in (BanditEnv(), Mixture({"bandit": BanditEnv(), "short": ShortEnv()}))
    )
    assert {c.name: c.status for c in own.checks} == {c.name: c.status for c in mixed.checks}


async def test_trajectories_bear_the_members_id_version_and_domain_and_replay():
    env = Mixture({"bandit": BanditEnv(), "short": ShortEnv()})
    runner = Runner(env, env.ladder()["random"], concurrency=4)
    played = await runner.collect(episodes(task_list(env, "train", 0, 8), group_size=2))
    assert {(t.labels[DOMAIN], t.env, t.env_version) for t in played} == {
        ("bandit", "bandit-v0", "1"),
        ("short", "short-v0", "7"),
    }
    for trajectory in played:
        assert await replaying(trajectory, env)
        assert await replaying(trajectory, env.members[trajectory.labels[DOMAIN]])


async def test_a_failure_is_the_members_and_a_foreign_task_is_refused():
    env = Mixture({"good": BanditEnv(), "broken": BanditEnv(broken=True)})
    runner = Runner(env, env.ladder()["oracle"], retries=0)
    played = await runner.collect(episodes(task_list(env, "train", 0, 6)))
    assert {(t.labels[DOMAIN], t.status) for t in played} == {("good", "terminated"), ("broken", "failed")}
    assert {t.env for t in played} == {"bandit-v0"}
    with pytest.raises(UnknownName, match="a mixture plays the tasks that it gives"):
        await env.spawn().reset(Task(env="bandit-v0"))


async def test_an_instance_can_be_used_again_for_another_member_and_not_without_a_task():
    env = shops().spawn()
    with pytest.raises(ConfigError, match="no episode is running"):
        await env.step({})
    for name in ("one", "two"):
        task = next(t for t in env.tasks("test") if t.labels[DOMAIN] == name)
        assert (await env.reset(task))["agent"].messages
    await env.close()
    await env.close()


# --- capabilities -----------------------------------------------------------------------------------------------


def test_it_can_what_all_members_can():
    both = Mixture({"shop": make("shopping-v0", **SHOP), "bandit": BanditEnv()})
    assert both.capabilities == {"ladder"}
    assert shops().capabilities == make("shopping-v0", **SHOP).capabilities
    assert list(both.ladder()) == ["random", "oracle"]
    assert {"teacher", "oracle"} <= shops().demonstrations().keys()


def test_hints_answers_and_twins_are_the_members():
    env = shops()
    for task in task_list(env, "train", 0, 6):
        member = env.members[task.labels[DOMAIN]]
        assert (env.hint(task, 2), env.answer(task)) == (member.hint(task, 2), member.answer(task))
        assert env.hidden_twin(task).labels == task.labels


def test_the_vocabulary_is_the_union_in_order_and_refused_where_a_member_has_none():
    class Mute(BanditEnv):
        vocabulary = property()  # as if it had none

    env = Mixture({"bandit": BanditEnv(), "shop": make("shopping-v0", **SHOP)})
    words = env.vocabulary()
    assert words[:3] == ["pick", "one", "another"]
    assert len(set(words)) == len(words)
    assert set(words) == {*BanditEnv().vocabulary(), *make("shopping-v0", **SHOP).vocabulary()}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"mute .bandit-v0. has no method vocabulary"):
        Mixture({"bandit": BanditEnv(), "mute": Mute()}).vocabulary()


@pytest.mark.parametrize(
    ("members", "weights", "reason"),
    [
        ({}, None, "at least one member"),
        ({"a": BanditEnv()}, {"a": 0.0}, "above 0 and finite; got 0.0"),
        ({"a": BanditEnv()}, {"a": float("nan")}, "above 0 and finite; got nan"),
        ({"a": BanditEnv(), "b": BanditEnv()}, {"a": 1.0}, "'b'"),
        ({"a": BanditEnv(), "b": make("gym:CartPole-v1")}, None, "no policy plays both"),
        ({"a": bandits(x=1.0, y=1.0)}, None, "a is a mixture itself"),
    ],
)
def test_what_no_mixture_can_be(members: dict[str, Environment], weights, reason):
    with pytest.raises(ConfigError, match=reason):
        Mixture(members, weights)


# --- rewards ----------------------------------------------------------------------------------------------------


async def test_every_domain_is_rewarded_by_its_own_declaration():
    env = Mixture({"bandit": BanditEnv(), "short": ShortEnv()})
    blue = ByDomain(dict.fromkeys(env.members, Scripted(lambda e, a: lambda o: Action(text="blue"))))
    found = await evaluate(env, blue, episodes=12, split="test")
    parts = found.by_label[DOMAIN]
    assert {name: part.return_mean for name, part in parts.items()} == {"bandit": 2.0, "short": 21.0}
    assert {part.success for part in parts.values()} == {1.0}
    assert parts["bandit"].episodes + parts["short"].episodes == 12
    assert found.return_mean == pytest.approx((2 * parts["bandit"].episodes + 21 * parts["short"].episodes) / 12)


def test_composers_know_their_domains_and_what_they_read():
    env = Mixture({"bandit": BanditEnv(), "short": ShortEnv()})
    task = next(t for t in env.tasks() if t.labels[DOMAIN] == "short")
    assert composers(env).of(task).declaration == ShortEnv.reward
    assert composers(BanditEnv()).of(task).declaration == BanditEnv.reward
    own = {"bandit": "policy.tokens", "short": {"op": "sum"}}
    assert Composers({"op": "sum"}, own).derived == ("policy.tokens",)
    assert env.reward == Environment.reward
    assert bandits(a=1.0, b=1.0).reward == BanditEnv.reward
