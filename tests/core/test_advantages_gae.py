"""Generalised advantages and discounted sums against loops; values of actions, agents and truncated episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from golden_runs import rich
from hypothesis import given
from hypothesis import strategies as st
from making import samples, trajectory

from agentgym.advantages import Term, advantages, critic_targets, gae, returns
from agentgym.advantages.gae import inner, scan
from agentgym.errors import ConfigError, RecordError
from agentgym.types import Action, Observation, RewardTerm, Trajectory, Turn, Turns

PPO = Term(key="none", centre="none", scale="none", credit="gae", gamma=0.9, lam=0.8)


def bounds_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.intp)


def slow_gae(r: Sequence, v: Sequence, mask: Sequence, gamma: float, lam: float, final: float) -> list[float]:
    """verl's loop: nothing happens where the mask is 0, and what was known is carried on."""
    ahead, later, out = final, 0.0, [0.0] * len(r)
    for n in reversed(range(len(r))):
        if mask[n]:
            later = r[n] + gamma * ahead - v[n] + gamma * lam * later
            ahead = v[n]
        out[n] = later
    return out


def test_gae_by_hand() -> None:
    bounds = bounds_of([3])
    found = gae(np.asarray([0.0, 0, 1]), np.asarray([0.5, 0.9, 0.6]), np.asarray([1, 0, 1]), bounds, 1.0, 0.5)
    assert found.tolist() == pytest.approx([0.3, 0.4, 0.4])
    target = returns(np.asarray([0.0, 0, 1]), np.asarray([0.5, 0.9, 0.6]), np.asarray([1, 0, 1]), bounds, 1.0, 0.5)
    assert target[[0, 2]].tolist() == pytest.approx([0.8, 1.0])


_number = st.floats(-2, 2)
_position = st.tuples(_number, _number, st.booleans())
_sequences = st.lists(st.tuples(st.lists(_position, max_size=6), _number), max_size=5)
_unit = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@given(_sequences, _unit, _unit)
def test_gae_agrees_with_a_loop(sequences: list, gamma: float, lam: float) -> None:
    bounds = bounds_of([len(s) for s, _ in sequences])
    flat = [p for s, _ in sequences for p in s]
    r, v, m = (np.asarray([p[i] for p in flat], float) for i in range(3))
    found = gae(r, v, m, bounds, gamma, lam, np.asarray([final for _, final in sequences], float))
    slow = [a for s, final in sequences if s for a in slow_gae(*zip(*s, strict=True), gamma, lam, final)]
    assert found.tolist() == pytest.approx(slow, abs=1e-9)


@given(st.lists(st.lists(_number, max_size=9), max_size=4), _unit)
def test_discounted_sums_agree_with_a_loop(sequences: list[list[float]], gamma: float) -> None:
    x = np.asarray([v for s in sequences for v in s])
    found = scan(x, inner(bounds_of([len(s) for s in sequences]), gamma))
    slow = [sum(gamma ** (j - i) * s[j] for j in range(i, len(s))) for s in sequences for i in range(len(s))]
    assert found.tolist() == pytest.approx(slow, abs=1e-9)


def test_masked_positions_are_not_read() -> None:
    mask, bounds = np.asarray([1, 0, 1, 0]), bounds_of([4])
    r, v = np.asarray([0.0, math.inf, 1, math.nan]), np.asarray([0.5, math.nan, 0.6, math.inf])
    assert gae(r, v, mask, bounds, 1.0, 0.5).tolist() == pytest.approx([0.3, 0.4, 0.4, 0.0])


# --- in advantages ----------------------------------------------------------------------------------------------


def valued(
    rewards: list[float], values: list[float | None], status: str = "terminated", **fields: object
) -> Trajectory:
    played = trajectory([{"r": r} for r in rewards], status=status, **fields)  # type: ignore[arg-type]
    turns = zip(played.turns.items, values, strict=True)  # type: ignore[union-attr]
    acted = tuple(turn.replace(action=turn.action.replace(value=v)) for turn, v in turns)
    changed: Trajectory = played.replace(turns=Turns(items=acted))
    return changed


