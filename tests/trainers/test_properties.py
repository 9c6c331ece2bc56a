"""Section 12 of the reference: fifteen properties of the whole family, each over every method of the catalogue.

The real pipeline takes each step: composer, advantages, collate, loss (tests/method_steps.py). Where a property does
not hold for a method, that method is named, and the test asserts that it does not: an exception that suddenly holds
fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from method_steps import EVERY, Step, changed, member, plain, world
from numpy.typing import NDArray

from agentgym.advantages import AdvantageState
from agentgym.advantages.transforms import tracked
from agentgym.errors import ConfigError
from agentgym.types import Batch, Trajectory, Turns
from agentgym_trainers.controllers import begun, controlled, numbers, with_numbers
from agentgym_trainers.forward import joined
from agentgym_trainers.methods import declared, load
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.behaviours import weights
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import NoGate, NoRatio, Objective, Token
from agentgym_trainers.objective.tokens import Tokens
from agentgym_trainers.strategies import declare as strategies
from agentgym_trainers.strategies.hints import next_level

every = pytest.mark.parametrize("method", EVERY)
PLAYED = world()
Gradient = dict[str, NDArray[np.float64]]


def same(a: Gradient, b: Gradient, among: Iterable[str] | None = None, tolerance: float = 1e-6) -> bool:
    """Whether two gradients agree on these episodes (all)."""
    return all(np.allclose(a[name], b[name], rtol=1e-5, atol=tolerance) for name in among or a)


def paid_by_length(t: Trajectory) -> Trajectory:
    tokens = sum(len(span.ids) for _, span in t.spans)
    return changed(t, lambda name, x: x + tokens)


def largest(gradient: Gradient, among: Callable[[str], bool] = lambda name: True) -> float:
    return max((float(np.abs(g).max(initial=0.0)) for name, g in gradient.items() if among(name)), default=0.0)


# --- 1: on-policy, every gate is REINFORCE ----------------------------------------------------------------------

OTHER_WEIGHTS = {"drpo"}
"""Its advantages come from the log-probs, not from the estimator."""
REGULARISED = {"dtpo", "g2rpo", "gigpo", "grpo", "kepo", "papo", "ppo", "riskpo"}
"""Regularisers that pull even where the policy is the proximal one."""


@every
def test_1_on_policy_gradients_agree(method: str) -> None:
    step = Step(method, PLAYED)
    reinforce = Step(method, PLAYED, objective=plain(step.objective))
    assert same(step.gradient(), reinforce.gradient()) == (method not in OTHER_WEIGHTS)
    assert largest(step.gradient()) > 1e-4


@every
def test_1_regularisers_pull(method: str) -> None:
    bare, whole = (Step(method, PLAYED, bare=bare, apart=0.5) for bare in (True, False))
    others = max(float(whole.slopes(name).abs().max()) for name in ("entropy", "masked", "divergence"))
    assert (not same(bare.gradient(), whole.gradient()) or others > 0) == (method in REGULARISED)


@pytest.mark.parametrize("method", ["adaptthink", "kepo"])
def test_1_forced_and_hinted_samples_are_off_policy(method: str) -> None:
    """Their first tokens were not drawn from the policy that is trained: the ratio is not one, and corrects."""
    step = Step(method, PLAYED)
    t = step.tokens
    first = torch.ones_like(t.sequence, dtype=torch.bool)
    first[1:] = t.sequence[1:] != t.sequence[:-1]
    forced = replace(t, old=torch.where(first, math.log(0.5), t.old))
    o = step.objective
    (found,) = torch.autograd.grad(loss(o, forced, totals(o.aggregation, forced))[0], t.logp)
    assert not torch.allclose(found, step.slopes())


BY_DEFINITION = {
    *("cgpo-crpg", "cgpo-crraft", "cispo", "complementary-extractor", "dppo-kl", "dppo-tv"),
    *("drpo", "gpg", "hrpo", "minpro", "opo", "remax", "rloo", "vespo"),
}
"""Their values hold detached factors (detached weights, products in token form, REINFORCE): the coefficient is by
definition. The token form of a geometric mean is exact where the advantage is one for the sequence (GSPO, DHPO)."""


@every
def test_1_the_gradient_is_that_of_the_loss(method: str) -> None:
    """Finite differences in float64, off-policy and with a mismatch, at a few tokens of every step."""
    step = Step(method, PLAYED, move=0.3, mismatch=0.05)
    slopes, size = step.slopes(), 1e-6
    places = range(0, len(slopes), max(len(slopes) // 7, 1))
    found = [(_shifted(step, at, size) - _shifted(step, at, -size)) / (2 * size) for at in places]
    agrees = torch.allclose(torch.tensor(found).double(), slopes[list(places)], atol=1e-7, rtol=1e-5)
    assert agrees == (method not in BY_DEFINITION)


def _shifted(step: Step, at: int, size: float) -> float:
    logp = step.tokens.logp.detach().clone()
    logp[at] += size
    return value(step.objective, replace(step.tokens, logp=logp))


def value(o: Objective, t: Tokens) -> float:
    return float(loss(o, t, totals(o.aggregation, t))[0].detach())


# --- 2: what nobody trains on -----------------------------------------------------------------------------------


@every
def test_2_masked_positions_do_not_matter(method: str) -> None:
    """Random values behind mask 0 in every column, and a longer context, leave loss and gradient as they are."""
    step = Step(method, PLAYED, move=0.3)
    noisy = Step(method, PLAYED, move=0.3)
    noise = np.random.default_rng(0).normal(size=len(step.batch.ids)).astype(np.float32) * (1 - step.batch.mask)
    held = {name: getattr(step.batch, name) for name in Batch.__struct_fields__}
    numbers = {"advantages": step.batch.advantages + noise, "logprobs": step.batch.logprobs + noise}
    noisy.__dict__["batch"] = Batch(**{**held, **numbers, "ids": step.batch.ids + (noise * 9).astype(np.int32)})
    assert float(step.loss().detach()) == float(noisy.loss().detach())
    assert all(np.array_equal(g, noisy.gradient()[name]) for name, g in step.gradient().items())
    longer = Step(method, [with_context(t) for t in PLAYED], move=0.3)
    assert len(longer.batch.ids) > len(step.batch.ids)
    assert same(step.gradient(), longer.gradient(), tolerance=1e-12)


def with_context(t: Trajectory) -> Trajectory:
    """The same trajectory behind a longer prompt."""
    assert isinstance(t.turns, Turns)
    first = t.turns.items[0]
    assert first.action.span is not None
    span = first.action.span.replace(prompt=type(first.action.span.prompt)(range(1, 9 + t.episode.member)))
    turns = (first.replace(action=first.action.replace(span=span)), *t.turns.items[1:])
    found: Trajectory = t.replace(turns=Turns(items=turns))
    return found


# --- 3 to 6: rewards and advantages -----------------------------------------------------------------------------

SIGNAL_WITHOUT_CONTRAST = {
    *("adaptthink", "remax", "ppo", "mdpo"),  # a baseline from outside the group
    *("reinforce-pp", "reinforce-pp-baseline", "cgpo-crpg"),  # whitened over tokens of, or compared with, the batch
    *("hrpo", "etcon-tpsft", "cgpo-crraft"),  # raw rewards; what is good
}
"""Not RiskPO: a bundle's value is shared by the distance from the prompt's mean, and there is none."""


@every
def test_3_equal_rewards_give_no_signal(method: str) -> None:
    """The first group's members have the same rewards turn by turn; the others do not."""
    rewards = [{"tool": 0.2, "action": 0.1}, {"tool": 0.2, "action": 0.4, "outcome": 1.0}]
    equal = [member(0, m, rewards, [1 + m, 2]) for m in range(4)]
    found = Step(method, [*equal, *PLAYED[4:]]).gradient()
    assert (largest(found, of_group("p0")) > 1e-9) == (method in SIGNAL_WITHOUT_CONTRAST)


