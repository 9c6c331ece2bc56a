"""Advantages: the numbers of the literature by hand, a slow twin, and the properties of the whole family."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import msgspec
import numpy as np
import pytest
from golden_runs import rich
from hypothesis import given
from hypothesis import strategies as st
from making import samples, trajectory

from agentgym.advantages import Best, PassAtK, RankNormal, Risk, Term, advantages, to_tokens
from agentgym.errors import ConfigError, RecordError, UnknownName
from agentgym.rewards import Composed, composer, derived
from agentgym.types import RewardTerm, Trajectory


def outcomes(rewards: list[float], **fields: object) -> list[Trajectory]:
    return [trajectory([{"r": r}], **fields) for r in rewards]  # type: ignore[arg-type]


def first(found: list) -> list[float]:
    return [float(values[0]) for values in found]


def estimate(rewards: list[float], *terms: Term) -> list[float]:
    return first(advantages(samples(outcomes(rewards)), terms))


# --- by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "rewards", "expected"),
    [
        (Term(), [1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024]),
        (Term(), [1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
        (Term(scale="none"), [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        (Term(centre="leave_one_out", scale="none"), [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        (
            Term(key="none", centre="none", scale="tokens", credit="return_to_go"),
            [1, 1, 0],
            [0.57735, 0.57735, -1.1547],
        ),
        (Term(key="batch", scale="none"), [1, 1, 0], [1 / 3, 1 / 3, -2 / 3]),
        (Term(eps=1e-4), [1, 0, 0, 1], [0.865876, -0.865876, -0.865876, 0.865876]),
        (Term(ddof=0, eps=0), [1, 0, 0, 1], [1, -1, -1, 1]),
        (Term(singleton="keep"), [0.7], [0.7]),
        (Term(), [0.7], [0.0]),
        (Term(centre="leave_one_out", scale="none"), [0.7], [0.0]),
        (Term(centre="others", scale="none"), [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        (Term(centre="others", scale="none"), [0.7], [0.0]),
        (Term(centre="others", scale="none", singleton="keep"), [0.7], [0.7]),
        (Term(scale="active"), [0, 0], [0, 0]),
        (Term(key="none", centre="none", scale="none", weight=-2.0), [0.7], [-1.4]),
    ],
)
def test_estimators_of_one_group(term: Term, rewards: list[float], expected: list[float]) -> None:
    assert estimate(rewards, term) == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_with_group_baseline_whitens_the_batch() -> None:
    both = [*outcomes([1, 0], group="a"), *outcomes([0, 0], group="b")]
    found = first(advantages(samples(both), [Term(scale="batch")]))
    assert found == pytest.approx([1.224745, -1.224745, 0, 0], abs=1e-5)


def test_gpg_makes_up_for_the_share_without_signal() -> None:
    both = [*outcomes([1, 0], group="a"), *outcomes([0, 0], group="b")]
    assert first(advantages(samples(both), [Term(scale="active")])) == pytest.approx([2, -2, 0, 0])


def test_a_trajectory_may_enter_its_statistics_once_a_turn() -> None:
    """The flag of GiGPO's released code: statistics over steps, so that long trajectories weigh more."""
    played = [trajectory([{"r": 1.0}, {}, {}]), trajectory([{"r": 0.0}])]
    assert first(advantages(samples(played), [Term(scale="none")])) == [0.5, -0.5]
    each = np.asarray([1.0, 1.0, 1.0, 0.0])
    expected = (np.asarray([1.0, 0.0]) - each.mean()) / (each.std(ddof=1) + 1e-6)
    assert first(advantages(samples(played), [Term(count="turns")])) == pytest.approx(expected.tolist())


def test_domains_and_labels_are_keys() -> None:
    shop, web = {"labels": {"domain": "shop"}}, {"labels": {"domain": "web"}}
    played = [*outcomes([1, 0], group="a", **shop), *outcomes([4, 3], group="b", **web), *outcomes([9], group="c")]
    found = first(advantages(samples(played), [Term(key="domain", scale="none", singleton="keep")]))
    assert found == [0.5, -0.5, 0.5, -0.5, 9.0]


