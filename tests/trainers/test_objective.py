"""The composition: what holds for the whole family (section 12), what is refused, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import objective_twins as twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_twins import Rollout, Step, random_step, row, steps, tensors

from agentgym.errors import ConfigError, UnknownName
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.compute import loss, summarise
from agentgym_trainers.objective.custom import resolve
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.objective.paths import get, put
from agentgym_trainers.objective.ratios import ratio_of
from agentgym_trainers.objective.tokens import Tokens, Totals

TOKEN, NONE = declare.Token(), declare.NoGate()
LEARNER: dict[str, Any] = {"proximal": "learner"}
FOUR = ("domain", "prompt", "trajectory", "token")


DUAL = {"kind": "dual", "watch": "ratio_variance", "target": 0.1}
ADAPTIVE = {"kind": "adaptive", "of": "regularisers.0.coef", "watch": "kl_reference", "target": 0.1}
SCHEDULE = {"kind": "schedule", "start": 0.1, "end": 0.9, "steps": 5}


def custom(name: str, **given: Any) -> Any:
    return declare.Custom(target=f"custom_pieces:{name}", **given)


OBJECTIVES: dict[str, Objective] = {
    "reinforce": Objective(ratio=declare.NoRatio(), gate=NONE),
    "plain": Objective(gate=NONE),
    "ppo": Objective(gate=declare.Clip(dual=3.0)),
    "grpo": Objective(aggregation=declare.SeqMeanTokenMean(), regularisers=(declare.Kl(form="k3"),)),
    "dr_grpo": Objective(aggregation=declare.ConstNorm(horizon=16)),
    "gspo": Objective(
        ratio=declare.Geometric(), gate=declare.Clip(low=3e-4, high=4e-4), aggregation=declare.SeqMeanTokenMean()
    ),
    "cispo": Objective(gate=declare.Detached()),
    "sapo": Objective(gate=declare.Soft()),
    "gmpo": Objective(gate=declare.LogClip(), aggregation=declare.SeqMeanTokenMean()),
    "dppo_tv": Objective(gate=declare.Divergence()),
    "dppo_kl": Objective(gate=declare.Divergence(form="kl", low=0.05, high=0.05, weight="ratio")),
    "vespo": Objective(ratio=declare.SequenceProduct(), gate=declare.GammaWeight()),
    "dro": Objective(gate=declare.SquaredLog()),
    "minpro": Objective(ratio=declare.PrefixMin()),
    "minpro_inclusive": Objective(ratio=declare.PrefixMin(inclusive=True, cap_one=True), gate=declare.Detached()),
    "prefix_product": Objective(ratio=declare.PrefixProduct()),
    "hrpo": Objective(ratio=declare.TurnProduct()),
    "dhpo": Objective(ratio=declare.Mix(by="entropy"), gate=declare.BranchClip()),
    "bapo": Objective(gate=declare.Clip(dual=3.0, adaptive=declare.Adaptive())),
    "fiberpo": Objective(ratio=declare.Levels(), gate=declare.LevelsClip(), aggregation=declare.SeqMeanTokenMean()),
    "fiberpo_a": Objective(ratio=declare.Levels(), gate=declare.LevelsClip(variant="A", pessimistic=True)),
    "fiberpo_domain": Objective(
        ratio=declare.Levels(levels=FOUR), gate=declare.LevelsClip(budgets=(0.1, 0.15, 0.2, 0.2))
    ),
    "apc": Objective(gate=declare.VariationBudget()),
    "r2vpo": Objective(gate=declare.Quadratic()),
    "degrpo": Objective(aggregation=declare.Segments(by="first", weights={"first": 0.001})),
    "dtpo": Objective(
        aggregation=declare.Segments(by="turn", weights={"earlier": 0.5}), regularisers=(declare.Entropy(),)
    ),
    "labelled": Objective(aggregation=declare.Segments(weights={"tool": 0.5})),
    "icepop": Objective(**LEARNER, behaviour=(declare.Mask(high=5.0), declare.Veto())),
    "tis": Objective(**LEARNER, behaviour=(declare.Truncate(), declare.Normalise())),
    "rejecting": Objective(**LEARNER, behaviour=(declare.Clamp(), declare.Reject(), declare.OffPolicyMask())),
    "reinforce_tis": Objective(ratio=declare.NoRatio(), gate=NONE, behaviour=(declare.Truncate(level="geometric"),)),
    "kepo": Objective(regularisers=(declare.Distillation(), declare.Sft())),
    "papo": Objective(regularisers=(declare.Perception(clean=0.05, masked=0.05), declare.Kl(coef=0.01))),
    "hinge": Objective(regularisers=(declare.KlHinge(coef=10.0), declare.EntropyBand())),
    "custom": Objective(
        ratio=custom("squared"),
        gate=custom("halved"),
        behaviour=(custom("doubled"),),
        aggregation=custom("summed"),
        regularisers=(declare.CustomPenalty(target="custom_pieces:distance", coef=0.1),),
    ),
}
DRPO = Objective(
    ratio=declare.NoRatio(),
    gate=NONE,
    aggregation=declare.SeqMeanTokenMean(),
    contrast=declare.Discriminative(max_length=8),
)


def value_of(o: Objective, t: Tokens) -> float:
    return loss(o, t, totals(o.aggregation, t))[0].item()


def gradient(o: Objective, t: Tokens) -> list[float]:
    found, _ = loss(o, t, totals(o.aggregation, t))
    (slope,) = torch.autograd.grad(found, t.logp)
    return list(slope.tolist())


# --- the whole composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"custom", "reinforce_tis"}))
@given(step=steps())
def test_loss_equals_its_twin(name: str, step: Step) -> None:
    o = OBJECTIVES[name]
    assert value_of(o, tensors(step)) == pytest.approx(twins.loss(o, step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES)))
def test_declarations_survive_their_table(name: str) -> None:
    o = OBJECTIVES[name]
    assert msgspec.convert(json.loads(msgspec.json.encode(o)), Objective) == o


def test_decoupled_ppo_against_coupled() -> None:
    """AReaL's example: lp -.6, proximal -.8, sampler -1: w 1.221403 times the clipped 1.2; coupled 1.2."""
    decoupled = Objective(**LEARNER, behaviour=(declare.Truncate(cap=5.0),))
    assert value_of(decoupled, tensors([row([0.2], logp=-0.6, sampled=[-1.0])])) == pytest.approx(-1.465683, abs=1e-6)
    assert value_of(Objective(), tensors([row([0.4], logp=-0.6)])) == pytest.approx(-1.2)