def test_values_are_those_recorded_or_given() -> None:
    r, v = [0.5, 0.0, 1.0], [0.2, 0.4, 0.6]
    slow = slow_gae(r, v, [1, 1, 1], 0.9, 0.8, 0.0)
    recorded = samples([valued(r, v)])
    assert advantages(recorded, [PPO])[0].tolist() == pytest.approx(slow)
    given_ = samples([trajectory([{"r": x} for x in r])])
    assert advantages(given_, [PPO], values=[np.asarray(v)])[0].tolist() == pytest.approx(slow)
    assert critic_targets(recorded, PPO)[0].tolist() == pytest.approx([a + x for a, x in zip(slow, v, strict=True)])
    with pytest.raises(ConfigError, match="credit 'gae', not 'turn'"):
        critic_targets(recorded, Term(credit="turn"))


def test_only_a_truncated_episode_bootstraps() -> None:
    r, v = [0.5, 1.0], np.asarray([0.2, 0.4, 3.0])
    for status, final in (("truncated", 3.0), ("terminated", 0.0)):
        found = advantages(samples([trajectory([{"r": x} for x in r], status=status)]), [PPO], values=[v])
        assert found[0].tolist() == pytest.approx(slow_gae(r, [0.2, 0.4], [1, 1], 0.9, 0.8, final))
    bare = advantages(samples([valued(r, [0.2, 0.4], "truncated")]), [PPO])
    assert bare[0].tolist() == pytest.approx(slow_gae(r, [0.2, 0.4], [1, 1], 0.9, 0.8, 0.0))


def test_values_that_are_missing_or_strange_are_refused_by_turn() -> None:
    with pytest.raises(RecordError, match=r"turn 1 of episode g\.0\.0 has no value"):
        advantages(samples([valued([0.0, 1.0], [0.5, None])]), [PPO])
    played = samples([trajectory([{"r": 1.0}])])
    with pytest.raises(RecordError, match=r"3 values for episode g\.0\.0; it has 1 turns, and 1 agents"):
        advantages(played, [PPO], values=[np.zeros(3)])
    with pytest.raises(RecordError, match=r"a value of episode g\.0\.0 is inf"):
        advantages(played, [PPO], values=[np.asarray([math.inf])])
    cut = samples([trajectory([{"r": 1.0}], status="truncated")])
    with pytest.raises(RecordError, match=r"the value after the end of episode g\.0\.0 is nan"):
        advantages(cut, [PPO], values=[np.asarray([0.0, math.nan])])
    failed = trajectory([{"r": 1.0}], status="failed")
    assert [len(v) for v in advantages(samples([failed]), [PPO], values=[None])] == [0]


# --- several agents ---------------------------------------------------------------------------------------------


def team_game() -> Trajectory:
    """Two agents act at once in steps 0 and 1; then only b, in step 2. Own rewards, and the team's, which the last turn
    of a step carries."""
    own = {(0, "a"): 1.0, (0, "b"): 10.0, (1, "a"): 2.0, (1, "b"): 20.0, (2, "b"): 30.0}
    team = {0: 0.25, 1: 0.5, 2: 1.0}
    turns = []
    for i, ((step, agent), amount) in enumerate(own.items()):
        rewards = [RewardTerm(name="own", value=amount, turn=i, agent=agent)]
        if (step, agent) in ((0, "b"), (1, "b"), (2, "b")):
            rewards.append(RewardTerm(name="goal", value=team[step], turn=i, level="team"))
        turns.append(
            Turn(
                step=step, agent=agent, observation=Observation(), action=Action(value=0.5 * i), rewards=tuple(rewards)
            )
        )
    return trajectory([]).replace(turns=Turns(items=tuple(turns)))


RAW = {"key": "none", "centre": "none", "scale": "none", "gamma": 0.5}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"whose": "agent", "credit": "turn"}, [1, 10, 2, 20, 30]),
        ({"whose": "team", "credit": "turn"}, [0.25, 0.25, 0.5, 0.5, 1.0]),
        ({"whose": "agent", "credit": "return_to_go"}, [2, 27.5, 2, 35, 30]),
        ({"whose": "team", "credit": "return_to_go"}, [0.75, 0.75, 1.0, 1.0, 1.0]),
        ({"whose": "agent"}, [63] * 5),
        ({"whose": "team"}, [1.75] * 5),
        ({"whose": "agent", "key": "agent", "singleton": "keep"}, [3, 60, 3, 60, 60]),
        ({"whose": "team", "component": "goal", "credit": "turn"}, [0.25, 0.25, 0.5, 0.5, 1.0]),
        ({"whose": "agent", "component": "goal", "credit": "turn"}, [0] * 5),
    ],
)
def test_an_agents_own_rewards_and_the_teams_are_told_apart(fields: dict, expected: list[float]) -> None:
    term = Term(**{**RAW, **fields})
    assert advantages(samples([team_game()]), [term])[0].tolist() == pytest.approx(expected)


