"""The learner: how a step is cut changes nothing, imitation fits, state survives, non-finite gradients are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learning import CREDIT, EPISODES, REWARDS, Bare, weights

from agentgym.collate import collate
from agentgym.errors import ConfigError, ModelError, RecordError
from agentgym.modeling.logprobs import token_logprobs
from agentgym.types import Batch, Floats, Trajectory, Turns, iterate
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.declare import IMITATION, Kl, Objective

TEACHER = Bare(seed=7).module()
REFERENCE = Bare(seed=8).module()

DECLARED: dict[str, Objective] = {
    "plain": Objective(),
    "sequence mean, entropy bonus": Objective(
        aggregation=declare.SeqMeanTokenMean(), regularisers=(declare.Entropy(coef=0.01),)
    ),
    "KL to a reference": Objective(regularisers=(Kl(coef=0.1),)),
    "segments": Objective(aggregation=declare.Segments(by="label", weights={"control": 0.1}), gate=declare.NoGate()),
    "perception": Objective(regularisers=(declare.Perception(coef=0.2, clean=0.05, masked=0.05),)),
    "distillation": Objective(regularisers=(declare.Distillation(coef=0.5),)),
    "layer": Objective(source=declare.Layer(layer=1, steps=1), proximal="learner"),
    "BAPO": Objective(gate=declare.Clip(adaptive=declare.Adaptive())),
    "FiberPO-Domain": Objective(
        ratio=declare.Levels(levels=("domain", "prompt", "trajectory", "token")),
        gate=declare.LevelsClip(budgets=(0.02, 0.03, 0.05, 0.1)),
        aggregation=declare.SeqMeanTokenMean(),
    ),
    "DHPO by entropy": Objective(
        ratio=declare.Mix(by="entropy"), gate=declare.BranchClip(), regularisers=(declare.Entropy(coef=0.01),)
    ),
    "DRPO": Objective(
        ratio=declare.NoRatio(),
        gate=declare.NoGate(),
        contrast=declare.Discriminative(tau=1.0, max_length=16),
        aggregation=declare.SeqMeanTokenMean(),
        regularisers=(declare.KlHinge(coef=5.0),),
    ),
    "normalised weights": Objective(proximal="learner", behaviour=(declare.Truncate(), declare.Normalise())),
}


def exact(objective: Objective, micro_tokens: int, **changes: Any) -> Learner:
    """A learner in float64."""
    optim = Optim(lr=0.02, warmup=0, decay=0.0, clip=0.0, epochs=2, micro_tokens=micro_tokens, **changes)
    models = {"teacher": TEACHER.double(), "reference": REFERENCE.double()}
    return Learner(Bare(dtype=torch.float64), objective, optim, total_steps=2, **models)


@pytest.mark.parametrize("name", DECLARED)
def test_micro_batches_do_not_change_a_step(name: str) -> None:
    """Two steps over one big micro-batch, and over many: equal weights and figures, in float64."""
    whole, cut = exact(DECLARED[name], 10_000), exact(DECLARED[name], 24)
    figures = [learner.update(EPISODES, CREDIT, REWARDS) for learner in (whole, cut)]
    assert figures[0]["tokens"] == 2 * sum(len(span.ids) for t in EPISODES for _, span in t.spans)
    assert figures[0] == pytest.approx(figures[1], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(weights(whole), weights(cut), rtol=0, atol=1e-10)
    assert not torch.equal(weights(whole), weights(exact(DECLARED[name], 24)))


def test_tokens_nobody_trains_on_do_not_matter() -> None:
    """12.2: noise in every column behind mask 0 leaves loss and gradient as they are."""
    (batch,) = collate(EPISODES, CREDIT, max_tokens=10_000)
    noise = np.random.default_rng(0).normal(size=len(batch.ids)).astype(np.float32) * (1 - batch.mask)
    noisy = Batch(
        **{
            **{name: getattr(batch, name) for name in Batch.__struct_fields__},
            "advantages": batch.advantages + noise,
            "logprobs": batch.logprobs + noise,
        }
    )
    plain, other = (Learner(Bare(), Objective(), Optim(), total_steps=1).step([b]) for b in (batch, noisy))
    assert plain == other


def test_imitation_fits_and_the_schedule_falls() -> None:
    learner = Learner(Bare(), IMITATION, Optim(lr=1e-2, minibatches=2), total_steps=60)
    ones = [np.ones(len(t.turns)) for t in EPISODES]
    first = learner.update(EPISODES, ones)["nll"]
    for _ in range(29):
        last = learner.update(EPISODES, ones)["nll"]
    assert learner.steps == 60
    assert last < 0.5 * first
    rates = [learner.optim.rate(step, 60) for step in range(60)]
    assert rates[0] == pytest.approx(1e-2 / 3)
    assert max(rates) == rates[10] == 1e-2
    assert rates[-1] == pytest.approx(1e-3)


def test_state_goes_on_where_it_was() -> None:
    options = {"total_steps": 8, "seed": 3}
    whole = Learner(Bare(), Objective(), Optim(minibatches=2), **options)  # type: ignore[arg-type]
    for _ in range(2):
        whole.update(EPISODES, CREDIT)
    half = Bare()
    first = Learner(half, Objective(), Optim(minibatches=2), **options)  # type: ignore[arg-type]
    first.update(EPISODES, CREDIT)
    tensors, plain = first.state()
    second = Learner(half, Objective(), Optim(minibatches=2), **options)  # type: ignore[arg-type]
    second.restore({name: value.clone() for name, value in tensors.items()}, plain)
    second.update(EPISODES, CREDIT)
    assert torch.equal(weights(second), weights(whole))
    assert (second.steps, second.updates) == (4, 2)


def test_half_precision_moves_by_steps_below_its_rounding() -> None:
    half = Bare()
    half.model.to(torch.bfloat16)
    start = weights(Learner(half, IMITATION, Optim(), total_steps=1)).clone()
    learner = Learner(half, IMITATION, Optim(lr=1e-5, warmup=0, decay=0.0), total_steps=60)
    ones = [np.ones(len(t.turns)) for t in EPISODES]
    for _ in range(60):
        learner.update(EPISODES, ones)
    moved = torch.cat([m.detach().flatten() for m in learner.masters]) - start.float()
    assert moved.abs().median() > 3e-4
    tensors, plain = learner.state()
    again = Learner(half, IMITATION, Optim(), total_steps=60)
    again.restore(tensors, plain)
    assert all(torch.equal(a, b) for a, b in zip(again.masters, learner.masters, strict=True))


def test_half_precision_forgets_the_gradient_of_the_step_before() -> None:
    half = Bare(dtype=torch.bfloat16)
    learner = Learner(half, IMITATION, Optim(lr=1e-9, warmup=0, clip=0.0), total_steps=60)
    ones = [np.ones(len(t.turns)) for t in EPISODES]
    first, *_, last = (learner.update(EPISODES, ones)["grad_norm"] for _ in range(4))
    assert last == pytest.approx(first, rel=1e-3)


def test_without_a_trained_token_nothing_moves() -> None:
    """12.14: empty micro-batches beside others change nothing, and alone they are no step."""
    (batch,) = collate(EPISODES, CREDIT, max_tokens=10_000)
    held = {name: getattr(batch, name) for name in Batch.__struct_fields__}
    empty = Batch(**{**held, "mask": np.zeros_like(batch.mask)})
    learner, beside = (Learner(Bare(), Objective(), Optim(), total_steps=1) for _ in range(2))
    start = weights(learner).clone()
    assert learner.step([empty]) == {}
    assert learner.update([], []) == {}
    assert torch.equal(weights(learner), start)
    assert learner.steps == 0
    assert learner.step([batch]) == beside.step([empty, batch])


def test_an_objective_that_reads_rewards_says_so() -> None:
    objective = Objective(regularisers=(declare.Sft(),))
    with pytest.raises(RecordError, match=r"Tokens\.reward"):
        Learner(Bare(), objective, Optim(), total_steps=1).update(EPISODES, CREDIT)


def test_log_ratios_are_summed_by_turn() -> None:
    """Whatever the cut; zero against the policy itself."""
    learner, other = Learner(Bare(), Objective(), Optim(micro_tokens=24), total_steps=1), Bare(3).module()
    found = learner.log_ratios(EPISODES, other)
    assert [len(x) for x in found] == [len(t.turns) for t in EPISODES]
    (batch,) = collate(EPISODES[4:5], CREDIT[4:5], max_tokens=10_000)
    gap = (token_logprobs(learner.trainable.module(), batch)[0] - token_logprobs(other, batch)[0]).detach()
    for turn, value in enumerate(found[4]):
        mine = torch.from_numpy((batch.turns == turn) & (batch.mask > 0))
        assert value == pytest.approx(float(gap[mine].sum()), abs=1e-5)
    assert all(abs(x).max() < 1e-9 for x in learner.log_ratios(EPISODES, learner.trainable.module()))


def test_proximal_policy_stays_fixed_over_epochs() -> None:
    """With proximal = "learner" the first pass has ratio one whatever the sampler said; with "sampler" it has not."""
    found = {}
    for proximal in ("learner", "sampler"):
        learner = Learner(Bare(), Objective(proximal=proximal), Optim(), total_steps=1)  # type: ignore[arg-type]
        found[proximal] = learner.update(EPISODES, CREDIT)
    assert found["learner"]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(found["sampler"]["ratio"] - 1.0) > 1e-3


def test_a_reference_holds_the_policy_back() -> None:
    with pytest.raises(ConfigError, match="reference"):
        Learner(Bare(), Objective(regularisers=(Kl(coef=1.0),)), Optim(), total_steps=1)
    drift = []
    for coef in (1e-9, 50.0):
        objective = Objective(regularisers=(Kl(coef=coef),))
        learner = Learner(Bare(), objective, Optim(lr=1e-2, warmup=0), total_steps=10, reference=Bare().module())
        drift.append([learner.update(EPISODES, CREDIT)["kl_reference"] for _ in range(10)][-1])
    assert drift[1] < 0.2 * drift[0]


def test_what_is_not_finite_moves_nothing() -> None:
    learner = Learner(Bare(), Objective(), Optim(), total_steps=1)
    before = weights(learner)
    credit = [a.copy() for a in CREDIT]
    credit[4][0] = np.nan
    with pytest.raises(RecordError, match=f"{EPISODES[4].episode.id} are not finite"):
        learner.update(EPISODES, credit)
    with pytest.raises(RecordError, match="of trajectory 4 of this batch"):
        learner.step(collate(EPISODES, credit, max_tokens=10_000))
    with pytest.raises(ModelError, match="extreme advantages"):
        learner.update(EPISODES, [np.full(len(t.turns), 3e38) for t in EPISODES])
    assert torch.equal(weights(learner), before)
    assert (learner.steps, learner.updates) == (0, 0)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(proximal="learner", regularisers=(Kl(against="sampler"),)),
        Objective(ratio=declare.NoRatio(), gate=declare.NoGate(), regularisers=(Kl(against="old"),)),
    ],
)
def test_a_missing_log_prob_of_the_sampler_is_refused_where_it_is_compared_with(objective: Objective) -> None:
    learner = Learner(Bare(), objective, Optim(), total_steps=1)
    start = weights(learner).clone()
    with pytest.raises(RecordError, match=r"no finite log-prob of the sampler.*objective\.proximal = 'learner'"):
        learner.update([*EPISODES[1:], unscored(EPISODES[0])], [*CREDIT[1:], CREDIT[0]])
    assert torch.equal(weights(learner), start)


def test_a_correction_takes_a_token_without_a_log_prob_as_it_is() -> None:
    learner = Learner(Bare(), Objective(proximal="learner", behaviour=(declare.Truncate(),)), Optim(), total_steps=1)
    figures = learner.update([*EPISODES[1:], unscored(EPISODES[0])], [*CREDIT[1:], CREDIT[0]])
    assert np.isfinite(list(figures.values())).all()


def unscored(t: Trajectory) -> Trajectory:
    """The trajectory with the first log-prob of every turn unknown."""
    spans = [turn.action.span for turn in iterate(t.turns)]
    floats = [Floats([float("nan"), *span.logprobs.numpy()[1:]]) for span in spans if span is not None]
    turns = tuple(
        turn.replace(action=turn.action.replace(span=turn.action.span.replace(logprobs=held)))
        for turn, held in zip(iterate(t.turns), floats, strict=True)
        if turn.action.span is not None
    )
    found: Trajectory = t.replace(turns=Turns(items=turns))
    return found


@pytest.mark.parametrize("micro_tokens", [10_000, 24])
def test_a_function_of_ones_own_has_the_gradient_of_the_entropy(micro_tokens: int) -> None:
    """-0.01 H as a gate adds it is the entropy bonus, also where the step is taken in two passes."""
    own = declare.Custom(target="custom_pieces:bonus", coupled=True)
    mine = exact(Objective(proximal="learner", gate=own), micro_tokens)
    bonus = Objective(proximal="learner", gate=declare.NoGate(), regularisers=(declare.Entropy(coef=0.01),))
    theirs = exact(bonus, micro_tokens)
    for learner in (mine, theirs):
        learner.update(EPISODES, CREDIT)
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=1e-10)


def test_groups_that_are_read_together_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """DRPO weighs members against each other: an optimiser step has all of a group or none."""
    seen: list[set[int]] = []
    trainable = Bare()

    def spy(trajectories: Any, *args: Any, **named: Any) -> list[Batch]:
        seen.append({t.episode.seed * 3 + t.episode.member for t in trajectories})
        return collate(trajectories, *args, **named)

    monkeypatch.setattr(trainable, "collate", spy)
    learner = Learner(trainable, DECLARED["DRPO"], Optim(minibatches=2), total_steps=2)
    learner.update(EPISODES, CREDIT, REWARDS)
    groups = [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    assert set.union(*seen) == set(range(9))
    assert all(group <= part or not group & part for group in groups for part in seen)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"lr": 0.0}, "lr is positive"), ({"lr": float("nan")}, "lr"), ({"lr": float("inf")}, "lr"),
     ({"decay": 2.0}, "shares"), ({"betas": (0.9, 1.0)}, "betas"),
     ({"weight_decay": float("nan")}, "weight_decay"), ({"only": "("}, "regular expression")],
)  # fmt: skip
def test_an_optimiser_that_cannot_be_meant_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Optim(**given)


def test_no_trajectories_have_no_log_ratios() -> None:
    assert exact(Objective(), 100).log_ratios([], REFERENCE) == []


def test_a_loss_that_is_not_finite_is_refused_also_where_its_gradient_is() -> None:
    lost = declare.CustomPenalty(target="custom_pieces:lost")
    learner = Learner(Bare(), Objective(regularisers=(lost,)), Optim(), total_steps=1)
    start = weights(learner).clone()
    with pytest.raises(ModelError, match="the loss of optimiser step 0 is nan; the weights are as before it"):
        learner.update(EPISODES, CREDIT)
    assert torch.equal(weights(learner), start)