@given(step=steps())
def test_decoupled_is_coupled_when_the_proximal_policy_sampled(step: Step) -> None:
    """12.11."""
    same = [Rollout(**{**vars(s), "sampled": s.old}) for s in step]
    decoupled = Objective(**LEARNER, behaviour=(declare.Truncate(), declare.Veto(), declare.Reject()))
    assert value_of(decoupled, tensors(same)) == pytest.approx(value_of(Objective(), tensors(same)))


def test_without_a_ratio_the_policy_itself_is_compared_with_the_sampler() -> None:
    """Bypass: REINFORCE with w = sg(pi) / pi_sampler has the gradient of the ratio against the sampler."""
    played = row([math.log(1.5), math.log(0.5)], [1.0, -2.0])
    bypassed = Objective(ratio=declare.NoRatio(), gate=NONE, behaviour=(declare.Truncate(cap=9.0),))
    assert gradient(bypassed, tensors([played])) == pytest.approx(gradient(Objective(gate=NONE), tensors([played])))


def test_recipes_of_etcon_and_the_extractor() -> None:
    """TPSFT is the clip with A = 1; Complementary RL's extractor is CISPO within .1."""
    tpsft = value_of(Objective(), tensors([row([math.log(1.5), math.log(0.5)], 1.0)]))
    assert tpsft == pytest.approx(-(1.2 + 0.5) / 2)
    extractor = Objective(gate=declare.Detached(low=0.1, high=0.1))
    assert value_of(extractor, tensors([row([0.5, -0.5], 1.0)])) == pytest.approx((1.1 + 0.9) / 2)


# --- properties of the family -----------------------------------------------------------------------------------

