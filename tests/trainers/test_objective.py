"""Numbers computed by hand (the reference's sections 3.2, 3.4 and 4), and what holds for the whole family."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName
from agentgym_trainers.config import from_table
from agentgym_trainers.objective import (
    AGGREGATIONS,
    BEHAVIOURS,
    GATES,
    KLS,
    RATIOS,
    Behaviour,
    Gate,
    Objective,
    Regulariser,
    Tokens,
    Totals,
    loss,
)


def tokens(logp: Tensor, old: Tensor, advantages: Tensor, lengths: list[int] | None = None, **given: Any) -> Tokens:
    lengths = lengths or [len(logp)]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    fields = {"sampled": old, **given}
    return Tokens(logp=logp, old=old, advantages=advantages, sequence=owner, sequences=len(lengths), **fields)


def gated(ratio: float, advantage: float, **bounds: Any) -> float:
    """The loss of one token at this ratio."""
    value = GATES["clip"](torch.tensor([advantage]), torch.tensor([ratio]).log(), Gate(**bounds))
    return -float(value)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(1.5, 1, -1.2), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8)]
)
def test_ppo_clip(ratio: float, advantage: float, expected: float) -> None:
    assert gated(ratio, advantage) == pytest.approx(expected, abs=1e-6)


def test_dual_clip_and_asymmetric_bounds() -> None:
    assert gated(5.0, -1.0, dual=3.0) == pytest.approx(3.0)
    assert gated(5.0, -1.0) == pytest.approx(5.0)
    assert gated(1.5, 1.0, high=0.28) == pytest.approx(-1.28)


def test_sequence_ratio_is_geometric() -> None:
    log_ratios = torch.tensor([1.2, 0.9, 1.1]).log()
    found = RATIOS["sequence"](tokens(log_ratios, torch.zeros(3), torch.ones(3)))
    assert found.exp().tolist() == pytest.approx([1.059105] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("token_mean", 10 / 6), ("seq_mean_token_mean", 1.5), ("seq_mean_token_sum", 5.0), ("const_norm", 1.25)],
)
def test_aggregations(name: str, expected: float) -> None:
    values = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    packed = tokens(values, values, values, [2, 4])
    assert float(AGGREGATIONS[name](values, packed, Totals(6, 2), 4)) == pytest.approx(expected)


def test_kl_estimators() -> None:
    gap = torch.tensor([0.2, -0.2])
    assert KLS["k3"](gap).tolist() == pytest.approx([0.021403, 0.018731], abs=1e-6)
    assert KLS["k2"](gap).tolist() == pytest.approx([0.02, 0.02])
    assert KLS["k1"](gap).tolist() == pytest.approx([-0.2, 0.2])


def test_truncated_weights() -> None:
    weights = torch.tensor([0.3, 0.9, 1.0, 2.5])
    given = tokens(torch.zeros(4), weights.log(), torch.ones(4), sampled=torch.zeros(4))
    assert BEHAVIOURS["truncate"](given, Behaviour(kind="truncate")).tolist() == pytest.approx([0.3, 0.9, 1.0, 2.0])
    sequence = BEHAVIOURS["truncate"](given, Behaviour(kind="truncate", level="sequence"))
    assert sequence.tolist() == pytest.approx([0.906413] * 4, abs=1e-6)


def test_decoupled_ppo_against_coupled() -> None:
    """AReaL's example: lp -.6, proximal -.8, sampler -1: w 1.221403 times the clipped 1.2."""
    decoupled = Objective(proximal="learner", behaviour=Behaviour(kind="truncate", cap=5.0))
    given = tokens(torch.tensor([-0.6]), torch.tensor([-0.8]), torch.ones(1), sampled=torch.tensor([-1.0]))
    assert float(loss(decoupled, given, Totals(1, 1))[0]) == pytest.approx(-1.465683, abs=1e-6)
    coupled = tokens(torch.tensor([-0.6]), torch.tensor([-1.0]), torch.ones(1))
    assert float(loss(Objective(), coupled, Totals(1, 1))[0]) == pytest.approx(-1.2)


