"""S3: ratio levels by the reference's numbers (5.1, 5.2, 5.4, 3.2), and against their slow twins."""

from __future__ import annotations

import math
from typing import Any

import objective_twins as twins
import pytest
import torch
from hypothesis import given
from objective_twins import Step, flat, row, steps, tensors

from agentgym.errors import RecordError
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.ratios import RATIOS, ratio_of

KINDS = [
    declare.NoRatio(),
    declare.Token(),
    declare.TurnProduct(),
    declare.Geometric(),
    declare.SequenceProduct(),
    declare.PrefixProduct(),
    declare.PrefixMin(),
    declare.PrefixMin(cap_one=True),
    declare.PrefixMin(inclusive=True),
    declare.PrefixMin(inclusive=True, cap_one=True),
    declare.Mix(weight=0.3),
    declare.Mix(by="entropy"),
    declare.Levels(),
    declare.Levels(levels=("token",)),
    declare.Levels(levels=("prompt", "trajectory", "token")),
    declare.Levels(levels=("domain", "prompt", "trajectory", "token")),
    declare.Levels(levels=("domain", "token")),
]


def logs(*rhos: float) -> list[float]:
    return [math.log(rho) for rho in rhos]


def ratios(declared: Any, *rows: twins.Rollout) -> list[float]:
    return ratio_of(declared, tensors([*rows])).ratio.tolist()


def test_every_kind_has_a_twin() -> None:
    assert set(twins.RATIOS) | {declare.Custom} == set(RATIOS)


@pytest.mark.parametrize("declared", KINDS, ids=repr)
@given(step=steps())
def test_ratio_equals_its_twin(declared: Any, step: Step) -> None:
    parts, twin = ratio_of(declared, tensors(step)), twins.ratio(declared, step)
    assert parts.ratio.tolist() == pytest.approx(flat(twin.rho), rel=1e-9)
    for log, rows in zip(parts.logs, twin.logs, strict=True):
        assert log.tolist() == pytest.approx(flat(rows), rel=1e-9, abs=1e-12)


def test_geometric_and_product_of_a_sequence() -> None:
    played = row(logs(1.2, 0.9, 1.1))
    assert ratios(declare.Geometric(), played) == pytest.approx([1.059105] * 3, abs=1e-6)
    assert ratios(declare.SequenceProduct(), played) == pytest.approx([1.188] * 3)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (declare.PrefixMin(), [1.2, 0.6, 0.75, 0.4]),
        (declare.PrefixProduct(), [1.2, 0.6, 0.9, 0.72]),
        (declare.PrefixMin(cap_one=True), [1.2, 0.5, 0.75, 0.4]),
        (declare.PrefixMin(inclusive=True), [1.2, 0.5, 0.5, 0.5]),
    ],
)
def test_prefix_ratios(declared: Any, expected: list[float]) -> None:
    """5.1, with another sequence before and behind, which must not leak in."""
    played, other = row(logs(1.2, 0.5, 1.5, 0.8)), row(logs(0.1, 3.0))
    assert ratios(declared, other, played, other)[2:6] == pytest.approx(expected)


def test_a_prefix_of_ones_leaves_the_token_ratio() -> None:
    """12.9."""
    played = row(logs(1.0, 1.0, 1.0, 0.7))
    assert ratios(declare.PrefixMin(), played) == pytest.approx(ratios(declare.Token(), played))


def test_product_over_a_turn_is_the_ratio_of_a_joint_action() -> None:
    played = row(logs(1.2, 0.9, 1.1, 2.0), turn=[0, 0, 3, 3])
    assert ratios(declare.TurnProduct(), played) == pytest.approx([1.08, 1.08, 2.2, 2.2])


def test_forced_first_token() -> None:
    """5.10: on-policy, but the first token was forced with probability one half."""
    played = row(logs(0.1 / 0.5, 1.0, 1.0))
    assert ratios(declare.Geometric(), played) == pytest.approx([0.584804] * 3, abs=1e-6)


def test_mix_of_token_and_sequence() -> None:
    """5.2: unclipped, s = 1.161895."""
    played = row(logs(1.5, 0.9), entropy=[0.25, 1.0])
    assert ratios(declare.Mix(), played) == pytest.approx([(1.5 + 1.161895) / 2, (0.9 + 1.161895) / 2], abs=1e-6)
    by_entropy = ratios(declare.Mix(by="entropy"), played)
    assert by_entropy == pytest.approx([0.25 * 1.5 + 0.75 * 1.161895, 0.9], abs=1e-6)
    blank = row(logs(1.5, 0.9), entropy=[0.0, 0.0])
    assert ratios(declare.Mix(by="entropy"), blank) == pytest.approx([1.161895] * 2, abs=1e-6)


def test_domain_levels_with_one_trajectory_each_add_nothing() -> None:
    """12.8: the inner aggregate differences are 0."""
    step = [row([0.5, 0.1, 0.3], group=0, domain=0), row([-0.4, 0.2], group=1, domain=1)]
    parts = ratio_of(declare.Levels(levels=("domain", "prompt", "trajectory", "token")), tensors(step))
    plain = ratio_of(declare.Levels(), tensors(step))
    assert parts.logs[1].tolist() == parts.logs[2].tolist() == [0.0] * 5
    assert parts.logs[0].tolist() == pytest.approx(plain.logs[0].tolist())
    assert parts.logs[3].tolist() == pytest.approx(plain.logs[1].tolist())


def test_token_form_gives_each_token_its_own_gradient() -> None:
    """The ratio's value is the sequence's, its gradient the token's own: d s_t / d lp_t = s."""
    for declared in (declare.Geometric(), declare.SequenceProduct(), declare.PrefixMin(), declare.TurnProduct()):
        t = tensors([row(logs(1.5, 0.9, 0.7))])
        parts = ratio_of(declared, t)
        (found,) = torch.autograd.grad(parts.ratio[1], t.logp)
        assert found.tolist() == pytest.approx([0.0, parts.ratio[1].item(), 0.0])


def test_a_column_that_is_missing_is_named() -> None:
    t = tensors([row([0.1])])
    bare = declare.Levels(levels=("domain", "token"))
    with pytest.raises(RecordError, match=r"Tokens\.domain"):
        ratio_of(bare, type(t)(**{**vars(t), "domain": None}))


def test_extreme_log_ratios_stay_finite() -> None:
    played = [row([500.0, -500.0, 40.0]), row([])]
    for declared in KINDS:
        assert torch.isfinite(ratio_of(declared, tensors(played)).ratio).all(), declared