def test_opo_weighs_the_baseline_by_length_and_remax_is_given_one() -> None:
    played = [trajectory([{"r": 1.0}], tokens=2), trajectory([{"r": 0.0}], tokens=4)]
    found = advantages(samples(played), [Term(centre="length_weighted", scale="none")])
    assert first(found) == pytest.approx([2 / 3, -1 / 3])
    greedy = [trajectory([{"r": 1.0}], metrics={"greedy": 0.4})]
    assert first(advantages(samples(greedy), [Term(centre="given", scale="none", given="greedy")])) == [0.6]
    with pytest.raises(UnknownName, match="did you mean 'greedy'"):
        advantages(samples(greedy), [Term(centre="given", scale="none", given="greddy")])


def test_gdpo_normalises_each_component_before_it_sums() -> None:
    played = [trajectory([{"a": a, "b": b}]) for a, b in ((1, 0), (0, 0.1), (0, 0.1), (1, 0))]
    apart = first(advantages(samples(played), [Term(key=("prompt", "component"))]))
    assert [abs(x) for x in apart] == pytest.approx([1.35e-5] * 4, rel=0.01)
    together = first(advantages(samples(played), [Term()]))
    assert together == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)
    whitened = advantages(samples(played), [Term(key=("prompt", "component"), eps=0.0)], whiten="trajectories")
    assert all(abs(x) < 1e-6 for x in first(whitened))


def test_gigpo_adds_an_anchor_state_term() -> None:
    played = [
        trajectory([{"r": 0.0}, {"r": 1.0}], anchors=["s0", "s1"]),
        trajectory([{"r": 0.0}, {"r": 0.0}], anchors=["s0", "s2"]),
        trajectory([{"r": 0.0}, {"r": 0.0}], anchors=["s0", "s1"]),
    ]
    step = Term(key=("prompt", "anchor"), scale="none", credit="return_to_go", gamma=0.5)
    both = np.asarray(advantages(samples(played), [Term(scale="none"), step]))
    only = np.asarray(advantages(samples(played), [step]))
    assert only == pytest.approx(np.asarray([[1 / 3, 0.5], [-1 / 6, 0], [-1 / 6, -0.5]]))
    assert both[0] == pytest.approx([1.0, 1.166667], abs=1e-6)


def test_return_to_go_discounts_by_step_and_not_by_turn() -> None:
    """Agents that act at once share a step: nothing lies between them."""
    played = trajectory([{"r": 1.0}, {"r": 2.0}, {"r": 4.0}])
    steps = zip(played.turns.items, (0, 0, 2), strict=True)  # type: ignore[union-attr]
    played = played.replace(turns=played.turns.replace(items=tuple(t.replace(step=s) for t, s in steps)))
    raw = Term(key="none", centre="none", scale="none", credit="return_to_go", gamma=0.5)
    assert advantages(samples([played]), [raw])[0].tolist() == [4.0, 3.0, 4.0]


def test_numeric_episodes_get_advantages_too() -> None:
    numeric = rich()[1]
    raw = Term(key="none", centre="none", scale="none", credit="return_to_go", gamma=0.5)
    assert advantages(samples([numeric]), [raw])[0].tolist() == [2.5, 1.5, 1.0, 0.5]
    by_agent = Term(key=("batch", "agent"), scale="none", credit="turn")
    assert advantages(samples([numeric]), [by_agent])[0].tolist() == [0.25, 0.25, -0.25, -0.25]


def test_dtpo_credits_tool_turns_apart_from_the_outcome() -> None:
    rewards = zip([0.1, 0, 0.1, 0], [1.5, 0.5, 0.5, 1.5], strict=True)
    played = [trajectory([{"tool": tool}, {"outcome": outcome}]) for tool, outcome in rewards]
    terms = [Term(component="outcome"), Term(component="tool", credit="turn", weight=0.3)]
    found = np.asarray(advantages(samples(played), terms))
    assert found[:, 0] == pytest.approx([1.125827, -1.125827, -0.606221, 0.606221], abs=1e-5)
    assert found[:, 1] == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)