PENALISED = {"grpo", "papo", "hinge", "dtpo", "kepo"}  # their regularisers have a gradient of their own


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"degrpo", "dtpo", "labelled", "custom"}))
def test_on_policy_gradient_is_the_advantage(name: str) -> None:
    """12.1: where policy, proximal policy and sampler agree, every gate gives weight x A."""
    o = msgspec.structs.replace(OBJECTIVES[name], regularisers=(), aggregation=declare.SeqMeanTokenMean())
    step = [row([0.0] * 4, 0.7, logp=[-1.0, -0.5, -2.0, -0.1], turn=[0, 0, 1, 1]), row([0.0] * 2, -1.3, group=1)]
    assert [-2 * x for x in gradient(o, tensors(step))] == pytest.approx([0.7 / 4] * 4 + [-1.3 / 2] * 2)


def test_exceptions_to_on_policy_agreement() -> None:
    """A forced first token, DRPO and regularisers have another gradient, and must."""
    forced = Objective(ratio=declare.Geometric(), gate=NONE)
    assert gradient(forced, tensors([row([math.log(0.2), 0.0])])) != pytest.approx([-0.5] * 2)
    pair = [row([0.0], 0.7, reward=1.0), row([0.0], 0.7, reward=0.0)]
    assert gradient(DRPO, tensors(pair)) == pytest.approx([-0.5, 0.5])
    kl = Objective(regularisers=(declare.Kl(coef=1.0, form="k1"),))
    assert gradient(kl, tensors([row([0.0], 0.7)])) == pytest.approx([1.0 - 0.7])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_another_sequence_matters_only_where_it_may(name: str) -> None:
    """`coupled` says whose loss reads other sequences; for the others gradients are block-diagonal."""
    o, lengths = OBJECTIVES[name], [3, 4, 2, 3]
    before, after = random_step(lengths, 5), random_step(lengths, 5)
    for s in after[1:]:
        s.logp = [x - 1.0 for x in s.logp]
        s.entropy = [x + 1.0 for x in s.entropy]
    first, second = (gradient(o, tensors(step))[:3] for step in (before, after))
    if not o.coupled:
        assert first == second


def test_coupled_objectives_are_those_that_read_the_whole_step() -> None:
    coupled = {name for name, o in OBJECTIVES.items() if o.coupled}
    assert coupled == {"bapo", "dhpo", "fiberpo_domain", "hinge", "tis"}
    assert DRPO.coupled
    assert Objective(gate=custom("halved", coupled=True)).coupled


@pytest.mark.parametrize("name", sorted(name for name, o in OBJECTIVES.items() if not o.coupled))
@given(step=steps(), data=st.data())
def test_micro_batches_add_up(name: str, step: Step, data: st.DataObject) -> None:
    """12.12."""
    o, cut = OBJECTIVES[name], data.draw(st.integers(0, len(step)))
    total = totals(o.aggregation, tensors(step))
    parts = sum(loss(o, tensors(part), total)[0].item() for part in (step[:cut], step[cut:]) if part)
    assert parts == pytest.approx(value_of(o, tensors(step)), rel=1e-9, abs=1e-9)


WIDE = declare.Clip(low=1.0, high=1e9)


@pytest.mark.parametrize(
    ("wide", "plain"),
    [
        (Objective(gate=WIDE), Objective(gate=NONE)),
        (
            Objective(gate=declare.Clip(adaptive=declare.Adaptive(low=(0.0, 0.0), high=(1e9, 1e9)))),
            Objective(gate=NONE),
        ),
        (Objective(ratio=declare.Levels(), gate=declare.LevelsClip(budgets=(99.0, 99.0))), Objective(gate=NONE)),
        (
            Objective(ratio=declare.Levels(levels=FOUR), gate=declare.LevelsClip(budgets=(99.0,) * 4, variant="A")),
            Objective(gate=NONE),
        ),
        (Objective(ratio=declare.Levels(levels=FOUR), gate=NONE), Objective(gate=NONE)),
        (Objective(gate=declare.Quadratic(coef=0.0)), Objective(gate=NONE)),
        (Objective(gate=declare.VariationBudget(delta=1e9)), Objective(gate=NONE)),
        (
            Objective(gate=declare.Divergence(low=9.0, high=9.0, weight="ratio")),
            Objective(gate=NONE),
        ),
        (
            Objective(ratio=declare.Mix(weight=1.0), gate=declare.BranchClip(token=(0.2, 0.3))),
            Objective(gate=declare.Clip(low=0.2, high=0.3)),
        ),
        (
            Objective(ratio=declare.Mix(weight=0.0), gate=declare.BranchClip(sequence=(0.1, 0.15))),
            Objective(ratio=declare.Geometric(), gate=custom("clip_like")),
        ),
        (
            Objective(ratio=declare.Mix(weight=0.0), gate=declare.BranchClip(sequence=(1.0, 1e9), pessimistic=False)),
            Objective(ratio=declare.Geometric(), gate=NONE),
        ),
    ],
    ids=lambda o: f"{o.ratio.kind}-{o.gate.kind}",
)
@given(step=steps())
def test_wide_bounds_and_single_branches(wide: Objective, plain: Objective, step: Step) -> None:
    """12.8: value and gradient."""
    assert value_of(wide, tensors(step)) == pytest.approx(value_of(plain, tensors(step)), rel=1e-9, abs=1e-12)
    assert gradient(wide, tensors(step)) == pytest.approx(gradient(plain, tensors(step)), rel=1e-9, abs=1e-12)


