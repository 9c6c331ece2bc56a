"""Counterfactual credit against values known exactly, and in the shop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from math import comb
from typing import Any

import numpy as np
import pytest

from agentgym import make
from agentgym.advantages import Term, advantages
from agentgym.env import SingleAgentEnv
from agentgym.errors import ConfigError, EngineFault, Fault, RecordError
from agentgym.fork import Counterfactual, alternatives, counterfactual
from agentgym.policy import Scripted
from agentgym.rewards import by_turn, composer
from agentgym.rollout import Runner, episodes
from agentgym.seeding import rng
from agentgym.types import (
    Action,
    Episode,
    Guidance,
    Observation,
    RewardTerm,
    StepResult,
    Task,
    Trajectory,
    iterate,
    say,
)

TURNS = 4
SUM = composer({"op": "sum"})


class Climb(SingleAgentEnv):
    """Four turns up or not: `step` pays 1 for each up at once, `peak` the square of all ups at the end."""

    id = "climb-v0"
    version = "1"

    def __init__(self, forgetful: bool = False) -> None:
        self.forgetful, self.resets = forgetful, [0]

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        yield Task(env=self.id)

    async def begin(self, task: Task) -> Observation:
        self.turn = self.ups = 0
        self.resets[0] += 1
        return say(f"start {self.resets[0] if self.forgetful else ''}")

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        up = action.text == "up"
        self.turn, self.ups = self.turn + 1, self.ups + up
        step = RewardTerm(name="step", value=float(up))
        if self.turn < TURNS:
            return say(f"turn {self.turn}, height {self.ups}"), StepResult(rewards=(step,))
        peak = RewardTerm(name="peak", value=float(self.ups**2), level="episode")
        return None, StepResult(rewards=(step, peak), terminated=True)


def climber(p: float, broken: float = 0.0) -> Scripted:
    """Goes up with probability p, keyed by the session."""

    def script(episode: Episode, agent: str) -> Callable[[Observation], Action]:
        g = rng("climb", episode.seed, episode.member)
        if g.random() < broken:
            raise EngineFault("no rope")
        return lambda seen: Action(text="up" if g.random() < p else "stay")

    return Scripted(script)


def whole(height: int, left: int, p: float) -> float:
    """E[ups + ups squared] from this height with so many turns left, by enumeration."""
    chances = [comb(left, n) * p**n * (1 - p) ** (left - n) for n in range(left + 1)]
    return sum(c * ((height + n) + (height + n) ** 2) for n, c in enumerate(chances))


async def played(env: SingleAgentEnv, policy: Any, **guidance: Any) -> Trajectory:
    (episode,) = episodes([next(env.tasks())], seed=3)
    given = episode.replace(guidance=Guidance(**guidance)) if guidance else episode
    (found,) = await Runner(env, policy, retries=0).collect([given])
    return found


def runner(env: Any, policy: Any) -> Runner:
    return Runner(env, policy, retries=0, concurrency=64)


STARTED = {"start": (Action(text="up"), Action(text="stay"))}


async def test_values_are_within_three_standard_errors_of_the_exact_ones() -> None:
    env, p = Climb(), 0.4
    t = await played(env, climber(p), **STARTED)
    ups = [turn.action.text == "up" for turn in iterate(t.turns)]
    found = await counterfactual(runner(env, climber(p)), t, SUM, continuations=400)
    heights = np.concatenate(([0], np.cumsum(ups)))
    returns = np.asarray([whole(int(h), TURNS - k, p) for k, h in enumerate(heights)])
    exact = returns - np.concatenate(([0], np.cumsum(by_turn(SUM.trajectory(t), t))))
    assert found.value_errors[-1] == 0
    assert found.values[-1] == pytest.approx(0)
    assert (found.value_errors[:-1] > 0).all()
    assert (np.abs(found.values - exact) <= 3 * found.value_errors + 1e-12).all()
    assert (np.abs(found.advantages - np.diff(returns)) <= 3 * found.advantage_errors).all()
    assert found.failures == 0


async def test_advantages_are_the_definition_and_add_up() -> None:
    env = Climb()
    t = await played(env, climber(0.5))
    found = await counterfactual(runner(env, climber(0.5)), t, SUM, continuations=4)
    paid = by_turn(SUM.trajectory(t), t)
    np.testing.assert_allclose(found.advantages, paid + found.values[1:] - found.values[:-1])
    assert found.advantages.sum() == pytest.approx(SUM.trajectory(t).value - found.values[0])


async def test_its_values_serve_as_a_critics() -> None:
    """One-step GAE over these values is the counterfactual advantage; over turns alone the end has value 0 anyway."""
    env = Climb()
    t = await played(env, climber(0.5))
    found = await counterfactual(runner(env, climber(0.5)), t, SUM, continuations=4)
    term = Term(key="none", centre="none", scale="none", credit="gae", gamma=1.0, lam=0.0)
    for given in (found.values, found.values[:-1]):
        (credit,) = advantages([(t, SUM.trajectory(t))], [term], values=[given])
        np.testing.assert_allclose(credit, found.advantages)


async def test_a_certain_continuation_gives_exact_values() -> None:
    env = Climb()
    t = await played(env, climber(1.0), **STARTED)
    found = await counterfactual(runner(env, climber(1.0)), t, SUM, continuations=2)
    np.testing.assert_array_equal(found.advantages, [0, 12 - 20, 0, 0])  # 4 + 16 becomes 3 + 9 where it stayed
    np.testing.assert_array_equal(found.value_errors, np.zeros(5))
    np.testing.assert_array_equal(found.values, [20, 19, 11, 10, 0])


async def test_alternatives_at_a_turn() -> None:
    env = Climb()
    t = await played(env, climber(1.0))
    options = [Action(text="up"), Action(text="stay")]
    found = await alternatives(runner(env, climber(1.0)), t, SUM, 1, options, continuations=2)
    np.testing.assert_array_equal(found.values, [19, 11])
    np.testing.assert_array_equal(found.errors, [0, 0])


async def test_only_the_turns_asked_for_are_played() -> None:
    env = Climb()
    t = await played(env, climber(1.0))
    env.resets[0] = 0
    found = await counterfactual(runner(env, climber(1.0)), t, SUM, continuations=3, turns=[1])
    assert env.resets[0] == 6
    assert np.isfinite(found.values).tolist() == [False, True, True, False, True]
    assert np.isfinite(found.advantages).tolist() == [False, True, False, False]


async def test_draws_are_keyed() -> None:
    env, policy = Climb(), climber(0.5)
    t = await played(env, policy)

    async def run(concurrency: int, seed: int = 0) -> Counterfactual:
        return await counterfactual(Runner(env, policy, concurrency=concurrency), t, SUM, continuations=16, seed=seed)

    first, again, other = await run(1), await run(50), await run(50, seed=1)
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.values != other.values).any()


async def test_failures_are_counted_and_in_no_mean() -> None:
    env = Climb()
    t = await played(env, climber(1.0))
    found = await counterfactual(runner(env, climber(1.0, broken=0.4)), t, SUM, continuations=20)
    np.testing.assert_array_equal(found.advantages, np.zeros(4))
    assert 10 < found.failures < 60
    with pytest.raises(Fault, match=r"all 2 continuations behind 0 turns .* failed: engine: act: no rope"):
        await counterfactual(runner(env, climber(1.0, broken=1.1)), t, SUM, continuations=2)


async def test_a_reward_that_is_no_sum_telescopes_too() -> None:
    env, gate = Climb(), composer({"op": "gate", "when": "step", "at_least": 3.0, "then": "peak", "otherwise": 0.5})
    t = await played(env, climber(0.7))
    found = await counterfactual(runner(env, climber(0.7)), t, gate, continuations=8)
    composed = gate.trajectory(t)
    expected = found.values[0] + composed.base
    assert found.advantages.sum() == pytest.approx(composed.value - expected)
    assert found.values[-1] == pytest.approx(0)


async def test_what_has_no_counterfactuals_is_refused() -> None:
    env = Climb()
    t = await played(env, climber(1.0))
    with pytest.raises(ConfigError, match="at least 2 continuations"):
        await counterfactual(runner(env, climber(1.0)), t, SUM, continuations=1)
    with pytest.raises(ConfigError, match="turns are 0 to 3"):
        await counterfactual(runner(env, climber(1.0)), t, SUM, turns=[4])
    with pytest.raises(RecordError, match="failed: it has no return"):
        await counterfactual(runner(env, climber(1.0)), t.replace(status="failed"), SUM)
    forgetful = Climb(forgetful=True)
    with pytest.raises(RecordError, match="climb-v0 does not replay"):
        await counterfactual(runner(forgetful, climber(1.0)), await played(forgetful, climber(1.0)), SUM)
    counts = composer({"op": "weighted_sum", "of": {"policy.tokens": -0.1, "step": 1.0}})
    with pytest.raises(ConfigError, match=r"reads policy.tokens, which continuations do not have"):
        await counterfactual(runner(env, climber(1.0)), t, counts)


# --- in the shop ------------------------------------------------------------------------------------------------


async def test_a_rung_of_the_ladder_loses_nothing_by_its_own_actions() -> None:
    """It is certain of what it does, so every turn is worth what was expected, and values are exact."""
    env = make("shopping-v0", surface="compact")
    reward = composer(env.reward)
    (episode,) = episodes([next(env.tasks("test"))])
    policy = env.ladder()["ask_one"]
    (t,) = await Runner(env, policy).collect([episode])
    found = await counterfactual(Runner(env, policy), t, reward, continuations=2)
    np.testing.assert_allclose(found.advantages, np.zeros(len(t.turns)), atol=1e-12)
    np.testing.assert_array_equal(found.value_errors, np.zeros(len(t.turns) + 1))


def shopper(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    """Searches for all it has been told, takes the first result. It remembers what it reads, not what it does."""
    known: list[str] = []

    def act(seen: Observation) -> Action:
        verb, *words = seen.messages[0].text.split()
        if verb in ("want", "answer"):
            pairs = " ".join(words).split(" ; ")
            known.extend(pair for pair in pairs if len(pair.split()) == 2 and pair.split()[1] not in ("any", "vague"))
            return Action(text="search " + " ; ".join(known))
        return Action(text="recommend r1")

    return act


async def test_asking_for_what_is_hidden_is_worth_what_it_changes() -> None:
    env = make("shopping-v0", surface="compact", vague=0.0, intents=("single",))
    reward, policy = composer(env.reward), Scripted(shopper)
    gains = []
    for episode in episodes(islice(env.tasks("test"), 12)):
        (t,) = await Runner(env, policy).collect([episode])
        ask, now = Action(text=env.hint(t.task, 3)), next(iterate(t.turns)).action
        found = await alternatives(Runner(env, policy), t, reward, 0, [ask, now], continuations=2)
        (asked,) = await Runner(env, policy).collect([episode.replace(guidance=Guidance(start=(ask,)))])
        exact = [reward.trajectory(x).value - reward.trajectory(t).base for x in (asked, t)]
        np.testing.assert_allclose(found.values, exact, atol=1e-12)
        gains.append(found.values[0] - found.values[1])
    assert np.mean(gains) > 0
