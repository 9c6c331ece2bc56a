"""Guidance of an episode: actions already taken, sampling of its own, and prompts trained without their hint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from making import span

from agentgym.collate import collate
from agentgym.env import Environment
from agentgym.errors import RecordError
from agentgym.policy import Scripted
from agentgym.replay import replaying
from agentgym.rollout import Limits, Runner, episodes
from agentgym.testing.fakes import CountingEnv
from agentgym.types import (
    Action,
    Array,
    Batch,
    Episode,
    Floats,
    Guidance,
    Ids,
    Observation,
    Sampling,
    StepResult,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    decode,
    encode,
    iterate,
    say,
)


class Listener:
    """A policy that keeps what its sessions heard: ("tell" | "act", last words or action, sampling)."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def session(self, episode: Episode, agent: str) -> Listener:
        return self

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        self.heard.append(("act", sampling))
        return Action(text="mine", logprob=-1.0)

    async def tell(self, observation: Observation, action: Action) -> None:
        self.heard.append(("tell", action))


def guided(env: Environment, **guidance: Any) -> Episode:
    (episode,) = episodes([next(env.tasks())])
    made: Episode = episode.replace(guidance=Guidance(**guidance))
    return made


async def play(env: Environment, policy: Any, episode: Episode, **options: Any) -> Trajectory:
    (found,) = await Runner(env, policy, retries=0, **options).collect([episode])
    return found


# --- the runner -------------------------------------------------------------------------------------------------


async def test_the_runner_plays_the_start_and_tells_the_session_of_it() -> None:
    env, listener = CountingEnv(turns=4), Listener()
    taken = (Action(text="1", span=span([5]), logprob=-0.5, value=2.0), Action(text="2"))
    found = await play(env, listener, guided(env, start=taken), sampling=Sampling(top_k=7))
    said = [turn.action for turn in iterate(found.turns)]
    assert [a.text for a in said] == ["1", "2", "mine", "mine"]
    assert said[:2] == [Action(text="1"), Action(text="2")]
    assert listener.heard == [("tell", taken[0]), ("tell", taken[1]), *[("act", Sampling(top_k=7))] * 2]
    assert [len(t.rewards) for t in iterate(found.turns)] == [1, 1, 1, 2]
    assert decode(encode(found), Trajectory) == found


async def test_the_sampling_of_the_guidance_goes_before_the_runners() -> None:
    env, listener = CountingEnv(turns=1), Listener()
    await play(env, listener, guided(env, sampling=Sampling(temperature=0.0)), sampling=Sampling(top_k=7))
    assert listener.heard == [("act", Sampling(temperature=0.0))]


async def test_a_script_stays_in_step_with_what_it_is_told() -> None:
    """The oracle of counting counts its own calls: behind two actions it would have said itself it is still right."""
    env = CountingEnv(turns=5)
    whole = await play(env, env.ladder()["oracle"], guided(env))
    start = tuple(t.action for t in list(iterate(whole.turns))[:2])
    behind = await play(env, env.ladder()["oracle"], guided(env, start=start))
    assert behind.metrics == {"success": 1.0}
    assert [t.action for t in iterate(behind.turns)] == [t.action for t in iterate(whole.turns)]
    assert (await replaying(behind, env)).same


async def test_a_start_may_end_the_episode_or_meet_its_budget() -> None:
    env, listener = CountingEnv(turns=2), Listener()
    start = (Action(text="1"),) * 3
    ended = await play(env, listener, guided(env, start=start))
    cut = await play(CountingEnv(turns=9), listener, guided(env, start=start), limits=Limits(max_turns=3))
    assert (ended.status, len(ended.turns)) == ("terminated", 2)
    assert (cut.status, len(cut.turns)) == ("truncated", 3)
    assert not [kind for kind, _ in listener.heard if kind == "act"]


async def test_what_is_no_action_is_a_failure() -> None:
    env = CountingEnv(turns=2)
    found = await play(env, Listener(), guided(env, start=("left",)))
    assert found.failure is not None
    assert "not an Action" in found.failure.message