@given(step=steps())
def test_domain_levels_of_single_trajectories_are_the_two_levels(step: Step) -> None:
    """12.8: one trajectory a group and one group a domain: FiberPO-Domain is FiberPO with delta = the domain's."""
    alone = [Rollout(**{**vars(s), "group": i, "domain": i}) for i, s in enumerate(step)]
    four = Objective(ratio=declare.Levels(levels=FOUR), gate=declare.LevelsClip(budgets=(0.1, 0.15, 0.2, 0.3)))
    two = Objective(ratio=declare.Levels(), gate=declare.LevelsClip(budgets=(0.1, 0.3)))
    assert value_of(four, tensors(alone)) == pytest.approx(value_of(two, tensors(alone)))
    assert gradient(four, tensors(alone)) == pytest.approx(gradient(two, tensors(alone)), abs=1e-12)


@given(step=steps())
def test_prefix_minimum_is_on_the_right_side_of_the_prefix_product(step: Step) -> None:
    """12.9: all earlier ratios at most one: at least the product; all at least one: at most."""
    for sign in (1.0, -1.0):
        one_sided = [row([sign * abs(x) for x in s.deltas()]) for s in step]
        t = tensors(one_sided)
        least, product = (ratio_of(kind, t).ratio for kind in (declare.PrefixMin(), declare.PrefixProduct()))
        assert bool((sign * (product - least) >= -1e-12).all())


@pytest.mark.parametrize("name", [*sorted(OBJECTIVES), "drpo"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_learn_from_is_a_finite_zero(name: str, lengths: list[int]) -> None:
    """12.14."""
    o, t = {**OBJECTIVES, "drpo": DRPO}[name], tensors(random_step(lengths, 0))
    found, sums = loss(o, t, totals(o.aggregation, t))
    found.backward()
    assert found.item() == 0.0
    assert all(math.isfinite(x) for x in summarise([sums], totals(o.aggregation, t)).values())


@pytest.mark.parametrize("name", [*sorted(OBJECTIVES), "drpo"])
def test_far_from_home_nothing_is_nan(name: str) -> None:
    o = {**OBJECTIVES, "drpo": DRPO}[name]
    step = [row([300.0, -300.0, 25.0], [1.0, -1.0, 0.0], reward=math.nan), row([]), row([-40.0], 0.0)]
    t = tensors(step, torch.float32)
    found, sums = loss(o, t, totals(o.aggregation, t))
    found.backward()
    assert torch.isfinite(found), name
    assert t.logp.grad is not None
    assert torch.isfinite(t.logp.grad).all(), name
    assert all(math.isfinite(x) for x in sums.values())


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - PENALISED - {"dro", "custom", "r2vpo"}))
def test_equal_rewards_leave_nothing_to_learn(name: str) -> None:
    """12.3: all-equal groups have A = 0, and A = 0 has no gradient (a quadratic gate pulls back to rho = 1)."""
    step = [row([0.3, -0.2], 0.0), row([0.1], 0.0)]
    assert gradient(OBJECTIVES[name], tensors(step)) == [0.0] * 3


# --- figures ----------------------------------------------------------------------------------------------------