def test_hrpo_adds_raw_action_rewards() -> None:
    played = [trajectory([{}, {"action": -0.1, "outcome": 1.0}]), trajectory([{"outcome": 0.0}])]
    raw = Term(key="none", centre="none", scale="none", credit="turn", component="action")
    found = advantages(samples(played), [Term(component="outcome"), raw])
    assert found[0] == pytest.approx([0.707106, 0.607106], abs=1e-5)
    assert found[1] == pytest.approx([-0.707106], abs=1e-5)


def test_complementary_rl_normalises_in_each_subgroup() -> None:
    played = [*outcomes([1, 1, 0], labels={"experience": "with"}), *outcomes([0, 0, 1], labels={"experience": "no"})]
    found = first(advantages(samples(played), [Term(key=("prompt", "label:experience"))]))
    assert found == pytest.approx([0.577349, 0.577349, -1.154699, -0.577349, -0.577349, 1.154699], abs=1e-5)


# --- a slow twin ------------------------------------------------------------------------------------------------


@dataclass
class Unit:
    owner: int
    turn: int  # -1: a whole trajectory
    group: object
    coarse: object
    score: float
    tokens: int
    turns: int


def slow(trajectories: list[Trajectory], term: Term) -> list[list[float]]:
    """The same by plain loops over units, for rewards named "r"."""
    units: list[Unit] = []
    for p, t in enumerate(trajectories):
        amounts = [sum(r.value for r in turn.rewards) for turn in t.turns.items]  # type: ignore[union-attr]
        tokens = [len(turn.action.span.ids) for turn in t.turns.items]  # type: ignore[union-attr]
        group: object = t.episode.group if "prompt" in term.parts else "all"
        if term.credit == "trajectory":
            units.append(Unit(p, -1, group, group, sum(amounts), sum(tokens), len(amounts)))
            continue
        for k in range(len(amounts)):
            to_go = sum(term.gamma ** (j - k) * amounts[j] for j in range(k, len(amounts)))
            score = to_go if term.credit == "return_to_go" else amounts[k]
            fine = (t.turns[k].observation.anchor if "anchor" in term.parts else "", k if "turn" in term.parts else 0)
            units.append(Unit(p, k, (group, fine), group, score, tokens[k], 1))
    values = [_slow_unit(u, units, term) for u in units]
    if term.scale == "active":
        values = [v * len(units) / max(sum(u.score != 0 for u in units), 1) for v in values]
    if term.scale in ("batch", "tokens"):
        weights = [u.tokens if term.scale == "tokens" else 1 for u in units]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        square = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
        std = math.sqrt(square / max(sum(weights) - term.ddof, 1))
        values = [(v - mean) / (std + term.eps) for v in values]
    out = [[0.0] * len(t.turns) for t in trajectories]
    for u, value in zip(units, values, strict=True):
        for turn in range(len(out[u.owner])) if u.turn < 0 else [u.turn]:
            out[u.owner][turn] = value
    return out


def _slow_unit(u: Unit, units: list[Unit], term: Term) -> float:
    mine = [v for v in units if v.group == u.group]
    scores = [v.score for v in mine for _ in range(v.turns if term.count == "turns" else 1)]
    if term.centre == "others":
        baseline = _slow_others(u, units)
        if baseline is None:
            return u.score if term.singleton == "keep" else 0.0
        value = u.score - baseline
    elif len(mine) == 1 and term.centre != "none":
        return u.score if term.singleton == "keep" else 0.0
    else:
        value = u.score - _slow_baseline(u, mine, scores, term)
    if term.scale == "std" and max(scores) > min(scores):
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / max(len(scores) - term.ddof, 1))
        value /= std + term.eps
    return value


