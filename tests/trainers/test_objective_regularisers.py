"""S7 and contrast by the reference's numbers (3.4, 5.7, 5.8, 5.14, 5.17), and against their slow twins."""

from __future__ import annotations

import math
from typing import Any

import objective_twins as twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_twins import Step, flat, row, steps, tensors

from agentgym.errors import RecordError
from agentgym.modeling.logprobs import divergence
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.contrast import contrasted
from agentgym_trainers.objective.regularisers import KLS, REGULARISERS, penalty
from agentgym_trainers.objective.tokens import Tokens, Totals

KINDS: list[Any] = [
    *(declare.Kl(form=form, coef=0.1) for form in ("k1", "k2", "k3", "k3_k2")),
    declare.Kl(against="old"),
    declare.Kl(against="sampler"),
    declare.KlHinge(coef=2.0, bound=0.01),
    declare.KlHinge(coef=2.0, bound=0.05, against="reference"),
    declare.Entropy(coef=0.2),
    declare.EntropyBand(coef=0.5),
    declare.Perception(clean=0.05, masked=0.02),
    declare.Perception(form="paper", coef=0.3),
    declare.Distillation(threshold=0.5),
    declare.Sft(threshold=1.0),
]


def test_every_regulariser_has_a_twin() -> None:
    assert {*twins.PENALTIES, declare.KlHinge, declare.CustomPenalty} == set(REGULARISERS)


@pytest.mark.parametrize("declared", KINDS, ids=repr)
@given(step=steps())
def test_penalty_equals_its_twin(declared: Any, step: Step) -> None:
    assert penalty(declared, tensors(step)).tolist() == pytest.approx(
        flat(twins.penalty(declared, step)), rel=1e-9, abs=1e-12
    )


def test_kl_estimators() -> None:
    gap = torch.tensor([0.2, -0.2])
    assert KLS["k3"](gap).tolist() == pytest.approx([0.021403, 0.018731], abs=1e-6)
    assert KLS["k2"](gap).tolist() == pytest.approx([0.02, 0.02])
    assert KLS["k1"](gap).tolist() == pytest.approx([-0.2, 0.2])


def slope(declared: Any, t: Tokens, of: str = "logp") -> list[float]:
    leaf = getattr(t, of)
    (found,) = torch.autograd.grad(penalty(declared, t).sum(), leaf)
    return list(found.tolist())


def test_straight_through_kl_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    t = tensors([row([0.0], reference=[-0.8])])
    k3_k2 = declare.Kl(coef=1.0, form="k3_k2")
    assert penalty(k3_k2, t).item() == pytest.approx(0.021403, abs=1e-6)
    assert slope(k3_k2, t) == pytest.approx(slope(declare.Kl(coef=1.0, form="k2"), t))
    assert slope(k3_k2, t) == pytest.approx([-0.2])


@pytest.mark.parametrize("declared", KINDS, ids=repr)
@given(step=steps(least=1), column=st.sampled_from(["logp", "masked", "entropy", "divergence"]))
def test_gradients_by_finite_differences(declared: Any, step: Step, column: str) -> None:
    """All but the straight-through form and the detached factor of the hinge are what they differentiate to."""
    if getattr(declared, "form", "") == "k3_k2" or isinstance(declared, declare.KlHinge):
        return
    t = tensors(step)
    (found,) = torch.autograd.grad(penalty(declared, t).sum() + 0 * getattr(t, column).sum(), getattr(t, column))

    def shifted(by: float) -> float:
        held = getattr(step[0], column)
        held[0] += by
        value = sum(flat(twins.penalty(declared, step)))
        held[0] -= by
        return value

    assert found[0].item() == pytest.approx((shifted(1e-6) - shifted(-1e-6)) / 2e-6, rel=1e-4, abs=1e-6)


