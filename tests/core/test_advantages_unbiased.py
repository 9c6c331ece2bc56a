"""Turn baselines by exact enumeration, where the policy decides when to stop: docs/credit.md in numbers.

Every group of N episodes of a small decision process is listed with its probability, goes through `advantages`, and
the expected estimate mean_i sum_k A_ik d log pi(a_ik | s_ik) is compared with the gradient of the expected return.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from making import samples, trajectory

from agentgym.advantages import Term, advantages

State = str
Process = dict[State, list[tuple[float, State]]]
"""For each state its actions: (reward, next state), "" being the end."""

STOPPING: Process = {
    "first": [(0.3, ""), (0.0, "second"), (0.5, "")],
    "second": [(1.0, ""), (0.2, ""), (-0.1, "third")],
    "third": [(2.0, ""), (-1.0, ""), (0.5, "")],
}
RETURNING: Process = {  # the first state may come back to itself once
    "start": [(0.1, ""), (0.0, "start*")],
    "start*": [(1.0, ""), (-0.5, "last")],
    "last": [(0.7, ""), (-0.2, "")],
}


class Path(NamedTuple):
    decisions: list[tuple[State, int]]
    rewards: list[float]


def paths(process: Process, state: State) -> Iterator[Path]:
    for action, (reward, after) in enumerate(process[state]):
        if not after:
            yield Path([(state, action)], [reward])
            continue
        for rest in paths(process, after):
            yield Path([(state, action), *rest.decisions], [reward, *rest.rewards])


def name(state: State) -> str:
    """A state with a star is the same state, reached again."""
    return state.rstrip("*")


class Enumerated:
    """All groups of `n` episodes under a policy: probabilities by state name, [actions] each."""

    def __init__(self, process: Process, n: int, policy: dict[str, list[float]]) -> None:
        self.paths = list(paths(process, next(iter(process))))
        self.policy = {state: np.asarray(p) for state, p in policy.items()}
        self.chances = [np.prod([self.policy[name(s)][a] for s, a in p.decisions]) for p in self.paths]
        self.n = n

    def scores(self, path: Path, k: int) -> dict[tuple[str, int], np.ndarray]:
        """d log pi(a_k | s_k) with respect to the logits, by (state, turn)."""
        state, action = path.decisions[k]
        p = self.policy[name(state)]
        return {(name(state), k): np.eye(len(p))[action] - p}

    def summed(self, weights: list[tuple[float, Path, list[float]]]) -> dict[tuple[str, int], np.ndarray]:
        found: dict[tuple[str, int], np.ndarray] = {}
        for chance, path, values in weights:
            for k, value in enumerate(values):
                for key, score in self.scores(path, k).items():
                    found[key] = found.get(key, 0.0) + chance * value * score
        return found

    def true(self) -> dict[tuple[str, int], np.ndarray]:
        """The gradient of the expected return, by state and turn."""
        to_go = [list(np.cumsum(p.rewards[::-1])[::-1]) for p in self.paths]
        return self.summed(list(zip(self.chances, self.paths, to_go, strict=True)))

    def expected(self, *terms: Term) -> dict[tuple[str, int], np.ndarray]:
        weights = []
        for group in product(range(len(self.paths)), repeat=self.n):
            chance = float(np.prod([self.chances[i] for i in group]))
            played = [self.paths[i] for i in group]
            records = [
                trajectory([{"r": r} for r in p.rewards], anchors=[name(s) for s, _ in p.decisions]) for p in played
            ]
            found = advantages(samples(records), terms)
            weights += [(chance / self.n, p, list(v)) for p, v in zip(played, found, strict=True)]
        return self.summed(weights)

    def alive(self, k: int) -> float:
        """The probability that an episode has a turn k."""
        return sum(c for c, p in zip(self.chances, self.paths, strict=True) if len(p.decisions) > k)


def term(key: tuple[str, ...], centre: str, scale: str = "none", **fields: object) -> Term:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Term(key=key, centre=centre, scale=scale, credit="return_to_go", **fields)  # type: ignore[arg-type]


POLICY = {"first": [0.3, 0.5, 0.2], "second": [0.3, 0.3, 0.4], "third": [0.2, 0.5, 0.3]}
TURN = ("prompt", "turn")


def whole(gradient: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
    """By state, summed over turns."""
    states = sorted({state for state, _ in gradient})
    return np.concatenate([sum(g for (s, _), g in gradient.items() if s == state) for state in states])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("key", [TURN, ("prompt", "anchor"), ("prompt", "anchor", "turn")])
def test_the_baseline_of_others_is_unbiased(n: int, key: tuple[str, ...]) -> None:
    lab = Enumerated(STOPPING, n, POLICY)
    true, found = lab.true(), lab.expected(term(key, "others"))
    for place, gradient in true.items():
        assert found[place] == pytest.approx(gradient, abs=1e-12), place


@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_per_turn_index_shrinks_late_turns(n: int) -> None:
    """By E[1 - 1/n_k], given that this episode is alive at turn k; each turn by another factor."""
    lab = Enumerated(STOPPING, n, POLICY)
    true, found = lab.true(), lab.expected(term(TURN, "mean"))
    factors = []
    for (state, k), gradient in true.items():
        p = lab.alive(k)
        others = [(m, _binomial(n - 1, m, p)) for m in range(n)]
        factors.append(sum(chance * (1 - 1 / (1 + m)) for m, chance in others))
        assert found[state, k] == pytest.approx(factors[-1] * gradient, abs=1e-12)
    assert factors[0] == pytest.approx(1 - 1 / n)
    assert factors[0] > factors[1] > factors[2]
    assert cosine(whole(found), whole(true)) < 0.95


def test_leaving_one_out_without_a_way_out_loses_the_turns_reached_alone() -> None:
    lab = Enumerated(STOPPING, 3, POLICY)
    true = lab.true()
    dropped, kept = (
        lab.expected(term(TURN, "leave_one_out")),
        lab.expected(term(TURN, "leave_one_out", singleton="keep")),
    )
    for (state, k), gradient in true.items():
        company = 1 - (1 - lab.alive(k)) ** 2
        assert dropped[state, k] == pytest.approx(company * gradient, abs=1e-12)
        assert kept[state, k] == pytest.approx(gradient, abs=1e-12)  # unbiased, without a baseline there


def test_a_std_per_turn_index_turns_the_gradient_of_a_turn() -> None:
    lab = Enumerated(STOPPING, 3, POLICY)
    true, found = lab.true(), lab.expected(term(TURN, "mean", "std"))
    assert cosine(found["third", 2], true["third", 2]) < 0.995
    # in groups of two only the sign is left: winning more often beats getting more
    gamble: Process = {"first": [(0.5, ""), (0.0, "luck")], "luck": [(2.0, ""), (0.0, "")]}
    pair = Enumerated(gamble, 2, {"first": [0.5, 0.5], "luck": [0.3, 0.7]})
    assert pair.true()["first", 0][1] > 0  # 0.6 on average against 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pair.expected(term(TURN, "mean", "std"))["first", 0][1] < 0
    assert pair.expected(term(TURN, "others"))["first", 0] == pytest.approx(pair.true()["first", 0])


def test_anchor_groups_that_a_trajectory_visits_twice_need_the_others() -> None:
    """An own later visit is in the group's mean, and whether it happens depends on the action."""
    lab = Enumerated(RETURNING, 2, {"start": [0.4, 0.6], "last": [0.5, 0.5]})
    true = whole(lab.true())
    key = ("prompt", "anchor")
    assert whole(lab.expected(term(key, "others"))) == pytest.approx(true, abs=1e-12)
    for centre in ("mean", "leave_one_out"):
        found = whole(lab.expected(term(key, centre)))
        scale = float(found @ true / (true @ true))
        assert np.abs(found - scale * true).max() > 0.01, centre


def _binomial(n: int, k: int, p: float) -> float:
    return float(np.prod([(n - i) / (i + 1) for i in range(k)])) * p**k * (1 - p) ** (n - k)