def test_figures_are_per_token() -> None:
    t = tensors([row([math.log(1.5), 0.0, math.log(0.5), math.log(1.5)], [1.0, 1.0, -1.0, -1.0])])
    total = Totals(4, 1)
    found = summarise([loss(Objective(), t, total)[1]], total)
    assert found["clipped"] == 0.5
    assert found["clipped_up"] == found["clipped_down"] == 0.25
    assert found["ratio"] == pytest.approx(4.5 / 4)
    assert found["ratio_max"] == pytest.approx(1.5)
    assert found["ratio_variance"] == pytest.approx(0.75 / 4)
    assert found["nll"] == pytest.approx(1.0)
    assert found["entropy"] == pytest.approx(1.0)
    assert "ess" not in found


def test_effective_sample_size() -> None:
    """Section 4: weights .3, .9, 1, 2 are worth 2.98983 of 4."""
    played = row([0.0] * 4, sampled=[-1.0 - math.log(w) for w in (0.3, 0.9, 1.0, 2.5)])
    o, total = Objective(**LEARNER, behaviour=(declare.Truncate(),)), Totals(4, 1)
    found = summarise([loss(o, tensors([played]), total)[1]], total)
    assert 4 * found["ess"] == pytest.approx(2.98983, abs=1e-5)
    assert found["weight"] == pytest.approx(4.2 / 4)


def test_spread_of_ratios_feeds_the_dual_of_r2vpo() -> None:
    """5.5: rho 1.5, .9 has mean squared deviation .13."""
    t = tensors([row([math.log(1.5), math.log(0.9)])])
    assert summarise([loss(OBJECTIVES["r2vpo"], t, Totals(2, 1))[1]], Totals(2, 1))["ratio_variance"] == pytest.approx(
        0.13
    )


def test_adaptive_bounds_are_reported() -> None:
    t = tensors([row([math.log(x) for x in (1.5, 0.5, 0.9, 0.9)], [1.0, -1.0, -1.0, -1.0])])
    found = summarise([loss(OBJECTIVES["bapo"], t, Totals(4, 1))[1]], Totals(4, 1))
    assert (found["bound_low"], found["bound_high"]) == pytest.approx((0.8, 2.0))


# --- functions of one's own -------------------------------------------------------------------------------------


def test_functions_of_ones_own() -> None:
    t = tensors([row([math.log(1.5), 0.0], 3.0), row([0.0], 3.0)])
    gained = 2 * (2.25 + 1 + 1) * 3 / 2 / 2
    assert value_of(OBJECTIVES["custom"], t) == pytest.approx(-gained + 0.1 * math.log(1.5) ** 2 / 2)
    by_six = Objective(gate=custom("halved", options={"by": 6.0}))
    assert value_of(by_six, t) == pytest.approx(-(1.5 + 1 + 1) / 6)
    contrasted = Objective(gate=NONE, contrast=custom("ones"))
    assert value_of(contrasted, t) == pytest.approx(-3.5 / 3)


@pytest.mark.parametrize("target", ["custom_pieces:nothing", "no_such_module:f", "custom_pieces:NUMBER"])
def test_a_function_that_is_not_there_is_refused(target: str) -> None:
    o = Objective(gate=declare.Custom(target=target))
    with pytest.raises(ConfigError, match="target = "):
        value_of(o, tensors([row([0.0])]))


@pytest.mark.parametrize(("text", "said"), [("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division")])
def test_a_module_that_does_not_load_is_refused(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_piece_{said[:4].lower()}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"importing it raises {said}"):
        resolve(f"{name}:f")


# --- what cannot be meant ---------------------------------------------------------------------------------------