def test_hinge_on_the_mean_of_the_step() -> None:
    """DRPO: KL 5e-4 past a bound of 1e-4 with coefficient 1e3 -> factor .4, value .0002; its factor is detached."""
    gap = 0.0316  # k3 = 5e-4 to 1 %
    gap = math.sqrt(2 * 5e-4 / (1 + gap / 3))
    t = tensors([row([-gap, -gap])])
    kl = math.exp(gap) - gap - 1
    assert kl == pytest.approx(5e-4, rel=2e-3)
    assert penalty(declare.KlHinge(), t).mean().item() == pytest.approx(1e3 * (kl - 1e-4) * kl)
    assert penalty(declare.KlHinge(), t).mean().item() == pytest.approx(2e-4, rel=5e-3)
    assert slope(declare.KlHinge(), t) == pytest.approx([1e3 * (kl - 1e-4) * (1 - math.exp(gap))] * 2)
    assert penalty(declare.KlHinge(bound=1.0), t).tolist() == [0.0, 0.0]


def test_entropy_band() -> None:
    t = tensors([row([0.0] * 3, entropy=[0.1, 0.5, 1.4])])
    assert penalty(declare.EntropyBand(coef=1.0), t).tolist() == pytest.approx([0.2, 0.0, 0.4])
    assert slope(declare.EntropyBand(coef=1.0), t, "entropy") == [-1.0, 0.0, 1.0]


def test_perception_as_released_and_as_printed() -> None:
    """PAPO at lp - masked = .5: .106531 in the code, .148721 in the paper; both move the masked log-probs too."""
    t = tensors([row([0.0], masked=[-1.5])])
    code, paper = declare.Perception(coef=1.0), declare.Perception(coef=1.0, form="paper")
    assert penalty(code, t).item() == pytest.approx(-0.106531, abs=1e-6)
    assert penalty(paper, t).item() == pytest.approx(-0.148721, abs=1e-6)
    assert slope(code, t, "masked") == pytest.approx([1 - math.exp(-0.5)])
    entropies = declare.Perception(coef=0.0, clean=0.05, masked=0.02)
    assert penalty(entropies, t).item() == pytest.approx(0.05 * 1.0 + 0.02 * 1.5)


def test_entropies_of_perception_count_without_its_kl() -> None:
    t = tensors([row([0.0], a=0.0, masked=[-1.5])])
    declared = declare.Objective(regularisers=(declare.Perception(coef=0.0, clean=0.05),))
    assert loss(declared, t, Totals(1, 1))[0].item() == pytest.approx(0.05)


def test_distillation_and_imitation_only_where_the_reward_is_enough() -> None:
    """KEPO: R 2, .1, .5, 1 past a threshold of 1 -> 1, 0, 0, 1; without a reward nothing."""
    step = [row([0.0], reward=r, divergence=[0.3]) for r in (2.0, 0.1, 0.5, 1.0, math.nan)]
    assert penalty(declare.Distillation(), tensors(step)).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.3, 0.0])
    assert penalty(declare.Sft(coef=1.0), tensors(step)).tolist() == pytest.approx([1.0, 0.0, 0.0, 1.0, 0.0])


def test_a_column_that_is_missing_is_named() -> None:
    t = tensors([row([0.0])])
    bare = Tokens(**{**vars(t), "reference": None, "masked": None, "divergence": None})
    for declared, name in [(KINDS[0], "reference"), (KINDS[10], "masked"), (KINDS[12], "divergence")]:
        with pytest.raises(RecordError, match=rf"Tokens\.{name}"):
            penalty(declared, bare)


# --- divergence over the vocabulary -----------------------------------------------------------------------------


def looped(policy: list[float], teacher: list[float], beta: float) -> float:
    p, q = ([math.exp(x) / sum(map(math.exp, xs)) for x in xs] for xs in (policy, teacher))
    mixture = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    if beta == 0:
        return sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
    if beta == 1:
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return sum(
        beta * y * math.log(y / m) + (1 - beta) * x * math.log(x / m) for x, y, m in zip(p, q, mixture, strict=True)
    )