def quiet(**fields: Any) -> Objective:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Objective(**fields)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("gate", GATES)
def test_on_policy_gradient_is_the_advantage(ratio: str, gate: str) -> None:
    """12.1: at lp = lp_old every gate has the coefficient A / T, also by finite differences where there is a value."""
    if ratio == "none" and gate != "none":
        with pytest.raises(ConfigError, match="no ratio"):
            Objective(ratio=ratio, gate=Gate(kind=gate))
        return
    declared = quiet(ratio=ratio, gate=Gate(kind=gate))
    logp = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.full((4,), 0.7, dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        return loss(declared, tokens(at, logp.detach(), advantages), Totals(4, 1))[0]

    value(logp).backward()
    assert logp.grad is not None
    assert (-logp.grad).tolist() == pytest.approx([0.7 / 4] * 4)
    if ratio == "token":
        step = torch.zeros(4, dtype=torch.float64)
        step[1] = 1e-6
        slope = (value(logp.detach() + step) - value(logp.detach() - step)) / 2e-6
        assert float(slope) == pytest.approx(-0.7 / 4, rel=1e-5)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=8), st.floats(-3, 3))
def test_wide_bounds_are_plain_importance_sampling(gaps: list[float], advantage: float) -> None:
    """12.8."""
    logp, old = torch.tensor(gaps, dtype=torch.float64), torch.zeros(len(gaps), dtype=torch.float64)
    given = tokens(logp, old, torch.full_like(logp, advantage))
    wide = Objective(gate=Gate(low=1.0, high=1e9))
    plain = Objective(gate=Gate(kind="none"))
    total = Totals(len(gaps), 1)
    assert float(loss(wide, given, total)[0]) == pytest.approx(float(loss(plain, given, total)[0]))


@given(st.data())
def test_micro_batches_add_up(data: st.DataObject) -> None:
    """12.12: however sequences are cut into micro-batches, losses with global counts sum to that of one batch."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    name = data.draw(st.sampled_from(sorted(AGGREGATIONS)))
    declared = Objective(
        aggregation=name,
        horizon=7 if name == "const_norm" else 0,
        regularisers=(Regulariser(kind="kl", coef=0.1), Regulariser(kind="entropy", coef=0.05)),
    )
    g = torch.Generator().manual_seed(sum(lengths))
    columns = torch.randn(5, sum(lengths), generator=g, dtype=torch.float64)

    def part(ls: list[int], at: slice) -> float:
        logp, old, advantages, reference, entropy = columns[:, at]
        given = tokens(logp, old, advantages, ls, reference=reference, entropy=entropy)
        return float(loss(declared, given, Totals(sum(lengths), len(lengths)))[0])

    middle = sum(lengths[:cut])
    parts = part(lengths[:cut], slice(0, middle)) + part(lengths[cut:], slice(middle, None))
    assert parts == pytest.approx(part(lengths, slice(None)), rel=1e-9, abs=1e-12)


def test_nothing_to_learn_from_is_a_finite_zero() -> None:
    """12.14."""
    empty = torch.zeros(0)
    for name in AGGREGATIONS:
        declared = Objective(aggregation=name, horizon=int(name == "const_norm"))
        value, _ = loss(declared, tokens(empty, empty, empty, [0]), Totals(0, 0))
        assert float(value) == 0.0


def test_weights_of_the_sampler_carry_no_gradient() -> None:
    """12.10."""
    sampled = torch.zeros(2, requires_grad=True)
    given = tokens(torch.zeros(2), torch.ones(2), torch.ones(2), sampled=sampled)
    assert not BEHAVIOURS["truncate"](given, Behaviour(kind="truncate")).requires_grad


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"behaviour": {"kind": "truncate"}}, "corrects twice"),
        ({"ratio": "none"}, "no ratio to act on"),
        ({"aggregation": "const_norm"}, "horizon"),
        ({"horizon": 5}, "const_norm"),
        ({"gate": {"low": -1.0}}, "0 <= low <= 1"),
        ({"gate": {"dual": 0.5}}, "dual"),
        ({"gate": {"kind": "clap"}}, "did you mean 'clip'"),
        ({"ratio": "tokens"}, "did you mean 'token'"),
        ({"regularisers": [{"kind": "kll"}]}, "kl"),
        ({"gate": {"hi": 0.3}}, "objective.gate.hi"),
    ],
)
def test_combinations_that_cannot_be_meant_are_refused(declared: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=said):
        from_table({"env": {"id": "x"}, "objective": declared})


def test_a_sequence_ratio_with_token_bounds_warns() -> None:
    with pytest.warns(UserWarning, match="never bind"):
        Objective(ratio="sequence")
    assert Objective(ratio="sequence", gate=Gate(low=3e-4, high=4e-4)).gate.high < 1e-3


def test_statistics_are_per_token() -> None:
    given = tokens(torch.tensor([math.log(1.5), 0.0]), torch.zeros(2), torch.tensor([1.0, 1.0]))
    _, sums = loss(Objective(), given, Totals(2, 1))
    assert sums["clipped"] == 1.0
    assert sums["ratio"] == pytest.approx(2.5)
    assert sums["ratio_max"] == pytest.approx(1.5)