def of_group(name: str) -> Callable[[str], bool]:
    return lambda episode: episode.startswith(name)


MIXING = {
    *("ppo", "reinforce-pp", "reinforce-pp-baseline", "gdpo"),  # whitened over the batch
    *("cgpo-crpg", "gpg", "riskpo"),  # the batch's mean, its share of signal, bundles
    *("bapo", "fiberpo-domain"),  # bounds of the whole step; the domain's mean ratio
}


@every
def test_4_groups_are_apart(method: str) -> None:
    """Other rewards in the second group leave the gradient of the others as it is."""
    played = [t if t.episode.group == "p0" else paid_by_length(t) for t in PLAYED]  # gains and losses near balance
    a = Step(method, played, move=0.6, drift=0.25).gradient()
    untouched = [name for name in a if not of_group("p1")(name)]
    changes: tuple[Callable[[str, float], float], ...] = (lambda name, x: x * x + x, lambda name, x: -x, lambda *_: 0.0)
    agree = []
    for change in changes:
        others = [changed(t, change) if t.episode.group == "p1" else t for t in played]
        agree.append(same(a, Step(method, others, move=0.6, drift=0.25).gradient(), untouched, tolerance=1e-9))
    assert all(agree) == (method not in MIXING)


@every
def test_5_order_does_not_matter(method: str) -> None:
    orders = (range(len(PLAYED))[::-1], (1, 0, 3, 2, *range(4, len(PLAYED))))
    ahead = Step(method, PLAYED, move=0.3, mismatch=0.05)
    others = [Step(method, [PLAYED[i] for i in order], move=0.3, mismatch=0.05) for order in orders]
    agree = [same(ahead.gradient(), step.gradient()) for step in others]
    assert all(agree) == (method not in PAIRED_BY_INDEX)