def test_each_agent_is_compared_with_the_same_agent_of_others() -> None:
    played = [team_game(), team_game()]
    steady = Term(key=("prompt", "agent"), whose="agent", scale="none")
    assert advantages(samples(played), [steady])[0].tolist() == [0.0] * 5
    raised = played[1].turns[1].replace(rewards=(RewardTerm(name="own", value=14.0, turn=1, agent="b"),))
    items = played[1].turns.items  # type: ignore[union-attr]
    played[1] = played[1].replace(turns=Turns(items=(items[0], raised, *items[2:])))
    found = advantages(samples(played), [steady])
    assert found[0].tolist() == [0.0, -2.0, 0.0, -2.0, -2.0]
    assert found[1].tolist() == [0.0, 2.0, 0.0, 2.0, 2.0]


def test_a_reward_for_another_agent_than_the_turns_is_nobodys_own() -> None:
    game = team_game()
    foreign = RewardTerm(name="own", value=100.0, turn=0, agent="spectator")
    items = game.turns.items  # type: ignore[union-attr]
    game = game.replace(turns=Turns(items=(items[0].replace(rewards=(*items[0].rewards, foreign)), *items[1:])))
    assert advantages(samples([game]), [Term(**RAW, whose="agent", credit="turn")])[0].tolist() == [1, 10, 2, 20, 30]


def test_gae_of_agents_follows_each_agents_turns() -> None:
    game = samples([team_game()])
    with pytest.raises(ConfigError, match="set whose = 'agent' or 'team'"):
        advantages(game, [Term(**RAW, credit="gae")])
    own = advantages(game, [Term(**RAW, credit="gae", lam=0.8, whose="agent")])[0]
    a, b = (
        slow_gae([1, 2], [0.0, 1.0], [1, 1], 0.5, 0.8, 0),
        slow_gae([10, 20, 30], [0.5, 1.5, 2.0], [1] * 3, 0.5, 0.8, 0),
    )
    assert own.tolist() == pytest.approx([a[0], b[0], a[1], b[1], b[2]])
    # a is not asked in step 2: the team's reward there still belongs to what its last turn brought
    team = advantages(game, [Term(**RAW, credit="gae", lam=0.8, whose="team")])[0]
    a = slow_gae([0.25, 0.5 + 0.5 * 1.0], [0.0, 1.0], [1, 1], 0.5, 0.8, 0)
    b = slow_gae([0.25, 0.5, 1.0], [0.5, 1.5, 2.0], [1] * 3, 0.5, 0.8, 0)
    assert team.tolist() == pytest.approx([a[0], b[0], a[1], b[1], b[2]])
    cut = [(t.replace(status="truncated"), c) for t, c in game]
    values = [np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 7.0, 9.0])]  # then a's and b's value after the end
    found = advantages(cut, [Term(**RAW, credit="gae", lam=0.8, whose="agent")], values=values)[0]
    assert found[2] == pytest.approx(2 + 0.5 * 7.0 - 1.0)
    assert found[4] == pytest.approx(30 + 0.5 * 9.0 - 2.0)


def test_numeric_episodes_have_values_and_own_rewards() -> None:
    numeric = rich()[1]
    own = Term(**RAW, credit="turn", whose="agent")
    assert advantages(samples([numeric]), [own])[0].tolist() == [
        sum(r.value for r in turn.rewards) for turn in (numeric.turns[i] for i in range(len(numeric.turns)))
    ]
    held = [numeric.turns[i].action.value for i in range(len(numeric.turns))]
    values = None if all(v is not None for v in held) else [np.zeros(len(held))]
    found = advantages(samples([numeric]), [Term(**RAW, credit="gae", whose="agent")], values=values)
    assert np.isfinite(found[0]).all()
