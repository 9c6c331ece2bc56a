"""Numeric environments: the same runner, the columnar storage, and one view of the turns over both storages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest

import agentgym
from agentgym.env import Environment
from agentgym.policy import Scripted
from agentgym.rollout import Runner, episodes
from agentgym.seeding import share
from agentgym.types import (
    Action,
    Array,
    Columns,
    Episode,
    Observation,
    RewardTerm,
    StepResult,
    Task,
    Trajectory,
    Turns,
    decode,
    encode,
    iterate,
)


def balance(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    """Push where the pole falls, with the figures a numeric learner needs."""

    def act(observation: Observation) -> Action:
        assert observation.array is not None
        _, _, angle, spin = observation.array.numpy()
        state = Array.of(np.array([angle, spin], np.float32))
        return Action(
            array=Array.of(np.int64(angle + spin > 0)), logprob=-0.5, value=float(np.float32(angle)), state=state
        )

    return act


def cartpole(count: int, policy: Any = balance) -> list[Trajectory]:
    env = agentgym.make("gym:CartPole-v1")
    return Runner(env, Scripted(policy), concurrency=8).run_sync(islice(episodes(env.tasks()), count))


def test_cartpole_runs_and_is_stored_as_columns() -> None:
    found = cartpole(4)
    for trajectory in found:
        assert isinstance(trajectory.turns, Columns)
        (column,) = trajectory.turns.agents.values()
        steps = len(trajectory.turns)
        assert column.observations.shape == (steps, 4)
        assert column.actions.shape == (steps,)
        assert list(column.steps) == list(range(steps))
        assert sum(column.rewards["reward"]) == steps == sum(r.value for r in trajectory.rewards)
        assert column.values is not None
        assert np.array_equal(column.values.numpy(), column.observations.numpy()[:, 2])
        assert column.states is not None
        assert column.states.shape == (steps, 2)
        assert (trajectory.status == "truncated") == (steps == 500)
        assert bool(trajectory.final) == (trajectory.status == "truncated")
    assert max(len(t.turns) for t in found) > 150


def test_columns_are_small_and_survive_the_disk() -> None:
    (found,) = cartpole(1)
    written = encode(found)
    assert decode(written, Trajectory) == found
    assert len(written) / len(found.turns) < 80  # 16 + 8 + 8 + 3 * 4 + 4 bytes of numbers a turn, and little else


class Drones(Environment):
    """Two numeric agents; the second only acts in every other step, so columns have different lengths."""

    id = "drones-v0"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, seed=n) for n in range(20))

    async def reset(self, task: Task) -> dict[str, Observation]:
        self.seed, self.now = task.seed, 0
        return self._see()

    def _see(self) -> dict[str, Observation]:
        agents = ("left", "right") if self.now % 2 == 0 else ("left",)
        mask = Array.of(np.array([True, self.now % 3 > 0]))
        return {a: Observation(array=Array.of(np.float32([self.now, self.seed])), action_mask=mask) for a in agents}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        paid = [RewardTerm(name="moved", value=0.5, agent=a) for a in actions]
        if self.now == 2:
            paid.append(RewardTerm(name="bonus", value=2.0, agent="left"))
        self.now += 1
        return StepResult(observations=self._see(), rewards=tuple(paid), terminated=self.now == 5)


class NumericDrones(Drones):
    numeric = True


def drive(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    return lambda observation: Action(array=Array.of(np.int64(share(episode.seed, agent) > 0.5)), logprob=-0.25)


def stored(env: Environment) -> Trajectory:
    return Runner(env, Scripted(drive)).run_sync(islice(episodes(env.tasks()), 1))[0]


@pytest.fixture(params=[Drones, NumericDrones], ids=["turns", "columns"])
def drones(request: pytest.FixtureRequest) -> Trajectory:
    """The same episode in each of the two storages."""
    return stored(request.param())


def test_both_storages_show_the_same_turns(drones: Trajectory) -> None:
    assert [(t.step, t.agent) for t in iterate(drones.turns)] == [
        (0, "left"), (0, "right"), (1, "left"), (2, "left"), (2, "right"), (3, "left"), (4, "left"), (4, "right"),
    ]  # fmt: skip
    assert [(r.name, r.value, r.turn, r.agent) for r in drones.turns[3].rewards] == [
        ("moved", 0.5, 3, "left"),
        ("bonus", 2.0, 3, "left"),
    ]
    assert [len(t.rewards) for t in iterate(drones.turns)] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert drones.turns[-1] == drones.turns[len(drones.turns) - 1]
    with pytest.raises(IndexError):
        drones.turns[8]
    mask = drones.turns[0].observation.action_mask
    assert mask is not None
    assert mask.numpy().tolist() == [True, False]
    assert decode(encode(drones), Trajectory) == drones


def test_the_two_storages_agree_turn_by_turn() -> None:
    one, other = stored(Drones()), stored(NumericDrones())
    assert isinstance(one.turns, Turns)
    assert isinstance(other.turns, Columns)
    assert [t.replace(timing=None) for t in one.turns.items] == list(iterate(other.turns))
    assert list(one.rewards) == list(other.rewards)


class Judged(NumericDrones):
    """Its last term is about the whole episode: a column cannot say so."""

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        found = await super().step(actions)
        if not found.terminated:
            return found
        judged: StepResult = found.replace(rewards=(RewardTerm(name="won", value=1.0, level="episode", agent="left"),))
        return judged


def test_what_columns_cannot_hold_is_kept_as_turns() -> None:
    found = stored(Judged())
    assert isinstance(found.turns, Turns)
    assert [r.level for r in found.rewards if r.name == "won"] == ["episode"]


def ragged(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    return lambda observation: Action(array=Array.of([0] if share("ragged", observation.array.data) < 0.5 else 0))  # type: ignore[union-attr]


def test_ragged_actions_lose_nothing() -> None:
    (found,) = cartpole(1, ragged)
    assert len(found.turns) > 2
    assert isinstance(found.turns, Turns)
    assert {t.action.array.shape for t in iterate(found.turns) if t.action.array} == {(), (1,)}
