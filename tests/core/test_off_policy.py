"""Off-policy evaluation: the numbers of the reference, slow twins, exact expectations, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from making import span

from agentgym.errors import ConfigError, RecordError, UnknownName
from agentgym.evaluation import Logged, effective, estimate, logged, weights
from agentgym.rewards import composer
from agentgym.types import (
    Action,
    Array,
    Column,
    Columns,
    Draft,
    Episode,
    Failure,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Task,
    Trajectory,
    Turn,
    Turns,
)

P0, PI, R = np.array([0.5, 0.25, 0.25, 0.5]), np.array([0.8, 0.1, 0.1, 0.8]), np.array([1.0, 0.0, 1.0, 0.0])
ADS = {"behaviour": np.log(P0), "target": np.log(PI), "rewards": R}
MODEL = {"q": np.array([0.5, 0.4, 0.4, 0.5]), "v": np.full(4, 0.48)}


@pytest.mark.parametrize(
    ("method", "expected"), [("ips", 0.5), ("snips", 0.5), ("clipped", 0.35), ("doubly_robust", 0.5)]
)
def test_numbers_of_the_ad_load_example(method: Any, expected: float) -> None:
    log = Logged.of(**ADS, **MODEL)
    found = estimate(log, method, cap=1.0)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert weights(log)[:, 0] == pytest.approx([1.6, 0.4, 0.4, 1.6])
    assert found.ess == pytest.approx(2.941176, abs=1e-6)
    assert (found.weight, found.heaviest) == (pytest.approx(1.0), pytest.approx(1.6))
    assert found.interval is not None
    assert found.interval[0] <= found.value <= found.interval[1]


# --- twins ------------------------------------------------------------------------------------------------------


def slow(method: str, mu: list, pi: list, rewards: list, cap: float, q: list, v: list) -> float:
    """Each estimator by its definition, decision by decision, over rows of unlike length."""
    n, longest = len(mu), max(map(len, mu))
    total = 0.0
    for t in range(longest):
        num = den = 0.0
        for i in range(n):
            weight = math.prod(math.exp(pi[i][k] - mu[i][k]) for k in range(min(t + 1, len(mu[i]))))
            before = math.prod(math.exp(pi[i][k] - mu[i][k]) for k in range(min(t, len(mu[i]))))
            weight = min(weight, cap) if method == "clipped" else weight
            den += weight if method == "snips" else 1.0
            if t < len(mu[i]):
                num += weight * rewards[i][t]
                if method == "doubly_robust":
                    num += before * v[i][t] - weight * q[i][t]
        total += num / den
    return total


def rows(seed: int) -> tuple[list, list, list, list, list]:
    g = np.random.default_rng(seed)
    lengths = g.integers(1, 5, 12)
    return tuple([list(g.normal(scale, 0.4, n)) for n in lengths] for scale in (-1, -1, 0.5, 0.4, 0.4))  # type: ignore[return-value]


def numeric(mu: list, rewards: list, task: int = 0, **fields: Any) -> Trajectory:
    n = len(mu)
    column = Column(
        steps=Ids(range(n)),
        observations=Array.of(np.zeros((n, 1))),
        actions=Array.of(np.zeros(n)),
        rewards={"r": Floats(rewards)},
        logprobs=None if mu[0] is None else Floats(mu),
    )
    episode = Episode(task=Task(env="log-v0", seed=task), member=fields.pop("member", 0))
    return Trajectory(
        env="log-v0", episode=episode, turns=Columns(agents={"agent": column}), status="terminated", **fields
    )


@pytest.mark.parametrize("method", ["ips", "snips", "clipped", "doubly_robust"])
@pytest.mark.parametrize("seed", range(3))
def test_estimators_are_their_definitions(method: Any, seed: int) -> None:
    mu, pi, rewards, q, v = rows(seed)
    mu, rewards = ([np.float32(x).tolist() for x in part] for part in (mu, rewards))
    trajectories = [numeric(m, r, task=i) for i, (m, r) in enumerate(zip(mu, rewards, strict=True))]
    found = estimate(logged(trajectories, pi, q=q, v=v), method, cap=1.5)
    assert found.value == pytest.approx(slow(method, mu, pi, rewards, 1.5, q, v), rel=1e-9)


def test_a_whole_trajectory_may_be_weighed_at_once() -> None:
    mu, pi, rewards, _, _ = rows(4)
    trajectories = [numeric(m, r, task=i) for i, (m, r) in enumerate(zip(mu, rewards, strict=True))]
    found = estimate(logged(trajectories, pi), "ips", weighting="trajectory").value
    whole = [math.exp(sum(p) - sum(m)) * sum(r) for m, p, r in zip(mu, pi, rewards, strict=True)]
    assert found == pytest.approx(np.mean(whole), rel=1e-5)
    assert np.ptp(weights(logged(trajectories, pi), "trajectory"), axis=1).max() == 0.0


# --- exact expectations -----------------------------------------------------------------------------------------

MU2 = np.array([[0.7, 0.3], [0.4, 0.6]])
"""Behaviour at the first decision, and at the second (whatever came first)."""
PI2 = np.array([[0.2, 0.8], [0.9, 0.1]])
REWARD2 = {(0, 0): (1.0, 0.0), (0, 1): (1.0, 2.0), (1, 0): (0.0, 3.0), (1, 1): (0.0, -0.5)}


def of_two(a: int, b: int, wrong: float) -> tuple[float, ...]:
    """Reward of the pair, and a model of it that is off by `wrong`."""
    q1 = [PI2[1] @ [sum(REWARD2[x, y]) for y in (0, 1)] + wrong * (x + 1) for x in (0, 1)]
    q2 = [REWARD2[a, y][1] + wrong * y for y in (0, 1)]
    return (*REWARD2[a, b], q1[a], q2[b], float(PI2[0] @ q1), float(PI2[1] @ q2))


@pytest.mark.parametrize("method", ["ips", "doubly_robust"])
@pytest.mark.parametrize("wrong", [0.0, 5.0])
def test_unbiased_by_enumeration(method: Any, wrong: float) -> None:
    """The expectation over everything that the behaviour policy can log equals the target's value; with doubly robust
    whatever the model, and without any variance where the model is right."""
    found, chance, truth = [], [], 0.0
    for a, b in itertools.product((0, 1), repeat=2):
        r1, r2, q1, q2, v1, v2 = of_two(a, b, wrong)
        mu, pi = ([np.log([p[0, a], p[1, b]])] for p in (MU2, PI2))
        log = Logged.of(mu, pi, [[r1, r2]], q=[[q1, q2]], v=[[v1, v2]])
        found.append(estimate(log, method).value)
        chance.append(MU2[0, a] * MU2[1, b])
        truth += PI2[0, a] * PI2[1, b] * (r1 + r2)
    assert np.dot(found, chance) == pytest.approx(truth, abs=1e-12)
    if method == "doubly_robust" and not wrong:
        assert np.ptp(found) == pytest.approx(0.0, abs=1e-9)


SECOND_FIRST = [
    {"op": "product", "of": ["b", "a"]},
    {"op": "gate", "when": "b", "at_least": 1, "then": "a", "otherwise": -1.0},
    {"op": "min", "of": ["b", 0.5]},
    {"op": "term", "name": "seen", "default": 5.0},
    {"op": "weighted_sum", "of": {"a": 1.0, "late": 2.0}},
]
"""Rewards whose share of the first turn hangs on what the second one decides, or whose base does."""


@pytest.mark.parametrize("reward", SECOND_FIRST, ids=lambda d: d["op"])
def test_a_reward_that_is_no_sum_over_turns_is_unbiased_too(reward: Any) -> None:
    found, chance, truth = [], [], 0.0
    for a, b in itertools.product((0, 1), repeat=2):
        amounts = {0: {"a": 1.0 + a}, 1: {"b": float(b), **({"seen": 1.0} if b else {})}}
        late = RewardTerm(name="late", value=float(b), turn=0)  # about the first turn, and known after the second
        turns = [
            Turn(
                step=k,
                observation=Observation(),
                action=Action(span=span([1], logprobs=Floats([float(np.log(MU2[k, x]))]))),
                rewards=tuple(RewardTerm(name=n, value=v, turn=k) for n, v in amounts[k].items()) + (late,) * k,
            )
            for k, x in enumerate((a, b))
        ]
        t = spoken(*turns)
        found.append(estimate(logged([t], [np.log([PI2[0, a], PI2[1, b]])], reward=reward), "ips").value)
        chance.append(MU2[0, a] * MU2[1, b])
        truth += PI2[0, a] * PI2[1, b] * composer(reward).trajectory(t).value
    assert np.dot(found, chance) == pytest.approx(truth, abs=1e-6)


def test_clipping_is_biased_and_self_normalising_bounded() -> None:
    chance, truth = MU2[0], float(PI2[0] @ [0.0, 1.0])
    clipped = [
        estimate(Logged.of([np.log(MU2[0, a])], [np.log(PI2[0, a])], [float(a)]), "clipped", cap=1.0) for a in (0, 1)
    ]
    assert chance @ [e.value for e in clipped] < truth - 0.1
    log = Logged.of(np.log([0.01, 0.5]), np.log([0.9, 0.5]), [1.0, 0.0])
    assert estimate(log, "ips").value > 1.0 >= estimate(log, "snips").value


def test_the_same_policy_gives_the_mean_return() -> None:
    log = Logged.of(ADS["behaviour"], ADS["behaviour"], R)
    assert all(estimate(log, m).value == pytest.approx(0.5) for m in ("ips", "snips", "clipped"))
    assert estimate(log).ess == pytest.approx(4.0)


# --- intervals --------------------------------------------------------------------------------------------------


def test_intervals_treat_the_task_as_the_unit() -> None:
    """Ten times the same rows of the same tasks are no more evidence; of new tasks they are."""
    once = Logged.of(**ADS, tasks=range(4))
    again = {name: np.tile(x, 10) for name, x in ADS.items()}
    same, other = Logged.of(**again, tasks=[*range(4)] * 10), Logged.of(**again, tasks=range(40))
    widths = [np.diff(estimate(log).interval or (0, 0))[0] for log in (once, same, other)]
    assert widths[0] == pytest.approx(widths[1])
    assert widths[2] < 0.6 * widths[1]
    assert estimate(other, seed=1).interval != estimate(other, seed=2).interval
    assert estimate(other, seed=1) == estimate(other, seed=1)
    assert estimate(Logged.of(**ADS, tasks=["one"] * 4)).interval is None


def test_intervals_cover() -> None:
    """Of 60 logs of 200 decisions each, about 95 % of the intervals hold the truth."""
    g = np.random.default_rng(0)
    held = []
    for _ in range(60):
        a = (g.random(200) > MU2[0, 0]).astype(int)
        log = Logged.of(np.log(MU2[0])[a], np.log(PI2[0])[a], a + g.normal(size=200))
        low, high = estimate(log, "snips", resamples=300).interval or (0, 0)
        held.append(low <= 0.8 <= high)
    assert 0.85 <= np.mean(held) <= 1.0


# --- language trajectories --------------------------------------------------------------------------------------


def spoken(*turns: Turn, task: int = 0, status: str = "terminated") -> Trajectory:
    episode = Episode(task=Task(env="log-v0", seed=task))
    failure = Failure(kind="tool") if status == "failed" else None
    return Trajectory(env="log-v0", episode=episode, turns=Turns(items=turns), status=status, failure=failure)  # type: ignore[arg-type]


def said(step: int, logprobs: list[float], reward: float = 0.0, **fields: Any) -> Turn:
    action = Action(span=span([1] * len(logprobs), logprobs=Floats(logprobs), **fields.pop("span", {})))
    terms = (RewardTerm(name="r", value=reward, turn=step),)
    return Turn(step=step, observation=Observation(), action=action, rewards=terms, **fields)


def test_a_decision_is_all_that_was_sampled_in_a_turn() -> None:
    draft = Draft(by="agent", action=Action(span=span([3], logprobs=Floats([-1.0]))))
    t = spoken(said(0, [-0.5, -0.25]), said(1, [-2.0], 3.0, drafts=(draft,)))
    log = logged([t], lambda t: [-0.75, -2.5])
    assert log.ratios.tolist() == [[0.0, 0.5]]
    assert estimate(log, "ips").value == pytest.approx(3.0 * math.exp(0.5))


def test_the_distribution_that_was_sampled_from_counts() -> None:
    sampled = {"sampled_logprobs": Floats([-0.1])}
    assert logged([spoken(said(0, [-0.5], span=sampled))], [[-0.1]]).ratios.item() == pytest.approx(0.0, abs=1e-7)


def test_the_base_of_a_reward_is_not_weighed() -> None:
    t = spoken(said(0, [-1.0], 2.0))
    found = estimate(logged([t], [[0.0]], reward={"op": "weighted_sum", "bias": 10.0, "of": {"r": 1.0}}), "ips")
    assert found.value == pytest.approx(10.0 + 2.0 * math.e)


def test_failures_are_left_out() -> None:
    good, bad = spoken(said(0, [-1.0], 2.0)), spoken(status="failed")
    log = logged([bad, good], lambda t: [-1.0])
    assert (log.failed, estimate(log).value) == (1, pytest.approx(2.0))
    with pytest.raises(RecordError, match="nothing to judge by"):
        logged([bad], lambda t: [])


@pytest.mark.parametrize(
    "unrecorded",
    [numeric([None], [1.0]), spoken(said(0, [])), spoken(Turn(step=0, observation=Observation(), action=Action()))],
)
def test_missing_log_probs_are_refused_with_a_way_out(unrecorded: Trajectory) -> None:
    if unrecorded.turns[0].action.span is not None:
        empty = unrecorded.turns[0].action.span.replace(ids=Ids([1, 2]))
        turn = unrecorded.turns[0].replace(action=Action(span=empty))
        unrecorded = unrecorded.replace(turns=Turns(items=(turn,)))
    with pytest.raises(RecordError, match="log-probs; pass behaviour"):
        logged([unrecorded], [[-1.0]])
    assert logged([unrecorded], [[-1.0]], behaviour=[[-1.0]]).ratios.item() == 0.0


def test_what_has_no_weight_is_refused() -> None:
    t = spoken(said(0, [-1.0], 2.0))
    with pytest.raises(RecordError, match="turn 0 was logged with propensity 0"):
        logged([t], [[-1.0]], behaviour=[[-math.inf]])
    with pytest.raises(RecordError, match="target log-prob that is no number"):
        logged([t], [[math.inf]])
    with pytest.raises(RecordError, match="every importance weight is 0"):
        estimate(logged([t], [[-math.inf]]), "snips")
    assert estimate(logged([t], [[-math.inf]]), "ips").value == 0.0
    with pytest.raises(RecordError, match="too large for a number"):
        estimate(Logged.of([-1000.0], [0.0], [1.0]))
    assert effective([0.0, 0.0]) == 0.0
    with pytest.raises(RecordError, match="numbers of shape"):
        logged([t], [[-1.0, -1.0]])
    with pytest.raises(RecordError, match="rewards holds a number that is not finite"):
        Logged.of([-1.0], [-1.0], [math.nan])


def test_what_cannot_be_meant_is_refused() -> None:
    log = Logged.of(**ADS)
    with pytest.raises(UnknownName, match="snips"):
        estimate(log, "snip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the model's q and v"):
        estimate(log, "doubly_robust")
    with pytest.raises(ConfigError, match="weighting = 'decision'"):
        estimate(Logged.of(**ADS, **MODEL), "doubly_robust", weighting="trajectory")
    with pytest.raises(ConfigError, match="cap"):
        estimate(log, "clipped", cap=0.0)
    with pytest.raises(ConfigError, match="one shape"):
        Logged.of([-1.0], [-1.0, -2.0], [1.0])
    with pytest.raises(ConfigError, match="2 arrays for 1 trajectories"):
        logged([spoken(said(0, [-1.0]))], [[-1.0], [-1.0]])