SEQUENCE = {"ratio": {"kind": "sequence"}}
FREE = {"ratio": {"kind": "none"}, "gate": {"kind": "none"}}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"behaviour": [{"kind": "truncate"}]}, "corrects twice"),
        ({"behaviour": [{"kind": "mask"}]}, "corrects twice"),
        ({"proximal": "learner", "behaviour": [{"kind": "mask"}, {"kind": "clamp"}]}, "both weigh by w"),
        ({"behaviour": [{"kind": "veto"}]}, "would never act"),
        ({"behaviour": [{"kind": "reject"}]}, "would never act"),
        ({"proximal": "learner", "behaviour": [{"kind": "normalise"}]}, "put it last"),
        ({"proximal": "learner", "behaviour": [{"kind": "truncate", "cap": 0.5}]}, "both sides of 1"),
        ({"proximal": "learner", "behaviour": [{"kind": "mask", "low": 1.5}]}, "both sides of 1"),
        ({"proximal": "learner", "behaviour": [{"kind": "clamp", "high": 0.9}]}, "both sides of 1"),
        ({"proximal": "learner", "behaviour": [{"kind": "veto", "floor": 1.0}]}, "drops every sequence"),
        ({"ratio": {"kind": "none"}}, "no ratio to act on"),
        (SEQUENCE, "never bind"),
        ({**SEQUENCE, "gate": {"kind": "clip", "low": 3e-4, "high": 0.2}}, "never bind"),
        ({**SEQUENCE, "gate": {"kind": "clip", "adaptive": {}}}, "never bind"),
        ({"gate": {"kind": "levels_clip"}}, "acts on the parts of ratio 'levels'"),
        ({"gate": {"kind": "branch_clip"}}, "acts on the parts of ratio 'mix'"),
        ({**SEQUENCE, "gate": {"kind": "log_clip"}}, "acts on the parts of ratio 'token'"),
        ({**SEQUENCE, "gate": {"kind": "divergence"}}, "acts on the parts"),
        ({"ratio": {"kind": "turn"}, "gate": {"kind": "gamma_weight"}}, "acts on the parts"),
        ({"ratio": {"kind": "levels"}}, "sees only what the levels sum to"),
        ({"ratio": {"kind": "levels"}, "gate": {"kind": "levels_clip", "budgets": [0.1]}}, "one budget for each"),
        ({"ratio": {"kind": "levels", "levels": ["token", "prompt"]}, "gate": {"kind": "none"}}, "outermost"),
        ({"ratio": {"kind": "levels", "levels": ["prompt"]}, "gate": {"kind": "none"}}, "outermost"),
        ({"ratio": {"kind": "mix", "by": "entropy", "weight": 0.3}, "gate": {"kind": "branch_clip"}}, "does not read"),
        ({"ratio": {"kind": "mix", "weight": 1.5}, "gate": {"kind": "branch_clip"}}, r"mix\.weight is at most 1"),
        ({"gate": {"kind": "clip", "low": -1.0}}, r"clip\.low is a finite number from 0"),
        ({"gate": {"kind": "clip", "low": 1.5}}, r"clip\.low is at most 1"),
        ({"gate": {"kind": "clip", "dual": 0.5}}, "dual clip is above 1"),
        ({"gate": {"kind": "clip", "adaptive": {"low": [0.8, 0.6]}}}, "ascend"),
        ({"gate": {"kind": "clip", "adaptive": {"high": [0.9, 2.0]}}}, "leave 1 between"),
        ({"gate": {"kind": "clip", "adaptive": {"step": [0.0, 0.1]}}}, r"adaptive\.step is above 0"),
        ({"gate": {"kind": "clip", "adaptive": {"balance": "share", "target": 1.5}}}, "at most 1"),
        ({"gate": {"kind": "clip", "low": 0.1, "adaptive": {}}}, "are not read"),
        ({"gate": {"kind": "soft", "positive": 0.0}}, r"soft\.positive is above 0"),
        ({"ratio": {"kind": "mix"}, "gate": {"kind": "branch_clip", "token": [1.2, 0.2]}}, "lower bound is at most 1"),
        ({"aggregation": {"kind": "const_norm", "horizon": 0}}, r"horizon is above 0"),
        ({"aggregation": {"kind": "segments", "weights": {"tool": -1.0}}}, r"weights\.tool is a finite"),
        ({"source": {"kind": "layer", "layer": 0}}, r"layer is above 0"),
        ({"regularisers": [{"kind": "perception"}, {"kind": "perception", "share": 0.5}]}, "same second forward"),
        ({"regularisers": [{"kind": "distillation", "beta": 1.5}]}, r"beta is at most 1"),
        ({"regularisers": [{"kind": "entropy_band", "low": 2.0}]}, "low <= high"),
        ({"contrast": {"kind": "discriminative"}}, "goes with ratio 'none'"),
        ({**FREE, "contrast": {"kind": "discriminative"}}, "aggregation 'seq_mean_token_mean'"),
        ({"contrast": {"kind": "discriminative", "tau": 0.0}}, r"tau is above 0"),
        ({"gate": {"kind": "custom", "target": "module.function"}}, "package.module:function"),
        ({"controllers": [{"kind": "dual", "of": "gate.width", "watch": "kl", "target": 1.0}]}, "leads nowhere"),
        ({"controllers": [{"kind": "dual", "of": "gate.low", "watch": "kl", "target": 1.0, "lr": 0.0}]}, "above 0"),
        ({"controllers": [{"kind": "adaptive", "of": "gate.low", "watch": "kl", "target": 0.0}]}, "above 0"),
        (
            {"controllers": [{"kind": "schedule", "of": "gate.low", "start": 0.2, "end": 1.2, "steps": 9}]},
            r"clip\.low is at most 1",
        ),
        (
            {
                "controllers": [
                    {"kind": "schedule", "of": "gate.low", "start": 0.2, "end": 0, "steps": 9, "form": "geometric"}
                ]
            },
            "between positives",
        ),
        ({"controllers": [DUAL | {"of": "gate.low"}]}, r"may bring 'gate\.low' to 5: clip\.low is at most 1"),
        ({"gate": {"kind": "soft"}, "controllers": [DUAL | {"of": "gate.positive"}]}, "to 0: soft.positive is above 0"),
        ({"controllers": [ADAPTIVE], "regularisers": [{"kind": "kl", "coef": 0.0}]}, "0 would stay 0"),
        (
            {"source": {"kind": "layer", "layer": 2}, "controllers": [SCHEDULE | {"of": "source.layer"}]},
            "read when the run begins",
        ),
        (
            {"regularisers": [{"kind": "perception"}], "controllers": [SCHEDULE | {"of": "regularisers.0.share"}]},
            "read when the run begins",
        ),
        (
            {"regularisers": [{"kind": "distillation"}], "controllers": [SCHEDULE | {"of": "regularisers.0.beta"}]},
            "read when the run begins",
        ),
        (
            {"source": {"kind": "layer", "layer": 2}, "regularisers": [{"kind": "kl", "against": "sampler"}]},
            "'kl' compares the policy with the sampler",
        ),
        ({"gate": {"kind": "clip", "adaptive": {"step": [1e-12, 0.1]}}}, "at most 1000 steps"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError), match=said):
        msgspec.convert(table, Objective)