class Pair(Environment):
    """Two agents act at once, three times; the numbers they say are paid to nobody."""

    id, version, numeric = "pair-v0", "1", True

    def tasks(self, split: str = "train", seed: int = 0) -> Any:
        yield Task(env=self.id)

    async def reset(self, task: Task) -> dict[str, Observation]:
        self.step_number = 0
        return {name: Observation(array=Array.of([0.0])) for name in ("a", "b")}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        self.step_number += 1
        seen = {name: Observation(array=Array.of([1.0])) for name in ("a", "b")}
        return StepResult(observations=seen, terminated=self.step_number == 3)


async def test_agents_that_act_at_once_take_the_actions_in_the_order_of_turns() -> None:
    env = Pair()
    taken = tuple(Action(array=Array.of([float(n)]), logprob=-1.0) for n in range(3))
    free = Scripted(lambda episode, agent: lambda seen: Action(array=Array.of([9.0]), logprob=-2.0))
    found = await play(env, free, guided(env, start=taken))
    turns = list(iterate(found.turns))
    said = [(t.agent, float(t.action.array.numpy()[0]), t.action.logprob) for t in turns if t.action.array]
    assert said == [("a", 0, None), ("b", 1, None), ("a", 2, None), ("b", 9, -2), ("a", 9, -2), ("b", 9, -2)]


# --- hinted prompts ---------------------------------------------------------------------------------------------

HINTED = span([5, 6], prompt=[1, 7, 7, 7, 2], suffix=[9], context="hinted", unhinted=Ids([1, 2]))


def episode_of(*spans: TokenSpan, context: str = "original") -> Trajectory:
    turns = tuple(Turn(step=i, observation=say("x"), action=Action(span=found)) for i, found in enumerate(spans))
    episode = Episode(task=Task(env="t"), guidance=Guidance(hint="h", context=context))  # type: ignore[arg-type]
    return Trajectory(env="t", episode=episode, turns=Turns(items=turns), status="terminated")


def one(trajectory: Trajectory) -> Batch:
    (batch,) = collate([trajectory], [np.ones(len(trajectory.turns))], max_tokens=100)
    return batch


def rows(batch: Batch) -> list[list[int]]:
    return [batch.ids[a:b].tolist() for a, b in zip(batch.bounds, batch.bounds[1:], strict=False)]


def test_the_original_context_takes_the_hint_out_and_keeps_the_samplers_logprobs() -> None:
    more = span([8], prompt=[4])
    sampled, original = (one(episode_of(HINTED, more, context=c)) for c in ("sampled", "original"))
    assert rows(sampled) == [[1, 7, 7, 7, 2, 5, 6, 9, 4, 8]]
    assert rows(original) == [[1, 2, 5, 6, 9, 4, 8]]
    assert original.mask.tolist() == [0, 0, 1, 1, 0, 0, 1]
    on = [batch.logprobs[batch.mask == 1].tolist() for batch in (sampled, original)]
    assert on[0] == on[1] == [*HINTED.logprobs, *more.logprobs]
    assert original.positions.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(5, [1, 2]), (6, [1, 2, 5]), (8, [1, 2, 5, 6, 9]), (0, [])],
)
def test_a_fork_behind_a_hinted_prompt_adds_up(length: int, expected: list[int]) -> None:
    fork = span([8], prompt=[4], branch=1, parent=(0, length))
    again = span([3], prompt=[4], branch=2, parent=(1, length + 2))
    found = rows(one(episode_of(HINTED, fork, again)))
    assert [*expected, 4, 8] in found
    assert [*expected, 4, 8, 4, 3] in found
    plain = rows(one(episode_of(HINTED, fork, again, context="sampled")))
    assert sorted(map(len, plain)) == sorted([8, length + 2, length + 4])


def test_what_does_not_add_up_with_a_hint_is_refused() -> None:
    inside = span([8], prompt=[4], branch=1, parent=(0, 3))
    with pytest.raises(RecordError, match="forked after 3 tokens of branch 0, which was hinted just there"):
        one(episode_of(HINTED, inside))
    assert rows(one(episode_of(HINTED, inside, context="sampled")))[1] == [1, 7, 7, 4, 8]
    with pytest.raises(RecordError, match="branch 0, which has 8 tokens"):
        one(episode_of(HINTED, span([8], prompt=[4], branch=1, parent=(0, 9))))
    with pytest.raises(RecordError, match="hinted span without its unhinted prompt"):
        one(episode_of(span([5], context="hinted", logprobs=Floats([-1]))))
