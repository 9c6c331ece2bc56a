"""S5 and S6: behaviour weights and aggregations by the reference's numbers (3.4, 4, 5.9, 5.11), and their twins."""

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
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import AGGREGATIONS, aggregate, count_parts, totals
from agentgym_trainers.objective.behaviours import BEHAVIOURS, weights
from agentgym_trainers.objective.tokens import Tokens, Totals

KINDS: list[Any] = [
    declare.Truncate(cap=1.5),
    declare.Truncate(level="geometric"),
    declare.Truncate(level="product"),
    declare.Mask(),
    declare.Mask(level="geometric", low=0.9, high=1.1),
    declare.Mask(level="product"),
    declare.Clamp(low=0.8, high=1.2),
    declare.Clamp(level="geometric"),
    declare.Veto(floor=0.2),
    *(declare.Reject(form=form, over=over) for form in ("k1", "k2", "k3") for over in ("token", "sum", "mean", "max")),
    declare.OffPolicyMask(threshold=0.1),
]


def mismatch(*ws: float, a: float = 1.0, **given: Any) -> twins.Rollout:
    """A sequence with these weights pi_proximal / pi_sampler."""
    return row([0.0] * len(ws), a, sampled=[-1.0 - math.log(w) for w in ws], **given)


def found(declared: Any, *rows: twins.Rollout) -> list[float]:
    return weights(declared if isinstance(declared, tuple) else (declared,), tensors([*rows])).tolist()


# --- behaviour weights ------------------------------------------------------------------------------------------


def test_every_correction_has_a_twin() -> None:
    assert {*twins.BEHAVIOURS, declare.Normalise, declare.Custom} == set(BEHAVIOURS)


@pytest.mark.parametrize("declared", KINDS, ids=repr)
@given(step=steps())
def test_weights_equal_their_twin(declared: Any, step: Step) -> None:
    for behaviours in ((declared,), (declared, declare.Normalise())):
        expected = flat(twins.weights(behaviours, step))
        assert weights(behaviours, tensors(step)).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (declare.Truncate(cap=2.0), [0.3, 0.9, 1.0, 2.0]),
        (declare.Truncate(level="product", cap=3.0), [0.675] * 4),
        (declare.Truncate(level="geometric"), [0.906413] * 4),
        (declare.Mask(low=0.5, high=5.0), [0.0, 0.9, 1.0, 2.5]),
        (declare.Mask(low=0.5, high=2.0), [0.0, 0.9, 1.0, 0.0]),
        (declare.Mask(level="geometric", low=0.9999, high=1.0001), [0.0] * 4),
        (declare.Clamp(low=0.5, high=2.0), [0.5, 0.9, 1.0, 2.0]),
        (declare.Veto(floor=0.31), [0.0] * 4),
        (declare.Veto(), [1.0] * 4),
    ],
)
def test_weights_of_the_reference(declared: Any, expected: list[float]) -> None:
    """Section 4: token ratios .3, .9, 1, 2.5; another sequence beside them changes nothing."""
    calm = mismatch(1.0, 1.0)
    assert found(declared, calm, mismatch(0.3, 0.9, 1.0, 2.5))[2:] == pytest.approx(expected, abs=1e-6)


def test_off_policy_mask() -> None:
    """A = -1, mean drifts .1 and .5 past a threshold of .3: keep, drop; A = +1 keeps both."""

    def drifted(by: float, a: float) -> twins.Rollout:
        return row([0.0, 0.0], a, sampled=[-1.0 + 2 * by, math.nan])

    step = [drifted(0.1, -1.0), drifted(0.5, -1.0), drifted(0.1, 1.0), drifted(0.5, 1.0)]
    assert found(declare.OffPolicyMask(), *step) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_tokens_the_sampler_did_not_score_weigh_one() -> None:
    played = row([0.0, 0.0], sampled=[math.nan, -1.0 - math.log(0.5)])
    assert found(declare.Truncate(), played) == pytest.approx([1.0, 0.5])


def test_normalised_weights_have_mean_one() -> None:
    both = (declare.Truncate(), declare.Normalise())
    ws = found(both, mismatch(0.3, 0.9), mismatch(1.0, 2.5))
    assert sum(ws) / 4 == pytest.approx(1.0)
    assert found((declare.Mask(), declare.Normalise()), mismatch(9.0, 9.0)) == [0.0, 0.0]


