"""The operations that shape and constrain, composites with the literature's numbers, and terms from outside."""

from __future__ import annotations

import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import ledger, samples, span, trajectory

from agentgym.errors import ConfigError, RecordError, UnknownName
from agentgym.rewards import (
    Dual,
    by_turn,
    check_gamma,
    composer,
    composites,
    derived,
    multipliers,
    with_multipliers,
    with_terms,
)
from agentgym.types import RewardTerm

R = pytest.approx


def value(declaration: object, **amounts: float) -> float:
    return composer(declaration, debug=True).compose(ledger(amounts)).value  # type: ignore[arg-type]


def owed(declaration: object, **amounts: float) -> dict[str, float]:
    found = composer(declaration, debug=True).compose(ledger(amounts))  # type: ignore[arg-type]
    return dict(zip(amounts, found.shares, strict=True))


# --- shapes -----------------------------------------------------------------------------------------------------


def test_a_trapezoid_of_length() -> None:
    shape = {"op": "length_shape", "of": "length", "low": 100, "start": 200, "end": 400, "high": 800}
    found = [value(shape, length=n) for n in (50, 100, 150, 200, 300, 400, 600, 800, 900)]
    assert found == R([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert value({**shape, "start": 400, "height": 0.2}, length=400) == R(0.2)


def test_the_soft_penalty_for_being_too_long() -> None:
    soft = {"op": "overlong", "of": "length", "max": 10, "cache": 4}
    assert [value(soft, length=n) for n in (5, 6, 8, 10, 11)] == R([0, 0, -0.5, -1, -1])


def test_clip_steps_and_curve_by_hand() -> None:
    assert [value({"op": "clip", "of": "x", "low": 0, "high": 1}, x=x) for x in (-2, 0.25, 3)] == [0, 0.25, 1]
    assert value({"op": "clip", "of": "x", "high": 1}, x=-7) == -7
    steps = {"op": "steps", "of": "x", "levels": [[3, 0.5], [4, 1]], "otherwise": -1}
    assert [value(steps, x=x) for x in (2.9, 3, 3.9, 4, 5)] == [-1, 0.5, 0.5, 1, 1]
    curve = {"op": "curve", "of": "x", "points": [[0, 1], [2, 0], [3, 5]]}
    assert [value(curve, x=x) for x in (-1, 1, 2, 2.5, 9)] == R([1, 0.5, 0, 2.5, 5])


def test_sigmoids_do_not_overflow() -> None:
    assert value({"op": "calibrated", "of": "r", "baseline": "base"}, r=2, base=1) == R(0.731059, abs=1e-6)
    assert value({"op": "sigmoid", "of": "x"}, x=-1e4) == 0.0
    assert value({"op": "sigmoid", "of": "x"}, x=1e4) == 1.0


def test_the_greatest_is_charged_and_of_equals_the_first() -> None:
    assert owed({"op": "max", "of": ["a", "b", "c"]}, a=1, b=3, c=2) == {"a": 0, "b": 3, "c": 0}
    assert owed({"op": "max", "of": ["a", "b"]}, a=2, b=2) == {"a": 2, "b": 0}
    assert owed({"op": "min", "of": ["a", "b"]}, a=2, b=2) == {"a": 2, "b": 0}


def test_a_share_and_a_division_by_zero() -> None:
    share = {"op": "ratio", "of": "right", "by": "all"}
    assert value(share, right=3, all=4) == 0.75
    with pytest.raises(RecordError, match="divides by 0"):
        value(share, right=0, all=0)
    assert value({**share, "otherwise": 1}, right=0, all=0) == 1


def test_the_first_judge_that_is_not_satisfied_is_charged() -> None:
    mixture = {"op": "all_of", "when": ["safe", "honest"], "then": "r", "otherwise": -1}
    assert owed(mixture, safe=1, honest=1, r=0.5) == {"safe": 0, "honest": 0, "r": 0.5}
    assert owed(mixture, safe=1, honest=0, r=0.5) == {"safe": 0, "honest": -1, "r": 0}
    assert owed(mixture, safe=0, honest=0, r=0.5) == {"safe": -1, "honest": 0, "r": 0}
    lenient = {**mixture, "when": [{"op": "term", "name": "safe", "default": 1}]}
    assert value(lenient, r=0.5) == 0.5


NAMES = ("a", "b", "c")
_numbers = st.floats(-3, 3).map(lambda x: round(x, 3))
_parts = st.deferred(lambda: _shaped | st.sampled_from(NAMES))
_lists = st.lists(_parts, min_size=2, max_size=3)
_shaped = st.one_of(
    _numbers,
    st.builds(lambda of: {"op": "clip", "of": of, "low": -1, "high": 2}, _parts),
    st.builds(lambda of: {"op": "sigmoid", "of": of}, _parts),
    st.builds(lambda of, b: {"op": "calibrated", "of": of, "baseline": b}, _parts, _parts),
    st.builds(lambda of, x: {"op": "steps", "of": of, "levels": [[x, 2], [x + 1, -1]]}, _parts, _numbers),
    st.builds(lambda of: {"op": "curve", "of": of, "points": [[-1, 0], [0, 2], [2, -1]]}, _parts),
    st.builds(lambda of: {"op": "overlong", "of": of, "max": 3, "cache": 2}, _parts),
    st.builds(lambda of: {"op": "length_shape", "of": of, "low": -1, "start": 0, "end": 1, "high": 2}, _parts),
    st.builds(lambda of: {"op": "max", "of": of}, _lists),
    st.builds(lambda of: {"op": "min", "of": of}, _lists),
    st.builds(lambda of, n: {"op": "ratio", "of": of, "by": n, "otherwise": 0.5}, _parts, st.sampled_from(NAMES)),
    st.builds(lambda t, o, x: {"op": "all_of", "when": ["a", "c"], "at_least": x, "then": t, "otherwise": o},
              _parts, _parts, _numbers),
    st.builds(lambda of, c, m: {"op": "lagrangian", "of": of, "constraints": {
                  "a": {"multiplier": m}, "x": {"multiplier": 1, "cost": c, "target": 1}}},
              _parts, _parts, st.floats(0, 5)),
)  # fmt: skip
_ledgers = st.lists(st.tuples(st.sampled_from(NAMES), _numbers), max_size=6).map(
    lambda more: [RewardTerm(name=n, value=v) for n, v in (*((n, 0.5) for n in NAMES), *more)]
)


def occurrences(declared: object) -> int:
    """Names in the order of a declaration, counted: the slow way to know how many occurrences there are."""
    if isinstance(declared, str):
        return 1
    if isinstance(declared, list):
        return sum(map(occurrences, declared))
    if not isinstance(declared, dict):
        return 0
    read = ("when", "of", "baseline", "by", "then", "otherwise")
    inner = [occurrences(part) for key, part in declared.items() if key in read]
    costs = declared.get("constraints", {}).items()
    return sum(inner) + sum(occurrences(table.get("cost", name)) for name, table in costs)


@given(_shaped, _ledgers)
def test_every_shape_reconciles_and_reads_each_occurrence_once(declared: object, terms: list[RewardTerm]) -> None:
    made = composer({"op": "weighted_sum", "plus": [declared]}, debug=True)
    assert len(made._leaves) == occurrences(declared)
    found = made.compose(terms)
    assert math.isfinite(found.value)
    assert found.base + math.fsum(found.shares) == R(found.value, rel=1e-9, abs=1e-9)


# --- constraints --------------------------------------------------------------------------------------------------

PRICED = {
    "op": "weighted_sum",
    "plus": [{
        "op": "lagrangian", "of": "utility",
        "constraints": {
            "violation": {"multiplier": 0.5, "target": 0.1, "lr": 0.2},
            "length": {"multiplier": 1.0, "cost": {"op": "scale", "of": "tokens", "factor": 0.01}, "max": 1.5},
        },
    }],
}  # fmt: skip


def test_a_lagrangian_by_hand_and_its_exact_shares() -> None:
    assert value(PRICED, utility=1, violation=2, tokens=30) == R(1 - 0.5 * 1.9 - 0.3)
    assert owed(PRICED, utility=1, violation=2, tokens=30) == R({"utility": 1, "violation": -1, "tokens": -0.3})
    two = [RewardTerm(name="violation", value=v, turn=i) for i, v in enumerate((1.0, -1.0))]
    found = composer(PRICED).compose([*two, *ledger({"utility": 0, "tokens": 0})])
    assert found.shares[:2] == (-0.5, 0.5)


def test_multipliers_are_read_replaced_and_moved() -> None:
    assert multipliers(PRICED) == {"violation": 0.5, "length": 1.0}
    other = with_multipliers(PRICED, {"violation": 2.0})
    assert multipliers(other) == {"violation": 2.0, "length": 1.0}
    assert multipliers(PRICED)["violation"] == 0.5
    dual = Dual(PRICED)
    played = [
        ledger({"utility": 1, "violation": 1, "tokens": 200}),
        ledger({"utility": 1, "violation": 0, "tokens": 0}),
    ]
    costs = dual.costs(played)
    assert costs == R({"violation": 0.5, "length": 1.0})
    assert dual.update(costs) == R({"violation": 0.5 + 0.2 * 0.4, "length": 1.1})
    assert dual.composer.compose(played[0]).value == R(1 - 0.58 * 0.9 - 1.1 * 2)
    for _ in range(50):
        dual.update({"length": 9.0, "violation": 0.0})
    assert dual.state() == {"violation": 0.0, "length": 1.5}
    again = Dual(PRICED)
    again.restore(dual.state())
    assert again.declaration == dual.declaration
    assert dual.costs([]) == {}
    with pytest.raises(UnknownName, match="did you mean 'violation'"):
        with_multipliers(PRICED, {"violations": 1.0})
    with pytest.raises(UnknownName, match="no constraint 'x'"):
        dual.update({"x": 1.0})


def test_the_multiplier_settles_where_the_constraint_binds() -> None:
    """utility log(1 + v), cost v, target 1: the best answer to a multiplier m is v = 1/m - 1, so m tends to 1/2."""
    dual = Dual(composites.constrained(1.0, multiplier=1.0, lr=0.05))
    for _ in range(400):
        dual.update({"violation": 1 / max(dual.state()["violation"], 0.1) - 1})
    assert dual.state()["violation"] == R(0.5, abs=1e-3)


# --- terms from outside the ledger --------------------------------------------------------------------------------


def test_derived_terms_price_every_turn() -> None:
    played = trajectory([{"r": 1.0}, {"r": 1.0}], tokens=[3, 5])
    cut = played.turns[1].action.span.replace(finish="length")
    last = played.turns[1].replace(action=played.turns[1].action.replace(span=cut))
    played = played.replace(turns=played.turns.replace(items=(played.turns[0], last)))
    names = [(t.name, t.value, t.turn, t.level) for t in derived(played)]
    assert names == [
        ("policy.tokens", 3.0, 0, "turn"),
        ("policy.truncated", 0.0, 0, "turn"),
        ("policy.tokens", 5.0, 1, "turn"),
        ("policy.truncated", 1.0, 1, "turn"),
    ]
    with pytest.raises(RecordError, match="1 divergences for the 2 turns"):
        derived(played, [0.5])
    long = {"op": "weighted_sum", "of": {"r": 1}, "plus": [{"op": "overlong", "max": 10, "cache": 4}]}
    made = composer(long, debug=True)
    assert made.derived == ("policy.tokens",)
    found = made.trajectory(played, derived(played, [0.1, 0.4]))
    assert found.value == 1.5
    assert by_turn(found, played) == R([1 - 0.5 * 3 / 8, 1 - 0.5 * 5 / 8])
    assert by_turn(made.trajectory(played), played) == R(by_turn(found, played))
    with pytest.raises(RecordError, match=r"no reward term 'policy\.kl'"):
        composer("policy.kl").trajectory(played)


def test_the_plain_sum_leaves_derived_terms_out() -> None:
    played = trajectory([{"r": 1.0}], tokens=7)
    assert composer("sum").trajectory(played, derived(played)).value == 1.0


def test_judged_terms_join_the_ledger_at_their_turn() -> None:
    played = trajectory([{"r": 1.0}, {"r": 2.0}])
    judged = with_terms(played, [RewardTerm(name="safe", value=1.0), RewardTerm(name="kind", value=0.5, turn=0)])
    assert [(t.name, t.turn) for t in judged.rewards] == [("r", 0), ("kind", 0), ("r", 1), ("safe", 1)]
    assert with_terms(played, []) is played
    with pytest.raises(RecordError, match="names turn 7"):
        with_terms(played, [RewardTerm(name="safe", value=1.0, turn=7)])
    found = composer("sum").trajectory(played, [RewardTerm(name="late", value=4.0)])
    assert by_turn(found, played).tolist() == [1.0, 6.0]


# --- the literature's composites ----------------------------------------------------------------------------------

SEEN = {"match": 0.8, "executed": 1, "intent": 0, "readability": 3, "correctness": 2}


@pytest.mark.parametrize(
    ("declaration", "amounts", "expected"),
    [
        (composites.text2vis(), SEEN, 0.4275),
        (composites.text2vis(), {**SEEN, "executed": 0}, 0.24),
        (composites.text2vis(), {**SEEN, "match": 0.999, "intent": 1, "readability": 4, "correctness": 5},
         0.5 * (0.6 * 0.999 + 0.4) + 0.5),
        (composites.text2vis(), {**SEEN, "correctness": 3}, 0.24 + 0.125 + 0.125),
        (composites.text2vis(format=1.0), {**SEEN, "format": 1}, 1.4275),
        (composites.globe(), {"country": 1, "city": 0, "localisable": 0.7, "entities": 0.5, "format": 1}, 1.65),
        (composites.globe(), {"country": 1, "city": 1, "localisable": 0, "entities": 0, "format": 0}, 1.0),
        (composites.globe(), {"country": 0, "city": 1, "localisable": 0, "entities": 0, "format": 0}, 0.0),
        (composites.crpo(), {"accuracy": 1, "format": 1.5, "english": 0.98}, 11.99),
        (composites.etcon(), {"format": 1, "exact": 0, "subset": 1, "cleanliness": 0.4, "consistency": 0.5}, 0.685),
        (composites.etcon(), {"format": 0, "exact": 1, "subset": 1, "cleanliness": 1, "consistency": 1}, 0.0),
        (composites.etcon(), {"format": 1, "exact": 0, "subset": 0, "similarity": 0.925, "cleanliness": 0,
                              "consistency": 0}, 0.05 + 0.35),
        (composites.etcon(), {"format": 1, "exact": 0, "subset": 0, "similarity": 0.84, "cleanliness": 0,
                              "consistency": 0}, 0.05),
        (composites.rluf(0.5, 0.3, 0.2), {"love": 0.2, "helpful": 0.9, "safe": 1}, 0.57),
        (composites.heads(["h.0", "h.1"]), {"h.0": 1, "h.1": 0.5}, 0.75),
        (composites.wco(["r1", "r2", "r3"]), {"r1": 1, "r2": 2, "r3": 3}, 1.0),
        (composites.uwo(["r1", "r2", "r3"], 0.5, 0), {"r1": 1, "r2": 2, "r3": 3}, 1.666667),
        (composites.uwo(["r1", "r2", "r3"], 0.5, 1), {"r1": 1, "r2": 2, "r3": 3}, 1.5),
        (composites.crpg(["j"], 2.0), {"j": 1, "reward": 2, "baseline": 1, "policy.kl": 0.5}, 0.548294),
        (composites.crpg(["j"], 2.0), {"j": 0, "reward": 2, "baseline": 1, "policy.kl": 0.5}, 0.0),
        (composites.crpg(["j"], 2.0), {"j": 1, "reward": 2, "baseline": 1, "policy.kl": 2.5}, 0.0),
        (composites.crraft(["j"], 2.0), {"j": 1, "reward": 2, "baseline": 1, "policy.kl": 0.5}, 0.731059),
        (composites.crraft(["j"], 2.0), {"j": 1, "reward": 2, "baseline": 1, "policy.kl": 2.5}, 0.0),
        (composites.violations(0.3), {"utility": 1, "violation": 1}, 0.7),
        (composites.violations(0.3), {"utility": 1, "violation": 0}, 1.0),
        (composites.constrained(0.1, multiplier=2.0), {"utility": 1, "violation": 1}, 1 - 2 * 0.9),
        (composites.degrpo(), {"correct": 1, "think": 0}, 1.0),
        (composites.degrpo(), {"correct": 1, "think": 1}, 0.5),
        (composites.degrpo(), {"correct": 0, "think": 1}, -1.0),
        (composites.dtpo(), {"accuracy": 1, "tool": 1, "format": 1, "useful": 1, "area": 0.25}, 1.45),
        (composites.dtpo(), {"accuracy": 1, "tool": 0, "format": 1}, 1.5),
        (composites.retroformer(), {"next": 0.8, "now": 0.3}, 0.5),
        (composites.rlir(), {"recovered": 3, "actions": 4}, 0.75),
        (composites.classwise(), {"hit": 2, "miss": 1, "false_alarm": 1}, -1.0),
    ],
)  # fmt: skip
def test_a_composite_gives_the_papers_number(declaration: object, amounts: dict[str, float], expected: float) -> None:
    assert value(declaration, **amounts) == R(expected, abs=1e-6)


def test_adaptthink_against_the_reference_accuracy() -> None:
    found = {
        (right, quick): value(composites.adaptthink(), correct=right, nothinking=quick) - 0.6
        for right in (0, 1)
        for quick in (0, 1)
    }
    assert found == R({(1, 1): 0.45, (0, 1): -0.55, (1, 0): 0.4, (0, 0): -0.6})


def test_a_violated_judge_has_a_negative_advantage() -> None:
    from agentgym.advantages import Term, advantages

    made = composites.crpg(["j"], 2.0)
    rows = [{"j": j, "reward": 2, "baseline": 1, "policy.kl": 0.5} for j in (1, 1, 0)]
    found = advantages(
        samples([trajectory([row]) for row in rows], made), [Term(key="batch", scale="none")]
    )  # fmt: skip
    assert [round(float(a[0]), 6) for a in found] == [0.182765, 0.182765, -0.365529]


def test_a_composite_stands_in_toml_anywhere_in_a_declaration() -> None:
    text = """
    op = "weighted_sum"
    plus = [
        {op = "composite", name = "uwo", of = ["rm.0", "rm.1"], weight = 0.1, ddof = 1},
        {op = "composite", name = "constrained", target = 0.0, utility = "u", multiplier = 2.0},
        {op = "potential", name = "phi", gamma = 0.9},
    ]
    """
    declared = tomllib.loads(text)
    amounts = {"rm.0": 1.0, "rm.1": 2.0, "u": 1.0, "violation": 0.25, "phi.before": 1.0, "phi.after": 1.0}
    assert value(declared, **amounts) == R(1.5 - 0.05 + 1 - 0.5 - 0.1)
    assert multipliers(declared) == {"violation": 2.0}
    assert multipliers(with_multipliers(declared, {"violation": 0.5})) == {"violation": 0.5}
    with pytest.raises(ConfigError, match="gamma"):
        check_gamma(declared, 1.0)


def test_every_composite_without_a_choice_of_its_own_compiles() -> None:
    plain = ("text2vis", "globe", "crpo", "etcon", "classwise", "rlir", "retroformer", "degrpo", "adaptthink", "dtpo")
    for name in plain:
        assert composer({"op": "composite", "name": name}).names
    assert set(plain) < set(composites.COMPOSITES)


@pytest.mark.parametrize(
    ("declaration", "error", "says"),
    [
        ({"op": "composite", "name": "glob"}, UnknownName, "did you mean 'globe'"),
        ({"op": "composite", "name": "uwo", "of": ["a"]}, ConfigError, "missing a required argument: 'weight'"),
        ({"op": "composite", "name": "globe", "x": 1}, ConfigError, "takes"),
        ({"op": "composite", "name": "heads", "of": ["a", "b"], "weights": [1]}, ConfigError, "one weight for each"),
        ({"op": "clip", "of": "a"}, ConfigError, "'low' or 'high'"),
        ({"op": "clip", "of": "a", "low": 2, "high": 1}, ConfigError, "not above"),
        ({"op": "steps", "of": "a", "levels": [[2, 1], [1, 0]]}, ConfigError, "lowest x to the highest"),
        ({"op": "curve", "of": "a", "points": [[1, 2, 3]]}, ConfigError, r"\[x, value\]"),
        ({"op": "length_shape", "low": 3, "start": 2, "end": 4, "high": 5}, ConfigError, "low < start"),
        ({"op": "overlong", "max": 4, "cache": 5}, ConfigError, "between 0 and max"),
        ({"op": "ratio", "of": "a", "by": {"op": "min", "of": ["a"]}}, ConfigError, "is a term's name") ,
        ({"op": "all_of", "when": [{"op": "min", "of": ["a"]}], "then": 1, "otherwise": 0}, ConfigError, "term's name"),
        ({"op": "lagrangian", "of": "a", "constraints": {}}, ConfigError, "table of name"),
        ({"op": "lagrangian", "of": "a", "constraints": {"c": {"multiplier": -1.0}}}, ConfigError, "between 0 and max"),
        ({"op": "lagrangian", "of": "a", "constraints": {"c": {"weight": 1.0}}}, ConfigError, "constraint"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_meant_is_refused(declaration: object, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        composer(declaration)  # type: ignore[arg-type]


def test_two_constraints_of_one_name_are_refused() -> None:
    one = {"op": "lagrangian", "of": "u", "constraints": {"c": {"multiplier": 1.0}}}
    with pytest.raises(ConfigError, match="two constraints"):
        multipliers({"op": "weighted_sum", "plus": [one, one]})


def test_a_value_that_overflows_is_refused() -> None:
    with pytest.raises(RecordError, match="too large"):
        value({"op": "power", "of": "x", "exponent": 400}, x=1e10)
    with pytest.raises(RecordError, match="finite"):
        value({"op": "product", "of": ["x", "x"]}, x=1e200)


def test_spans_of_drafts_are_no_sampled_tokens_of_the_turn() -> None:
    from agentgym.types import Action, Draft

    played = trajectory([{"r": 1.0}], tokens=2)
    draft = Draft(by="guard", action=Action(span=span([1, 2, 3])))
    turn = played.turns[0].replace(drafts=(draft,))
    played = played.replace(turns=played.turns.replace(items=(turn,)))
    assert derived(played)[0].value == 2.0