def test_unknown_parts_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'kl_refrence'; did you mean 'kl_reference'\? .*regularisers\.0\.coef"):
        msgspec.convert(
            {"regularisers": [{"kind": "kl"}], "controllers": [ADAPTIVE | {"watch": "kl_refrence"}]}, Objective
        )
    with pytest.raises(UnknownName, match="did you mean 'first'"):
        Objective(aggregation=declare.Segments(by="first", weights={"frist": 1.0}))
    with pytest.raises(UnknownName, match="did you mean 'last'"):
        Objective(aggregation=declare.Segments(by="turn", weights={"lst": 1.0}))


def test_wide_sequence_bounds_warn() -> None:
    with pytest.warns(UserWarning, match="hardly ever bind"):
        Objective(ratio=declare.Geometric(), gate=declare.Clip(low=0.1, high=0.1))


def test_rewards_may_be_negative_in_thresholds() -> None:
    assert Objective(regularisers=(declare.Sft(threshold=-0.5),)).regularisers[0].coef == 0.1


def test_numbers_by_path() -> None:
    o = OBJECTIVES["papo"]
    assert get(o, "regularisers.1.coef") == 0.01
    moved = put(o, "regularisers.1.coef", 0.5)
    assert get(moved, "regularisers.1.coef") == 0.5
    assert moved.regularisers[0] == o.regularisers[0]
    with pytest.raises(ConfigError, match="no number"):
        get(o, "gate.adaptive")


def test_what_is_needed_follows_from_what_is_declared() -> None:
    assert OBJECTIVES["grpo"].needs_reference
    assert not OBJECTIVES["ppo"].needs_reference
    assert Objective(gate=custom("halved", reference=True)).needs_reference
    assert OBJECTIVES["ppo"].needs_sampler
    assert not OBJECTIVES["reinforce"].needs_sampler
    assert not declare.IMITATION.needs_sampler
