"""Advantages: the numbers of the literature by hand, a slow twin, and the properties of the whole family."""

from __future__ import annotations

import math

import numpy as np
import pytest
from golden_runs import rich
from hypothesis import given
from hypothesis import strategies as st
from making import samples, trajectory

from agentgym.advantages import Term, advantages, to_tokens
from agentgym.errors import ConfigError, RecordError, UnknownName
from agentgym.types import Trajectory


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
        (Term(key="none", centre="none", scale="none", weight=-2.0), [0.7], [-1.4]),
    ],
)
def test_estimators_of_one_group(term: Term, rewards: list[float], expected: list[float]) -> None:
    assert estimate(rewards, term) == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_with_group_baseline_whitens_the_batch() -> None:
    both = [*outcomes([1, 0], group="a"), *outcomes([0, 0], group="b")]
    found = first(advantages(samples(both), [Term(scale="batch")]))
    assert found == pytest.approx([1.224745, -1.224745, 0, 0], abs=1e-5)


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


def slow(trajectories: list[Trajectory], term: Term) -> list[list[float]]:
    """The same by plain loops over units, for rewards named "r"."""
    units: list[tuple[int, int, object, float, int]] = []  # trajectory, turn, group, score, tokens
    for p, t in enumerate(trajectories):
        amounts = [sum(r.value for r in turn.rewards) for turn in t.turns.items]  # type: ignore[union-attr]
        tokens = [len(turn.action.span.ids) for turn in t.turns.items]  # type: ignore[union-attr]
        group: object = t.episode.group if "prompt" in term.parts else "all"
        if term.credit == "trajectory":
            units.append((p, -1, group, sum(amounts), sum(tokens)))
            continue
        for k in range(len(amounts)):
            to_go = sum(term.gamma ** (j - k) * amounts[j] for j in range(k, len(amounts)))
            score = to_go if term.credit == "return_to_go" else amounts[k]
            anchor = t.turns[k].observation.anchor if "anchor" in term.parts else ""
            units.append((p, k, (group, anchor), score, tokens[k]))
    values = [_slow_unit(i, units, term) for i in range(len(units))]
    if term.scale in ("batch", "tokens"):
        weights = [u[4] if term.scale == "tokens" else 1 for u in units]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        square = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
        std = math.sqrt(square / max(sum(weights) - term.ddof, 1))
        values = [(v - mean) / (std + term.eps) for v in values]
    out = [[0.0] * len(t.turns) for t in trajectories]
    for (p, k, *_), value in zip(units, values, strict=True):
        for turn in range(len(out[p])) if k < 0 else [k]:
            out[p][turn] = value
    return out


def _slow_unit(i: int, units: list, term: Term) -> float:
    mine = [u for u in units if u[2] == units[i][2]]
    score, scores = units[i][3], [u[3] for u in mine]
    if len(mine) == 1 and term.centre != "none":
        return score if term.singleton == "keep" else 0.0
    mean = sum(scores) / len(scores)
    value = score
    if term.centre == "mean":
        value = score - mean
    elif term.centre == "leave_one_out":
        value = score - (sum(scores) - score) / (len(scores) - 1)
    elif term.centre == "length_weighted":
        value = score - sum(u[4] * u[3] for u in mine) / sum(u[4] for u in mine)
    if term.scale == "std":
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / max(len(scores) - term.ddof, 1))
        value /= std + term.eps
    return value


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
    "centre": st.sampled_from(["mean", "leave_one_out", "length_weighted", "none"]),
    "scale": st.sampled_from(["none", "std", "batch", "tokens"]),
    "ddof": st.sampled_from([0, 1]),
    "eps": st.just(1e-3),
    "singleton": st.sampled_from(["zero", "keep"]),
}
_terms = st.one_of(
    st.builds(Term, key=st.sampled_from(["prompt", "batch"]), **_axes),
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


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"centre": "meen"}, UnknownName, "did you mean 'mean'"),
        ({"key": "promt"}, UnknownName, "did you mean 'prompt'"),
        ({"key": ("prompt", "anchor")}, ConfigError, "set credit to 'turn'"),
        ({"key": "none"}, ConfigError, "makes no groups"),
        ({"key": ("prompt", "component"), "component": "r"}, ConfigError, "drop component"),
        ({"ddof": 2}, ConfigError, "ddof is 0 or 1"),
    ],
)
def test_a_wrong_term_is_refused_with_the_way_out(fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        Term(**fields)


def test_turn_index_groups_warn_and_missing_keys_are_named() -> None:
    with pytest.warns(UserWarning, match="late turns exist only in long"):
        Term(key=("prompt", "turn"), credit="turn")
    played = samples([trajectory([{"r": 1.0}], labels={"intent": "x"})])
    with pytest.raises(UnknownName, match="did you mean 'intent'"):
        advantages(played, [Term(key=("prompt", "label:intemt"))])
    with pytest.raises(ConfigError, match=r"needs Observation.anchor; test-v0 gives none"):
        advantages(played, [Term(key=("prompt", "anchor"), credit="turn")])
