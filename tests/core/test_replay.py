"""Replay: the same episode again, and the first difference in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import pytest

import agentgym
from agentgym.env import Environment
from agentgym.policy import Scripted
from agentgym.replay import replay, replaying
from agentgym.rewards.judges import judged, rule
from agentgym.rollout import Limits, Runner, episodes
from agentgym.testing.fakes import CountingEnv, FakePolicy, FlakyEnv, SimulatedPolicy
from agentgym.types import (
    Action,
    Array,
    Observation,
    RewardTerm,
    StepResult,
    Task,
    Trajectory,
    Turns,
    decode,
    encode,
    say,
)


def recorded(env: Environment, limits: Limits | None = None, number: int = 0) -> Trajectory:
    runner = Runner(env, SimulatedPolicy(), limits=limits, retries=0)
    return runner.run_sync(islice(episodes(env.tasks()), number, number + 1))[0]


def test_an_episode_replays_also_after_the_disk() -> None:
    env = CountingEnv()
    stored = decode(encode(recorded(env)), Trajectory)
    report = replay(stored, CountingEnv())
    assert report
    assert str(report) == "counting-v0: same, 8 turns, terminated"
    assert list(report.played.rewards) == list(stored.rewards)


async def test_what_judges_added_is_not_asked_of_the_environment() -> None:
    env = CountingEnv()
    (stored,) = await judged(
        rule("nice", lambda t: 1.0), await Runner(env, SimulatedPolicy()).collect(islice(episodes(env.tasks()), 1))
    )
    assert [term.name for term in stored.rewards if term.by == "judge"] == ["nice"]
    assert (await replaying(decode(encode(stored), Trajectory), env)).same
    last = stored.turns.items[-1]  # type: ignore[union-attr]
    forged = last.replace(rewards=tuple(term.replace(by="environment") for term in last.rewards))
    changed = stored.replace(turns=Turns(items=(*stored.turns.items[:-1], forged)))  # type: ignore[union-attr]
    assert "reward: recorded nice = 1.0" in (await replaying(changed, env)).difference


async def test_it_replays_inside_a_running_loop() -> None:
    env = CountingEnv()
    (stored,) = await Runner(env, FakePolicy()).collect(islice(episodes(env.tasks()), 1))
    assert replay(stored, env).same
    assert (await replaying(stored, env)).same


def test_a_truncated_episode_and_the_turns_of_a_failed_one_replay() -> None:
    env = CountingEnv()
    cut = recorded(env, Limits(max_turns=3))
    assert (cut.status, replay(cut, env).turns) == ("truncated", 3)
    assert replay(cut, env).same
    failed = recorded(FlakyEnv(raises=0.2, persistent=True), number=2)
    assert (failed.status, len(failed.turns) > 0) == ("failed", True)
    assert replay(failed, env).same
    assert replay(failed.replace(turns=Turns()), env).turns == 0


def test_cartpole_replays_by_its_id() -> None:
    env = agentgym.make("gym:CartPole-v1")
    policy = Scripted(lambda episode, agent: lambda seen: Action(array=Array.of(int(seen.array.numpy()[2] > 0))))
    (stored,) = Runner(env, policy).run_sync(islice(episodes(env.tasks()), 1))
    assert replay(stored).same
    task = stored.task.replace(seed=stored.task.seed + 1)
    other = stored.replace(episode=stored.episode.replace(task=task))
    assert "turn 0 (agent), observation array: recorded [" in replay(other).difference


class Louder(CountingEnv):
    """Says the same in another way from the third turn on, and pays otherwise from the second."""

    version = "2"

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.words = words

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        observation, result = await super().act(action)
        if self.turn == 2 and self.words:
            return say("The number was ..."), result
        if self.turn == 2:
            raised: StepResult = result.replace(rewards=(RewardTerm(name="correct", value=0.5),))
            return observation, raised
        return observation, result


def test_the_first_difference_is_told_in_words() -> None:
    stored = recorded(CountingEnv())
    said = replay(stored, Louder(words=True))
    assert not said
    assert said.turns == 2
    assert "turn 2 (agent), observation: recorded 'user: The number is " in said.difference
    assert "now 'user: The number was ...'" in said.difference
    assert "(recorded with version '1' of counting-v0, which is now '2')" in said.difference
    paid = replay(stored, Louder(words=False))
    assert "turn 1 (agent), reward: recorded correct = 0.0 (turn, turn 1, agent), now correct = 0.5" in str(paid)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (CountingEnv(turns=5), "turn 4 (agent), reward: recorded none, now finish = 0.0 (episode"),
        (CountingEnv(turns=12), "turn 7 (agent), reward: recorded finish = 0.0 (episode, turn 7, agent), now none"),
        (FlakyEnv(raises=1.0), "turn 0 (agent), ending: the recording goes on, the replay failed here: step: broke"),
    ],
)
def test_another_length_is_a_difference(env: Environment, said: str) -> None:
    assert replay(recorded(CountingEnv()), env).difference.startswith(said)


class Ends(Environment):
    """Ends after `turns` steps, with these metrics."""

    id = "ends-v0"

    def __init__(self, turns: int, metrics: Mapping[str, float], final: str = "") -> None:
        self.turns, self.metrics, self.final = turns, dict(metrics), final

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        yield Task(env=self.id)

    async def reset(self, task: Task) -> dict[str, Observation]:
        self.left = self.turns
        return {"agent": say("?")}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        self.left -= 1
        if self.left:
            return StepResult(observations={"agent": say("?")})
        final = {"agent": say(self.final)} if self.final else {}
        return StepResult(observations=final, terminated=True, metrics=self.metrics)


@pytest.mark.parametrize(
    ("env", "difference"),
    [
        (Ends(3, {}), "ending: recorded terminated, now truncated"),
        (Ends(1, {}), "turn 1 (agent), ending: the recording goes on, the replay terminated here"),
        (Ends(2, {"success": 1.0}), "metrics: recorded {}, now {'success': 1.0}"),
        (Ends(2, {}, "bye"), "final observation: recorded '', now 'user: bye' (character 0)"),
    ],
)
def test_endings_metrics_and_final_observations_are_compared(env: Environment, difference: str) -> None:
    assert replay(recorded(Ends(2, {})), env).difference == difference
