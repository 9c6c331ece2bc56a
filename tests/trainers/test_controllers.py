"""Controllers: the printed numbers, what there is to watch, and that they go on after a save where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning import CREDIT, EPISODES, REWARDS, Bare, weights

from agentgym_trainers.controllers import begun, controlled, numbers, with_numbers
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective.declare import (
    Adaptive,
    AdaptiveCoef,
    Clip,
    Distillation,
    Dual,
    Kl,
    Objective,
    Quadratic,
    Schedule,
    Truncate,
)
from agentgym_trainers.objective.refusals import figures_of


def test_the_dual_of_a_quadratic_gate() -> None:
    """5.5: rho = [1.5, .9] has variance .13; lr .1, target .02: .04 -> .051. Never below 0 nor above its bound."""
    dual = Dual(of="gate.coef", watch="ratio_variance", target=0.02, lr=0.1)
    objective = Objective(gate=Quadratic(coef=0.04), controllers=(dual,))
    found = controlled(objective, 1, {"ratio_variance": (0.5**2 + 0.1**2) / 2})
    assert numbers(found) == {"gate.coef": pytest.approx(0.051)}
    assert numbers(controlled(objective, 1, {"ratio_variance": -10.0})) == {"gate.coef": 0.0}
    assert numbers(controlled(objective, 1, {"ratio_variance": 1e9})) == {"gate.coef": 5.0}


@pytest.mark.parametrize(("kl", "factor"), [(0.011, 1.001), (0.5, 1.002), (0.0, 0.998), (0.01, 1.0)])
def test_adaptive_kl(kl: float, factor: float) -> None:
    """3.4: beta *= 1 + clip(kl / target - 1, -.2, .2) / horizon."""
    adaptive = AdaptiveCoef(of="regularisers.0.coef", watch="kl_reference", target=0.01, horizon=100)
    objective = Objective(regularisers=(Kl(coef=0.5),), controllers=(adaptive,))
    found = numbers(controlled(objective, 7, {"kl_reference": kl}))
    assert found["regularisers.0.coef"] == pytest.approx(0.5 * factor)


@pytest.mark.parametrize(
    ("form", "expected"),
    [("linear", [0.4, 0.325, 0.25, 0.1, 0.1]), ("geometric", [0.4, 0.282843, 0.2, 0.1, 0.1]),
     ("inverse", [0.4, 0.228571, 0.16, 0.1, 0.1])],
)  # fmt: skip
def test_schedules_start_go_and_stay(form: Any, expected: list[float]) -> None:
    schedule = Schedule(of="gate.high", start=0.4, end=0.1, steps=4, form=form)
    objective = begun(Objective(gate=Clip(high=0.2), controllers=(schedule,)))
    held = [numbers(objective)["gate.high"]]
    held += [numbers(controlled(objective, step, {}))["gate.high"] for step in (1, 2, 4, 9)]
    assert held == pytest.approx(expected, abs=1e-6)


CONTROLLED = Objective(
    gate=Quadratic(coef=0.04),
    regularisers=(Kl(coef=0.2),),
    controllers=(
        Dual(of="gate.coef", watch="ratio_variance", target=0.001, lr=2.0),
        AdaptiveCoef(of="regularisers.0.coef", watch="kl_reference", target=0.01, horizon=2.0),
    ),
)


def learner(trainable: Bare) -> Learner:
    return Learner(trainable, CONTROLLED, Optim(lr=1e-2, minibatches=2), total_steps=8, reference=Bare(3).module())


def test_a_learner_moves_its_numbers_once_a_step_and_resumes_them() -> None:
    """12.13: after save and load everything goes on as it would have, bit by bit."""
    whole = learner(Bare())
    figures = whole.update(EPISODES, CREDIT)
    assert figures["kl_reference"] > 0.012
    assert numbers(whole.objective)["regularisers.0.coef"] == pytest.approx(0.2 * 1.1**2)
    half = Bare()
    first = learner(half)
    first.update(EPISODES, CREDIT)
    tensors, plain = first.state()
    second = learner(half)
    second.restore({name: value.clone() for name, value in tensors.items()}, plain)
    for one in (whole, second):
        one.update(EPISODES, CREDIT)
    assert numbers(whole.objective) == numbers(second.objective)
    assert torch.equal(weights(whole), weights(second))


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(proximal="learner", behaviour=(Truncate(),), gate=Clip(adaptive=Adaptive())),
        Objective(regularisers=(Kl(coef=0.2), Distillation()), controllers=CONTROLLED.controllers[1:]),
    ],
)
def test_figures_to_watch_are_those_of_every_step(objective: Objective) -> None:
    """Not those that only some tokens show: age, mismatch and staleness."""
    frozen = {"reference": Bare(3).module(), "teacher": Bare(4).module()}
    found = Learner(Bare(), objective, Optim(), total_steps=1, **frozen).update(EPISODES, CREDIT, REWARDS)
    assert set(found) - {"age", "age_max", "mismatch", "staleness_kl"} == set(figures_of(objective))


@given(st.floats(0, 5), st.floats(0, 5, exclude_min=True))
def test_numbers_come_back(coef: float, kl: float) -> None:
    held = {"gate.coef": coef, "regularisers.0.coef": kl}
    assert numbers(with_numbers(CONTROLLED, held)) == held