PAIRED_BY_INDEX = {"riskpo"}
"""Its bundles sum the k-th members of several prompts."""

SCALES = {"cgpo-crpg", "cgpo-crraft", "degrpo", "dr-grpo", "gigpo", "gpg", "opo", "riskpo", "rloo", "turn-baseline"}
"""The advantage is in units of the reward."""
SCALES_OTHERWISE = {"adaptthink", "hrpo", "mdpo", "ppo", "remax"}
"""A figure beside the reward keeps its own unit: a given baseline, a critic's values, raw actions."""
SHIFTS = {"adaptthink", "cgpo-crraft", "gigpo", "mdpo", "ppo", "remax", "drpo"}


@every
def test_6_affine_rewards(method: str) -> None:
    """Rewards x 3: the same gradient, or three times it. The outcome + 2: the same gradient."""
    a = Step(method, PLAYED).gradient()
    tripled = Step(method, [changed(t, lambda name, x: 3 * x) for t in PLAYED]).gradient()
    thrice = {name: 3 * g for name, g in a.items()}
    assert same(thrice, tripled) == (method in SCALES)
    assert same(a, tripled, tolerance=1e-5) == (method not in SCALES | SCALES_OTHERWISE)
    shifted = Step(method, [changed(t, lambda name, x: x + 2.0 * (name == "outcome")) for t in PLAYED]).gradient()
    assert same(a, shifted, tolerance=1e-5) == (method not in SHIFTS)


def test_6_ranks_know_no_scale_at_all() -> None:
    played = [member(0, m, [{"outcome": x}], 2) for m, x in enumerate((0.1, 0.5, 0.5, 0.9))]
    warped = [changed(t, lambda name, x: math.exp(5 * x)) for t in played]
    assert same(Step("g2rpo", played).gradient(), Step("g2rpo", warped).gradient())
    assert not same(Step("grpo", played).gradient(), Step("grpo", warped).gradient(), tolerance=1e-3)


def test_7_ranks_are_antisymmetric() -> None:
    rewards = np.random.default_rng(0).normal(size=7)

    def given(values: Iterable[float]) -> NDArray[np.float64]:
        return np.concatenate(Step("g2rpo", [member(0, m, [{"r": x}], 1) for m, x in enumerate(values)]).credit)

    assert given(rewards) == pytest.approx(-given(-rewards))
    assert given(rewards).sum() == pytest.approx(0, abs=1e-12)
    tied = given([0.0, 1.0, 1.0, 2.0, 1.0])
    assert tied[1] == tied[2] == tied[4] == pytest.approx(0, abs=1e-12)


# --- 8 and 9: limits --------------------------------------------------------------------------------------------

WIDE = 1e9


