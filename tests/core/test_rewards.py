"""Rewards: hand-computed values of the literature, the exact attribution, and refusals with a way out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from golden_runs import rich
from hypothesis import given
from hypothesis import strategies as st
from making import ledger, trajectory

from agentgym.errors import ConfigError, RecordError, UnknownName
from agentgym.rewards import Composed, by_turn, carried, check_gamma, check_reconciles, compose, composer, explain
from agentgym.types import RewardTerm

HRM = {
    "op": "gate", "when": "valid", "at_least": 1, "otherwise": -1.0,
    "then": {
        "op": "gate", "when": "finished", "at_least": 1, "otherwise": 0.0,
        "then": {
            "op": "gate", "when": "hard", "at_least": 1,
            "otherwise": {"op": "power", "of": "share", "exponent": 2, "scale": 0.3},
            "then": {
                "op": "weighted_sum", "bias": 0.5, "of": {"quality": 0.35},
                "plus": [{
                    "op": "gate", "when": "quality", "at_least": 0.5, "otherwise": 0.0,
                    "then": {"op": "weighted_sum", "of": {"efficiency": 0.15}},
                }],
            },
        },
    },
}  # fmt: skip
SHAPED = {"op": "weighted_sum", "plus": [HRM, {"op": "potential", "name": "phi", "gamma": 1.0}]}


def value(declaration: object, amounts: dict[str, float]) -> float:
    return composer(declaration, debug=True).compose(ledger(amounts)).value  # type: ignore[arg-type]


def owed(declaration: object, amounts: dict[str, float]) -> dict[str, float]:
    found = composer(declaration, debug=True).compose(ledger(amounts))  # type: ignore[arg-type]
    return dict(zip(amounts, found.shares, strict=True))


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amounts", "expected", "charged"),
    [
        ({"valid": 0, "finished": 1, "hard": 1}, -1.0, {"valid": -1.5}),
        ({"valid": 1, "finished": 0, "hard": 0}, 0.0, {"finished": -0.5}),
        ({"valid": 1, "finished": 1, "hard": 0, "share": 0.5}, 0.075, {"hard": -0.5, "share": 0.075}),
        ({"valid": 1, "finished": 1, "hard": 1, "quality": 0.4, "efficiency": 1}, 0.64, {"quality": 0.14}),
        (
            {"valid": 1, "finished": 1, "hard": 1, "quality": 0.6, "efficiency": 0.5},
            0.785,
            {"quality": 0.21, "efficiency": 0.075},
        ),
    ],
)
def test_shopping_gates_charge_the_first_that_fails(
    amounts: dict[str, float], expected: float, charged: dict[str, float]
) -> None:
    assert value(HRM, amounts) == pytest.approx(expected, abs=1e-12)
    assert composer(HRM).compose(ledger(amounts)).base == 0.5
    assert owed(HRM, amounts) == pytest.approx({name: charged.get(name, 0.0) for name in amounts}, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(0, 4))
def test_raising_a_part_of_the_shopping_reward_never_lowers_it(parts: list[float], raised: int) -> None:
    names = ("valid", "finished", "hard", "share", "quality", "efficiency")
    amounts = dict(zip(names, [round(p) if i < 3 else p for i, p in enumerate(parts)], strict=True))
    better = {**amounts, names[raised]: 1.0}
    assert value(HRM, better) >= value(HRM, amounts) - 1e-12
    assert (value(HRM, amounts) >= 0.5) == (amounts["valid"] + amounts["finished"] + amounts["hard"] == 3)


def test_hand_computed_compositions_of_the_literature() -> None:
    buddy = {"op": "gate", "when": "l1", "at_least": 1, "otherwise": 0, "then": {
        "op": "weighted_sum", "bias": 0.5, "of": {"p": 0.3}, "plus": [
            {"op": "gate", "when": "p", "at_least": 0.5, "otherwise": 0,
             "then": {"op": "scale", "of": "e", "factor": 0.2}}
        ]}}  # fmt: skip
    found = [value(buddy, {"l1": 1, "p": p, "e": e}) for p, e in ((0.5, 1), (0.9, 0.2), (0.4, 1))]
    assert found == pytest.approx([0.85, 0.81, 0.62])
    text2vis = {"op": "weighted_sum", "of": {"answer": 0.5, "code": 0.25, "visual": 0.25}}
    assert value(text2vis, {"answer": 0.48, "code": 0.5, "visual": 0.25}) == pytest.approx(0.4275)
    globe = {"op": "weighted_sum", "of": {"acc": 1, "loc": 0.5, "visual": 0.2, "format": 1}}
    assert value(globe, {"acc": 0.2, "loc": 0.7, "visual": 0.5, "format": 1}) == pytest.approx(1.65)
    rluf = {"op": "weighted_sum", "of": {"love": 0.5, "helpful": 0.3, "safe": 0.2}}
    assert value(rluf, {"love": 0.2, "helpful": 0.9, "safe": 1}) == pytest.approx(0.57)


def test_ensembles_of_reward_models() -> None:
    scores = {"r1": 1.0, "r2": 2.0, "r3": 3.0}
    assert value({"op": "min", "of": list(scores)}, scores) == 1.0
    cautious = {"op": "mean_minus_variance", "of": list(scores), "lambda": 0.5}
    assert value(cautious, scores) == pytest.approx(1.666667, abs=1e-6)
    assert value({**cautious, "ddof": 1}, scores) == pytest.approx(1.5)


def test_min_charges_its_argmin_and_product_starts_from_one() -> None:
    assert owed({"op": "min", "of": ["a", "b", "c"]}, {"a": 3, "b": -2, "c": 5}) == {"a": 0, "b": -2, "c": 0}
    found = composer({"op": "product", "of": ["a", "b"]}).compose(ledger({"a": 0.5, "b": 0.4}))
    assert found == Composed(0.2, 1.0, (-0.5, pytest.approx(-0.3)))


def test_lexicographic_never_trades_an_earlier_part_for_later_ones() -> None:
    ordered = {"op": "lexicographic", "of": ["safe", "right", "short"], "levels": 4}
    low = value(ordered, {"safe": 0.5, "right": 1, "short": 1})
    assert value(ordered, {"safe": 0.75, "right": 0, "short": 0}) > low
    assert value(ordered, {"safe": 0.5, "right": 1, "short": 0.9}) < low
    assert value(ordered, {"safe": 1, "right": 1, "short": 1}) == pytest.approx(1.0)


def test_relative_to_baseline_and_scale() -> None:
    better = {"op": "scale", "of": {"op": "relative_to_baseline", "of": "now", "baseline": "before"}, "factor": 2}
    assert owed(better, {"now": 0.75, "before": 0.5}) == {"now": 1.5, "before": -1.0}
    assert value({"op": "relative_to_baseline", "of": "now", "baseline": 0.5}, {"now": 0.75}) == 0.25


# --- attribution ------------------------------------------------------------------------------------------------


def test_terms_of_one_name_are_totalled_and_share_by_value() -> None:
    terms = [RewardTerm(name=n, value=v) for n, v in (("a", 1.0), ("b", 7.0), ("a", 3.0))]
    squared = composer({"op": "power", "of": "a", "exponent": 2}, debug=True)
    assert squared.compose(terms) == Composed(16.0, 0.0, (4.0, 0.0, 12.0))
    nothing = [RewardTerm(name="valid", value=0.0), RewardTerm(name="valid", value=0.0)]
    gate = composer({"op": "gate", "when": "valid", "at_least": 1, "then": 1.0, "otherwise": 0.0})
    assert gate.compose(nothing).shares == (0.0, -1.0)


def test_turn_rewards_that_cancel_keep_their_own_shares() -> None:
    terms = [RewardTerm(name="r", value=v) for v in (0.1, 0.2, -0.3)]
    found = composer({"op": "weighted_sum", "of": {"r": 2.0}}, debug=True).compose(terms)
    assert found.shares == (0.2, 0.4, -0.6)


def test_what_the_world_caused_is_recorded_and_never_credited() -> None:
    terms = [
        RewardTerm(name="phi.before", value=0.25),
        RewardTerm(name="phi.after", value=0.5),
        RewardTerm(name="phi.drift", value=-0.4, cause="world"),
        RewardTerm(name="bonus", value=9.0, cause="world"),
        RewardTerm(name="bonus", value=1.0),
    ]
    shaped = {"op": "weighted_sum", "of": {"bonus": 1}, "plus": [{"op": "potential", "name": "phi", "gamma": 1.0}]}
    assert composer(shaped, debug=True).compose(terms) == Composed(1.25, 0.0, (-0.25, 0.5, 0.0, 0.0, 1.0))
    assert composer("sum").compose(terms).value == 1.0


def test_potential_shaping_by_hand_and_telescoping() -> None:
    shaping = composer({"op": "potential", "name": "phi", "gamma": 0.99})
    for before, after, expected in ((0.0, 1.0, 0.99), (1.0, 1.0, -0.01)):
        assert shaping.compose(ledger({"phi.before": before, "phi.after": after})).value == pytest.approx(expected)
    potentials = [0.1, 0.4, 0.2, 0.0]
    turns = [{"phi.before": a, "phi.after": b} for a, b in itertools.pairwise(potentials)]
    turns[-1] |= {"valid": 1, "finished": 1, "hard": 1, "quality": 0.6, "efficiency": 0.5}
    played = trajectory(turns)
    found = composer(SHAPED, debug=True).trajectory(played)
    assert found.value == pytest.approx(0.785 - potentials[0], abs=1e-12)
    assert by_turn(found, played) == pytest.approx([0.3, -0.2, 0.785 - 0.5 - 0.2])


def test_by_turn_follows_the_turn_a_term_names() -> None:
    played = trajectory([{"r": 1.0}, {"r": 2.0}])
    late = played.turns[1].replace(rewards=(RewardTerm(name="r", value=5.0, turn=0), RewardTerm(name="r", value=2.0)))
    played = played.replace(turns=played.turns.replace(items=(played.turns[0], late)))
    assert by_turn(composer("sum").trajectory(played), played).tolist() == [6.0, 2.0]
    with pytest.raises(RecordError, match="2 shares for the 3 reward terms"):
        by_turn(Composed(3.0, 0.0, (1.0, 2.0)), played)


def test_the_ledger_of_columns_needs_no_turns() -> None:
    numeric = rich()[1]
    assert [term for _, term in carried(numeric)] == list(numeric.rewards)
    found = composer("sum").trajectory(numeric)
    assert found.value == 3.0
    assert by_turn(found, numeric).tolist() == [1.0, 1.0, 0.5, 0.5]


NAMES = ("a", "b", "c", "d")
_numbers = st.floats(-3, 3).map(lambda x: round(x, 3))
_parts = st.deferred(lambda: _declarations)
_lists = st.lists(_parts, min_size=2, max_size=3)
_declarations = st.one_of(
    st.sampled_from(NAMES),
    _numbers,
    st.builds(lambda of, bias, plus: {"op": "weighted_sum", "of": of, "bias": bias, "plus": plus},
              st.dictionaries(st.sampled_from(NAMES), _numbers, min_size=1), _numbers, st.lists(_parts, max_size=2)),
    st.builds(lambda n, x, t, o: {"op": "gate", "when": n, "at_least": x, "then": t, "otherwise": o},
              st.sampled_from(NAMES), _numbers, _parts, _parts),
    st.builds(lambda of: {"op": "min", "of": of}, _lists),
    st.builds(lambda of: {"op": "product", "of": of}, _lists),
    st.builds(lambda of, k: {"op": "mean_minus_variance", "of": of, "lambda": k}, _lists, _numbers),
    st.builds(lambda of: {"op": "power", "of": of, "exponent": 2, "scale": 0.5}, _parts),
)  # fmt: skip
_ledgers = st.lists(st.tuples(st.sampled_from(NAMES), _numbers), max_size=8).map(
    lambda more: [RewardTerm(name=n, value=v) for n, v in (*((n, 0.5) for n in NAMES), *more)]
)


class Twin:
    """The definition, word by word: f(x_1..x_i, rest neutral) for every i, occurrences in order of appearance."""

    def __init__(self, declaration: object, totals: dict[str, float]) -> None:
        self.totals, self.declaration = totals, declaration
        self.order = list(self.occurrences(declaration, ()))
        self.argmin: dict[tuple, int] = {}
        self.known = {path for path, _ in self.order}
        self.value = self.f(declaration, ())

    def occurrences(self, d: object, path: tuple) -> Iterator[tuple[tuple, str]]:
        if isinstance(d, str):
            yield path, d
        elif isinstance(d, dict):
            if d["op"] == "gate":
                yield (*path, "when"), d["when"]
            children = {"weighted_sum": lambda: [*d["of"], *d["plus"]], "gate": lambda: [d["then"], d["otherwise"]],
                        "power": lambda: [d["of"]]}.get(d["op"], lambda: d["of"])()  # fmt: skip
            for i, child in enumerate(children):
                yield from self.occurrences(child, (*path, i))

    def f(self, d: object, path: tuple, neutral: float = 0.0) -> float:
        if isinstance(d, str):
            return self.totals[d] if path in self.known else neutral
        if not isinstance(d, dict):
            return d  # type: ignore[return-value]
        op = d["op"]
        if op == "weighted_sum":
            named = [w * self.f(n, (*path, i)) for i, (n, w) in enumerate(d["of"].items())]
            return d["bias"] + sum(named) + sum(
                self.f(p, (*path, len(named) + i)) for i, p in enumerate(d["plus"])
            )  # fmt: skip
        if op == "gate":
            passes = (*path, "when") not in self.known or self.totals[d["when"]] >= d["at_least"]
            return self.f(d["then"], (*path, 0)) if passes else self.f(d["otherwise"], (*path, 1))
        if op == "power":
            return 0.5 * self.f(d["of"], (*path, 0)) ** 2
        values = [self.f(p, (*path, i), 1.0 if op == "product" else 0.0) for i, p in enumerate(d["of"])]
        if op == "min":
            return values[self.argmin.setdefault(path, values.index(min(values)))]
        if op == "product":
            return math.prod(values)
        return float(np.mean(values) - d["lambda"] * np.var(values))

    def owed(self) -> tuple[float, dict[str, float]]:
        self.known = set()
        before = base = self.f(self.declaration, ())
        amounts = dict.fromkeys(NAMES, 0.0)
        for path, name in self.order:
            self.known.add(path)
            after = self.f(self.declaration, ())
            amounts[name] += after - before
            before = after
        return base, amounts


@given(_declarations, _ledgers)
def test_attribution_is_the_definition_and_reconciles(declaration: object, terms: list[RewardTerm]) -> None:
    found = composer(declaration, debug=True).compose(terms)  # type: ignore[arg-type]
    twin = Twin(declaration, {n: math.fsum(t.value for t in terms if t.name == n) for n in NAMES})
    base, expected = twin.owed()
    amounts = {n: sum(s for t, s in zip(terms, found.shares, strict=True) if t.name == n) for n in NAMES}
    size = max(1.0, abs(found.value), *map(abs, expected.values()))
    assert found.value == pytest.approx(twin.value, abs=1e-9 * size)
    assert found.base == pytest.approx(base, abs=1e-9 * size)
    assert amounts == pytest.approx(expected, abs=1e-9 * size)


_others = st.one_of(
    _declarations,
    st.just({"op": "sum"}),
    st.builds(lambda n, x: {"op": "term", "name": n, "default": x}, st.sampled_from(("a", "absent")), _numbers),
    st.builds(lambda of, b: {"op": "relative_to_baseline", "of": of, "baseline": b}, _declarations, _declarations),
    st.builds(lambda of, x: {"op": "scale", "of": of, "factor": x, "offset": 0.5}, _declarations, _numbers),
    st.builds(lambda of: {"op": "lexicographic", "of": of, "levels": 3}, _lists),
    st.just({"op": "weighted_sum", "of": {"own": {"op": "gate", "when": "a", "at_most": 1, "then": "b",
             "otherwise": {"op": "term", "name": "c"}}, "d": 0.5}}),
)  # fmt: skip


@given(_others, _others, _ledgers)
def test_every_operation_reconciles_wherever_it_stands(one: object, other: object, terms: list[RewardTerm]) -> None:
    both = {"op": "weighted_sum", "plus": [one, {"op": "product", "of": [other, one, 0.5]}]}
    found = composer(both, debug=True).compose(terms)
    apart = [composer(d).compose(terms).value for d in (one, other)]  # type: ignore[arg-type]
    assert found.value == pytest.approx(apart[0] + 0.5 * apart[0] * apart[1], rel=1e-9, abs=1e-9)


def test_debug_catches_what_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match="does not add up"):
        check_reconciles(Composed(1.0, 0.5, (0.4,)))
    assert not composer("sum").debug
    monkeypatch.setenv("AGENTGYM_DEBUG", "1")
    checked = composer("sum")
    monkeypatch.setattr(compose, "_hand_out", lambda *found: None)
    with pytest.raises(RecordError, match=r"base \+ shares = 0.0, value = 2.0"):
        checked.compose(ledger({"r": 2.0}))


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "error", "says"),
    [
        ({"op": "weigthed_sum", "of": {}}, UnknownName, "did you mean 'weighted_sum'"),
        (
            {"op": "gate", "when": "a", "at_least": 1, "then": 1, "otherwize": 0},
            UnknownName,
            "did you mean 'otherwise'",
        ),
        ({"op": "gate", "when": "a", "at_least": 1, "then": 1}, ConfigError, "needs 'otherwise'"),
        ({"op": "gate", "when": "a", "then": 1, "otherwise": 0}, ConfigError, "'at_least' or 'at_most'"),
        ({"op": "gate", "when": {"op": "sum"}, "at_most": 1, "then": 1, "otherwise": [1]}, ConfigError, "a table with"),
        ({"of": {"a": 1}}, ConfigError, "needs an 'op'"),
        ({"op": "weighted_sum", "of": {"a": float("nan")}}, ConfigError, "weight of 'a'"),
        ({"op": "weighted_sum", "of": {}}, ConfigError, "name = weight"),
        ({"op": "min", "of": "a"}, ConfigError, "list of names"),
        ({"op": "mean_minus_variance", "of": ["a"], "lambda": 1, "ddof": 1}, ConfigError, "number of parts"),
        ({"op": "power", "of": "a", "exponent": 0}, ConfigError, "above 0"),
        ({"op": "lexicographic", "of": ["a"], "levels": 0}, ConfigError, "whole number"),
        ('{"op": "sum"', ConfigError, "is JSON"),
    ],
)
def test_a_wrong_declaration_is_refused_with_the_way_out(declaration: object, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        composer(declaration)  # type: ignore[arg-type]


def test_an_absent_term_names_the_nearest_and_may_have_a_default() -> None:
    wanted = {"op": "weighted_sum", "of": {"quality": 1}}
    with pytest.raises(RecordError, match=r"did you mean 'qualtiy'\?.*'default': 0.0"):
        composer(wanted).compose(ledger({"qualtiy": 1.0}))
    lenient = {"op": "weighted_sum", "of": {}, "plus": [{"op": "term", "name": "quality", "default": 0.25}]}
    assert value(lenient, {"other": 3.0}) == 0.25
    unfinished = {
        "op": "gate",
        "when": {"op": "term", "name": "done", "default": 0},
        "at_least": 1,
        "then": 1,
        "otherwise": 0,
    }
    assert value(unfinished, {}) == 0.0
    assert value(unfinished, {"done": 1}) == 1.0
    with pytest.raises(RecordError, match="finite"):
        composer("sum").compose(ledger({"r": math.inf}))
    with pytest.raises(RecordError, match="no real number"):
        composer({"op": "power", "of": "a", "exponent": 0.5}).compose(ledger({"a": -1.0}))


def test_a_potential_with_another_gamma_than_the_learner_is_refused() -> None:
    check_gamma(SHAPED, 1.0)
    with pytest.raises(ConfigError, match=r"potential 'phi' has gamma = 1.0, the learner has gamma = 0.95"):
        check_gamma(SHAPED, 0.95)


def test_a_declaration_may_be_text() -> None:
    assert composer(json.dumps(HRM)).names == composer(HRM).names
    assert composer("r").compose(ledger({"r": 2.0, "other": 5.0})) == Composed(2.0, 0.0, (2.0, 0.0))


def test_explain_lists_every_term_base_and_value() -> None:
    terms = ledger({"valid": 1.0, "finished": 0.0, "noise": 3.0}, turn=2)
    lines = [line.split() for line in explain(composer(HRM).compose(terms), terms).splitlines()]
    assert lines[2] == ["2", "finished", "0", "-0.5"]
    assert lines[3] == ["2", "noise", "3", "+0"]
    assert lines[-2:] == [["base", "+0.5"], ["value", "+0"]]
