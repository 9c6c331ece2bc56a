"""Figures of an evaluation against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ConfigError
from agentgym.evaluation import evaluate, interval, standard_error, summarise
from agentgym.testing import CountingEnv, FlakyEnv
from agentgym.types import Action, Episode, Failure, Observation, RewardTerm, Task, Trajectory, Turn, Turns

REWARD = {"op": "sum"}


def played(
    task: int, member: int, success: float, reward: float, intent: str = "one", failed: bool = False
) -> Trajectory:
    """One attempt at one task, of one turn."""
    turn = Turn(
        step=0, observation=Observation(), action=Action(), rewards=(RewardTerm(name="r", value=reward, turn=0),)
    )
    return Trajectory(
        env="hand-v0",
        episode=Episode(task=Task(env="hand-v0", seed=task), member=member),
        turns=Turns(items=(turn,)),
        status="failed" if failed else "terminated",
        failure=Failure(kind="tool") if failed else None,
        metrics={"success": success, "asks": 2.0 * success},
        labels={"intent": intent},
    )


FOUR_BY_TWO = [
    played(0, 0, 1, 1.0),
    played(0, 1, 1, 1.0),
    played(1, 0, 1, 0.5),
    played(1, 1, 0, 0.1, intent="two"),
    played(2, 0, 0, 0.0, intent="two"),
    played(2, 1, 0, 0.0, intent="two"),
    played(3, 0, 1, 1.0),
    played(3, 1, 1, 9.0, failed=True),
]


def test_success_and_return_leave_failures_out() -> None:
    found = summarise(FOUR_BY_TWO, REWARD, attempts=2)
    assert found.episodes == 7
    assert found.tasks == 4
    assert found.success == pytest.approx(4 / 7)
    assert found.return_mean == pytest.approx(3.6 / 7)
    assert found.failures == {"tool": 1}


def test_pass_all_k_counts_tasks_with_all_attempts() -> None:
    found = summarise(FOUR_BY_TWO, REWARD, attempts=2)
    assert found.avg_at_k == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.pass_all_k == pytest.approx(1 / 3)  # task 3 has a failed attempt: neither passed nor not


def test_standard_error_is_over_tasks() -> None:
    found = summarise(FOUR_BY_TWO, REWARD, attempts=2)
    means = [1.0, 0.3, 0.0, 1.0]
    mean = sum(means) / 4
    assert found.return_se == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / 3 / 4))


def test_metrics_and_labels() -> None:
    found = summarise(FOUR_BY_TWO, REWARD, attempts=2)
    assert found.metrics["asks"] == pytest.approx(8 / 7)
    one, two = found.by_label["intent"]["one"], found.by_label["intent"]["two"]
    assert (one.episodes, one.success) == (4, 1.0)
    assert (two.episodes, two.success) == (3, 0.0)
    assert two.return_mean == pytest.approx(0.1 / 3)


def test_without_success_nothing_is_claimed() -> None:
    bare = [t.replace(metrics={}) for t in FOUR_BY_TWO]
    found = summarise(bare, REWARD, attempts=2)
    assert (found.success, found.success_interval, found.pass_all_k) == (None, None, None)
    assert found.return_mean == pytest.approx(3.6 / 7)


def test_interval_is_wilsons() -> None:
    low, high = interval([1.0] * 8 + [0.0] * 2)  # 8 of 10: the textbook's 0.490 to 0.943
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_attempts_that_disagree_count_as_more_evidence() -> None:
    alike = interval([1.0, 0.0] * 10)  # however many equal attempts are behind each rate, these are 20 tasks
    apart = interval([0.75, 0.25] * 10)
    assert apart[1] - apart[0] < alike[1] - alike[0]
    assert sum(apart) == pytest.approx(sum(alike))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_holds_its_estimate(rates: list[float]) -> None:
    low, high = interval(rates)
    mean = sum(rates) / len(rates)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1


def test_one_value_has_no_error() -> None:
    assert standard_error([3.0]) == 0.0


async def test_the_same_seed_means_the_same_figures() -> None:
    env = CountingEnv(turns=3)
    ladder = env.ladder()
    first = await evaluate(env, ladder["random"], episodes=20, seed=4, concurrency=7)
    again = await evaluate(env, ladder["random"], episodes=20, seed=4, concurrency=2)
    best = await evaluate(env, ladder["oracle"], episodes=20, seed=4)
    assert first.return_mean == again.return_mean
    assert first.turns == 60
    assert first.turns_per_second > 0
    assert best.return_mean == pytest.approx(4.0)  # three right turns and a whole finish
    assert best.return_mean > first.return_mean


async def test_failures_are_counted_and_no_zero() -> None:
    env = FlakyEnv(turns=2, raises=0.3, persistent=True)
    found = await evaluate(env, env.ladder()["oracle"], episodes=12, seed=1)
    assert found.failures["environment"] == 12 - found.episodes
    assert 0 < found.episodes < 12
    assert found.return_mean == pytest.approx(3.0)  # of those that ran: two right turns and a whole finish


async def test_seen_hears_of_every_episode() -> None:
    env, heard = CountingEnv(turns=1), []
    await evaluate(env, env.ladder()["oracle"], episodes=5, seen=heard.append)
    assert len(heard) == 5


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"attempts": 0}])
async def test_nothing_to_evaluate_is_refused(wrong: dict[str, int]) -> None:
    env = CountingEnv()
    with pytest.raises(ConfigError, match="at least one"):
        await evaluate(env, env.ladder()["oracle"], **wrong)
