"""Temporal logic against its definition, automata of known size, reward machines, and both as judges of episodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentgym.errors import ConfigError
from agentgym.rewards.automata import automaton
from agentgym.rewards.logic import Formula, atoms, holds, normal, parse
from agentgym.rewards.machines import RewardMachine

LETTERS = tuple(frozenset(x) for x in ((), ("a",), ("b",), ("a", "b")))
TRACES = [t for n in (1, 2, 3, 4) for t in itertools.product(LETTERS, repeat=n)]


def true_at(f: Formula, trace: Sequence[frozenset[str]], i: int) -> bool:
    """The definition of LTLf, word by word: whether f holds at step i of a trace that is not empty."""
    op, last = f.op, len(trace) - 1
    later = range(i, len(trace))

    def here(k: int, j: int = i) -> bool:
        return true_at(f.parts[k], trace, j)

    def until(a: int, b: int) -> bool:
        return any(here(b, j) and all(here(a, k) for k in range(i, j)) for j in later)

    def release(a: int, b: int) -> bool:
        return all(here(b, j) or any(here(a, k) for k in range(i, j)) for j in later)

    return {
        "true": lambda: True,
        "false": lambda: False,
        "atom": lambda: f.name in trace[i],
        "!": lambda: not here(0),
        "&": lambda: here(0) and here(1),
        "|": lambda: here(0) or here(1),
        "->": lambda: not here(0) or here(1),
        "<->": lambda: here(0) == here(1),
        "X": lambda: i < last and here(0, i + 1),
        "N": lambda: i == last or here(0, i + 1),
        "F": lambda: any(here(0, j) for j in later),
        "G": lambda: all(here(0, j) for j in later),
        "U": lambda: until(0, 1),
        "R": lambda: release(0, 1),
        "W": lambda: until(0, 1) or all(here(0, j) for j in later),
        "M": lambda: release(0, 1) and any(here(0, j) for j in later),
    }[op]()


def text(f: Formula) -> str:
    if f.op == "atom":
        return f.name
    if not f.parts:
        return f.op
    if len(f.parts) == 1:
        return f"{f.op} ({text(f.parts[0])})"
    return f"({text(f.parts[0])}) {f.op} ({text(f.parts[1])})"


formulas = st.recursive(
    st.sampled_from([Formula("atom", name="a"), Formula("atom", name="b"), Formula("true"), Formula("false")]),
    lambda inner: st.one_of(
        st.builds(lambda op, f: Formula(op, (f,)), st.sampled_from(["!", "X", "N", "F", "G"]), inner),
        st.builds(lambda op, f, g: Formula(op, (f, g)),
                  st.sampled_from(["&", "|", "->", "<->", "U", "R", "W", "M"]), inner, inner),
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@example(parse("X (F a)"))
@example(parse("N (G a)"))
@example(parse("G (a -> X b)"))
@given(formulas)
def test_the_automaton_accepts_what_the_definition_does(f: Formula) -> None:
    made = automaton(f)
    for trace in TRACES:
        assert made.accepts(trace) == true_at(f, trace, 0), (text(f), trace)


@settings(max_examples=100, deadline=None)
@given(formulas)
def test_reading_what_was_written_gives_the_same_formula(f: Formula) -> None:
    assert parse(text(f)) == f
    assert all(true_at(normal(f), t, 0) == true_at(f, t, 0) for t in TRACES[::7])
    assert all(true_at(normal(f, False), t, 0) != true_at(f, t, 0) for t in TRACES[::7])


@settings(max_examples=80, deadline=None)
@given(formulas)
def test_hopeless_and_settled_are_what_no_continuation_changes(f: Formula) -> None:
    """Every state of an automaton of n states is decided by continuations shorter than n; n is small here."""
    made = automaton(f)
    if len(made) > 6:
        return
    ends: list[set[bool]] = [{bool(x)} for x in made.accepting]
    for _ in range(len(made)):
        ends = [found.union(*(ends[int(t)] for t in row)) for found, row in zip(ends, made.table, strict=True)]
    assert [True not in found for found in ends] == made.hopeless.tolist()
    assert [False not in found for found in ends] == made.settled.tolist()
    assert (np.isinf(made.distance) == made.hopeless).all()
    assert ((made.distance == 0) == made.accepting).all()


@pytest.mark.parametrize(
    ("formula", "states"),
    [
        ("true", 1), ("false", 1), ("a | !a", 1), ("F a", 2), ("G a", 2), ("a", 3), ("a U b", 3), ("a W b", 3),
        ("G (a -> F b)", 2), ("F (a & X b)", 3), ("F a & F b", 4), ("G !a & F b", 3), ("X X a", 5),
        ("F (a & X F (b & X F c))", 4),
    ],
)  # fmt: skip
def test_automata_of_known_size(formula: str, states: int) -> None:
    assert len(automaton(formula)) == states


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("!(F a)", "G !a"), ("a -> b", "!a | b"), ("a U b", "!(!a R !b)"), ("F F a", "F a"), ("G G a", "G a"),
        ("a W b", "(a U b) | G a"), ("X a", "!WX !a"), ("F (a | b)", "F a | F b"), ("G (a & b)", "G a && G b"),
        ("F G a", "F (a & !X true)"),
    ],
)  # fmt: skip
def test_formulas_that_mean_the_same_have_the_same_automaton(one: str, other: str) -> None:
    a, b = automaton(one), automaton(other)
    if set(a.atoms) == set(b.atoms):
        assert a.table.tolist() == b.table.tolist()
        assert a.accepting.tolist() == b.accepting.tolist()


def test_binding_and_association() -> None:
    assert parse("a & b | c -> d U a") == parse("((a & b) | c) -> (d U a)")
    assert parse("a -> b -> c") == parse("a -> (b -> c)")
    assert parse("!a U b") == parse("(!a) U b")
    assert parse("G a -> b") == parse("(G a) -> b")
    assert atoms(parse("G (tool.buy -> F x_1)")) == {"tool.buy", "x_1"}


def test_safety_is_lost_and_liveness_won_at_a_step() -> None:
    safe = automaton("G !crash & F goal")
    states = safe.run([set(), {"goal"}, {"crash"}, set()])
    assert [bool(safe.hopeless[s]) for s in states] == [False, False, False, True, True]
    assert safe.distance[states].tolist() == [1, 1, 0, np.inf, np.inf]
    once = automaton("F goal")
    assert [bool(once.settled[s]) for s in once.run([set(), {"goal"}, set()])] == [False, False, True, True]


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        ("G (a", r"'\)' should come after 'G \( a', and there is nothing more"),
        ("a b", "the end should come after 'a', and there is 'b'"),
        ("a & U", "an atom"),
        ("", "an atom"),
        ("a @ b", "'@ b' cannot be read"),
        ("F " + " & ".join(f"p{i}" for i in range(11)), "at most 10 atoms"),
        (" & ".join(f"F (a{i} & X F (b{i} & X X X X a{i}))" for i in range(5)), "too large"),
        ("F (a & " + "X (" * 16 + "b" + ")" * 16 + ")", "too large"),
    ],
)
def test_what_is_no_formula_is_refused_with_the_place(formula: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        automaton(formula)


# --- reward machines ----------------------------------------------------------------------------------------------

ERRAND = {
    "start": "u0",
    "terminal": ["done", "spilt"],
    "edges": [
        {"from": "u0", "to": "u1", "when": "coffee & !spill"},
        {"from": "u0", "to": "spilt", "when": "spill", "reward": -1.0},
        {"from": "u1", "to": "spilt", "when": "spill", "reward": -1.0},
        {"from": "u1", "to": "done", "when": "office & !spill", "reward": 1.0},
    ],
}


def test_a_reward_machine_pays_for_what_came_before() -> None:
    errand = RewardMachine.declared(ERRAND)
    states, paid = errand.run([{"office"}, {"coffee"}, set(), {"office"}, {"office"}])
    assert [errand.states[s] for s in states] == ["u0", "u0", "u1", "u1", "done", "done"]
    assert paid == [0, 0, 0, 1, 0]
    assert errand.run([{"coffee", "spill"}])[1] == [-1.0]
    assert errand.terminal.tolist() == [name in ("done", "spilt") for name in errand.states]


def test_a_formula_as_a_machine_pays_once_when_the_verdict_stands() -> None:
    made = RewardMachine.of(automaton("G !crash & F goal"), satisfied=1.0, violated=-2.0)
    assert made.run([set(), {"crash"}, {"goal"}])[1] == [0, -2, 0]
    assert made.run([{"goal"}, set()])[1] == [0, 0]
    assert RewardMachine.of(automaton("F goal")).run([set(), {"goal"}, {"goal"}])[1] == [0, 1, 0]


@given(st.lists(st.sampled_from(LETTERS), max_size=6))
def test_a_machine_is_its_edges_read_one_by_one(trace: list[frozenset[str]]) -> None:
    edges = [("p", "q", "a & !b", 1.0), ("p", "p", "b", 0.5), ("q", "p", "a <-> b", -1.0)]
    made = RewardMachine.declared(
        {"start": "p", "edges": [{"from": s, "to": t, "when": w, "reward": r} for s, t, w, r in edges]}
    )
    state, paid = "p", []
    for letter in trace:
        fits = [(t, r) for s, t, w, r in edges if s == state and holds(parse(w), letter)]
        state, reward = fits[0] if fits else (state, 0.0)
        paid.append(reward)
    states, found = made.run(trace)
    assert (made.states[states[-1]], found) == (state, paid)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"edges": [{"from": "u0", "to": "x", "when": "a"}, {"from": "u0", "to": "y", "when": "b"}]}, "fit the same"),
        ({"edges": [{"from": "done", "to": "x"}]}, "is terminal"),
        ({"edges": [{"from": "u0", "to": "x", "when": "F a"}]}, "temporal"),
        ({"edges": [{"from": "u0"}]}, "missing required field `to`"),
        ({"edges": [{"from": "u0", "to": "x", "reward": float("nan")}]}, "finite"),
    ],
)
def test_a_machine_that_cannot_be_meant_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RewardMachine.declared({**ERRAND, **changes})