def _slow_baseline(u: Unit, mine: list[Unit], scores: list[float], term: Term) -> float:
    if term.centre == "mean":
        return sum(scores) / len(scores)
    if term.centre == "leave_one_out":
        return (sum(scores) - u.score) / (len(scores) - 1)
    if term.centre == "length_weighted":
        return sum(v.tokens * v.score for v in mine) / sum(v.tokens for v in mine)
    return 0.0


def _slow_others(u: Unit, units: list[Unit]) -> float | None:
    """Of others in the group; else what it was at the trajectory's latest earlier unit that had some."""
    earlier = [v for v in units if v.owner == u.owner and v.coarse == u.coarse and v.turn <= u.turn]
    for unit in reversed(earlier):
        found = [v.score for v in units if v.group == unit.group and v.owner != u.owner]
        if found:
            return sum(found) / len(found)
    return None


_rewards = st.floats(-2, 2).map(lambda x: round(x, 2))
_turns = st.lists(st.tuples(_rewards, st.sampled_from("xyz"), st.integers(1, 4)), min_size=1, max_size=3)
_batches = st.lists(st.tuples(_turns, st.sampled_from("gh")), min_size=1, max_size=7).map(
    lambda rows: [
        trajectory([{"r": r} for r, _, _ in turns], anchors=[a for _, a, _ in turns],
                   tokens=[n for _, _, n in turns], group=group)
        for turns, group in rows
    ]
)  # fmt: skip
_axes = {
    "centre": st.sampled_from(["mean", "leave_one_out", "others", "length_weighted", "none"]),
    "scale": st.sampled_from(["none", "std", "batch", "tokens", "active"]),
    "ddof": st.sampled_from([0, 1]),
    "eps": st.just(1e-3),
    "singleton": st.sampled_from(["zero", "keep"]),
}
_terms = st.one_of(
    st.builds(Term, key=st.sampled_from(["prompt", "batch"]), **_axes),
    st.builds(Term, key=st.sampled_from(["prompt", "batch"]), scale=st.sampled_from(["none", "std"]),
              count=st.just("turns")),
    st.builds(Term, key=st.sampled_from([("prompt", "turn"), ("batch", "turn"), ("prompt", "turn", "anchor")]),
              credit=st.just("return_to_go"), centre=st.just("others"), scale=st.sampled_from(["none", "batch"]),
              singleton=st.sampled_from(["zero", "keep"])),
    st.builds(Term, key=st.sampled_from(["prompt", ("prompt", "anchor"), ("batch", "anchor")]),
              credit=st.sampled_from(["turn", "return_to_go"]), gamma=st.sampled_from([0.5, 1.0]), **_axes),
)  # fmt: skip


@given(_batches, _terms)
def test_agrees_with_the_slow_twin(batch: list[Trajectory], term: Term) -> None:
    found = advantages(samples(batch), [term])
    for values, expected in zip(found, slow(batch, term), strict=True):
        assert values == pytest.approx(expected, abs=1e-6)


# --- properties -------------------------------------------------------------------------------------------------

GROUPED = [
    Term(),
    Term(scale="none"),
    Term(centre="leave_one_out", scale="none"),
    Term(centre="length_weighted"),
    Term(key=("prompt", "anchor"), credit="return_to_go"),
    Term(key=("prompt", "turn"), centre="others", scale="none", credit="return_to_go"),
    Term(centre="none", scale="none", transform=RankNormal()),
    Term(centre="none", transform=PassAtK()),
    Term(centre="none", scale="none", transform=Risk(natural=True)),
]


@pytest.mark.parametrize("term", [*GROUPED, Term(scale="batch"), Term(scale="tokens")])
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e9])
def test_equal_rewards_give_exact_zeros(term: Term, reward: float) -> None:
    played = [trajectory([{"r": reward}], tokens=n, anchors=["s"]) for n in (1, 2, 3)]
    assert first(advantages(samples(played), [term])) == [0.0, 0.0, 0.0]