def unbounded(gate: Any) -> Any:
    """The gate with budgets that nothing reaches; the same gate where it has none."""
    if isinstance(gate, declare.Clip):
        return declare.Clip(low=0.05, high=0.05) if gate.high < 0.05 else declare.Clip(low=1.0, high=WIDE)
    if isinstance(gate, declare.LevelsClip):
        return msgspec.structs.replace(gate, budgets=tuple(WIDE for _ in gate.budgets))
    if isinstance(gate, declare.Quadratic):
        return declare.Quadratic(coef=0.0)
    if isinstance(gate, declare.BranchClip):
        return declare.BranchClip(token=(1.0, WIDE), sequence=(1.0, WIDE))
    return gate


BOUNDED = [m for m in EVERY if unbounded(declared(load(m)).objective.gate) != declared(load(m)).objective.gate]


@pytest.mark.parametrize("method", BOUNDED)
def test_8_without_bounds_it_is_importance_sampling(method: str) -> None:
    """Of the token, or of the method's own level where that is another. Sequences move by less: between the method's
    bounds and the widest that a sequence may have."""
    o = Step(method, PLAYED).objective
    far = {"move": 0.002, "drift": 0.045} if isinstance(o.ratio, declare.Geometric) else {"move": 0.8}
    free = msgspec.structs.replace(o, gate=unbounded(o.gate))
    level = Token() if isinstance(o.ratio, declare.Levels) else o.ratio
    sampling = msgspec.structs.replace(o, ratio=level, gate=NoGate())
    bounded, unlimited, plainly = (Step(method, PLAYED, objective=x, **far).slopes() for x in (o, free, sampling))
    torch.testing.assert_close(unlimited, plainly, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(bounded, unlimited, atol=1e-6)


@pytest.mark.filterwarnings("ignore:a sequence ratio")
@pytest.mark.parametrize(("weight", "ratio"), [(1.0, "token"), (0.0, "sequence")])
def test_8_dhpo_between_its_branches(weight: float, ratio: str) -> None:
    o = Step("dhpo", PLAYED).objective
    mixed = msgspec.structs.replace(o, ratio=declare.Mix(weight=weight))
    bounds = o.gate.token if ratio == "token" else o.gate.sequence
    kind = Token() if ratio == "token" else declare.Geometric()
    branch = msgspec.structs.replace(o, ratio=kind, gate=declare.Clip(low=bounds[0], high=bounds[1]))
    a, b = (Step("dhpo", PLAYED, move=0.5, objective=x).gradient() for x in (mixed, branch))
    assert same(a, b)


def test_8_fiberpo_domain_of_single_trajectories_is_fiberpo() -> None:
    """One trajectory a group, one group a domain: the inner differences are zero."""
    alone = [
        t.replace(episode=t.episode.replace(group=f"p{i}"), labels={**t.labels, "domain": f"d{i}"})
        for i, t in enumerate(PLAYED)
    ]
    domain = Step("fiberpo-domain", alone, move=0.8, objective=None)
    two = msgspec.structs.replace(Step("fiberpo", alone).objective, gate=declare.LevelsClip(budgets=(0.1, 0.2)))
    for step in (domain, other := Step("fiberpo", alone, move=0.8, objective=two)):
        step.__dict__["credit"] = Step("dr-grpo", PLAYED).credit
    assert same(domain.gradient(), other.gradient())


def test_9_minpro_beside_the_exact_prefix() -> None:
    def ratios(method: str, **changes: Any) -> Callable[[Sequence[float]], NDArray[np.float64]]:
        o = msgspec.structs.replace(Step(method, PLAYED).objective, gate=NoGate(), **changes)

        def found(rho: Sequence[float]) -> NDArray[np.float64]:
            logs = torch.tensor(rho).double().log()
            t = Tokens(
                logp=torch.zeros_like(logs).requires_grad_(),
                **{"old": -logs, "sampled": -logs, "advantages": torch.ones_like(logs)},
                sequence=torch.zeros(len(logs), dtype=torch.long),
                sequences=1,
            )
            (slopes,) = torch.autograd.grad(loss(o, t, totals(o.aggregation, t))[0], t.logp)
            return -slopes.numpy() * len(logs)

        return found

    least, product = ratios("minpro"), ratios("minpro", ratio=declare.PrefixProduct())
    assert least([1, 1, 1, 0.7]) == pytest.approx([1, 1, 1, 0.7])
    below, above = [0.9, 0.5, 1.0, 0.8], [1.1, 2.0, 1.0, 1.3]
    assert (least(below) >= product(below) - 1e-12).all()
    assert (least(above) <= product(above) + 1e-12).all()


# --- 10 and 11: the sampler's mismatch --------------------------------------------------------------------------

CORRECTED = [m for m in EVERY if declared(load(m)).objective.behaviour]
CAPS = {"tis": 2.0, "veto": 2.0, "icepop": 5.0, "mis": 2.0, "geometric": 1.0001, "decoupled-ppo": 5.0}


@pytest.mark.parametrize("method", CORRECTED)
def test_10_weights_are_bounded_and_detached(method: str) -> None:
    step = Step(method, PLAYED, mismatch=3.0)
    t = step.tokens
    free = replace(t, old=t.old.clone().requires_grad_(), sampled=t.sampled.clone().requires_grad_())
    w = weights(step.objective.behaviour, free)
    assert not w.requires_grad
    assert 0 <= float(w.min()) <= float(w.max()) <= CAPS[method]
    if float(w.sum()):
        assert 0 < float(w.sum() ** 2 / (w**2).sum()) <= len(w) + 1e-9
    assert torch.autograd.grad(step.loss(), step.tokens.logp)[0].isfinite().all()


@pytest.mark.parametrize("method", CORRECTED)
def test_11_without_mismatch_a_correction_is_none(method: str) -> None:
    coupled = msgspec.structs.replace(Step(method, PLAYED).objective, behaviour=())
    a, b = (Step(method, PLAYED, move=0.4, objective=o) for o in (None, coupled))
    assert same(a.gradient(), b.gradient(), tolerance=1e-12)
    a, b = (Step(method, PLAYED, move=0.4, mismatch=1.0, objective=o) for o in (None, coupled))
    assert not same(a.gradient(), b.gradient(), tolerance=1e-4)


@every
def test_11_correcting_twice_is_refused(method: str) -> None:
    o = Step(method, PLAYED).objective
    if isinstance(o.ratio, NoRatio):
        once = msgspec.structs.replace(o, proximal="sampler", behaviour=(declare.Truncate(),))
        assert once.bypass
    else:
        with pytest.raises(ConfigError, match="twice"):
            msgspec.structs.replace(o, proximal="sampler", behaviour=(declare.Truncate(),))


# --- 12: micro-batches ------------------------------------------------------------------------------------------


@every
def test_12_micro_batches_add_up(method: str) -> None:
    """With the counts of the whole step; objectives that see the whole step are joined first, as the learner does."""
    step = Step(method, PLAYED, move=0.5, mismatch=0.05, apart=0.2, bare=False)
    o, t = step.objective, step.tokens
    total = totals(o.aggregation, t)
    parts = [cut(t, range(start, min(start + 3, t.sequences))) for start in range(0, t.sequences, 3)]
    if o.coupled:
        parts = [joined(parts)]
    found = sum(float(loss(o, part, total)[0].detach()) for part in parts)
    assert found == pytest.approx(float(step.loss().detach()), rel=1e-9, abs=1e-12)


COUPLED = {"bapo", "drpo", "fiberpo-domain"}
"""A token's loss depends on other sequences of the step."""


@every
def test_12_what_is_coupled_says_so(method: str) -> None:
    assert Step(method, PLAYED, bare=False).objective.coupled == (method in COUPLED)


def cut(t: Tokens, sequences: range) -> Tokens:
    """The tokens of these sequences."""
    at = (t.sequence >= sequences.start) & (t.sequence < sequences.stop)
    columns = {name: getattr(t, name) for name in Tokens.__dataclass_fields__ if name not in ("sequences", "labels")}
    picked = {
        name: x
        if x is None
        else x[sequences.start : sequences.stop]
        if name in ("group", "domain", "reward")
        else x[at]
        for name, x in columns.items()
    }
    picked["sequence"] = picked["sequence"] - sequences.start
    return Tokens(**picked, sequences=len(sequences), labels=t.labels)


# --- 13: state --------------------------------------------------------------------------------------------------

CONTROLLED = [m for m in EVERY if declared(load(m)).objective.controllers]


@pytest.mark.parametrize("method", CONTROLLED)
def test_13_controllers_go_on_where_they_were(method: str) -> None:
    figures = {"kl_reference": 0.3, "ratio_variance": 0.1}
    o = begun(declared(load(method)).objective)
    half = controlled(o, 1, figures)
    assert numbers(half) != numbers(o) or method == "mdpo"
    restored = with_numbers(begun(declared(load(method)).objective), numbers(half))
    assert controlled(restored, 2, figures) == controlled(half, 2, figures)


TRACKING = [m for m in EVERY if any(getattr(t.transform, "track", False) for t in declared(load(m)).advantage)]


@pytest.mark.parametrize("method", TRACKING)
def test_13_quantiles_go_on_where_they_were(method: str) -> None:
    state, again = AdvantageState(), AdvantageState()
    first = Step(method, world(1), state=state).credit
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    second, resumed = (Step(method, world(2), state=held).credit for held in (state, again))
    assert all(np.array_equal(a, b) for a, b in zip(second, resumed, strict=True))
    fresh = Step(method, world(2), state=AdvantageState()).credit
    assert not all(np.array_equal(a, b) for a, b in zip(second, fresh, strict=True))
    assert state.state_dict() == again.state_dict() != AdvantageState().state_dict()
    assert len(first) == len(second)


@every
def test_13_what_has_no_state_forgets(method: str) -> None:
    state = AdvantageState()
    Step(method, PLAYED, state=state).credit  # noqa: B018
    assert (state.state_dict() != AdvantageState().state_dict()) == (method in TRACKING)


HINTING = [m for m in EVERY if isinstance(declared(load(m)).strategy, strategies.HintLevels)]


@pytest.mark.parametrize("method", HINTING)
def test_13_hint_levels_follow_success(method: str) -> None:
    """How levels survive a checkpoint, test_strategies tests; here that a method's own bounds move them."""
    declared_ = declared(load(method)).strategy
    assert [next_level(level, success, declared_) for level, success in ((0, 0.0), (2, 0.2), (2, 0.5))] == [1, 2, 1]


# --- 14: nothing to learn from ----------------------------------------------------------------------------------


@every
def test_14_no_tokens_no_loss(method: str) -> None:
    step = Step(method, PLAYED, bare=False)
    o, t = step.objective, step.tokens
    none = cut(t, range(0))
    assert value(o, none) == 0.0
    empty = replace(none, sequences=2, **{name: getattr(t, name)[:2] for name in ("group", "domain", "reward")})
    assert value(o, empty) == 0.0


@every
def test_14_failures_and_single_turns(method: str) -> None:
    """Failed members, groups of one, trajectories without a sampled token: every gradient is finite."""
    odd = [
        *(member(0, m, [{"tool": 1.0, "action": 0.0, "outcome": float(m)}], 1 + m) for m in range(2)),
        member(1, 0, [{"tool": 1.0, "action": 0.0, "outcome": 1.0}], 2),
        member(2, 0, [{"tool": 1.0, "action": 0.0, "outcome": 1.0}], 0),
        member(2, 1, [{"tool": 0.5, "action": 0.0, "outcome": 1.0}], 3),
    ]
    step = Step(method, odd, move=0.3, mismatch=0.1, apart=0.1, bare=False)
    assert math.isfinite(float(step.loss().detach()))
    assert all(np.isfinite(g).all() for g in step.gradient().values())


# --- 15: quantiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRACKING)
def test_15_the_tracker_converges_to_the_quantile(method: str) -> None:
    """S = 0, 1, 2, 3, 5, alpha 0.5: with a falling rate 2.000 +- 0.001 after 2,000 steps; with a constant one it only
    oscillates. One step of the reference: q 0, S = 0, 1, 2, alpha 0.2, lr 0.1 gives 0.02."""
    scores, q = np.asarray([0.0, 1.0, 2.0, 3.0, 5.0]), 0.0
    for k in range(2000):
        q = tracked(q, scores, 0.5, 0.1 / (1 + 0.01 * k))
    assert q == pytest.approx(2.0, abs=1e-3)
    constant = [q := tracked(q, scores, 0.5, 0.1) for _ in range(50)]
    assert max(constant) - min(constant) > 0.01
    transform = declared(load(method)).advantage[0].transform
    assert tracked(0.0, np.asarray([0.0, 1.0, 2.0]), transform.lower, transform.lr) == pytest.approx(0.02)
