"""S4: gates and bounds by the reference's numbers (3.2, 5.2-5.5), their gradient coefficients, and their slow twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import objective_twins as twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_twins import Step, flat, row, steps, tensors

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.bounds import adapted
from agentgym_trainers.objective.gates import CLIPPED, GATES, clipped, gated
from agentgym_trainers.objective.ratios import ratio_of

TOKEN, MIX = declare.Token(), declare.Mix(by="entropy")
FOUR = declare.Levels(levels=("domain", "prompt", "trajectory", "token"))
PAIRS: list[tuple[Any, Any]] = [
    (declare.NoRatio(), declare.NoGate()),
    (TOKEN, declare.NoGate()),
    (TOKEN, declare.Clip(low=0.2, high=0.28, dual=3.0)),
    (declare.Geometric(), declare.Clip(low=0.01, high=0.02)),
    (declare.PrefixMin(), declare.Clip()),
    (TOKEN, declare.Detached(low=0.3, high=0.28)),
    (TOKEN, declare.Soft()),
    (TOKEN, declare.Quadratic()),
    (TOKEN, declare.SquaredLog()),
    (TOKEN, declare.Divergence()),
    (TOKEN, declare.Divergence(form="kl", low=0.05, high=0.02, weight="ratio")),
    (TOKEN, declare.LogClip(low=0.2, high=0.3)),
    (declare.SequenceProduct(), declare.GammaWeight()),
    (declare.Levels(), declare.LevelsClip()),
    (declare.Levels(), declare.LevelsClip(variant="A", budgets=(0.1, 0.3))),
    (FOUR, declare.LevelsClip(budgets=(0.1, 0.15, 0.2, 0.2), pessimistic=True)),
    (FOUR, declare.LevelsClip(budgets=(0.1, 0.15, 0.2, 0.2), variant="A")),
    (TOKEN, declare.VariationBudget()),
    (MIX, declare.BranchClip()),
    (declare.Mix(weight=0.3), declare.BranchClip(pessimistic=False)),
    (MIX, declare.Clip()),
]


def objective(ratio: Any, gate: Any, *rows: twins.Rollout) -> list[float]:
    t = tensors([*rows])
    return gated(gate, t, ratio_of(ratio, t)).tolist()


def loss_of(gate: Any, rho: float, a: float, **given: Any) -> float:
    """The loss of one token at this ratio."""
    return -objective(TOKEN, gate, row([math.log(rho)], a, **given))[0]


def test_every_kind_has_a_twin() -> None:
    assert set(twins.GATES) == set(GATES) == {type(gate) for _, gate in PAIRS}


@pytest.mark.parametrize(("ratio", "gate"), PAIRS, ids=repr)
@given(step=steps())
def test_gate_equals_its_twin(ratio: Any, gate: Any, step: Step) -> None:
    t = tensors(step)
    expected = flat(twins.gate(gate, twins.ratio(ratio, step), step))
    assert gated(gate, t, ratio_of(ratio, t)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "a", "expected"), [(1.5, 1, -1.2), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8)])
def test_ppo_clip(rho: float, a: float, expected: float) -> None:
    assert loss_of(declare.Clip(), rho, a) == pytest.approx(expected)


def test_dual_clip_and_asymmetric_bounds() -> None:
    assert loss_of(declare.Clip(dual=3.0), 5.0, -1.0) == pytest.approx(3.0)
    assert loss_of(declare.Clip(), 5.0, -1.0) == pytest.approx(5.0)
    assert loss_of(declare.Clip(high=0.28), 1.5, 1.0) == pytest.approx(-1.28)


def test_single_tokens() -> None:
    assert loss_of(declare.Detached(high=0.28), 1.5, 1.0, logp=-1.0) == pytest.approx(1.28)
    assert -loss_of(declare.Soft(), 1.5, 1.0) == pytest.approx(2.489837, abs=1e-6)
    assert -loss_of(declare.Quadratic(), 1.5, 1.0) == pytest.approx(1.49)
    tv = declare.Divergence(low=0.2, high=0.2)
    assert loss_of(tv, 1.6, 1.0, logp=math.log(0.8)) == 0.0
    assert loss_of(tv, 1.6, -1.0, logp=math.log(0.8)) == pytest.approx(1.6 * math.log(0.8))


def test_geometric_mean_of_clipped_ratios() -> None:
    """GMPO: log-ratios .5, .1, .3 within .4."""
    played = row([0.5, 0.1, 0.3])
    assert objective(TOKEN, declare.LogClip(), played) == pytest.approx([1.305605] * 3, abs=1e-6)


def test_gamma_weights() -> None:
    gate, product = declare.GammaWeight(), declare.SequenceProduct()
    for rho, a, expected in [(1.5, 1, 0.502043), (1.5, -1, 1.241593), (1.0, 1, 1.0), (1.0, -1, 1.0)]:
        played = row([math.log(rho), 0.0], a, logp=-1.0)
        assert objective(product, gate, played) == pytest.approx([-a * expected] * 2, abs=1e-6)


def test_branches_are_clipped_before_they_are_mixed() -> None:
    """DHPO: [1.15, 1.0]; averaged first and clipped then it would be [1.2, 1.030948]."""
    played = row([math.log(1.5), math.log(0.9)], entropy=[0.25, 1.0])
    for pessimistic in (True, False):
        gate = declare.BranchClip(pessimistic=pessimistic)
        assert objective(declare.Mix(), gate, played) == pytest.approx([1.15, 1.0])
        assert objective(declare.Mix(by="entropy"), gate, played) == pytest.approx([1.125, 0.9])
    assert objective(declare.Mix(), declare.Clip(), played) == pytest.approx([1.2, 1.030948], abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "expected"), [("A", [1.491825, 1.105171, 1.349859]), ("B", [1.491825, 1.0, 1.221403])]
)
def test_hierarchical_clip(variant: Any, expected: list[float]) -> None:
    """FiberPO: log-ratios .5, .1, .3 with budgets .2, .2."""
    gate = declare.LevelsClip(budgets=(0.2, 0.2), variant=variant)
    found = objective(declare.Levels(), gate, row([0.5, 0.1, 0.3]))
    assert found == pytest.approx(expected, abs=1e-6)
    if variant == "B":
        assert sum(found) / 3 == pytest.approx(1.237742, abs=1e-6)


def test_hierarchical_clip_moves_only_along_the_fibre_when_the_base_is_saturated() -> None:
    """The first two residuals lie on their budget exactly, so the printed gradient, by central differences, holds half
    of their slope; automatic differentiation takes all of it. Both sum to 0."""
    deltas, gate = [0.5, 0.1, 0.3], declare.LevelsClip(budgets=(0.2, 0.2))

    def mean(token: int, by: float) -> float:
        moved = [x + by * (i == token) for i, x in enumerate(deltas)]
        return sum(objective(declare.Levels(), gate, row(moved))) / 3

    found = [(mean(i, 1e-6) - mean(i, -1e-6)) / 2e-6 for i in range(3)]
    assert found == pytest.approx([-0.025509, -0.107479, 0.132988], abs=1e-6)
    t = tensors([row(deltas)])
    gated(gate, t, ratio_of(declare.Levels(), t)).mean().backward()
    assert t.logp.grad is not None
    assert t.logp.grad.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert t.logp.grad.abs().max().item() > 0.05


def test_hierarchical_clip_in_budget_has_the_gradient_of_the_ratio() -> None:
    t = tensors([row([0.15, 0.05, 0.1])])
    gated(declare.LevelsClip(), t, ratio_of(declare.Levels(), t)).mean().backward()
    assert t.logp.grad is not None
    assert t.logp.grad.tolist() == pytest.approx([math.exp(x) / 3 for x in (0.15, 0.05, 0.1)])


def test_hierarchical_clip_keeps_trajectories_apart() -> None:
    t = tensors([row([0.5, 0.1]), row([0.3, -0.4])])
    gated(declare.LevelsClip(), t, ratio_of(declare.Levels(), t))[:2].sum().backward()
    assert t.logp.grad is not None
    assert t.logp.grad[2:].tolist() == [0.0, 0.0]


def test_pessimistic_levels_keep_the_corrective_gradient() -> None:
    """A ratio far too high with A < 0: a plain clip stops the gradient that would bring it down."""
    slopes = []
    for pessimistic in (False, True):
        t = tensors([row([1.0, 1.0], -1.0)])
        gate = declare.LevelsClip(pessimistic=pessimistic)
        gated(gate, t, ratio_of(declare.Levels(), t)).sum().backward()
        assert t.logp.grad is not None
        slopes.append(t.logp.grad.tolist())
    assert slopes[0] == [0.0, 0.0]
    assert slopes[1] == pytest.approx([-math.e] * 2)


def test_domain_levels() -> None:
    """FiberPO-Domain: aggregates .05, .25, .3 and a token at .5 with budgets .1, .15, .2, .2 -> exp(.45)."""
    gate = declare.LevelsClip(budgets=(0.1, 0.15, 0.2, 0.2))
    step = [
        row([0.5, 0.1], group=0, domain=0),  # trajectory .3
        row([0.2, 0.2], group=0, domain=0),  # prompt .25
        row([-0.15, -0.15, -0.15, -0.15], group=1, domain=0),
        row([0.0] * 4, group=2, domain=0),  # domain: (.6 + .4 - .6 + 0) / 12
    ]
    shift = 0.05 - (0.6 + 0.4 - 0.6) / 12
    step[2] = row([x + shift * 3 for x in step[2].deltas()], group=1, domain=0)
    assert objective(FOUR, gate, *step)[0] == pytest.approx(1.568312, abs=1e-6)


def test_total_variation_budget() -> None:
    """APC: rho 1.5, .9, 1 with delta .1 leaves room .2, 0, 0."""
    found = objective(TOKEN, declare.VariationBudget(), row([math.log(x) for x in (1.5, 0.9, 1.0)]))
    assert found == pytest.approx([1.2, 1.0, 1.0])


# --- gradient coefficients --------------------------------------------------------------------------------------

Coefficient = Callable[[float, float], float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def soft(rho: float, a: float) -> float:
    tau = 1.0 if a > 0 else 1.05
    s = sigmoid(tau * (rho - 1))
    return 4 * s * (1 - s) * rho * a


def ppo(rho: float, a: float) -> float:
    held = (a > 0 and rho > 1.2) or (a < 0 and (rho < 0.8 or rho > 3.0))
    return 0.0 if held else rho * a


def phi(rho: float, a: float) -> float:
    k, lam = (2, 3) if a >= 0 else (3, 2)
    return rho**k * math.exp(lam * (1 - rho)) * a


VALUES: list[tuple[Any, Any, Coefficient]] = [
    (declare.NoRatio(), declare.NoGate(), lambda rho, a: a),
    (TOKEN, declare.NoGate(), lambda rho, a: rho * a),
    (TOKEN, declare.Clip(dual=3.0), ppo),
    (TOKEN, declare.Soft(), soft),
    (TOKEN, declare.Quadratic(), lambda rho, a: rho * (a - 2 * 0.04 * (rho - 1))),
    (TOKEN, declare.SquaredLog(), lambda rho, a: a - 0.1 * math.log(rho)),
    (
        TOKEN,
        declare.LogClip(),
        lambda rho, a: rho * a if math.exp(-0.4) < rho < math.exp(0.4) or a * (rho - 1) < 0 else 0,
    ),
    (
        declare.Levels(levels=("token",)),
        declare.LevelsClip(budgets=(0.3,)),
        lambda rho, a: rho * a if abs(math.log(rho)) < 0.3 else 0,
    ),
]
DETACHED: list[tuple[Any, Any, Coefficient]] = [
    (TOKEN, declare.Detached(low=0.3, high=0.28), lambda rho, a: min(max(rho, 0.7), 1.28) * a),
    (declare.SequenceProduct(), declare.GammaWeight(), phi),
    (TOKEN, declare.Divergence(low=1.0, high=1.0, cap=2.0), lambda rho, a: min(rho, 2.0) * a),
    (TOKEN, declare.Divergence(low=1.0, high=1.0, weight="ratio"), lambda rho, a: rho * a),
    (declare.Geometric(), declare.NoGate(), lambda rho, a: rho * a),
    (declare.PrefixMin(), declare.NoGate(), lambda rho, a: rho * a),
]  # fmt: skip


def value(ratio: Any, gate: Any, logp: float, old: float, a: float) -> tuple[float, float]:
    """The objective of one token, and its gradient coefficient."""
    t = tensors([row([logp - old], a, logp=logp)])
    found = gated(gate, t, ratio_of(ratio, t)).sum()
    found.backward()
    assert t.logp.grad is not None
    return found.item(), t.logp.grad.item()


@pytest.mark.parametrize("a", [1.0, -1.0, 0.7])
@pytest.mark.parametrize("rho", [0.5, 0.9, 1.0, 1.1, 1.5, 3.5])
@pytest.mark.parametrize(("ratio", "gate", "coefficient"), VALUES + DETACHED, ids=lambda x: repr(x)[:40])
def test_gradient_coefficient(ratio: Any, gate: Any, coefficient: Coefficient, rho: float, a: float) -> None:
    logp, old = -1.5, -1.5 - math.log(rho)
    _, slope = value(ratio, gate, logp, old, a)
    assert slope == pytest.approx(coefficient(rho, a), rel=1e-6, abs=1e-9)
    if (ratio, gate, coefficient) in VALUES and not isinstance(ratio, declare.NoRatio):
        step = 1e-6
        by_differences = (
            value(ratio, gate, logp + step, old, a)[0] - value(ratio, gate, logp - step, old, a)[0]
        ) / 2e-6
        assert slope == pytest.approx(by_differences, rel=1e-5, abs=1e-6)


def test_printed_coefficients() -> None:
    at = -1.0, -1.0 - math.log(1.5), 1.0
    assert value(TOKEN, declare.Soft(), *at)[1] == pytest.approx(1.410022, abs=1e-6)
    assert value(TOKEN, declare.Quadratic(), *at)[1] == pytest.approx(1.44)
    assert value(TOKEN, declare.SquaredLog(), *at)[1] == pytest.approx(0.959453, abs=1e-6)
    moved = math.log(0.8), math.log(0.5)
    assert value(TOKEN, declare.Divergence(), *moved, 1.0)[1] == 0.0
    assert value(TOKEN, declare.Divergence(), *moved, -1.0)[1] == pytest.approx(-1.6)


@pytest.mark.parametrize(("ratio", "gate"), [p for p in PAIRS if type(p[1]) in (declare.LogClip, declare.LevelsClip)])
@given(step=steps(least=1))
def test_cross_token_gradients_by_finite_differences(ratio: Any, gate: Any, step: Step) -> None:
    """Gates that are differentiated through a mean over the sequence: against the twin's slope."""
    t = tensors(step)
    gated(gate, t, ratio_of(ratio, t)).sum().backward()
    assert t.logp.grad is not None

    def shifted(by: float) -> float:
        step[0].logp[0] += by
        found = sum(flat(twins.gate(gate, twins.ratio(ratio, step), step)))
        step[0].logp[0] -= by
        return found

    expected = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert float(t.logp.grad[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_sequence_branch_of_a_mix_is_in_token_form() -> None:
    """Token t gets (1 - w_t) s A, not the mean of 1 - w."""
    t = tensors([row([math.log(1.5), math.log(0.9)], entropy=[0.25, 1.0])])
    wide = declare.BranchClip(token=(0.0, 0.0), sequence=(1.0, 9.0), pessimistic=False)
    gated(wide, t, ratio_of(MIX, t)).sum().backward()
    assert t.logp.grad is not None
    assert t.logp.grad.tolist() == pytest.approx([0.75 * 1.161895, 0.0], abs=1e-6)


# --- what is held back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "gate"), [p for p in PAIRS if type(p[1]) in CLIPPED], ids=repr)
def test_on_policy_nothing_is_held_back(ratio: Any, gate: Any) -> None:
    t = tensors([row([0.0, 0.0], [1.0, -1.0]), row([])])
    up, down = clipped(gate, t, ratio_of(ratio, t))
    assert not up.any()
    assert not down.any()


@pytest.mark.parametrize(("ratio", "gate"), [p for p in PAIRS if type(p[1]) in CLIPPED], ids=repr)
def test_a_token_far_off_is_held_back_on_its_side(ratio: Any, gate: Any) -> None:
    for delta, a, side in [(1.5, 1.0, 0), (-1.5, -1.0, 1)]:
        t = tensors([row([delta], a, logp=-0.2 if delta > 0 else -1.7)])
        held = clipped(gate, t, ratio_of(ratio, t))
        assert held[side].item(), (delta, a)
        assert not held[1 - side].item()


def test_gates_without_bounds_hold_nothing_back() -> None:
    t = tensors([row([5.0, -5.0])])
    assert not torch.stack(clipped(declare.Soft(), t, ratio_of(TOKEN, t))).any()


# --- BAPO's bounds ----------------------------------------------------------------------------------------------

RHO, A = torch.tensor([1.5, 0.5, 1.0, 0.7]), torch.tensor([1.0, -1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("low", "high", "ratio", "share"),
    [(0.6, 1.2, 1.692308, 0.628571), (0.8, 1.2, 1.375, None), (0.6, 2.0, 1.923077, None)],
)
def test_balance_of_the_reference(low: float, high: float, ratio: float, share: float | None) -> None:
    """P / N at fixed bounds: the target just below is met there, the one just above is not."""
    fixed = {"low": (low, low), "high": (high, high + 0.5), "step": (0.05, 0.5)}
    for target, met in [(ratio - 1e-5, True), (ratio + 1e-5, False)]:
        found = adapted(declare.Adaptive(**fixed, target=target), RHO, A)
        assert (found == (low, high)) is met
    if share is not None:
        for target, met in [(share - 1e-5, True), (share + 1e-5, False)]:
            found = adapted(declare.Adaptive(**fixed, target=target, balance="share"), RHO, A)
            assert (found == (low, high)) is met


def test_bounds_widen_until_the_step_is_balanced() -> None:
    """P 1.2, N 2.4, ratio .5 at the start: c_low goes to its end first (which makes N larger), then c_high."""
    ratio, a = torch.tensor([1.5, 0.5, 0.9, 0.9]), torch.tensor([1.0, -1.0, -1.0, -1.0])
    assert adapted(declare.Adaptive(target=0.5), ratio, a) == (0.6, 1.2)
    assert adapted(declare.Adaptive(target=0.55), ratio, a) == (0.8, pytest.approx(1.45))
    assert adapted(declare.Adaptive(), ratio, a) == (0.8, 2.0)
    assert adapted(declare.Adaptive(count="gradient", target=0.0), ratio, a) == (0.6, 1.2)


def test_nothing_to_balance_keeps_the_lowest_bounds() -> None:
    for n in (0, 3):
        assert adapted(declare.Adaptive(), torch.ones(n), torch.zeros(n)) == (0.6, 1.2)


@given(
    step=steps(),
    target=st.floats(0.1, 1.0),
    balance=st.sampled_from(["ratio", "share"]),
    count=st.sampled_from(["value", "gradient"]),
)
def test_bounds_equal_their_twin(step: Step, target: float, balance: Any, count: Any) -> None:
    declared = declare.Adaptive(target=target, balance=balance, count=count, high=(1.2, 3.0), low=(0.6, 0.9))
    t, rhos = tensors(step), twins.ratio(TOKEN, step).rho
    found = adapted(declared, ratio_of(TOKEN, t).ratio.detach(), t.advantages)
    assert found == pytest.approx(twins.bounds(declared, flat(rhos), flat([s.a for s in step])))