@given(_batches, st.sampled_from(GROUPED), st.randoms(use_true_random=False))
def test_groups_are_isolated_and_order_does_not_matter(batch: list[Trajectory], term: Term, random: object) -> None:
    found = advantages(samples(batch), [term])
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = advantages(samples([batch[i] for i in order]), [term])
    for place, i in enumerate(order):
        assert moved[place] == pytest.approx(found[i], abs=1e-9)
    mine = [t for t in batch if t.episode.group == "g"]
    alone = advantages(samples(mine), [term])
    together = [v for t, v in zip(batch, found, strict=True) if t.episode.group == "g"]
    for a, b in zip(alone, together, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


@given(st.lists(_rewards, min_size=2, max_size=6), st.sampled_from([0.5, 3.0]), _rewards)
def test_affine_rewards_change_nothing_with_std_and_scale_without(rewards: list[float], a: float, b: float) -> None:
    changed = [a * r + b for r in rewards]
    exact = Term(eps=0.0)
    if max(rewards) - min(rewards) > 1e-3:
        assert estimate(changed, exact) == pytest.approx(estimate(rewards, exact), abs=1e-6)
    plain = Term(scale="none")
    assert estimate(changed, plain) == pytest.approx([a * x for x in estimate(rewards, plain)], abs=1e-9)


def test_failures_are_in_no_baseline_and_get_nothing() -> None:
    good = outcomes([1, 0, 0])
    broken = trajectory([{"r": -100.0}], status="failed")
    for terms, whiten in ((GROUPED[:4], "none"), ([Term(scale="batch")], "tokens")):
        found = advantages(samples([good[0], broken, *good[1:]]), terms, whiten=whiten)
        assert found[1].shape == (0,)
        assert first([found[0], *found[2:]]) == first(advantages(samples(good), terms, whiten=whiten))
    assert [len(v) for v in advantages(samples([broken]), [Term()])] == [0]
    assert advantages([], [Term()]) == []
    with pytest.raises(RecordError, match="did not fail"):
        advantages([(good[0], None)], [Term()])


def test_terms_add_up_by_weight() -> None:
    played = samples(outcomes([1, 0, 0.5]))
    one, other = Term(scale="none", weight=2.0), Term(centre="leave_one_out", scale="none", weight=-0.5)
    both = first(advantages(played, [one, other]))
    apart = np.asarray(first(advantages(played, [one]))) + np.asarray(first(advantages(played, [other])))
    assert both == pytest.approx(apart.tolist())


def test_whitening_counts_trajectories_turns_or_tokens() -> None:
    played = samples([trajectory([{"r": 1.0}, {}, {}], tokens=[1, 1, 4]), trajectory([{"r": 0.0}], tokens=2)])
    for whiten, weights in (("trajectories", [1 / 3] * 3 + [1]), ("turns", [1] * 4), ("tokens", [1, 1, 4, 2])):
        found = np.concatenate(advantages(played, [Term(scale="none")], whiten=whiten))  # type: ignore[arg-type]
        assert np.dot(weights, found) == pytest.approx(0, abs=1e-9)
        assert np.dot(weights, found**2) / (sum(weights) - 1) == pytest.approx(1, abs=1e-4)
    silent = samples([trajectory([{"r": 1.0}], tokens=0)])
    with pytest.raises(ConfigError, match="no sampled tokens"):
        advantages(silent, [Term()], whiten="tokens")


def test_broadcast_to_the_tokens_of_each_turn() -> None:
    played = trajectory([{}, {}], tokens=[2, 3])
    assert to_tokens(played, np.asarray([0.5, -1.0])).tolist() == [0.5, 0.5, -1.0, -1.0, -1.0]
    with pytest.raises(RecordError, match="0 values for the 2 turns"):
        to_tokens(played, np.zeros(0))


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused_by_episode(value: float) -> None:
    good = samples(outcomes([1, 0]))
    bad = trajectory([{"r": value}], group="b")
    with pytest.raises(RecordError, match=r"composed reward of episode b\.0\.0 is"):
        advantages([*good, (bad, Composed(value, 0.0, (value,)))], [Term()])
    with pytest.raises(RecordError, match=r"share of a reward term of episode b\.0\.0"):
        advantages([*good, (bad, Composed(0.0, 0.0, (value,)))], [Term(credit="turn")])
    with pytest.raises(RecordError, match=r"a reward term of episode b\.0\.0"):
        advantages([*good, (bad, Composed(0.0, 0.0, (0.0,)))], [Term(component="r")])
    baseless = samples([trajectory([{"r": 1.0}], metrics={"baseline": value})])
    with pytest.raises(RecordError, match=r"metric 'baseline' of episode g\.0\.0"):
        advantages(baseless, [Term(centre="given", scale="none")])


def test_sums_that_overflow_are_refused_by_episode() -> None:
    huge = samples(outcomes([1.7e308, -1.7e308]))
    with pytest.raises(RecordError, match=r"the advantage of episode g\.0\.0"):
        advantages(huge, [Term(centre="leave_one_out", scale="none")])


ANY = [
    *GROUPED,
    Term(scale="batch"),
    Term(scale="tokens"),
    Term(scale="active"),
    Term(key=("prompt", "component")),
    Term(key=("batch", "agent")),
    Term(key="bundle", centre="none", scale="none", credit="share", transform=Risk(track=True)),
    Term(key="bundle", scale="std"),
    Term(centre="none", scale="none", transform=Best()),
    Term(component="absent"),
    Term(component="absent", credit="turn"),
    Term(key="none", centre="none", scale="none", credit="gae"),
    Term(whose="team", credit="return_to_go", key="batch"),
]


@pytest.mark.parametrize("term", ANY)
def test_empty_steps_failures_and_episodes_without_turns_are_defined(term: Term) -> None:
    broken, silent = trajectory([{"r": 1.0}], status="failed"), trajectory([])
    assert advantages([], [term]) == []
    assert [v.tolist() for v in advantages(samples([broken, broken]), [term])] == [[], []]
    assert [v.tolist() for v in advantages(samples([silent, broken, silent]), [term])] == [[], [], []]
    one = trajectory([{"r": 1.0}], anchors=["s"])
    (value,) = advantages(samples([one]), [term], values=[np.zeros(1)])[0].tolist()
    assert math.isfinite(value)


def test_terms_the_trainer_worked_out_are_read_by_name_only() -> None:
    played = trajectory([{"r": 1.0}, {}], tokens=[3, 4])
    lengths = derived(played)
    composed = composer("sum").trajectory(played, lengths)
    raw = Term(key="none", centre="none", scale="none", credit="turn")
    assert advantages([(played, composed)], [raw.replace(component="policy.tokens")])[0].tolist() == [3, 4]
    apart = Term(key=("prompt", "component"), scale="none", singleton="keep")
    assert advantages([(played, composed)], [apart])[0].tolist() == [1, 1]


def test_shares_and_turns_of_reward_terms_must_fit() -> None:
    played = trajectory([{"r": 1.0}])
    with pytest.raises(RecordError, match=r"2 shares for the 1 reward terms of episode g\.0\.0"):
        advantages([(played, Composed(1.0, 0.0, (0.5, 0.5)))], [Term(credit="turn")])
    stray = Composed(1.0, 0.0, (0.5, 0.5), (RewardTerm(name="late", value=0.5, turn=7),))
    with pytest.raises(RecordError, match=r"episode g\.0\.0 names turn 7, the trajectory has 1"):
        advantages([(played, stray)], [Term(credit="turn")])


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"centre": "meen"}, UnknownName, "did you mean 'mean'"),
        ({"key": "promt"}, UnknownName, "did you mean 'prompt'"),
        ({"key": ("prompt", "anchor")}, ConfigError, "set credit to 'turn'"),
        ({"key": "none"}, ConfigError, "makes no groups"),
        ({"key": ("prompt", "component"), "component": "r"}, ConfigError, "drop component"),
        ({"key": ()}, ConfigError, "an empty key"),
        ({"key": "label:"}, UnknownName, "label:NAME"),
        ({"key": "none", "centre": "none", "scale": "none", "transform": Best()}, ConfigError, "makes no groups"),
        ({"credit": "share"}, ConfigError, "set key = 'bundle'"),
        ({"key": ("bundle", "domain")}, ConfigError, "stands alone"),
        ({"key": "bundle", "credit": "turn"}, ConfigError, "stands alone"),
        ({"key": "bundle", "centre": "given"}, ConfigError, "of single trajectories"),
        ({"key": "bundle", "bundle": 0}, ConfigError, "at least one prompt"),
        ({"transform": RankNormal()}, ConfigError, "set centre = 'none'"),
        ({"transform": RankNormal(), "centre": "none"}, ConfigError, "set scale = 'none'"),
        ({"count": "turns", "credit": "turn"}, ConfigError, "needs credit 'trajectory'"),
        ({"count": "turns", "centre": "leave_one_out"}, ConfigError, "needs credit 'trajectory'"),
        ({"weight": math.nan}, ConfigError, "a finite number"),
        ({"ddof": 2}, ConfigError, "ddof is 0 or 1"),
        ({"lam": 1.5}, ConfigError, "gamma and lam in"),
    ],
)
def test_a_wrong_term_is_refused_with_the_way_out(fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        Term(**fields)


def test_turn_index_groups_warn_and_missing_keys_are_named() -> None:
    for biased in ({"credit": "turn"}, {"credit": "return_to_go", "centre": "others"}):
        with pytest.warns(UserWarning, match="late turns exist only in long"):
            Term(key=("prompt", "turn"), **biased)
    Term(key=("prompt", "turn"), credit="return_to_go", centre="others", scale="none")
    played = samples([trajectory([{"r": 1.0}], labels={"intent": "x"})])
    with pytest.raises(UnknownName, match="did you mean 'intent'"):
        advantages(played, [Term(key=("prompt", "label:intemt"))])
    with pytest.raises(ConfigError, match=r"needs Observation.anchor; test-v0 gives none"):
        advantages(played, [Term(key=("prompt", "anchor"), credit="turn")])


def test_terms_are_read_from_tables_with_precise_errors() -> None:
    table = {"key": ["prompt", "anchor"], "credit": "return_to_go", "scale": "none", "gamma": 0.95}
    assert msgspec.convert(table, Term) == Term(**{**table, "key": ("prompt", "anchor")})  # type: ignore[arg-type]
    risky = {"centre": "none", "transform": {"kind": "risk", "upper": 0.9, "track": True}}
    found = msgspec.convert(risky, Term)
    assert found == Term(centre="none", transform=Risk(upper=0.9, track=True))
    assert msgspec.convert(msgspec.to_builtins(found), Term) == found
    for wrong, says in (
        ({"transform": {"kind": "risk", "uper": 0.9}, "centre": "none"}, r"unknown field `uper`.*\$\.transform"),
        ({"transform": {"kind": "ranks"}}, r"Invalid value 'ranks' - at `\$\.transform\.kind`"),
        ({"transform": {"kind": "risk", "lower": 0.9}}, r"0 <= lower < upper <= 1; got 0\.9, 0\.8"),
        ({"centre": "meen"}, r"\$\.centre"),
        ({"key": "promt"}, "did you mean 'prompt'"),
        ({"centred": "mean"}, "unknown field `centred`"),
    ):
        with pytest.raises((msgspec.ValidationError, UnknownName), match=says):
            msgspec.convert(wrong, Term)


def test_the_tables_of_the_docs_are_terms() -> None:
    page = (Path(__file__).parents[2] / "docs" / "credit.md").read_text("utf-8")
    tables = re.findall(r"^    \[\[advantage\]\]\n(?:    .+\n)+", page, re.MULTILINE)
    found = [msgspec.convert(tomllib.loads(dedent(t))["advantage"], tuple[Term, ...]) for t in tables]
    assert [terms[0].parts for terms in found] == [("prompt", "turn"), ("prompt", "anchor")]