@given(step=steps(), cap=st.floats(1.0, 4.0), level=st.sampled_from(["token", "geometric", "product"]))
def test_truncated_weights_are_bounded_and_detached(step: Step, cap: float, level: Any) -> None:
    """12.10."""
    t = tensors(step)
    grown = Tokens(**{**vars(t), "sampled": t.sampled.requires_grad_(), "old": t.old.requires_grad_()})
    ws = weights((declare.Truncate(level=level, cap=cap),), grown)
    assert not ws.requires_grad
    assert bool(((ws >= 0) & (ws <= cap)).all())


# --- aggregation ------------------------------------------------------------------------------------------------

WAYS: list[Any] = [
    declare.TokenMean(),
    declare.SeqMeanTokenMean(),
    declare.SeqMeanTokenSum(),
    declare.ConstNorm(horizon=7),
    declare.TokenSum(),
    declare.Segments(by="first", weights={"first": 0.001}),
    declare.Segments(by="turn", weights={"earlier": 0.5, "last": 2.0}),
    declare.Segments(weights={"tool": 0.3}),
    declare.Segments(),
]


def test_every_aggregation_has_a_twin() -> None:
    assert {*twins.AGGREGATIONS, declare.Custom} == set(AGGREGATIONS)


@pytest.mark.parametrize("declared", WAYS, ids=repr)
@given(step=steps())
def test_aggregation_equals_its_twin(declared: Any, step: Step) -> None:
    t = tensors(step)
    value = aggregate(declared, t.logp, t, totals(declared, t))
    assert value.item() == pytest.approx(twins.aggregate(declared, [s.logp for s in step], step), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (declare.TokenMean(), 10 / 6),
        (declare.SeqMeanTokenMean(), 1.5),
        (declare.SeqMeanTokenSum(), 5.0),
        (declare.ConstNorm(horizon=4), 1.25),
        (declare.TokenSum(), 10.0),
    ],
)
def test_aggregations_of_the_reference(declared: Any, expected: float) -> None:
    t = tensors([row([0.0] * 2), row([0.0] * 4)])
    values = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert aggregate(declared, values, t, Totals(6, 2)).item() == pytest.approx(expected)


def test_a_control_token_has_its_own_mean() -> None:
    """DeGRPO: control losses .5, -.2; response tokens .1, .3, .2 -> .001 x .15 + .2."""
    declared = declare.Segments(by="first", weights={"first": 0.001})
    t = tensors([row([0.0] * 3), row([0.0] * 2)])
    values = torch.tensor([0.5, 0.1, 0.3, -0.2, 0.2])
    assert totals(declared, t).parts == {"first": 2, "rest": 3}
    assert aggregate(declared, values, t, totals(declared, t)).item() == pytest.approx(0.20015)


def test_the_last_turn_has_its_own_mean() -> None:
    """DTPO: alpha x mean over the tool turn + mean over the last; one sequence answers directly."""
    declared = declare.Segments(by="turn", weights={"earlier": 0.5})
    t = tensors([row([0.0] * 4, turn=[0, 0, 0, 1]), row([0.0] * 2)])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert totals(declared, t).parts == {"earlier": 3, "last": 3}
    assert aggregate(declared, values, t, totals(declared, t)).item() == pytest.approx(0.5 * 2.0 + 5.0)


@pytest.mark.parametrize("declared", WAYS, ids=repr)
@given(step=steps(), data=st.data())
def test_micro_batches_add_up(declared: Any, step: Step, data: st.DataObject) -> None:
    """12.12: however sequences are cut, values with the counts of the whole step sum to that of one batch."""
    cut = data.draw(st.integers(0, len(step)))
    whole = tensors(step)
    total = totals(declared, whole)
    halves = [tensors(part) for part in (step[:cut], step[cut:]) if part]
    counts = [count_parts(declared, t.turn, t.segment, t.sequence, t.labels) for t in halves]
    assert {name: sum(c[name] for c in counts) for name in total.parts} == total.parts
    values = sum(aggregate(declared, t.logp, t, total).item() for t in halves)
    assert values == pytest.approx(aggregate(declared, whole.logp, whole, total).item(), rel=1e-9, abs=1e-12)


def test_missing_labels_are_refused() -> None:
    t = tensors([row([0.0])])
    with pytest.raises(RecordError, match="no token carries one"):
        totals(declare.Segments(weights={"tool": 0.5}), Tokens(**{**vars(t), "labels": ("",)}))
    assert totals(declare.Segments(), t).parts == {"": 1, "think": 0, "tool": 0}
