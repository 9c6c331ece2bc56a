"""The runner: order, groups, deadlines, retries, cancellation, several agents, and what is recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import islice
from typing import Any

import pytest

from agentgym.env import Environment, SingleAgentEnv
from agentgym.errors import ConfigError, SandboxUnavailable, ToolFault, UnknownName
from agentgym.policy import Load, Scripted
from agentgym.rollout import Limits, Runner, episodes
from agentgym.testing.fakes import LATENCIES, CountingEnv, FakePolicy, FlakyEnv, SimulatedPolicy
from agentgym.types import (
    AGENT,
    Action,
    Draft,
    Episode,
    Observation,
    RewardTerm,
    StepResult,
    Task,
    Trajectory,
    decode,
    encode,
    iterate,
    say,
)


def first(env: Environment, count: int, group_size: int = 1, seed: int = 0) -> list[Episode]:
    return list(islice(episodes(env.tasks(), group_size, seed), count))


def oracle(env: Environment) -> Any:
    return env.ladder()["oracle"]


def acting(decide: Callable[[Observation], Any]) -> Scripted:
    return Scripted(lambda episode, agent: decide)


# --- episodes and order -----------------------------------------------------------------------------------------


def test_members_of_a_group_share_task_and_seed_and_groups_differ() -> None:
    found = first(CountingEnv(), 6, group_size=3)
    assert [e.member for e in found] == [0, 1, 2, 0, 1, 2]
    assert len({(e.task.id, e.seed, e.group) for e in found}) == 2
    assert found == first(CountingEnv(), 6, group_size=3)
    assert {e.seed for e in found}.isdisjoint(e.seed for e in first(CountingEnv(), 6, group_size=3, seed=1))
    with pytest.raises(ConfigError, match="group_size is at least 1"):
        next(episodes([], group_size=0), None)


async def test_a_solved_episode_is_recorded_exactly() -> None:
    env = CountingEnv(turns=3)
    (found,) = await Runner(env, oracle(env)).collect(first(env, 1))
    start = found.task.payload["start"]
    assert [t.action.text for t in iterate(found.turns)] == [str(start + n) for n in (1, 2, 3)]
    assert [(r.name, r.value, r.level, r.turn, r.agent) for r in found.rewards] == [
        ("correct", 1.0, "turn", 0, AGENT),
        ("correct", 1.0, "turn", 1, AGENT),
        ("correct", 1.0, "turn", 2, AGENT),
        ("finish", 1.0, "episode", 2, AGENT),
    ]
    assert (found.status, found.metrics, found.env_version) == ("terminated", {"success": 1.0}, "1")
    assert len(found.turns[0].observation.messages[0].text) == 220
    assert decode(encode(found), Trajectory) == found


async def test_run_yields_in_the_order_of_ending_and_collect_in_the_order_given() -> None:
    env = CountingEnv(turns=1)
    delays = {0: 0.06, 1: 0.0, 2: 0.03}

    async def slow(member: int) -> Action:
        await asyncio.sleep(delays[member])
        return Action()

    policy = Scripted(lambda episode, agent: lambda observation: slow(episode.member))
    asked = first(env, 3, group_size=3)
    ended = [t.episode.member async for t in Runner(env, policy).run(asked)]
    collected = [t.episode.member for t in await Runner(env, policy).collect(asked)]
    assert (ended, collected) == ([1, 2, 0], [0, 1, 2])


async def test_groups_arrive_whole_and_in_member_order_whatever_the_latency() -> None:
    env = CountingEnv(turns=2)
    policy = SimulatedPolicy(LATENCIES["pareto"](0.002), seed=3)
    runner = Runner(env, policy, concurrency=7)
    found = [g async for g in runner.groups(episodes(islice(env.tasks(), 10), 4))]
    assert len(found) == 10
    assert all([t.episode.member for t in g] == [0, 1, 2, 3] for g in found)
    assert all(len({t.episode.group for t in g}) == 1 for g in found)
    assert runner.counts == {"terminated": 40}


async def test_concurrency_changes_nothing_but_the_clock() -> None:
    env = CountingEnv(turns=3)
    policy = SimulatedPolicy(LATENCIES["lognormal"](0.001))
    alone = await Runner(env, policy, concurrency=1).collect(first(env, 8, 2))
    together = await Runner(env, policy, concurrency=8).collect(first(env, 8, 2))
    assert [t.content() for t in alone] == [t.content() for t in together]


async def test_the_source_is_read_only_as_fast_as_trajectories_are_taken() -> None:
    env = CountingEnv(turns=1)
    pulled = 0

    def source() -> Iterator[Episode]:
        nonlocal pulled
        for episode in episodes(env.tasks()):
            pulled += 1
            yield episode

    async with aclosing(Runner(env, FakePolicy(), concurrency=4).run(source())) as stream:
        async for _ in stream:
            await asyncio.sleep(0.02)
            break
    assert pulled <= 4 * 2 + 4 + 1


async def test_an_error_of_the_source_reaches_the_caller() -> None:
    def source() -> Iterator[Episode]:
        yield from first(CountingEnv(), 2)
        raise OSError("the file of tasks is gone")

    with pytest.raises(OSError, match="file of tasks"):
        await Runner(CountingEnv(), FakePolicy()).collect(source())


def test_run_sync_and_bad_settings() -> None:
    env = CountingEnv()
    assert len(Runner(env, oracle(env)).run_sync(first(env, 3))) == 3
    with pytest.raises(ConfigError, match="concurrency is at least 1"):
        Runner(env, FakePolicy(), concurrency=0)
    with pytest.raises(ConfigError, match="positive seconds"):
        Limits(turn_seconds=0)
    with pytest.raises(ConfigError, match="max_turns is at least 1"):
        Limits(max_turns=0)


# --- ends, faults and deadlines ---------------------------------------------------------------------------------


async def test_max_turns_truncates_and_keeps_the_last_observation() -> None:
    env = CountingEnv(turns=8)
    (found,) = await Runner(env, oracle(env), limits=Limits(max_turns=3)).collect(first(env, 1))
    assert (found.status, len(found.turns)) == ("truncated", 3)
    assert f"The number is {found.task.payload['start'] + 3}." in found.final[AGENT].messages[0].text


async def test_a_fault_is_retried_with_the_same_task_and_seed_and_heals() -> None:
    steady, flaky = CountingEnv(turns=4), FlakyEnv(turns=4, raises=0.1)
    asked = first(steady, 30)
    runner = Runner(flaky, oracle(steady), retries=8)
    found = await runner.collect(asked)
    assert runner.counts["retries.environment"] == runner.counts["retries"] > 0
    assert runner.counts["terminated"] == 30
    assert [t.episode for t in found] == asked
    assert [list(t.rewards) for t in found] == [
        list(t.rewards) for t in await Runner(steady, oracle(steady)).collect(asked)
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ToolFault, "tool"),
        (SandboxUnavailable, "sandbox"),
        (RuntimeError, "environment"),
        (asyncio.CancelledError, "cancelled"),
    ],
)
async def test_a_persisting_fault_is_a_failure_of_its_kind_and_never_a_reward(error: Any, kind: str) -> None:
    env = FlakyEnv(raises=1.0, persistent=True, error=error)
    runner = Runner(env, FakePolicy(), retries=2)
    (found,) = await runner.collect(first(env, 1))
    assert found.status == "failed"
    assert found.failure is not None
    assert (found.failure.kind, found.failure.step, found.failure.attempts) == (kind, 0, 3)
    assert not list(found.rewards)
    assert runner.counts == {"failed": 1, f"failed.{kind}": 1, "retries": 2, f"retries.{kind}": 2}
    assert env.census["begun"] == env.census["closed"] == 3


async def test_what_a_policy_raises_is_an_engine_failure_and_what_it_answers_is_checked() -> None:
    def broken(observation: Observation) -> Action:
        raise ZeroDivisionError("no batch")

    env = CountingEnv()
    (raised,) = await Runner(env, acting(broken), retries=0).collect(first(env, 1))
    assert raised.failure is not None
    assert (raised.failure.kind, raised.failure.message) == ("engine", "act: ZeroDivisionError: no batch")

    async def nothing(observation: Observation) -> Any:
        return None

    (odd,) = await Runner(env, acting(nothing), retries=0).collect(first(env, 1))
    assert odd.failure is not None
    assert "answered NoneType, not an Action" in odd.failure.message


@pytest.mark.parametrize(
    ("limits", "said"),
    [(Limits(turn_seconds=0.05), "the turn's 0.05 s"), (Limits(episode_seconds=0.05), "the episode's 0.05 s")],
)
async def test_a_hanging_step_runs_into_its_deadline_and_everything_is_closed(limits: Limits, said: str) -> None:
    env = FlakyEnv(hangs=1.0, persistent=True)
    policy = FakePolicy()
    runner = Runner(env, policy, retries=1, limits=limits)
    began = time.perf_counter()
    found = await runner.collect(first(env, 40))
    assert time.perf_counter() - began < 2.0
    assert {(t.failure.kind, t.failure.message) for t in found if t.failure} == {("timeout", f"step: {said} were over")}
    assert runner.counts["failed.timeout"] == 40
    assert policy.opened == policy.closed == 80
    assert env.census["begun"] == env.census["closed"] == 80


async def test_an_episode_deadline_is_for_all_turns_together() -> None:
    async def slow(observation: Observation) -> Action:
        await asyncio.sleep(0.02)
        return Action()

    env = CountingEnv(turns=100)
    limits = Limits(turn_seconds=5, episode_seconds=0.1)
    (found,) = await Runner(env, acting(slow), limits=limits, retries=0).collect(first(env, 1))
    assert found.failure is not None
    assert found.failure.kind == "timeout"
    assert 2 <= len(found.turns) == found.failure.step <= 10


async def test_a_held_loop_is_nobodys_timeout() -> None:
    async def slow(observation: Observation) -> Action:
        await asyncio.sleep(0.05)
        return Action()

    env = CountingEnv(turns=4)
    runner = Runner(env, acting(slow), concurrency=4, limits=Limits(turn_seconds=0.15, episode_seconds=0.6), retries=0)
    async with aclosing(runner.run(first(env, 8))) as stream:
        async for _ in stream:
            time.sleep(0.2)  # noqa: ASYNC251 - a learner that trains on the loop
    assert runner.counts == {"terminated": 8}


async def test_a_failed_member_stays_in_its_group() -> None:
    env = CountingEnv(turns=1)

    def decide(episode: Episode, agent: str) -> Callable[[Observation], Action]:
        def act(observation: Observation) -> Action:
            if episode.member == 1:
                raise OSError("lost")
            return Action()

        return act

    runner = Runner(env, Scripted(decide), retries=0)
    (group,) = [g async for g in runner.groups(first(env, 3, group_size=3))]
    assert [t.status for t in group] == ["terminated", "failed", "terminated"]


class Rude(CountingEnv):
    """Raises when it is closed."""

    async def close(self) -> None:
        raise OSError("socket already closed")


async def test_an_unclean_close_is_counted_and_the_outcome_stands() -> None:
    env = Rude(turns=1)
    runner = Runner(env, FakePolicy())
    (found,) = await runner.collect(first(env, 1))
    assert found.status == "terminated"
    assert runner.counts == {"terminated": 1, "unclean": 1}


class Silent(CountingEnv):
    """Ends nothing and shows nothing."""

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        return StepResult()


class NotANumber(CountingEnv):
    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        return StepResult(rewards=(RewardTerm(name="score", value=float("nan")),), terminated=True)


class Nonsense(CountingEnv):
    """Ends with this answer, which no record can be."""

    def __init__(self, **answer: Any) -> None:
        super().__init__()
        self.answer = answer

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        return StepResult(**self.answer, terminated=True)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (Silent(), "nobody can act next"),
        (NotANumber(), "'score' is nan"),
        (Nonsense(metrics={"success": float("nan")}), "metric 'success' is nan"),
        (Nonsense(metrics={"success": "yes"}), "must be real number"),
        (Nonsense(observations={"agent": "go on"}), "'agent' was given str, not an Observation"),
    ],
)
async def test_a_broken_answer_of_an_environment_is_its_fault(env: Environment, said: str) -> None:
    (found,) = await Runner(env, FakePolicy(), retries=0).collect(first(env, 1))
    assert found.failure is not None
    assert found.failure.kind == "environment"
    assert said in found.failure.message


# --- cancellation -----------------------------------------------------------------------------------------------


async def test_closing_the_stream_releases_every_session_and_environment() -> None:
    env, policy = CountingEnv(), SimulatedPolicy(5.0)
    runner = Runner(env, policy, concurrency=50)

    async def consume() -> None:
        async with aclosing(runner.run(episodes(env.tasks()))) as stream:
            async for _ in stream:
                raise AssertionError("nothing can have ended")

    consumer = asyncio.create_task(consume())
    await asyncio.sleep(0.05)
    assert (env.census["begun"], policy.opened) == (50, 50)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert (env.census["closed"], policy.closed) == (50, 50)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_an_interrupt_cleans_up() -> None:
    env, policy = CountingEnv(), SimulatedPolicy(5.0)

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.05, _interrupt)
        await Runner(env, policy, concurrency=20).collect(episodes(env.tasks()))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert policy.opened == policy.closed == env.census["begun"] == env.census["closed"] == 20


def _interrupt() -> None:
    raise KeyboardInterrupt


class Stubborn(CountingEnv):
    """Takes a while to close: a cancellation meanwhile may not leave it half open."""

    async def close(self) -> None:
        await asyncio.sleep(0.05)
        await super().close()


async def test_a_slow_close_is_awaited_after_cancellation() -> None:
    env = Stubborn()
    task = asyncio.create_task(Runner(env, SimulatedPolicy(5.0), concurrency=3).collect(episodes(env.tasks())))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert env.census["closed"] == 3


# --- several agents ---------------------------------------------------------------------------------------------


class Duel(Environment):
    """Two agents act at once, then one alone, then it ends; the ledger has a term for each case of filing."""

    id = "duel-v0"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        yield Task(env=self.id, labels={"domain": "games"})

    async def reset(self, task: Task) -> dict[str, Observation]:
        self.steps = 0
        return {"a": say("go"), "b": say("go")}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        self.steps += 1
        if self.steps == 1:
            paid = (
                RewardTerm(name="own", value=1.0, agent="a"),
                RewardTerm(name="both", value=2.0, level="team"),
            )
            return StepResult(observations={"b": say("you alone")}, rewards=paid)
        paid = (
            RewardTerm(name="solo", value=3.0),
            RewardTerm(name="late", value=-1.0, agent="a"),
            RewardTerm(name="named", value=4.0, turn=0),
        )
        return StepResult(rewards=paid, terminated=True)


async def test_agents_of_one_step_act_together_and_terms_find_their_turn() -> None:
    both = asyncio.Barrier(2)

    async def meet(observation: Observation) -> Action:
        if observation.messages[0].text == "go":
            await both.wait()
        return Action(text="met")

    runner = Runner(Duel(), {"a": acting(meet), "b": acting(meet)}, limits=Limits(turn_seconds=2), retries=0)
    (found,) = await runner.collect(episodes(Duel().tasks()))
    assert found.status == "terminated"
    assert [(t.step, t.agent) for t in iterate(found.turns)] == [(0, "a"), (0, "b"), (1, "b")]
    assert {(r.name, r.turn, r.agent) for r in found.rewards} == {
        ("own", 0, "a"),
        ("both", 1, ""),
        ("solo", 2, "b"),
        ("late", 0, "a"),
        ("named", 0, "a"),
    }
    assert all(r.turn == i for i, t in enumerate(iterate(found.turns)) for r in t.rewards)
    assert found.labels == {"domain": "games"}


async def test_when_one_agent_breaks_the_others_are_cancelled() -> None:
    cancelled = []

    async def waits(observation: Observation) -> Action:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append("b")
            raise
        return Action()

    async def breaks(observation: Observation) -> Action:
        await asyncio.sleep(0.01)
        raise OSError("gone")

    (found,) = await Runner(Duel(), {"a": acting(breaks), "b": acting(waits)}, retries=0).collect(
        episodes(Duel().tasks())
    )
    assert (found.status, cancelled) == ("failed", ["b"])


async def test_an_agent_without_a_policy_is_the_callers_mistake() -> None:
    with pytest.raises(UnknownName, match="no policy for agent 'b'"):
        await Runner(Duel(), {"a": FakePolicy()}).collect(episodes(Duel().tasks()))


# --- drafts and fairness ----------------------------------------------------------------------------------------


class Guarded:
    """A policy that rejects its first proposal of each turn."""

    @asynccontextmanager
    async def session(self, episode: Episode, agent: str) -> AsyncIterator[Guarded]:
        yield self

    async def act(self, observation: Observation, sampling: Any = None) -> Action:
        return Action(text="kind")

    def drafts(self) -> tuple[Draft, ...]:
        return (Draft(by="guard", action=Action(text="rude"), reason="tone"),)


async def test_drafts_of_a_session_are_recorded_with_their_turn() -> None:
    env = CountingEnv(turns=2)
    (found,) = await Runner(env, Guarded()).collect(first(env, 1))
    assert [[d.action.text for d in t.drafts] for t in iterate(found.turns)] == [["rude"], ["rude"]]


async def test_episodes_that_never_wait_do_not_hold_the_loop() -> None:
    env = CountingEnv(turns=3000)
    runner = Runner(env, acting(lambda observation: Action()), concurrency=8)
    task = asyncio.create_task(runner.collect(first(env, 8)))
    longest = 0.0
    while not task.done():
        before = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - before)
    assert len(await task) == 8
    assert longest < 0.25


class Crowd(SingleAgentEnv):
    """Counts how many of its episodes are alive at once."""

    id = "crowd-v0"

    def __init__(self) -> None:
        self.alive = {"now": 0, "most": 0}

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, seed=n) for n in range(500))

    async def begin(self, task: Task) -> Observation:
        self.alive["now"] += 1
        self.alive["most"] = max(self.alive.values())
        return say("wait")

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        await asyncio.sleep(0.01)
        return None, StepResult(terminated=True)

    async def close(self) -> None:
        self.alive["now"] -= 1


async def test_no_more_than_concurrency_are_alive_and_all_of_it_is_used() -> None:
    env = Crowd()
    await Runner(env, FakePolicy(), concurrency=100).collect(episodes(env.tasks()))
    assert env.alive == {"now": 0, "most": 100}


@pytest.mark.parametrize(
    ("load", "full"),
    [
        (Load(running=8, waiting=7, slots=8, cache=0.5), False),
        (Load(running=8, waiting=8, slots=8, cache=0.5), True),
        (Load(running=8, waiting=1, slots=8, cache=1.0), True),
        (Load(running=8, waiting=0, slots=8, cache=1.0), False),
    ],
)
def test_an_engine_is_full_where_newcomers_would_only_wait(load: Load, full: bool) -> None:
    assert load.full is full
