"""Transforms: ranks, quantiles of risk, the best alone; bundles of prompts and what is remembered between steps."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import samples, trajectory

from agentgym.advantages import AdvantageState, Best, PassAtK, RankNormal, Risk, Term, advantages
from agentgym.advantages.groups import quantile
from agentgym.advantages.transforms import best, normal_quantile, pass_at_k, rank_normal, risk, tracked
from agentgym.errors import ConfigError, RecordError, UnknownName

S = np.asarray([0.0, 1, 2, 3, 5])
ONE = np.zeros(5, np.intp)


def estimate(rewards: list[float], **fields: object) -> list[float]:
    played = [trajectory([{"r": r}]) for r in rewards]
    term = Term(**{"centre": "none", "scale": "none", **fields})  # type: ignore[arg-type]
    return [float(v[0]) for v in advantages(samples(played), [term])]


# --- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "rewards", "expected"),
    [
        ("half", [0.1, 0.5, 0.5, 0.9], [-1.150349, 0, 0, 1.150349]),
        ("plus_one", [0.1, 0.5, 0.5, 0.9], [-0.841621, 0, 0, 0.841621]),
        ("half", [1, 0, 0, 0], [1.150349, -0.383450, -0.383450, -0.383450]),
        ("half", [2, 2, 2], [0, 0, 0]),
        ("half", [7], [0]),
    ],
)
def test_g2rpo_by_hand(convention: str, rewards: list[float], expected: list[float]) -> None:
    found = estimate(rewards, transform=RankNormal(convention=convention))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_normal_quantile_is_pythons() -> None:
    p = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 999), [1e-10, 1e-4, 0.075, 0.925, 0.5]])
    assert normal_quantile(p) == pytest.approx([NormalDist().inv_cdf(x) for x in p], rel=1e-14, abs=1e-15)


_few = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)


@given(_few, st.sampled_from(["half", "plus_one"]))
def test_ranks_agree_with_a_slow_twin(rewards: list[float], convention: str) -> None:
    n, slow = len(rewards), []
    for r in rewards:
        ranks = [k for k, other in enumerate(sorted(rewards), 1) if other == r]
        ps = [(k - 0.5) / n if convention == "half" else k / (n + 1) for k in ranks]
        slow.append(sum(NormalDist().inv_cdf(p) for p in ps) / len(ps))
    found = rank_normal(np.asarray(rewards), np.zeros(n, np.intp), convention)
    assert found.tolist() == pytest.approx(slow, abs=1e-12)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    assert rank_normal(-np.asarray(rewards), np.zeros(n, np.intp), convention).tolist() == pytest.approx(
        (-found).tolist(), abs=1e-12
    )
    assert estimate([math.exp(3 * r) for r in rewards], transform=RankNormal()) == estimate(
        rewards, transform=RankNormal()
    )


# --- risk -------------------------------------------------------------------------------------------------------


def test_riskpo_by_hand() -> None:
    low, high = (float(quantile(S, ONE, a)[0]) for a in (0.2, 0.8))
    assert (low, high) == pytest.approx((0.8, 3.4))
    natural = risk(S, low, high, Risk(natural=True))
    assert natural.tolist() == pytest.approx([-4.133333, -1.6, -0.933333, -0.266667, 0], abs=1e-4)
    off = risk(S, low, high, Risk())
    assert off.tolist() == pytest.approx([-2.4, 0.133333, 0.8, 1.466667, 1.733333], abs=1e-4)
    rvar = risk(S, low, high, Risk(weight=0.0, natural=True))
    assert rvar.tolist() == pytest.approx([-4.333333, -4, -2.333333, -0.666667, 0], abs=1e-4)
    seeking = risk(S, low, high, Risk(seeking=True))
    upper = np.maximum(S - high, 0) / 0.2
    assert seeking.tolist() == pytest.approx(
        ((1.5 * upper + risk(S, low, high, Risk(weight=0.0))) / 2.5).tolist(), abs=1e-4
    )
    assert estimate(S.tolist(), transform=Risk()) == pytest.approx(off.tolist())


def test_a_quantile_tracker_steps_and_converges() -> None:
    assert tracked(0.0, np.asarray([0.0, 1, 2]), 0.2, 0.1) == pytest.approx(0.02)
    assert tracked(0.3, np.zeros(0), 0.2, 0.1) == 0.3
    q = 0.0
    for k in range(2000):
        q = tracked(q, S, 0.5, 0.1 / (1 + 0.01 * k))
    assert q == pytest.approx(2.0, abs=1e-3)


def test_quantiles_are_tracked_between_steps_and_survive_saving() -> None:
    term = Term(centre="none", scale="none", transform=Risk(track=True))
    played = samples([trajectory([{"r": float(r)}]) for r in S])
    state = AdvantageState()
    first = advantages(played, [Term(), term], state=state)
    assert state.quantiles == {"1": pytest.approx((0.8, 3.4))}  # the first step has its own
    assert [float(v[0]) for v in advantages(played, [Term(), term])] == [float(v[0]) for v in first]
    later = samples([trajectory([{"r": 0.0}]), trajectory([{"r": 0.0}])])
    saved = AdvantageState()
    saved.load_state_dict(state.state_dict())
    second = [advantages(later, [Term(), term], state=s) for s in (state, saved)]
    assert second[0] == second[1]
    assert float(second[0][0][0]) == pytest.approx(risk(np.zeros(1), 0.8, 3.4, Risk())[0])  # used, then moved
    assert state.quantiles == saved.quantiles == {"1": pytest.approx((0.8 + 0.1 * (0.2 - 1), 3.4 + 0.1 * (0.8 - 1)))}
    with pytest.raises(RecordError, match="no state of advantages"):
        saved.load_state_dict({"quantiles": {"1": 3}})


def test_a_group_without_spread_is_not_divided_by_nothing() -> None:
    """Tracked quantiles leave a value where all scores are equal; the std of such a group is no divisor."""
    term = Term(centre="none", scale="std", transform=Risk(track=True))
    state = AdvantageState()
    state.load_state_dict({"quantiles": {"0": [0.5, 1.5]}})
    found = advantages(samples([trajectory([{"r": 1.0}]), trajectory([{"r": 1.0}])]), [term], state=state)
    assert [float(v[0]) for v in found] == pytest.approx([risk(np.ones(1), 0.5, 1.5, Risk())[0]] * 2)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-5, 5)), min_size=1, max_size=12), st.floats(0, 1))
def test_quantiles_of_groups_are_numpys(pairs: list[tuple[int, float]], alpha: float) -> None:
    g = np.unique([g for g, _ in pairs], return_inverse=True)[1]
    x = np.asarray([x for _, x in pairs])
    slow = [np.quantile(x[g == i], alpha) for i in range(g.max() + 1)]
    assert quantile(x, g, alpha) == pytest.approx(slow, abs=1e-9)


def test_what_a_risk_cannot_be() -> None:
    for fields in ({"lower": 0.9}, {"upper": 1.5}, {"weight": -1.0}, {"lr": 0.0}, {"weight": math.nan}):
        with pytest.raises(ConfigError, match=r"lower < upper|weight is at least 0"):
            Risk(**fields)
    with pytest.raises(UnknownName, match="no convention 'third'"):
        RankNormal(convention="third")  # type: ignore[arg-type]


# --- the best alone ---------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand() -> None:
    assert estimate([0.9, 0.4, 0.1], transform=PassAtK()) == pytest.approx([0.5, 0, 0])
    assert estimate([0.9, 0.4, 0.1], transform=PassAtK(), scale="std") == pytest.approx([1.237177, 0, 0], abs=1e-5)
    assert estimate([1, 1, 0], transform=PassAtK()) == [0, 0, 0]
    assert estimate([1], transform=PassAtK()) == [0]
    assert estimate([1], transform=PassAtK(), singleton="keep") == [1]


def test_only_the_best_keeps_its_score() -> None:
    assert estimate([0.2, 0.7, 0.1], transform=Best()) == pytest.approx([0, 0.7, 0])
    assert estimate([0.6, 0.6, 0.1], transform=Best()) == pytest.approx([0.3, 0.3, 0])
    assert estimate([0, 0], transform=Best()) == [0, 0]
    assert estimate([0.4], transform=Best()) == [0.4]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-2, 2).map(float)), min_size=1, max_size=12))
def test_the_best_of_groups_agree_with_slow_twins(pairs: list[tuple[int, float]]) -> None:
    g = np.unique([g for g, _ in pairs], return_inverse=True)[1]
    x = np.asarray([x for _, x in pairs])
    slow_pass, slow_best = np.zeros(len(x)), np.zeros(len(x))
    for i in range(g.max() + 1):
        mine = [k for k in range(len(x)) if g[k] == i]
        ranked = sorted(mine, key=lambda k: x[k])
        slow_pass[ranked[-1]] = x[ranked[-1]] - (x[ranked[-2]] if len(mine) > 1 else 0.0)
        top = [k for k in mine if x[k] == max(x[j] for j in mine)]
        for k in top:
            slow_best[k] = x[k] / len(top)
    assert pass_at_k(x, g).tolist() == slow_pass.tolist()
    assert best(x, g).tolist() == pytest.approx(slow_best.tolist())


# --- bundles ----------------------------------------------------------------------------------------------------


def bundle_of(table: dict[str, list[float]]) -> list:
    return samples([trajectory([{"r": r}], group=group) for group, rewards in table.items() for r in rewards])


def slow_bundle(table: dict[str, list[float]], declared: Risk) -> list[float]:
    """RiskPO as its released code goes about it: papers without replacement, quantiles and credit by loops."""
    papers = min(map(len, table.values()))
    scores = [sum(rewards[k] for rewards in table.values()) for k in range(papers)]
    low, high = np.quantile(scores, declared.lower), np.quantile(scores, declared.upper)
    out = {group: [0.0] * len(rewards) for group, rewards in table.items()}
    for k, score in enumerate(scores):
        rvar = (max(score - low, 0) - max(score - high, 0)) / (declared.upper - declared.lower + 1e-6)
        cvar = -max(low - score, 0) / (declared.lower + 1e-6)
        value = (declared.weight * cvar + rvar) / (declared.weight + 1)
        ahead = {group: rewards[k] - np.mean(rewards) for group, rewards in table.items()}
        total = sum(ahead.values())
        for group in table:
            out[group][k] = value * (ahead[group] / total if abs(total) > 1e-6 else 1 / len(table))
    return [value for values in out.values() for value in values]


_prompts = st.lists(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=4), min_size=1, max_size=3)


@given(_prompts)
def test_bundles_share_their_value_as_riskpos_code_does(rewards: list[list[float]]) -> None:
    table = {f"p{i}": row for i, row in enumerate(rewards)}
    term = Term(key="bundle", centre="none", scale="none", credit="share", transform=Risk(), singleton="keep")
    found = [float(v[0]) for v in advantages(bundle_of(table), [term])]
    if min(map(len, rewards)) > 1:
        assert found == pytest.approx(slow_bundle(table, Risk()), abs=1e-9)


def test_bundles_hold_consecutive_prompts_and_leave_out_members_without_counterpart() -> None:
    table = {"a": [1.0, 0.0, 5.0], "b": [2.0, 0.0], "c": [4.0, 1.0]}
    term = Term(key="bundle", bundle=2, scale="none")
    found = [float(v[0]) for v in advantages(bundle_of(table), [term])]
    assert found == pytest.approx([1.5, -1.5, 0, 1.5, -1.5, 1.5, -1.5])
    table["b"] = [2.0]
    found = [float(v[0]) for v in advantages(bundle_of(table), [term.replace(singleton="keep")])]
    assert found == pytest.approx([3.0, 0, 0, 3.0, 1.5, -1.5])


def test_a_bundle_that_lacks_prompts_is_no_bundle_of_zeros() -> None:
    """Tracked quantiles are of sums over full bundles: half a bundle of the same rewards fares as a full one does."""
    risk = Risk(track=True)
    term = Term(key="bundle", bundle=2, centre="none", scale="none", credit="share", transform=risk)
    scores = [2.0, 1.0, 3.0, 0.0]
    state = AdvantageState()
    advantages(bundle_of({"a": scores, "b": scores}), [term], state=state)
    later, other = AdvantageState(), AdvantageState()
    later.quantiles, other.quantiles = dict(state.quantiles), dict(state.quantiles)
    full = advantages(bundle_of({"a": scores, "b": scores}), [term], state=later)
    half = advantages(bundle_of({"a": scores}), [term], state=other)
    assert [float(v[0]) for v in half] == pytest.approx([float(v[0]) for v in full[:4]])
    assert other.quantiles == later.quantiles


def test_a_bundles_value_is_shared_by_reward_above_the_prompts_mean() -> None:
    table = {"a": [1.0, 0.0], "b": [4.0, 0.0]}
    term = Term(key="bundle", scale="none", credit="share")
    found = [float(v[0]) for v in advantages(bundle_of(table), [term])]
    assert found == pytest.approx([2.5 * 0.2, -2.5 * 0.2, 2.5 * 0.8, -2.5 * 0.8])
    cancel = {"a": [1.0, 0.0, 0.0], "b": [0.0, 0.0, 1.0]}  # the first: +2/3 and -1/3; the second: -1/3 and -1/3
    found = [float(v[0]) for v in advantages(bundle_of(cancel), [term])]
    assert found == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1 / 3, -1 / 3, 2 / 3])