@given(
    logits=st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=5),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_divergence_equals_its_twin(logits: list[tuple[float, float]], beta: float) -> None:
    policy, teacher = ([x[i] for x in logits] for i in (0, 1))
    found = divergence(
        torch.tensor([[policy]], dtype=torch.float64), torch.tensor([[teacher]], dtype=torch.float64), beta
    )
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(looped(policy, teacher, beta), abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergence_with_ruled_out_tokens_is_finite(beta: float) -> None:
    policy = torch.tensor([0.0, 1.0, -torch.inf], requires_grad=True)
    value = divergence(policy, torch.tensor([0.5, 0.5, -torch.inf]), beta)
    value.backward()
    assert torch.isfinite(value)
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()
    assert float(divergence(policy.detach(), policy.detach(), beta)) == pytest.approx(0.0, abs=1e-7)


# --- discriminative advantages ----------------------------------------------------------------------------------


def weights(d: declare.Discriminative, step: Step) -> list[float]:
    return list(contrasted(d, tensors(step)).advantages.tolist())


@given(step=steps(), threshold=st.sampled_from([0.0, 0.5]), tau=st.sampled_from([0.1, 10.0]))
def test_discriminative_weights_equal_their_twin(step: Step, threshold: float, tau: float) -> None:
    d = declare.Discriminative(threshold=threshold, tau=tau, max_length=8)
    assert weights(d, step) == pytest.approx(flat(twins.discriminative(d, step)), rel=1e-9, abs=1e-12)


def drpo(lengths: tuple[int, int] = (1, 3)) -> Step:
    """s of the positives -.2, -.4 with L / Lmax .25, .75; of the negatives -.3, -.6."""
    return [
        row([0.0] * lengths[0], logp=-0.2, reward=1.0),
        row([0.0] * lengths[1], logp=-0.4, reward=1.0),
        row([0.0] * 2, logp=-0.3, reward=0.0),
        row([0.0] * 2, logp=-0.6, reward=0.0),
    ]


def test_discriminative_weights_of_the_reference() -> None:
    d = declare.Discriminative(tau=10.0, length_temperature=0.5, max_length=4)
    found = weights(d, drpo())
    assert [found[0], found[1]] == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert [found[4], found[6]] == pytest.approx([-0.507499, -0.492501], abs=1e-6)


def test_discriminative_gradient_is_that_of_the_printed_objective() -> None:
    """J = sum omega_i s_i - tau log mean exp(s_j / tau) = .195087, by finite differences over the mean log-probs."""
    omega, tau = [0.731059, 0.268941], 10.0

    def printed(s: list[float]) -> float:
        negative = tau * math.log(sum(math.exp(x / tau) for x in s[2:]) / 2)
        return omega[0] * s[0] + omega[1] * s[1] - negative

    at = [-0.2, -0.4, -0.3, -0.6]
    assert printed(at) == pytest.approx(0.195087, abs=1e-6)
    objective = declare.Objective(
        ratio=declare.NoRatio(),
        gate=declare.NoGate(),
        aggregation=declare.SeqMeanTokenMean(),
        contrast=declare.Discriminative(tau=tau, length_temperature=0.5, max_length=4),
    )
    t = tensors(drpo())
    loss(objective, t, Totals(8, 4))[0].backward()
    assert t.logp.grad is not None
    mine = [-4 * t.logp.grad[t.sequence == i].sum().item() for i in range(4)]
    for i in range(4):
        up, down = ([x + (e if j == i else 0) for j, x in enumerate(at)] for e in (1e-6, -1e-6))
        assert mine[i] == pytest.approx((printed(up) - printed(down)) / 2e-6, abs=1e-5)


def test_groups_all_right_or_all_wrong_or_without_rewards_weigh_nothing() -> None:
    d = declare.Discriminative()
    for reward in (1.0, 0.0, math.nan):
        assert weights(d, [row([0.1, 0.2], reward=reward), row([0.3], reward=reward)]) == [0.0] * 3
    empty_side = [row([], reward=1.0), row([0.3], reward=0.0)]
    assert weights(d, empty_side) == [0.0]
